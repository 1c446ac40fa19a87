"""Groups of the optimizer and the published order of the competition's steps."""

import math
from pathlib import Path

import pytest
import torch

from snell_diffusion.errors import SnellaConfigError
from snell_diffusion.tuners.snella_config import VISION
from snell_diffusion.vision.loading import Base, load_base
from snell_diffusion.vision.method import COMPONENT, adapt, level_setting, method_config
from snell_diffusion.vision.optimization import build_competition, parameter_groups
from snell_diffusion.vision.run import run
from tests.vision import runs


def adapted(base: str, **changes: object) -> tuple[Base, list[str], object]:
    config = runs.config(base, Path("pictures"), None, **changes)
    loaded = load_base(base, 3)
    adapt(config, loaded, 6, lambda settings: settings)
    extras = loaded.family.extras(loaded.model) if config.train_cls_token else []
    return loaded, extras, config


def test_groups(bases: dict[str, str]) -> None:
    """Matrices decay; biases, vectors, single numbers and the class token do not; head and single
    numbers learn at their own rates. Every trained tensor is in one group."""
    base, extras, config = adapted(
        bases["vit"],
        method="snella",
        rank=4,
        train_cls_token=True,
        adam_weight_decay=0.05,
        learning_rate=1e-3,
        head_learning_rate=1e-2,
        scalar_learning_rate=1e-4,
    )
    groups = {g["name"]: g for g in parameter_groups(config, base.model, extras)}
    names = {id(p): name for name, p in base.model.named_parameters()}
    found = {
        key: {names[id(p)].split(".default")[0].rpartition(".")[2] for p in group["params"]}
        for key, group in groups.items()
    }
    assert found == {
        "body": {"snella_A", "snella_B"},
        "body_undecayed": {"cls_token"},
        "scalars_undecayed": {"snella_alpha", "snella_gamma", "snella_beta"},
        "head": {"weight"},
        "head_undecayed": {"bias"},
    }
    settings = {key: (group["lr"], group["weight_decay"]) for key, group in groups.items()}
    assert settings == {
        "body": (1e-3, 0.05),
        "body_undecayed": (1e-3, 0.0),
        "scalars_undecayed": (1e-4, 0.0),
        "head": (1e-2, 0.05),
        "head_undecayed": (1e-2, 0.0),
    }
    trained = [p for p in base.model.parameters() if p.requires_grad]
    assert sorted(map(id, trained)) == sorted(id(p) for g in groups.values() for p in g["params"])


def test_published_allocation(bases: dict[str, str], pictures: Path) -> None:
    """Levels change before an epoch and never inside one; epoch 0 stays at the initial level; the
    budget of epoch e is K1 + (K0 - K1)(1 - e/E)^3, never quite the target."""
    epochs, start, target = 4, 0.1, 0.8
    config = runs.config(
        bases["vit"],
        pictures,
        None,
        protocol="paper",
        num_train_epochs=epochs,
        warmup_epochs=0.0,
        method="snella",
        rank=4,
        method_args={"init_sparsity": start, "target_sparsity": target},
    )
    result = run(config)
    steps = [e for e in result.history if e["event"] == "step"]
    per_epoch = result.steps_per_epoch
    assert per_epoch == 3
    layers = next(e for e in result.history if e["event"] == "allocation")["layers"]
    size = sum(row["size"] for row in layers)
    k0, k1 = (1 - start) * size, (1 - target) * size
    for epoch in range(epochs):
        shares = {e["kept_share"] for e in steps[epoch * per_epoch : (epoch + 1) * per_epoch]}
        assert len(shares) == 1
        m = 1 - epoch / epochs
        budget = math.floor(k0) if epoch == 0 else math.trunc(k1 + (k0 - k1) * m**3)
        assert shares == {budget / size}


def test_importance_is_new_parameter_times_old_gradient(bases: dict[str, str]) -> None:
    """After a step P = |p · g| with p as the optimizer left it and g the gradient that moved it."""
    base, _, config = adapted(bases["vit"], method="snella", rank=4, protocol="paper")
    competition = build_competition(config, {COMPONENT: base.model}, 3, 300)
    layer = dict(base.model.named_modules())["vit.layers.0.attention.q_proj"]
    A = layer.snella_A["default"]
    optimizer = torch.optim.SGD([A], lr=0.5)
    A.grad = torch.randn(A.shape, generator=torch.Generator().manual_seed(0))
    before = A.detach().clone()
    optimizer.step()
    competition.observe()
    state = competition.state_dict()
    P = ((before - 0.5 * A.grad) * A.grad).abs()
    name = "A.vit.vit.layers.0.attention.q_proj"
    torch.testing.assert_close(state[f"I.{name}"], 0.15 * P)
    torch.testing.assert_close(state[f"U.{name}"], 0.15 * (P - 0.15 * P))


