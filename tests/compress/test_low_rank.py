"""The layer of two factors and the rank that a ratio gives."""

import pytest
import torch
from torch import nn

from snell_diffusion.compress import LowRankLinear, penalty, rank_for, split
from snell_diffusion.errors import SnellaValueError
from snell_diffusion.tuners.weights import is_linear_like


def linear(i: int, o: int, bias: bool = True) -> nn.Linear:
    torch.manual_seed(3)
    return nn.Linear(i, o, bias=bias, dtype=torch.float64)


@pytest.mark.parametrize(("i", "o"), [(20, 12), (12, 20), (16, 16)])
@pytest.mark.parametrize("rank", [1, 5, 12])
def test_product_is_the_best_approximation(i: int, o: int, rank: int) -> None:
    """Its squared error is the sum of the dropped squared singular values: nothing is nearer."""
    weight = linear(i, o).weight.detach()
    first, second = split(weight, rank)
    singular = torch.linalg.svdvals(weight)
    error = (second @ first - weight).square().sum()
    torch.testing.assert_close(error, singular[rank:].square().sum(), rtol=1e-9, atol=1e-12)
    assert first.shape == (rank, i)
    assert second.shape == (o, rank)
    torch.testing.assert_close(first @ first.T, second.T @ second)  # the roots are shared evenly


@pytest.mark.parametrize("bias", [True, False])
def test_full_rank_computes_the_same(bias: bool) -> None:
    original = linear(12, 20, bias)
    layer = LowRankLinear.of(original, 12)
    x = torch.randn(2, 3, 12, dtype=torch.float64)
    torch.testing.assert_close(layer(x), original(x))
    torch.testing.assert_close(layer.dense()(x), original(x))
    assert (layer.second.bias is not None) == bias
    assert layer.first.bias is None


def test_sizes_and_repr() -> None:
    layer = LowRankLinear.of(linear(12, 20), 4)
    assert (layer.in_features, layer.out_features, layer.rank) == (12, 20, 4)
    assert is_linear_like(layer)  # so tuners of this package adapt it as a whole
    assert "rank=4" in repr(layer)


def test_half_precision_keeps_its_dtype() -> None:
    original = linear(12, 20).half()
    layer = LowRankLinear.of(original, 4)
    assert layer.first.weight.dtype == layer.second.weight.dtype == torch.float16
    want = LowRankLinear.of(original.float(), 4).product()
    torch.testing.assert_close(layer.product().float(), want, rtol=5e-3, atol=5e-3)


def test_meta_device_makes_no_numbers() -> None:
    layer = LowRankLinear.of(nn.Linear(768, 3072, device="meta"), 307)
    assert layer.first.weight.device.type == "meta"
    assert sum(p.numel() for p in layer.parameters()) == 307 * (768 + 3072) + 3072


@pytest.mark.parametrize("rank", [0, 13])
def test_rank_must_fit(rank: int) -> None:
    with pytest.raises(SnellaValueError, match=f"12 -> 20 must be 1 to 12, got {rank}"):
        LowRankLinear.of(linear(12, 20), rank)


def test_factors_must_fit_each_other() -> None:
    with pytest.raises(SnellaValueError, match="got 4 -> 3 and 2 -> 4"):
        LowRankLinear(nn.Linear(4, 3, bias=False), nn.Linear(2, 4))
    with pytest.raises(SnellaValueError, match="got 4 -> 3 with bias"):
        LowRankLinear(nn.Linear(4, 3), nn.Linear(3, 4))


def test_weight_that_is_not_finite_is_refused() -> None:
    original = linear(4, 4)
    with torch.no_grad():
        original.weight[1, 2] = torch.nan
    with pytest.raises(SnellaValueError, match="must be finite"):
        LowRankLinear.of(original, 2)


def test_rank_grows_as_the_ratio_falls() -> None:
    ranks = [rank_for(768, 768, c) for c in (1, 1.5, 2, 3, 100, 1000)]
    assert ranks == [384, 256, 192, 128, 3, 0]
    for c in (1, 1.5, 2, 3, 100):  # never more numbers than promised
        assert rank_for(768, 3072, c) * (768 + 3072) <= 768 * 3072 / c


@pytest.mark.parametrize("ratio", [0, -1, float("nan"), float("inf")])
def test_ratio_must_be_a_number_above_zero(ratio: float) -> None:
    with pytest.raises(SnellaValueError, match="above 0"):
        rank_for(768, 768, ratio)


class TestPenalty:
    """The weight-perturbation term."""

    @staticmethod
    def layer(deviation: float) -> tuple[LowRankLinear, torch.Tensor]:
        """A layer whose product differs from a weight in one entry, by that much."""
        layer = LowRankLinear.of(linear(6, 5), 5)
        weight = layer.product().detach()
        weight[2, 3] -= deviation
        return layer, weight

    def test_mean_of_squares(self) -> None:
        value = penalty([self.layer(0.5), self.layer(-0.2)], eps=0.1)
        torch.testing.assert_close(value.item(), (0.4**2 + 0.1**2) / 2)

    def test_below_eps_the_square_pulls_up_and_the_hinge_does_not(self) -> None:
        assert penalty([self.layer(0.02)], eps=0.1).item() == pytest.approx(0.08**2)
        layer, weight = self.layer(0.02)
        value = penalty([(layer, weight)], eps=0.1, hinge=True)
        value.backward()
        assert value == 0
        assert layer.first.weight.grad.abs().max() == 0

    def test_only_the_largest_entry_gets_a_gradient(self) -> None:
        layer, weight = self.layer(0.5)
        penalty([(layer, weight)], eps=0.0).backward()
        assert layer.second.weight.grad.abs().sum(1).nonzero().flatten().tolist() == [2]
        assert layer.first.weight.grad.abs().sum(0).nonzero().flatten().tolist() == [3]

    def test_nothing_and_wrong_shapes_are_refused(self) -> None:
        with pytest.raises(SnellaValueError, match="at least one"):
            penalty([])
        with pytest.raises(
            SnellaValueError, match=r"must be \(5, 6\) for this layer, got \(6, 5\)"
        ):
            penalty([(self.layer(0)[0], torch.zeros(6, 5))])
