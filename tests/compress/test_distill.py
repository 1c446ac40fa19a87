"""Training a compressed model back."""

import copy

import pytest
import torch
import torch.nn.functional as F
from torch import nn

from snell_diffusion.compress import (
    Distiller,
    DistillSettings,
    block_names,
    caught_features,
    compress,
    feature_loss,
    low_rank_layers,
    penalty,
)
from snell_diffusion.errors import SnellaKeyError, SnellaValueError
from tests.compress.models import pixels, small_swin, small_vit
from tests.tiny_models import DENOISERS, denoiser_inputs


def logits(model: nn.Module, x: torch.Tensor) -> torch.Tensor:
    return model(pixel_values=x).logits


def vit_distiller(**settings: object) -> Distiller:
    teacher = small_vit()
    student = copy.deepcopy(teacher)
    compress(student, 3)
    return Distiller(student, teacher, logits, settings=DistillSettings(**settings))


@pytest.mark.parametrize(
    ("family", "wanted"),
    [
        ("sd15", {"ResnetBlock2D", "BasicTransformerBlock"}),
        ("sd3", {"JointTransformerBlock"}),
        ("flux", {"FluxTransformerBlock", "FluxSingleTransformerBlock"}),
    ],
)
def test_blocks_of_denoisers(family: str, wanted: set[str]) -> None:
    model = DENOISERS[family]()
    names = block_names(model)
    assert {type(model.get_submodule(name)).__name__ for name in names} == wanted


def test_blocks_of_classifiers() -> None:
    assert block_names(small_vit()) == ["vit.layers.0", "vit.layers.1"]
    assert all(".blocks." in name for name in block_names(small_swin()))
    with pytest.raises(SnellaKeyError, match="no transformer or ResNet block was found"):
        block_names(nn.Sequential(nn.Linear(2, 2)))


def test_features_are_the_blocks_outputs_and_hooks_go_again() -> None:
    model, x = small_vit(), pixels()
    hooks = [len(m._forward_hooks) for m in model.modules()]
    with caught_features(model, ["vit.layers.0", "vit.layers.1"]) as seen, torch.no_grad():
        model(x)
    assert [len(m._forward_hooks) for m in model.modules()] == hooks
    with torch.no_grad():
        states = model(x, output_hidden_states=True).hidden_states
    torch.testing.assert_close(seen["vit.layers.0"][0], states[1])
    with (
        pytest.raises(SnellaKeyError, match=r"no modules vit\.nowhere"),
        caught_features(model, ["vit.nowhere"]),
    ):
        pass


def test_feature_loss_is_a_mean_over_blocks_then_outputs() -> None:
    zero, one, two = torch.zeros(2, 3), torch.ones(2, 3), torch.full((5,), 2.0)
    ours = {"a": [one], "b": [zero, two]}
    theirs = {"a": [zero], "b": [zero, torch.zeros(5)]}
    assert feature_loss(ours, theirs) == (1 + (0 + 4) / 2) / 2
    with pytest.raises(SnellaValueError, match="same blocks"):
        feature_loss({"a": [one]}, theirs)
    with pytest.raises(SnellaValueError, match=r"block a gives \[\(2, 3\)\] in the student"):
        feature_loss({"a": [one]}, {"a": [two]})


def test_loss_is_the_weighted_sum() -> None:
    distiller = vit_distiller(kd_alpha=0.5, kd_beta=2.0, weight=3.0, eps=0.01)
    labels = torch.tensor([0, 1, 2, 3])
    distiller.task = lambda out, batch: F.cross_entropy(out, labels)
    total, parts = distiller.loss(pixels())
    want = parts["task"] + 0.5 * parts["features"] + 2 * parts["output"] + 3 * parts["penalty"]
    assert total.item() == pytest.approx(want, rel=1e-5)
    teacher = dict(distiller.teacher.named_modules())
    pairs = [(layer, teacher[p].weight) for p, layer in low_rank_layers(distiller.student)]
    assert parts["penalty"] == pytest.approx(penalty(pairs, 0.01).item(), rel=1e-6)
    with torch.no_grad():
        answers = distiller.student(pixels()).logits
    assert parts["task"] == pytest.approx(float(F.cross_entropy(answers, labels)), rel=1e-5)


def test_training_lowers_the_loss_on_held_out_pictures_and_leaves_the_teacher() -> None:
    distiller = vit_distiller(kd_beta=1.0, steps=80, lr=3e-3)
    state = {k: v.clone() for k, v in distiller.teacher.state_dict().items()}
    held_out = [pixels(8, seed=10_000)]
    before = distiller.measure(held_out)
    lines: list[str] = []
    history = distiller.train(lambda step: pixels(8, seed=step), lines.append, every=20)
    after = distiller.measure(held_out)
    assert after["features"] < 0.7 * before["features"]
    assert after["output"] < before["output"]
    assert len(history) == 80
    assert len(lines) == 4
    assert "step 80 of 80" in lines[-1]
    assert "0 s left" in lines[-1]
    assert all(torch.equal(v, state[k]) for k, v in distiller.teacher.state_dict().items())
    assert not distiller.student.training


def test_penalty_alone_pulls_the_product_to_the_teacher() -> None:
    def worst(distiller: Distiller) -> float:
        teacher = dict(distiller.teacher.named_modules())
        layers = low_rank_layers(distiller.student)
        return max((x.product() - teacher[p].weight).abs().max().item() for p, x in layers)

    distiller = vit_distiller(kd_alpha=0.0, kd_beta=1e-9, weight=100.0, eps=0.0, steps=40, lr=1e-3)
    before = worst(distiller)
    distiller.train(lambda step: pixels(2, seed=step))
    assert worst(distiller) < before


@pytest.mark.parametrize("family", DENOISERS)
def test_denoisers(family: str) -> None:
    teacher = DENOISERS[family]()
    student = copy.deepcopy(teacher)
    compress(student, 3)
    call = lambda model, seed: model(  # noqa: E731
        **denoiser_inputs(family, seed), return_dict=False
    )[0]
    settings = DistillSettings(kd_beta=1.0, steps=8, lr=5e-4)
    distiller = Distiller(student, teacher, call, settings=settings)
    before = distiller.measure([99])
    distiller.train(lambda step: 99)  # one batch: that it learns, not that it generalises
    after = distiller.measure([99])
    assert after["features"] < before["features"]
    assert after["output"] < before["output"]


def test_refusals() -> None:
    with pytest.raises(SnellaValueError, match="kd_alpha must be 0 or more"):
        DistillSettings(kd_alpha=-1)
    with pytest.raises(SnellaValueError, match="lr must be above 0"):
        DistillSettings(lr=0)
    with pytest.raises(SnellaValueError, match="steps must be 0 or more"):
        DistillSettings(steps=-1)
    with pytest.raises(SnellaValueError, match="nothing to train on"):
        vit_distiller(kd_alpha=0.0)
    student = small_vit()
    compress(student, 2)
    with pytest.raises(SnellaKeyError, match="a copy of the model before compression"):
        Distiller(student, copy.deepcopy(student), logits)
    with pytest.raises(SnellaValueError, match="at least one held-out batch"):
        vit_distiller().measure([])


def test_loss_that_is_not_finite_stops_before_anything_changes() -> None:
    distiller = vit_distiller(steps=3)
    before = {k: v.clone() for k, v in distiller.student.state_dict().items()}
    with pytest.raises(SnellaValueError, match="the loss of step 0 is nan: lower lr"):
        distiller.train(lambda step: torch.full((2, 3, 16, 16), torch.nan))
    assert all(torch.equal(v, before[k]) for k, v in distiller.student.state_dict().items())
