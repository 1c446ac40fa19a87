"""A linear layer of two factors, and the rank that a compression ratio gives it.

Shapes: I in features, O out features, r rank; weights are (O, I), inputs [..., I].
"""

import math

import torch
from torch import Tensor, nn

from snell_diffusion.errors import SnellaValueError

__all__ = ["LowRankLinear", "rank_for", "split"]


class LowRankLinear(nn.Module):
    """x -> second(first(x)): a Linear whose weight is `second.weight @ first.weight`.

    It has `in_features` and `out_features` as a Linear has, so that the tuners of this package
    adapt it as one layer; `first` and `second` are ordinary Linears that any tuner can adapt.

    Args:
        first: I -> r, without bias.
        second: r -> O, with the bias of the layer it stands for.

    Raises:
        SnellaValueError: The factors do not fit each other, or the first has a bias.
    """

    def __init__(self, first: nn.Linear, second: nn.Linear) -> None:
        super().__init__()
        if first.out_features != second.in_features or first.bias is not None:
            raise SnellaValueError(
                "a low-rank layer needs a first factor I -> r without bias and a second r -> O, "
                f"got {first.in_features} -> {first.out_features}"
                f"{' with bias' if first.bias is not None else ''} and "
                f"{second.in_features} -> {second.out_features}"
            )
        self.in_features, self.out_features = first.in_features, second.out_features
        self.first, self.second = first, second

    @classmethod
    def empty_like(cls, linear: nn.Linear, rank: int) -> "LowRankLinear":
        """Uninitialised factors in the dtype and on the device of a Linear.

        Raises:
            SnellaValueError: The rank is not 1 to min(I, O).
        """
        widest = min(linear.in_features, linear.out_features)
        if not 1 <= rank <= widest:
            raise SnellaValueError(
                f"the rank of a layer {linear.in_features} -> {linear.out_features} must be 1 to "
                f"{widest}, got {rank}"
            )
        like = {"device": linear.weight.device, "dtype": linear.weight.dtype}
        first = nn.utils.skip_init(nn.Linear, linear.in_features, rank, bias=False, **like)
        bias = linear.bias is not None
        second = nn.utils.skip_init(nn.Linear, rank, linear.out_features, bias=bias, **like)
        made = cls(first, second)
        made.train(linear.training)
        return made

    @classmethod
    def of(cls, linear: nn.Linear, rank: int) -> "LowRankLinear":
        """The best approximation of a Linear at a rank, its bias kept; the Linear is untouched.

        On the meta device the factors are empty: shapes and counts only.

        Raises:
            SnellaValueError: The rank is not 1 to min(I, O), or the weight is not finite.
        """
        made = cls.empty_like(linear, rank)
        if linear.weight.device.type == "meta":
            return made
        first, second = split(linear.weight.detach(), rank)
        with torch.no_grad():
            made.first.weight.copy_(first)
            made.second.weight.copy_(second)
            if linear.bias is not None:
                made.second.bias.copy_(linear.bias)
        return made

    @property
    def rank(self) -> int:
        """Width between the factors, before any tuner wraps them."""
        return int(self.second.in_features)

    def forward(self, x: Tensor) -> Tensor:
        """x [..., I] -> [..., O]."""
        return self.second(self.first(x))

    def product(self) -> Tensor:
        """The weight that the factors stand for, (O, I); differentiable."""
        return self.second.weight @ self.first.weight

    def dense(self) -> nn.Linear:
        """An ordinary Linear with the same weight and bias, larger than the factors."""
        like = {"device": self.second.weight.device, "dtype": self.second.weight.dtype}
        bias = self.second.bias is not None
        made = nn.utils.skip_init(nn.Linear, self.in_features, self.out_features, bias=bias, **like)
        with torch.no_grad():
            made.weight.copy_(self.product())
            if bias:
                made.bias.copy_(self.second.bias)
        made.train(self.training)
        return made

    def extra_repr(self) -> str:
        return f"in_features={self.in_features}, out_features={self.out_features}, rank={self.rank}"


def rank_for(in_features: int, out_features: int, ratio: float) -> int:
    """floor(I O / (c (I + O))): factors of that rank have about 1/c of the weight's numbers.

    0 where the layer is too small for even rank 1.

    Args:
        in_features: I, 1 or more.
        out_features: O, 1 or more.
        ratio: c, above 0; below 1 the factors have more numbers than the weight.

    Raises:
        SnellaValueError: The ratio is not a finite number above 0.
    """
    if not (math.isfinite(ratio) and ratio > 0):
        raise SnellaValueError(f"the compression ratio must be a number above 0, got {ratio!r}")
    return int(in_features * out_features / (ratio * (in_features + out_features)))


def split(weight: Tensor, rank: int) -> tuple[Tensor, Tensor]:
    """Two factors whose product is the best approximation of a weight, the square roots in both.

    With W = U S Vᵀ: first = √S_r V_rᵀ (r, I) and second = U_r √S_r (O, r), float64. Factors are
    unique up to signs only.

    Raises:
        SnellaValueError: The weight has an entry that is not finite.
    """
    wide = weight.to("cpu" if weight.device.type == "mps" else weight.device, torch.float64)
    if not bool(wide.isfinite().all()):
        raise SnellaValueError("a weight to split must be finite, got infinite or NaN entries")
    u, s, vh = torch.linalg.svd(wide, full_matrices=False)
    root = s[:rank].sqrt()
    return root[:, None] * vh[:rank], u[:, :rank] * root
