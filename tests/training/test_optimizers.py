"""Optimizers by name, and a state that continues exactly without pickle."""

import json
import sys
from collections.abc import Callable

import pytest
import torch
from torch import nn

from snell_diffusion.errors import SnellaConfigError
from snell_diffusion.training.errors import CheckpointError
from snell_diffusion.training.optimizers import (
    make_optimizer,
    optimizer_class,
    own_rate,
    pack_optimizer,
    unpack_optimizer,
)


def parameters() -> list[nn.Parameter]:
    torch.manual_seed(0)
    return [nn.Parameter(torch.randn(3, 4)), nn.Parameter(torch.randn(2))]


def groups(values: list[nn.Parameter]) -> list[dict[str, object]]:
    return [{"params": values[:1], "lr": 0.1}, {"params": values[1:], "lr": 0.2}]


def steps(optimizer: torch.optim.Optimizer, values: list[nn.Parameter], count: range) -> None:
    for step in count:
        torch.manual_seed(step)
        for value in values:
            value.grad = torch.randn_like(value)
        optimizer.step()


@pytest.mark.parametrize(
    "name, arguments",
    [
        ("AdamW", ["amsgrad=True"]),
        ("torch.optim.SGD", ["momentum=0.9"]),
        ("torch.optim.Adafactor", []),
        ("RMSprop", []),
    ],
)
def test_a_restored_optimizer_continues_exactly(name: str, arguments: list[str]) -> None:
    def build(values: list[nn.Parameter]) -> torch.optim.Optimizer:
        defaults = {"betas": (0.9, 0.99), "fused": name == "AdamW"}
        return make_optimizer(name, groups(values), defaults, arguments)

    whole = parameters()
    steps(build(whole), whole, range(6))

    first = parameters()
    optimizer = build(first)
    steps(optimizer, first, range(3))
    tensors, plain = pack_optimizer(optimizer)
    tensors = {k: v.clone() for k, v in tensors.items()}
    second = [nn.Parameter(v.detach().clone()) for v in first]
    continued = build(second)
    unpack_optimizer(continued, tensors, json.loads(json.dumps(plain)))
    steps(continued, second, range(3, 6))
    for a, b in zip(whole, second, strict=True):
        assert torch.equal(a, b)


def test_groups_keep_their_rates() -> None:
    values = parameters()
    optimizer = make_optimizer("AdamW", groups(values), {"lr": 1.0, "unknown_to_adamw": 3})
    assert [g["lr"] for g in optimizer.param_groups] == [0.1, 0.2]


@pytest.mark.parametrize("name", ["Adamm", "no_such_package.Adam", "torch.nn.Linear", "torch.pi"])
def test_unknown_optimizer_is_named(name: str) -> None:
    with pytest.raises(SnellaConfigError, match=f"optimizer '{name}'"):
        optimizer_class(name)


def test_refused_argument_is_told() -> None:
    with pytest.raises(SnellaConfigError, match=r"'AdamW' refused its arguments: .*nonsense"):
        make_optimizer("AdamW", groups(parameters()), {}, ["nonsense=1"])


def test_state_that_cannot_be_saved_is_refused() -> None:
    values = parameters()
    optimizer = make_optimizer("SGD", groups(values), {}, ["momentum=0.9"])
    steps(optimizer, values, range(1))
    state: dict[str, Callable[[], None]] = optimizer.state[values[0]]
    state["closure"] = lambda: None
    with pytest.raises(CheckpointError, match="SGD keeps a function in 'closure'"):
        pack_optimizer(optimizer)


def test_other_groups_are_refused() -> None:
    values = parameters()
    optimizer = make_optimizer("AdamW", groups(values), {})
    tensors, plain = pack_optimizer(optimizer)
    other = make_optimizer("AdamW", groups(values)[:1], {})
    with pytest.raises(CheckpointError, match="2 parameter groups, this run 1"):
        unpack_optimizer(other, tensors, plain)


def test_a_missing_package_is_named_with_its_extra(monkeypatch: pytest.MonkeyPatch) -> None:
    for module in ("prodigyopt", "bitsandbytes", "bitsandbytes.optim"):
        monkeypatch.setitem(sys.modules, module, None)
    for name, extra in (
        ("prodigyopt.Prodigy", "prodigy"),
        ("bitsandbytes.optim.AdamW8bit", "quant"),
    ):
        with pytest.raises(SnellaConfigError, match=rf"pip install 'snell-diffusion\[{extra}\]'"):
            optimizer_class(name)


class Nested(torch.optim.SGD):
    """Keeps a table of tensors, as bitsandbytes does."""

    def step(self, closure=None):  # type: ignore[no-untyped-def]
        for group in self.param_groups:
            for value in group["params"]:
                table = self.state[value].setdefault("table", {})
                table["sum"] = table.get("sum", torch.zeros_like(value)) + value.grad
                value.data.sub_(table["sum"], alpha=group["lr"])


def test_tables_of_tensors_are_kept() -> None:
    whole, first = parameters(), parameters()
    steps(Nested(groups(whole)), whole, range(4))
    optimizer = Nested(groups(first))
    steps(optimizer, first, range(2))
    tensors, plain = pack_optimizer(optimizer)
    assert set(tensors) == {"0.table.sum", "1.table.sum"}
    continued = Nested(groups(first))
    unpack_optimizer(continued, tensors, json.loads(json.dumps(plain)))
    steps(continued, first, range(2, 4))
    assert all(torch.equal(a, b) for a, b in zip(whole, first, strict=True))


def test_prodigy_takes_one_rate_and_tells_its_estimate() -> None:
    pytest.importorskip("prodigyopt", reason="needs prodigyopt: pip install prodigyopt")
    values = parameters()
    with pytest.raises(
        SnellaConfigError, match=r"one learning rate for all tensors, .* 0\.1, 0\.2"
    ):
        make_optimizer("prodigyopt.Prodigy", groups(values), {})
    one = [{**group, "lr": 1.0} for group in groups(values)]
    optimizer = make_optimizer("prodigyopt.Prodigy", one, {"lr": 1.0})
    start = own_rate(optimizer)
    steps(optimizer, values, range(20))
    assert start == 1e-6
    assert own_rate(optimizer) > start


def test_others_have_no_estimate() -> None:
    for name in ("AdamW", "Adafactor"):
        assert own_rate(make_optimizer(name, groups(parameters()), {})) is None
