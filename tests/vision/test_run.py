"""Whole trainings: they learn, leave what loads, and resume as if they had not stopped."""

import dataclasses
import json
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file

from snell_diffusion.errors import SnellaConfigError, SnellaError
from snell_diffusion.training.errors import CheckpointError, NonFiniteError
from snell_diffusion.tuners.recipes import RECIPES
from snell_diffusion.vision.classifier import load_classifier
from snell_diffusion.vision.data import Inputs, load_task
from snell_diffusion.vision.data.pictures import read_picture
from snell_diffusion.vision.method import LINEAR_PROBE, method_names
from snell_diffusion.vision.run import run
from tests.vision import runs


def trained(result: Any) -> dict[str, torch.Tensor]:
    return {name: t.clone() for name, t in result.classifier.model.state_dict().items()}


@pytest.mark.parametrize("base", sorted(runs.BASES))
def test_learns(base: str, bases: dict[str, str], pictures: Path) -> None:
    """Three colours are told apart after a few epochs, from pictures that were not trained on."""
    config = runs.config(
        bases[base], pictures, None, method="lora", rank=4, num_train_epochs=8, learning_rate=2e-2
    )
    result = run(config)
    assert result.test_accuracy is not None
    assert result.test_accuracy >= 0.8  # chance is 1/3
    assert len(result.test.labels) == 12


# PEFT's SHiRA builds sparse tensors, of which torch warns once.
@pytest.mark.filterwarnings("ignore:Sparse invariant checks are implicitly disabled")
@pytest.mark.parametrize("method", sorted(method_names()))
def test_every_method_trains_and_loads(
    method: str, bases: dict[str, str], pictures: Path, tmp_path: Path
) -> None:
    """Two steps of each method change what it says it trains; what it leaves predicts the same."""
    changes = {"max_train_steps": 2, "warmup_epochs": 0.0, **runs.SMALL.get(method, {})}
    config = runs.config(bases["vit"], pictures, tmp_path, method=method, **changes)
    result = run(config)
    assert (result.sizes.adapter > 0) == (method != LINEAR_PROBE)
    assert result.sizes.head == 3 * 32 + 3
    assert result.output_dir is not None
    assert result.adapter_path is not None
    assert result.adapter_path.exists()
    task = load_task(config, config.seed, config.select_on)
    pixels = Inputs(task.test, result.classifier.preprocess, False, config).pixels(range(12))
    with torch.no_grad():
        again = load_classifier(result.output_dir)
        torch.testing.assert_close(again(pixels), result.classifier(pixels), rtol=0, atol=1e-5)


@pytest.mark.parametrize(
    "changes",
    [
        {"method": "snella", "rank": 4, "dropout": 0.1, "ema_decay": 0.9},
        {"method": "lora", "rank": 2, "gradient_accumulation_steps": 2, "drop_path": 0.2},
    ],
    ids=["snella", "lora"],
)
def test_resumed_equals_uninterrupted(
    changes: dict[str, Any], bases: dict[str, str], pictures: Path, tmp_path: Path
) -> None:
    """Stopped after an epoch and continued: the same bits, the same log of steps."""
    shared = {**changes, "num_train_epochs": 3, "checkpointing_epochs": 1, "random_flip": True}
    shared["checkpoints_total_limit"] = None
    whole = run(runs.config(bases["vit"], pictures, tmp_path / "a", **shared))
    first = runs.config(bases["vit"], pictures, tmp_path / "b", **shared)
    run(first)
    folder = tmp_path / "b" / "run" / "checkpoints"
    kept = sorted(folder.iterdir())[0]
    again = runs.config(
        bases["vit"],
        pictures,
        tmp_path / "b",
        **{**shared, "resume_from_checkpoint": str(kept)},
    )
    resumed = run(again)
    expected = trained(whole)
    for name, tensor in trained(resumed).items():
        torch.testing.assert_close(tensor, expected[name], rtol=0, atol=0, equal_nan=True, msg=name)
    losses = [
        [(e["step"], e["loss"]) for e in map(json.loads, lines) if e["event"] == "step"]
        for lines in (
            (tmp_path / one / "run" / "log.jsonl").read_text().splitlines() for one in "ab"
        )
    ]
    assert losses[0] == losses[1]
    assert len(losses[0]) >= 3


