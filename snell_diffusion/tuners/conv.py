"""Updates of convolutions: a Conv2d's kernels as the rows of a matrix, y = x * (W0 + Σ s_a ΔW_a).

Shape legend: g groups, kernel kh x kw; O out features = output channels, I in features = what one
output sees, (input channels / g) · kh · kw. Flattened after their first axis kernels are (O, I),
the shape of an update and all that a method knows of it. Stride, dilation, groups and every padding
mode are the base layer's own.
"""

from collections.abc import Sequence
from typing import TYPE_CHECKING

import torch.nn.functional as F
from torch import Tensor, nn

from snell_diffusion.core import BlockUpdate, Geometry, merged_conv2d
from snell_diffusion.tuners.effective import Multiply
from snell_diffusion.tuners.layer import DeltaLayer

__all__ = ["ConvLayer"]


class ConvLayer(DeltaLayer):
    """A Conv2d that adds the updates of its active adapters; combine it with a method's layer."""

    kind = "conv2d"
    stock = nn.Conv2d

    if TYPE_CHECKING:

        def get_base_layer(self) -> nn.Conv2d: ...  # type: ignore[override]

    def adopt(self, key: str) -> None:
        conv = self.get_base_layer()
        self.out_features = conv.out_channels
        self.in_features = conv.weight[0].numel()

    def weight_shape(self) -> tuple[int, ...]:
        conv = self.get_base_layer()
        return conv.out_channels, conv.in_channels // conv.groups, *conv.kernel_size

    def operation(self) -> Multiply:
        return self.get_base_layer()._conv_forward

    def multiply_trained(
        self,
        x: Tensor,
        weight: Tensor | None,
        bias: Tensor | None,
        update: BlockUpdate,
        params: Sequence[Tensor],
        folds: bool,
    ) -> Tensor:
        x, geometry = self._padded(x)
        if weight is not None and folds:
            return merged_conv2d(x, weight, bias, update, params, geometry)
        # A view of one zero: the update alone through the same code, without another matrix.
        nothing = x.new_zeros(()).expand(self.weight_shape())
        y = merged_conv2d(x, nothing, None, update, params, geometry)
        return y if weight is None else F.conv2d(x, weight, bias, *geometry.arguments) + y

    def _padded(self, x: Tensor) -> tuple[Tensor, Geometry]:
        """The input with every padding but plain zeros applied, and how the kernels then move."""
        conv = self.get_base_layer()
        geometry = Geometry(conv.stride, (0, 0), conv.dilation, conv.groups)
        if conv.padding_mode == "zeros" and not isinstance(conv.padding, str):
            return x, Geometry(conv.stride, conv.padding, conv.dilation, conv.groups)
        # "same" may pad one side more than the other, which a convolution's own padding cannot.
        mode = "constant" if conv.padding_mode == "zeros" else conv.padding_mode
        return F.pad(x, conv._reversed_padding_repeated_twice, mode=mode), geometry
