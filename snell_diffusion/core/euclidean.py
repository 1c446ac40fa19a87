"""Blocks of w for Euclidean kernels, of several layers of one shape at a time, and gradients.

    K = sum_h c_h |A[h,i] - B[h,o]|,   S = softmax_o(K / gamma),   w = K + alpha S + beta

    dL/dK = g + alpha / gamma S (g - r),   r = sum_o g S,   g = dL/dw
    dL/dalpha = sum r,   dL/dbeta = sum g,   dL/dgamma = -1 / gamma sum (dL/dK - g) K

Shapes: G layers, H heads, O outputs, I inputs, W columns of a block, q columns per head. Blocks are
[G, O, W], float32. A block is rebuilt in the backward pass from the factors alone.
"""

from collections.abc import Sequence

import torch
from torch import Tensor

from .kernels import positive_gamma
from .product_form import PointGradients, Points
from .scratch import Scratch

MAX_EXPONENT = 60.0  # O e^60 and e^-60 are far inside float32


class EuclideanBlocks:
    """One walk over the columns of w.

    Args:
        params: A [G, H, I, q], B [G, H, O, q] and, for the mixed kernel, alpha, gamma and beta
            [G, 1], float32.
        signs: c, [G, H].
        wanted: Which params need gradients.
    """

    def __init__(
        self, params: Sequence[Tensor], signs: Tensor, wanted: Sequence[bool], scratch: Scratch
    ) -> None:
        A, B, *scalars = params
        self._params, self._wanted = params, wanted
        self._points = Points.of(A, B, signs.to(A.dtype), scratch)
        self._gathered = PointGradients(self._points) if any(wanted[:2]) else None
        self._mixer = Mixer(scalars, self._points.reach, scratch) if scalars else None

    def dense(self, columns: slice) -> Tensor:
        """w[:, columns], [G, O, W]; the next block overwrites it."""
        self._columns = columns
        d, self._inverse = self._points.distances(columns)
        K = self._points.kernel(d)
        return K if self._mixer is None else self._mixer.mix(K, d)

    def pull(self, gw: Tensor) -> None:
        """Add what dL/dw [G, O, W] of the last block gives; both are used up."""
        gK = gw if self._mixer is None else self._mixer.pull(gw)
        if self._gathered is not None:
            self._gathered.add(self._columns, self._inverse, gK)

    def gradients(self) -> list[Tensor | None]:
        """By param, None where none is wanted."""
        both = (None, None) if self._gathered is None else self._gathered.result()
        found = [*both, *(() if self._mixer is None else self._mixer.gradients())]
        shaped = zip(found, self._params, self._wanted, strict=True)
        return [g.view_as(p) if want and g is not None else None for g, p, want in shaped]


class Mixer:
    """w = K + alpha softmax_o(K / gamma) + beta on blocks [G, O, W], and its derivatives."""

    def __init__(
        self, scalars: Sequence[Tensor], reach: Sequence[float] | None, scratch: Scratch
    ) -> None:
        """`scalars` are alpha, gamma, beta, [G, 1]; no |K| of a layer is above `reach` [G], if
        that is known."""
        self._alpha, gamma, self._beta = (t.reshape(-1, 1, 1) for t in scalars)
        self._rate = torch.as_tensor(positive_gamma(gamma)).reciprocal()
        # Where no exponent can overflow, the largest need not be looked for.
        rates = self._rate.flatten().tolist() if reach is not None else ()
        self._shifts = not (
            reach and all(r * k < MAX_EXPONENT for r, k in zip(rates, reach, strict=True))
        )
        self._scratch = scratch
        self._sums = torch.zeros(3, len(gamma), dtype=torch.float64, device=gamma.device)

    def mix(self, K: Tensor, spare: Tensor) -> Tensor:
        """w from K, both [G, O, W]; what is in `spare` is lost."""
        exponent, w = self._room(K, spare.view(-1))
        torch.mul(K, self._rate, out=exponent)
        if self._shifts:
            exponent -= exponent.amax(1, keepdim=True)
        self._K, self._e = K, exponent.exp_()
        self._share = self._e.sum(1, keepdim=True).reciprocal_()
        self._w = torch.add(K, self._beta, out=w)
        return w.addcmul_(self._e, self._alpha * self._share)

    def _room(self, K: Tensor, spare: Tensor) -> tuple[Tensor, Tensor]:
        """Two tensors like K, in memory that is in the cache already where that is large enough."""
        size = K.numel()
        if len(spare) >= 2 * size:
            return spare[:size].view_as(K), spare[size : 2 * size].view_as(K)
        return self._scratch.take("e", K.shape, K), self._scratch.take("w", K.shape, K)

    def pull(self, gw: Tensor) -> Tensor:
        """dL/dK from dL/dw, both [G, O, W]; the latter is used up, and so is w."""
        through = self._w
        r = torch.mul(gw, self._e, out=through).sum(1, keepdim=True).mul_(self._share)
        e = self._e.mul_(self._alpha * self._rate * self._share)
        torch.sub(gw, r, out=through).mul_(e)
        by_K = torch.linalg.vecdot(through.flatten(1), self._K.flatten(1))
        parts = (r.sum((1, 2)), -self._rate.flatten() * by_K, gw.sum((1, 2)))
        self._sums += torch.stack(parts)
        return gw.add_(through)

    def gradients(self) -> list[Tensor]:
        """Of alpha, gamma, beta, [G]; gamma's passes the bound of `positive_gamma`."""
        return list(self._sums.to(self._alpha.dtype))