@pytest.mark.parametrize("method", ["spt_lora", "spt_adapter"])
def test_sensitivity_pass(
    method: str, bases: dict[str, str], pictures: Path, tmp_path: Path
) -> None:
    """With a budget the run's own gradients choose what is tuned, about as much as asked for."""
    arguments = {"budget": 900, "batches": 2}
    config = runs.config(
        bases["vit"], pictures, tmp_path, method=method, rank=2, method_args=arguments
    )
    result = run(config)
    assert 600 <= result.sizes.adapter <= 1200
    whole = runs.config(bases["vit"], pictures, None, method=method, rank=2)
    assert run(whole).sizes.adapter > 1500
    assert load_classifier(tmp_path / "run").classes == runs.CLASSES


@pytest.mark.parametrize(
    "name, change, message",
    [
        ("adapter_model", lambda t: t.popitem(), "1 are missing"),
        ("adapter_model", lambda t: t.update(x=torch.zeros(1)), "unknown tensors x"),
        ("adapter_model", lambda t: t.update({n: v[:1] for n, v in t.items()}), "expected shape"),
        ("adapter_model", lambda t: t[min(t)].fill_(torch.nan), "NaN or infinite"),
        ("head", lambda t: t.popitem(), "the whole head"),
        ("head", lambda t: t.update(x=torch.zeros(1)), "no such tensor"),
        ("head", lambda t: t[min(t)].fill_(torch.inf), "NaN or infinite"),
    ],
)
def test_damaged_parts_are_refused(
    name: str, change: Any, message: str, lora_run: Path, tmp_path: Path
) -> None:
    """No part of what a run left may stay at its random start, or be no number."""
    folder = tmp_path / "copy"
    shutil.copytree(lora_run, folder)
    tensors = load_file(folder / f"{name}.safetensors")
    change(tensors)
    save_file(tensors, folder / f"{name}.safetensors", {"format": "pt"})
    with pytest.raises(SnellaError, match=message):
        load_classifier(folder)


@pytest.fixture(scope="module")
def lora_run(
    bases: dict[str, str], pictures: Path, tmp_path_factory: pytest.TempPathFactory
) -> Path:
    changes: dict[str, Any] = {"method": "lora", "rank": 2, "max_train_steps": 1}
    config = runs.config(bases["vit"], pictures, tmp_path_factory.mktemp("lora"), **changes)
    folder = run(config).output_dir
    assert folder is not None
    return folder


def test_run_folder(bases: dict[str, str], pictures: Path, tmp_path: Path) -> None:
    """What a run leaves, and that what it says of the test images is so."""
    config = runs.config(bases["vit"], pictures, tmp_path, method="snella", rank=4, quiet=False)
    result = run(config)
    folder = tmp_path / "run"
    names = {path.name for path in folder.iterdir()}
    assert names >= {
        *("config.yaml", "log.jsonl", "status.json", "result.json", "classifier.json"),
        *("curve.png", "confusion.png", "allocation.png", "head.safetensors", "checkpoints"),
        "pytorch_snella_weights.safetensors",
    }
    assert result.adapter_bytes == result.adapter_path.stat().st_size
    assert result.head_bytes == (folder / "head.safetensors").stat().st_size
    written = json.loads((folder / "result.json").read_text())
    paths = sorted((pictures / "test").rglob("*.png"))
    found = load_classifier(folder).predict([read_picture(path) for path in paths])
    right = [p.label == path.parent.name for p, path in zip(found, paths, strict=True)]
    assert written["test"]["accuracy"] == sum(right) / len(right) == result.test_accuracy
    assert result.test.confusion(3).sum(1).tolist() == [4, 4, 4]
    assert all(p.probability == p.ranked[0][1] for p in found)
    with pytest.raises(SnellaConfigError, match="holds an earlier run"):
        run(config)


def test_gradient_checkpointing(bases: dict[str, str], pictures: Path) -> None:
    """The same training with activations computed again; ConvNeXt has none and says so."""
    shared: dict[str, Any] = {"method": "snella", "rank": 4}
    plain = trained(run(runs.config(bases["vit"], pictures, None, **shared)))
    shared["gradient_checkpointing"] = True
    again = trained(run(runs.config(bases["vit"], pictures, None, **shared)))
    torch.testing.assert_close(again, plain, rtol=0, atol=1e-4, equal_nan=True)
    with pytest.raises(SnellaConfigError, match="ConvNeXt of transformers has none"):
        run(runs.config(bases["convnext"], pictures, None, **shared))


