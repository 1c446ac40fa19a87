"""Swin (arXiv:2103.14030) of transformers, both spellings of its layer names.

`reduction`, which halves the resolution between stages, is no attention or MLP: it stays as it is.
"""

from torch import nn
from transformers import SwinForImageClassification

from snell_diffusion.vision.models.base import Family, by_depth


def _branches(model: nn.Module) -> list[tuple[nn.Module, float]]:
    blocks = [module for module in model.modules() if type(module).__name__ == "SwinLayer"]
    return by_depth([(block.drop_path,) for block in blocks])


FAMILY = Family(
    name="Swin",
    model_types=("swin",),
    model_class=SwinForImageClassification,
    roles=("q", "k", "v", "proj", "fc1", "fc2"),
    branches=_branches,
    interpolates=True,
)
