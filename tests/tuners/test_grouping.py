"""Small layers whose updates are computed together train as they do alone."""

import copy
from collections.abc import Callable

import pytest
import torch
from peft import inject_adapter_in_model
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from snell_diffusion.tuners import SnellaConfig, delta_layers
from snell_diffusion.tuners.grouping import group_small_layers


class Net(nn.Module):
    """Two shapes, three layers each, and one layer that is not small."""

    def __init__(self) -> None:
        super().__init__()
        self.wide = nn.ModuleList(nn.Linear(32, 48) for _ in range(3))
        self.narrow = nn.ModuleList(nn.Linear(48, 32) for _ in range(3))
        self.large = nn.Linear(32, 1056)
        self.rerun = False
        self.within: Callable[[nn.Module], None] = lambda _: None

    def body(self, x: Tensor) -> Tensor:
        for wide, narrow in zip(self.wide, self.narrow, strict=True):
            x = x + narrow(wide(x).tanh())
        return self.large(x)

    def forward(self, x: Tensor) -> Tensor:
        self.within(self)
        return checkpoint(self.body, x, use_reentrant=False) if self.rerun else self.body(x)


def adapted(seed: int = 0, **settings: object) -> Net:
    torch.manual_seed(seed)
    config = SnellaConfig.paper(
        **{"target_modules": ["0", "1", "2", "large"], "r": 16, "init_sparsity": 0.3} | settings
    )
    model = inject_adapter_in_model(config, Net().requires_grad_(False)).train()
    with torch.no_grad():
        for parameter in trained(model).values():
            parameter.add_(torch.randn_like(parameter) * 0.1)
    return model


def trained(model: nn.Module) -> dict[str, nn.Parameter]:
    return {n: p for n, p in model.named_parameters() if p.requires_grad}


X = torch.randn(7, 32, generator=torch.Generator().manual_seed(3))


def gradients(model: nn.Module) -> dict[str, Tensor]:
    model(X).square().mean().backward()
    found = {n: p.grad.clone() for n, p in trained(model).items()}
    model.zero_grad()
    return found


def served(model: nn.Module) -> list[str]:
    """Which layers had their weight ready, seen from within a forward pass."""
    found: list[str] = []
    model.within = lambda m: found.extend(n for n, part in delta_layers(m) if part.ready)
    model(X)
    model.within = lambda _: None
    return found


SMALL = [f"{kind}.{i}" for kind in ("wide", "narrow") for i in range(3)]


@pytest.mark.parametrize("rule", ["squared", "mask", "soft", "printed", "none"])
@pytest.mark.parametrize("kernel", ["mixed", "distance"])
def test_gradients_are_those_of_layers_alone(kernel: str, rule: str) -> None:
    level = 0.0 if rule == "none" else 0.3
    alone = adapted(kernel=kernel, sparsify=rule, init_sparsity=level)
    together = copy.deepcopy(alone)
    group_small_layers(together)
    assert served(together) == SMALL
    torch.testing.assert_close(together(X), alone(X), rtol=1e-5, atol=1e-6)
    want, got = gradients(alone), gradients(together)
    assert got.keys() == want.keys()
    for name, gradient in got.items():
        largest = float(want[name].abs().max())
        torch.testing.assert_close(gradient, want[name], rtol=1e-4, atol=1e-5 * max(largest, 1e-12))


def test_scales_levels_and_frozen_scalars_are_respected() -> None:
    alone = adapted(scale=3.0, train_gamma=False)
    for i, (_, layer) in enumerate(delta_layers(alone)):
        layer.set_sparsity("default", 0.1 * i)
    together = copy.deepcopy(alone)
    group_small_layers(together)
    want, got = gradients(alone), gradients(together)
    assert not any("gamma" in name for name in got)
    for name, gradient in got.items():
        torch.testing.assert_close(gradient, want[name], rtol=1e-4, atol=1e-6)


def test_ready_weights_do_not_outlive_the_pass() -> None:
    model = adapted()
    handle = group_small_layers(model)
    before = model(X).detach()
    assert not any(layer.ready for _, layer in delta_layers(model))
    with torch.no_grad():
        for parameter in trained(model).values():
            parameter.data.mul_(2)  # counts no version
    assert not torch.equal(model(X), before)

    def fail(_: nn.Module) -> None:
        raise RuntimeError("in the middle")

    model.within = fail
    with pytest.raises(RuntimeError, match="in the middle"):
        model(X)
    assert not any(layer.ready for _, layer in delta_layers(model))
    handle.remove()
    assert not model._forward_pre_hooks
    assert not model._forward_hooks
    assert served(model) == []


def test_a_stored_threshold_goes_as_training_begins() -> None:
    model = adapted()
    for _, layer in delta_layers(model):
        layer.store_threshold("default")
    group_small_layers(model)
    model(X)
    assert all(layer.snella_threshold["default"].isnan() for _, layer in delta_layers(model))


def test_who_is_not_served() -> None:
    for settings in ({"dropout": 0.1}, {"p": 1.0}, {"r": 8}, {"kernel": "linear"}):
        model = adapted(**settings)
        group_small_layers(model)
        assert served(model) == []
    model = adapted()
    group_small_layers(model)
    assert served(model.eval()) == []
    with torch.no_grad():
        assert served(model.train()) == []
    model.wide[1].base_layer.to(torch.bfloat16)
    model.wide[2].base_layer.register_forward_hook(lambda *_: None)
    expected = ["wide.0", *SMALL[3:]]
    found: list[str] = []
    model.within = lambda m: found.extend(n for n, part in delta_layers(m) if part.ready)
    with pytest.raises(RuntimeError):  # the bfloat16 layer cannot take float32 by itself
        model(X)
    assert found == expected


def test_a_scale_set_within_the_pass_counts() -> None:
    alone = adapted()
    together = copy.deepcopy(alone)
    group_small_layers(together)

    def double(model: nn.Module) -> None:
        for _, layer in delta_layers(model):
            layer.scale_layer(2.0)

    alone.within = together.within = double
    torch.testing.assert_close(together(X), alone(X), rtol=1e-6, atol=1e-6)


def test_under_autocast_every_layer_computes_its_own() -> None:
    alone = adapted()
    together = copy.deepcopy(alone)
    group_small_layers(together)
    with torch.autocast("cpu", torch.bfloat16):
        assert torch.equal(together(X), alone(X))


@pytest.mark.parametrize("flag", [False, True])
def test_activation_checkpointing(flag: bool) -> None:
    """Whether the model says that it checkpoints, or just does."""
    alone = adapted()
    together = copy.deepcopy(alone)
    group_small_layers(together)
    together.rerun, together.gradient_checkpointing = True, flag
    want, got = gradients(alone), gradients(together)
    for name, gradient in got.items():
        torch.testing.assert_close(gradient, want[name], rtol=1e-5, atol=1e-7)


def test_the_memory_is_bounded(monkeypatch: pytest.MonkeyPatch) -> None:
    from snell_diffusion.tuners import grouping

    monkeypatch.setattr(grouping, "TOTAL_ENTRIES", 4 * 32 * 48)
    model = adapted()
    group_small_layers(model)
    assert served(model) == SMALL[:4]
    monkeypatch.setattr(grouping, "STACK_ENTRIES", 1)  # every layer a stack of its own
    assert served(model) == SMALL[:4]