def test_half_precision(bases: dict[str, str], pictures: Path, tmp_path: Path) -> None:
    """A bfloat16 base trains float32 adapters and head; what is loaded says the same."""
    config = runs.config(
        bases["vit"], pictures, tmp_path, method="snella", rank=4, mixed_precision="bf16"
    )
    result = run(config)
    stored = load_file(result.adapter_path) | load_file(tmp_path / "run" / "head.safetensors")
    assert {t.dtype for n, t in stored.items() if n.endswith(("_A", "weight"))} == {torch.float32}
    images = [read_picture(path) for path in sorted((pictures / "test").rglob("*.png"))]
    live = result.classifier.predict(images)
    loaded = load_classifier(tmp_path / "run").predict(images)
    assert [p.label for p in live] == [p.label for p in loaded]
    for one, other in zip(live, loaded, strict=True):
        assert one.probability == pytest.approx(other.probability, abs=1e-5)


def test_best_epoch_is_kept_and_test_is_not_looked_at(
    bases: dict[str, str], pictures: Path
) -> None:
    """The weights kept are those of the best validation; test labels change nothing."""
    config = runs.config(
        bases["vit"],
        pictures,
        None,
        method="lora",
        rank=2,
        num_train_epochs=5,
        learning_rate=2e-2,
        lr_scheduler="constant",
    )
    task = load_task(config, config.seed, config.select_on)
    # With wrong labels to choose on, what is learned makes it worse: an early epoch is the best.
    wrong = dataclasses.replace(task.validation, labels=(task.validation.labels + 1) % 3)
    task = dataclasses.replace(task, validation=wrong)
    result = run(config, task=task)
    measured = [e for e in result.history if e["event"] == "validation"]
    best = max(measured, key=lambda e: (e["validation_accuracy"], -e["validation_loss"]))
    assert result.kept_step == best["step"] < result.step
    assert result.validation_accuracy == best["validation_accuracy"]
    inputs = Inputs(task.validation, result.classifier.preprocess, False, config)
    with torch.no_grad():
        scores = result.classifier(inputs.pixels(range(12)))
    loss = torch.nn.functional.cross_entropy(scores, inputs.labels(range(12)))
    assert loss.item() == pytest.approx(best["validation_loss"], rel=1e-5)

    shifted = dataclasses.replace(task.test, labels=(task.test.labels + 1) % 3)
    other = run(config, task=dataclasses.replace(task, test=shifted))
    assert other.kept_step == result.kept_step
    torch.testing.assert_close(trained(other), trained(result), rtol=0, atol=0)


def test_early_stopping(bases: dict[str, str], pictures: Path) -> None:
    """Measurements that do not improve end the run."""
    config = runs.config(
        bases["vit"],
        pictures,
        None,
        method=LINEAR_PROBE,
        num_train_epochs=30,
        learning_rate=1e-12,
        early_stopping_patience=2,
    )
    result = run(config)
    assert result.stopped_early
    assert result.step < 30 * result.steps_per_epoch


def test_level_search(bases: dict[str, str], pictures: Path, tmp_path: Path) -> None:
    """Each level is trained; the best on validation is what the folder holds."""
    config = runs.config(
        bases["vit"], pictures, tmp_path, method="snella", rank=4, levels=[0.3, 0.9]
    )
    result = run(config)
    assert set(result.tried) == {0.3, 0.9}
    assert result.level in result.tried
    assert result.validation_accuracy == max(result.tried.values())
    alone = runs.config(
        bases["vit"],
        pictures,
        None,
        method="snella",
        rank=4,
        method_args={"target_sparsity": result.level},
    )
    single = run(alone)
    assert single.test_accuracy == result.test_accuracy
    left = load_file(tmp_path / "run" / "head.safetensors")
    torch.testing.assert_close(left["classifier.weight"], single.classifier.model.classifier.weight)
    log = (tmp_path / "run" / f"level-{result.level}" / "result.json").read_text()
    assert json.loads(log)["test"] is None  # levels are compared without it
    silent = dataclasses.replace(config, output_dir=None, levels=[0.9, 0.3])
    assert run(silent).level == result.level  # whatever the order
    again = run(dataclasses.replace(config, resume_from_checkpoint="latest"))
    assert (again.level, again.tried) == (result.level, result.tried)
    assert again.test_accuracy == result.test_accuracy
    steps = [e for e in again.history if e["event"] == "step"]
    assert not steps  # both levels had finished