def test_units_of_the_competition(bases: dict[str, str]) -> None:
    """alloc_* count epochs or steps, as `allocate` says."""
    base, _, by_epoch = adapted(bases["vit"], method="snella", rank=4, allocate="epoch")
    competition = build_competition(by_epoch, {COMPONENT: base.model}, 5, 50)
    assert [s for s in range(50) if competition.due(s)] == list(range(5, 50, 5))
    by_step = runs.config(bases["vit"], Path("x"), None, method="snella", allocate="step")
    competition = build_competition(by_step, {COMPONENT: base.model}, 5, 50)
    assert [s for s in range(50) if competition.due(s)] == list(range(1, 50))


def test_the_schedule_of_epochs_ends_with_the_run(bases: dict[str, str]) -> None:
    """50 steps are 10 epochs: of 0 to 9 only the last comes after epoch 10 - 2, at step 45."""
    warmup = {"alloc_interval": 100, "alloc_final_warmup": 2}
    base, _, config = adapted(
        bases["vit"], method="snella", rank=4, allocate="epoch", method_args=warmup
    )
    competition = build_competition(config, {COMPONENT: base.model}, 5, 50)
    assert [s for s in range(50) if competition.due(s)] == [45]


@pytest.mark.parametrize("allocate", ["step", "epoch"])
def test_what_a_competition_tells(allocate: str, bases: dict[str, str]) -> None:
    """Before the first allocation every layer keeps the initial share, and all have a row."""
    start = {"init_sparsity": 0.25, "target_sparsity": 0.5}
    base, _, config = adapted(
        bases["vit"], method="snella", rank=4, allocate=allocate, method_args=start
    )
    competition = build_competition(config, {COMPONENT: base.model}, 5, 50)
    assert competition.kept_share() == 0.75
    assert {row["budget"] / row["size"] for row in competition.report()} == {0.75}
    assert len(competition.report()) == 12


def test_ranks_that_compete_leave_no_events_of_levels(
    bases: dict[str, str], pictures: Path, tmp_path: Path
) -> None:
    """AdaLoRA has no levels: no share is kept, no allocation is logged and none is drawn."""
    changes = {"max_train_steps": 4, "warmup_epochs": 0.0, "quiet": False}
    result = run(runs.config(bases["vit"], pictures, tmp_path, method="adalora", **changes))
    assert {e["event"] for e in result.history} >= {"step", "finished"}
    assert "allocation" not in {e["event"] for e in result.history}
    assert {e["kept_share"] for e in result.history if e["event"] == "step"} == {None}
    assert result.output_dir is not None
    assert (result.output_dir / "curve.png").is_file()
    assert not (result.output_dir / "allocation.png").exists()


@pytest.mark.parametrize("method", ["snell", "mixk", "klora", "lora", "linear_probe", "full"])
def test_methods_without_competition(method: str, bases: dict[str, str]) -> None:
    base, _, config = adapted(bases["vit"], method=method)
    assert build_competition(config, {COMPONENT: base.model}, 3, 6) is None


def test_paper_protocol_takes_the_published_settings(
    bases: dict[str, str], monkeypatch: pytest.MonkeyPatch
) -> None:
    """Of the method too, unless they are given; dropout is placed, not the method's."""
    monkeypatch.setitem(VISION, "scale", 4.0)
    monkeypatch.setitem(VISION, "train_beta", False)
    base = load_base(bases["vit"], 3)
    config = runs.config(bases["vit"], Path("x"), None, protocol="paper", method="snella")
    settings = method_config(config, base, 6)
    assert (settings.scale, settings.train_beta, settings.dropout) == (1.0, True, 0.0)
    assert config.dropout == 0.1
    ours = method_config(runs.config(bases["vit"], Path("x"), None, method="snella"), base, 6)
    assert (ours.scale, ours.train_beta, ours.dropout) == (4.0, False, 0.0)
    given = runs.config(
        bases["vit"], Path("x"), None, protocol="paper", method="snella", update_scale=3.0
    )
    assert method_config(given, base, 6).scale == 3.0
    # Methods of other papers have their own dropout, where they have one at all.
    arc = runs.config(bases["vit"], Path("x"), None, protocol="paper", method="arc", rank=4)
    assert method_config(arc, base, 6).dropout == 0.1
    shira = runs.config(bases["vit"], Path("x"), None, protocol="paper", method="shira", rank=4)
    assert method_config(shira, base, 6).r == 4


def test_level_settings() -> None:
    assert level_setting("snella") == "target_sparsity"
    assert level_setting("snell") == "init_sparsity"
    for method in ("lora", "mixk", "linear_probe"):
        with pytest.raises(SnellaConfigError, match="has no sparsity level"):
            level_setting(method)
