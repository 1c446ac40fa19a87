"""ViT (arXiv:2010.11929) of transformers: supervised, DINO and MAE checkpoints.

Layers are `vit.layers.N.attention.{q,k,v,o}_proj` and `mlp.{fc1,fc2}` in transformers 5, and
`vit.encoder.layer.N.attention.attention.query` ... `output.dense` before; both are adapted, and
checkpoints of either spelling load. An MAE checkpoint loads without its decoder and mask token.
"""

from torch import nn
from transformers import PretrainedConfig, ViTConfig, ViTForImageClassification

from snell_diffusion.vision.models.base import Family, by_depth


def _config(config: PretrainedConfig) -> PretrainedConfig:
    if config.model_type == "vit":
        return config
    values = config.to_dict()
    known = ViTConfig().to_dict().keys() - {"model_type", "architectures", "transformers_version"}
    return ViTConfig(**{name: values[name] for name in known if name in values})


def _branches(model: nn.Module) -> list[tuple[nn.Module, float]]:
    blocks = [module for module in model.modules() if type(module).__name__ == "ViTLayer"]
    # Before transformers 5 the MLP's second half adds the residual itself.
    return by_depth(
        [
            (block.attention, block.mlp if hasattr(block, "mlp") else block.output.dense)
            for block in blocks
        ]
    )


def _extras(model: nn.Module) -> list[str]:
    return [name for name, _ in model.named_parameters() if name.endswith("cls_token")]


FAMILY = Family(
    name="ViT",
    model_types=("vit", "vit_mae"),
    model_class=ViTForImageClassification,
    roles=("q", "k", "v", "proj", "fc1", "fc2"),
    interpolates=True,
    classifier_config=_config,
    branches=_branches,
    extras=_extras,
)