def test_linear_probe_on_features_equals_on_pictures(
    bases: dict[str, str], pictures: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Features computed once train the same head as pictures sent through the base every time."""
    config = runs.config(bases["vit"], pictures, None, method=LINEAR_PROBE)
    quick = trained(run(config))
    monkeypatch.setattr("snell_diffusion.vision.trainer.is_constant", lambda *args: False)
    slow = trained(run(config))
    torch.testing.assert_close(quick, slow, rtol=0, atol=1e-5)
    base = load_file(Path(bases["vit"]) / "model.safetensors")
    assert not torch.equal(quick["classifier.weight"], base["classifier.weight"][:3])


def test_base_stays_as_it_is(bases: dict[str, str], pictures: Path) -> None:
    """Only the adapter and the head are trained, with the class token where it is asked for."""
    config = runs.config(bases["vit"], pictures, None, method="lora", rank=2, train_cls_token=True)
    result = run(config)
    from snell_diffusion.vision.loading import load_base

    fresh = dict(load_base(bases["vit"], 3).model.named_parameters())
    live = dict(result.classifier.model.named_parameters())
    changed = {
        name
        for name, value in fresh.items()
        if not torch.equal(value, live.get(name, live.get(_wrapped(name))))
    }
    assert changed == {"classifier.weight", "classifier.bias", "vit.embeddings.cls_token"}
    assert result.sizes.extras == 32


def _wrapped(name: str) -> str:
    path, _, kind = name.rpartition(".")
    return f"{path}.base_layer.{kind}"


def test_another_seed_is_another_run(bases: dict[str, str], pictures: Path) -> None:
    """The seed decides head, order and adapter; the same seed gives the same bits."""
    first, same, other = (
        trained(run(runs.config(bases["vit"], pictures, None, method="lora", rank=2, seed=seed)))
        for seed in (0, 0, 1)
    )
    torch.testing.assert_close(first, same, rtol=0, atol=0)
    assert not torch.equal(first["classifier.weight"], other["classifier.weight"])


@pytest.mark.parametrize(
    "changes, message",
    [
        ({"method": "snelja"}, "method 'snelja' is unknown; known: .*linear_probe"),
        ({"method": LINEAR_PROBE, "rank": 4}, "method linear_probe has no rank"),
        ({"method": "lora", "method_args": {"heads": 2}}, "method lora has no heads; it takes"),
        ({"method": "lora", "levels": [0.1]}, "method lora has no sparsity level"),
        ({"method": "snella", "rank": 5}, "r must be divisible by heads"),
        (
            {"method": "snella", "allocate": "epoch", "method_args": {"alloc_init_warmup": 9}},
            "does not fit into 2 epochs of 3 steps",
        ),
        ({"target_modules": ["nowhere"]}, "ViTFor.* cannot be adapted: Target modules .*nowhere"),
        ({"mixed_precision": "fp16"}, "fp16 needs a GPU"),
        ({"report_to": "wandb"}, "needs a package that is not installed"),
    ],
)
def test_refused(
    changes: dict[str, Any], message: str, bases: dict[str, str], pictures: Path, tmp_path: Path
) -> None:
    """Before anything is written, in words."""
    with pytest.raises(SnellaConfigError, match=message):
        run(runs.config(bases["vit"], pictures, tmp_path, **changes))
    assert not (tmp_path / "run").exists()


def test_other_settings_do_not_continue_a_run(
    bases: dict[str, str], pictures: Path, tmp_path: Path
) -> None:
    """A checkpoint belongs to its settings; each that differs is named."""
    run(runs.config(bases["vit"], pictures, tmp_path, method=LINEAR_PROBE))
    other = runs.config(
        bases["vit"],
        pictures,
        tmp_path,
        method=LINEAR_PROBE,
        learning_rate=1e-3,
        resume_from_checkpoint="latest",
    )
    with pytest.raises(CheckpointError, match=r"learning_rate: 0\.01 then, 0\.001 now"):
        run(other)


def test_diverging_run_stops(bases: dict[str, str], pictures: Path, tmp_path: Path) -> None:
    """A loss that is not finite ends the run with its own error; nothing unsound is saved."""
    config = runs.config(
        bases["vit"],
        pictures,
        tmp_path,
        method="full",
        optimizer="SGD",
        learning_rate=1e30,
        warmup_epochs=0.0,
        max_grad_norm=0.0,
    )
    with pytest.raises(NonFiniteError, match="Lower learning_rate"):
        run(config)
    assert not (tmp_path / "run" / "classifier.json").exists()


def test_recipes_are_all_offered() -> None:
    assert set(method_names()) == {*RECIPES, LINEAR_PROBE}
