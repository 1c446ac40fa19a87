"""Distances of points and their gradients through matrix products, one block at a time.

    |a - b|^2 = [a, |a|^2, 1] . [-2b, 1, |b|^2]        one product per head and block
    dL/da[i] = sum_o R (a - b),  R = dL/dK / |a - b|,  R = 0 where |a - b| = 0

The product cannot resolve |a - b|^2 below about eps (|a|^2 + |b|^2). What is smaller than that of
the farthest points counts as zero: coincident points come out at exactly zero, and no gradient is
built on noise. Shapes: G layers of one shape, H heads, O outputs, I inputs, W columns of a block,
q columns per head.
"""

from dataclasses import dataclass

import torch
from torch import Tensor

from .precision import at_hand
from .scratch import Scratch


@dataclass(frozen=True)
class Points:
    """Both sets of points of all heads, centred, scaled by |signs|, ready to be multiplied."""

    left: Tensor  # [G H, q + 2, O]: 1, -2b, |b|^2
    right: Tensor  # [G H, q + 2, I]: |a|^2, a, 1
    b: Tensor  # [G H, q + 1, O]: b, 1
    a: Tensor  # [G H, q + 1, I]: a, 1
    signs: Tensor  # [G, H], -1, 0 or 1
    sizes: Tensor  # [G H, 1, 1], |signs|
    noise: Tensor  # [G H], squared distances not above it count as zero
    limits: list[float] | None  # the same as numbers where they are at hand
    reach: list[float] | None  # [G], no |K| is larger; where numbers are at hand
    scratch: Scratch

    @classmethod
    def of(cls, A: Tensor, B: Tensor, signs: Tensor, scratch: Scratch) -> "Points":
        """From A [G, H, I, q], B [G, H, O, q] and signs [G, H].

        On CUDA in float64: the products would otherwise run in TF32 where the user allows it.
        """
        dtype = torch.float64 if A.is_cuda else torch.float32
        sizes = signs.abs().view(-1, 1, 1)
        A, B = A.flatten(0, 1), B.flatten(0, 1)
        # Together, since in small matrices every call counts; transposed: long rows are fast.
        rows = A.new_empty(len(A), A.shape[2] + 2, A.shape[1] + B.shape[1], dtype=dtype)
        norms, p, ones = rows[:, :1], rows[:, 1:-1], rows[:, -1:]
        torch.cat([A.mT, B.mT], 2, out=p)
        p -= B.mean(1).unsqueeze(2)  # a common shift keeps distances and saves digits
        p *= sizes
        torch.sum(p.square(), 1, keepdim=True, out=norms)
        ones.fill_(1)
        right, b = rows.split([A.shape[1], B.shape[1]], 2)
        left = torch.cat([b[:, -1:], b[:, 1:-1] * -2, b[:, :1]], 1)
        farthest = right[:, 0].amax(1) + b[:, 0].amax(1)
        noise = farthest * (torch.finfo(dtype).eps * right.shape[1])
        limits = reach = None
        if at_hand(noise):
            limits = noise.tolist()
            reach = (2 * farthest).sqrt_().view(signs.shape).sum(1).tolist()
        points = b[:, 1:], right[:, 1:]
        return cls(left, right, *points, signs.sign(), sizes, noise, limits, reach, scratch)

    def distances(self, columns: slice) -> tuple[Tensor, Tensor]:
        """|signs| |b - a| and its reciprocal (0 for 0), both [G H, O, W] float32.

        They are scratch: the next block overwrites them.
        """
        left, right = self.left.mT, self.right[..., columns]
        shape = (len(right), left.shape[1], right.shape[2])
        squared, inverse = (self.scratch.take(name, shape, right) for name in "di")
        if self._heads_alike(shape[2]):
            torch.bmm(left, right, out=squared)
        else:
            torch.stack(
                [b.clone() @ a.clone() for b, a in zip(left, right, strict=True)], out=squared
            )
        self._invert(squared, inverse)
        return squared.mul_(inverse).float(), inverse.float()

    def _heads_alike(self, width: int) -> bool:
        """Whether every head begins at the same place of a cache line.

        Else a batched product may round equal heads differently, and their sum is not exactly 0.
        """
        sizes = self.left.shape[2], self.right.shape[2], width
        return self.left.device.type != "cpu" or all(size % 16 == 0 for size in sizes)

    def kernel(self, d: Tensor) -> Tensor:
        """K = sum_h signs[h] |b - a|, [G, O, W], from `distances`; scratch.

        The factors left are 1 and -1, so that two equal heads of opposite sign leave exactly 0.
        """
        G, H = self.signs.shape
        K = self.scratch.take("K", (G, *d.shape[1:]), d)
        if d.is_cuda:  # here a product might round to TF32
            return torch.sum(d.view(G, H, *d.shape[1:]) * self.signs.view(G, H, 1, 1), 1, out=K)
        torch.bmm(self.signs.view(G, 1, H), d.view(G, H, -1), out=K.view(G, 1, -1))
        return K

    def _invert(self, squared: Tensor, out: Tensor) -> None:
        """out = 1 / sqrt(squared), 0 where a squared distance counts as zero."""
        if self.limits is None:
            noise = self.noise.view(-1, 1, 1)
            out.copy_(squared).masked_fill_(squared <= noise, torch.inf).rsqrt_()
        elif float(squared.amin()) > max(self.limits):
            torch.rsqrt(squared, out=out)
        else:
            for one, limit, result in zip(squared, self.limits, out, strict=True):
                torch.threshold(one, limit, torch.inf, out=result)
            out.rsqrt_()


class PointGradients:
    """Gathers dL/dA and dL/dB over the blocks of a walk."""

    def __init__(self, points: Points) -> None:
        self.points = points
        # The last row of a product with R is a sum of R.
        self._b, self._a = points.b, points.a
        self._ga = torch.empty_like(self._a, memory_format=torch.contiguous_format)
        self._gb = torch.zeros_like(self._b, memory_format=torch.contiguous_format)

    def add(self, columns: slice, inverse: Tensor, gK: Tensor) -> None:
        """A block's dL/dK [G, O, W]; `inverse` of `distances` is used up."""
        G, H = self.points.signs.shape
        inverse.view(G, H, *gK.shape[1:]).mul_(gK.unsqueeze(1))
        R = inverse.to(self._a.dtype)
        ga = self.points.scratch.take("g", (len(R), self._b.shape[1], R.shape[2]), R)
        self._ga[..., columns] = torch.bmm(self._b, R, out=ga)
        self._gb.baddbmm_(self._a[..., columns], R.mT)

    def result(self) -> tuple[Tensor, Tensor]:
        """dL/dA [G, H, I, q] and dL/dB [G, H, O, q], float32."""
        heads = self.points.signs.shape
        factor = self.points.sizes * self.points.signs.view(-1, 1, 1)
        found = [
            (factor * (own[:, :-1] * other[:, -1:] - other[:, :-1])).mT.float()
            for own, other in ((self._a, self._ga), (self._b, self._gb))
        ]
        return found[0].unflatten(0, heads), found[1].unflatten(0, heads)
