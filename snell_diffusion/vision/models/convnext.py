"""ConvNeXt (arXiv:2201.03545) of transformers.

Its pointwise convolutions are Linear layers, `pwconv1` and `pwconv2`: they are adapted as the MLP
of a block. Depthwise convolutions stay as they are.
"""

from torch import nn
from transformers import ConvNextForImageClassification

from snell_diffusion.vision.models.base import Family, by_depth


def _branches(model: nn.Module) -> list[tuple[nn.Module, float]]:
    blocks = [module for module in model.modules() if type(module).__name__ == "ConvNextLayer"]
    return by_depth([(block.drop_path,) for block in blocks])


FAMILY = Family(
    name="ConvNeXt",
    model_types=("convnext",),
    model_class=ConvNextForImageClassification,
    roles=("fc1", "fc2"),
    branches=_branches,
    maps=True,
)
