"""Parity with numbers that the public reference code produced (tests/golden/README.md)."""

import pytest
import torch
from torch import nn

from snell_diffusion.compress import LowRankLinear, penalty, rank_for, split
from tests.golden.cases import MANIFEST, Case, cases


@pytest.mark.parametrize("case", cases("low_rank"), ids=str)
def test_case(case: Case) -> None:
    t, config = case.tensors("f64"), case.config
    rank = rank_for(config["in_features"], config["out_features"], config["compress_ratio"])
    assert rank == config["rank"]
    linear = nn.Linear(config["in_features"], config["out_features"])
    linear.load_state_dict({"weight": t["W"].float(), "bias": t["b"].float()})
    # The reference decomposes in float64 and keeps factors in float32, as a float32 layer does.
    layer = LowRankLinear.of(linear, rank).double()
    first, second = layer.first.weight.detach(), layer.second.weight.detach()
    product = layer.product()

    def check(got: torch.Tensor, what: str) -> None:
        case.assert_close(got, t[f"{what}.f64"], "f64", what)

    check(product, "product")
    for factor in split(t["W"], rank):  # each carries a square root
        singular = torch.linalg.svdvals(factor).square()
        check(singular, "singular_values")
    check((product - t["W"]).square().mean(), "mse")
    torch.testing.assert_close(layer.second.bias, t["b"], rtol=0, atol=0)
    # The reference's signs: rows of the first factor and columns of the second flip together.
    signs = (first * t["first.f64"]).sum(1).sign()
    check(first * signs[:, None], "first")
    check(second * signs, "second")

    # The penalty is taken with a perturbed first factor.
    with torch.no_grad():
        layer.first.weight.copy_(t["first.f64"] + t["noise"])
        layer.second.weight.copy_(t["second.f64"])
    check((layer.product() - t["W"]).abs().max(), "linf")
    value = penalty([(layer, t["W"])], eps=config["eps"])
    value.backward()
    check(value, "penalty")
    check(layer.first.weight.grad, "gfirst")
    check(layer.second.weight.grad, "gsecond")


@pytest.mark.parametrize("row", MANIFEST["pela_rank_rule"]["table"], ids=str)
def test_rank_rule(row: dict) -> None:
    assert rank_for(row["in_features"], row["out_features"], row["compress_ratio"]) == row["rank"]
