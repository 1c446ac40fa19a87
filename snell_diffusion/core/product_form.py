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

    left: Tensor  # [G H, O, q + 2]
    right: Tensor  # [G H, I, q + 2]
    signs: Tensor  # [G, H], -1, 0 or 1
    sizes: Tensor  # [G H, 1, 1], |signs|
    noise: Tensor  # [G H], squared distances not above it count as zero
    reach: Tensor  # [G], no |K| is larger
    scratch: Scratch

    @classmethod
    def of(cls, A: Tensor, B: Tensor, signs: Tensor, scratch: Scratch) -> "Points":
        """From A [G, H, I, q], B [G, H, O, q] and signs [G, H].

        On CUDA in float64: the products would otherwise run in TF32 where the user allows it.
        """
        dtype = torch.float64 if A.is_cuda else torch.float32
        sizes = signs.abs().view(-1, 1, 1)
        A, B = A.flatten(0, 1), B.flatten(0, 1)
        mean = B.mean(1, keepdim=True)  # a common shift keeps distances and saves digits
        a, b = ((t - mean).mul_(sizes).to(dtype) for t in (A, B))
        a_norm, b_norm = (t.square().sum(2, keepdim=True) for t in (a, b))
        left = torch.cat([b.mul(-2), torch.ones_like(b_norm), b_norm], 2)
        right = torch.cat([a, a_norm, torch.ones_like(a_norm)], 2)
        farthest = a_norm.amax((1, 2)) + b_norm.amax((1, 2))
        noise = farthest * (torch.finfo(dtype).eps * right.shape[2])
        reach = (2 * farthest).sqrt().view(signs.shape).sum(1).float()
        return cls(left, right, signs.sign(), sizes, noise, reach, scratch)

    def distances(self, columns: slice) -> tuple[Tensor, Tensor]:
        """|signs| |b - a| and its reciprocal (0 for 0), both [G H, O, W] float32.

        They are scratch: the next block overwrites them.
        """
        right = self.right[:, columns].mT
        shape = (len(right), self.left.shape[1], right.shape[2])
        squared, inverse = (self.scratch.take(name, shape, right) for name in "di")
        if self._heads_alike(shape[2]):
            torch.bmm(self.left, right, out=squared)
        else:
            torch.stack(
                [b.clone() @ a.clone() for b, a in zip(self.left, right, strict=True)], out=squared
            )
        self._without_noise(squared, inverse).rsqrt_()
        return squared.mul_(inverse).float(), inverse.float()

    def _heads_alike(self, width: int) -> bool:
        """Whether every head begins at the same place of a cache line.

        Else a batched product may round equal heads differently, and their sum is not exactly 0.
        """
        sizes = self.left.shape[1], self.right.shape[1], width
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

    def _without_noise(self, squared: Tensor, out: Tensor) -> Tensor:
        """Squared distances, infinity in place of those that count as zero."""
        if not at_hand(squared):
            noise = self.noise.view(-1, 1, 1)
            return out.copy_(squared).masked_fill_(squared <= noise, torch.inf)
        for one, limit, result in zip(squared, self.noise.tolist(), out, strict=True):
            torch.threshold(one, limit, torch.inf, out=result)
        return out


class PointGradients:
    """Gathers dL/dA and dL/dB over the blocks of a walk."""

    def __init__(self, points: Points) -> None:
        self.points = points
        q = points.left.shape[2] - 2
        # [b, 1] and [a, 1], transposed: the last row of a product with R is a sum of R.
        self._b = torch.cat([points.left[..., :q] * -0.5, points.left[..., q : q + 1]], 2).mT
        self._a = torch.cat([points.right[..., :q], points.right[..., q + 1 :]], 2).mT
        self._ga = torch.empty_like(self._a)  # [G H, q + 1, I]
        self._gb = torch.zeros_like(self._b)  # [G H, q + 1, O]

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
