"""Tiny models of the families users adapt, built from configs, with an input each."""

from collections.abc import Callable
from copy import deepcopy
from dataclasses import dataclass
from functools import cache
from typing import Any

import pytest
import torch
from torch import Tensor, nn

FAMILIES = ("unet_sd15", "unet_sdxl", "sd3", "flux", "clip_text", "vit", "mlp")


@dataclass
class Family:
    """A base model and a way to run it: `run(model)` is one tensor, the same for equal weights."""

    name: str
    base: nn.Module
    run: Callable[..., Tensor]

    def model(self) -> nn.Module:
        return deepcopy(self.base)


def randn(*shape: int, seed: int = 1) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


def unet_sd15() -> tuple[nn.Module, dict[str, Any]]:
    from diffusers import UNet2DConditionModel

    model = UNet2DConditionModel(
        sample_size=8,
        block_out_channels=(16, 32),
        layers_per_block=1,
        norm_num_groups=8,
        cross_attention_dim=24,
        attention_head_dim=8,
        down_block_types=("CrossAttnDownBlock2D", "DownBlock2D"),
        up_block_types=("UpBlock2D", "CrossAttnUpBlock2D"),
    )
    inputs = {
        "sample": randn(2, 4, 8, 8),
        "timestep": torch.tensor([3, 500]),
        "encoder_hidden_states": randn(2, 7, 24),
    }
    return model, inputs


def unet_sdxl() -> tuple[nn.Module, dict[str, Any]]:
    from diffusers import UNet2DConditionModel

    model = UNet2DConditionModel(
        sample_size=8,
        block_out_channels=(16, 32),
        layers_per_block=1,
        norm_num_groups=8,
        cross_attention_dim=24,
        attention_head_dim=(2, 4),
        use_linear_projection=True,
        addition_embed_type="text_time",
        addition_time_embed_dim=8,
        projection_class_embeddings_input_dim=64,
        transformer_layers_per_block=(1, 2),
        down_block_types=("DownBlock2D", "CrossAttnDownBlock2D"),
        up_block_types=("CrossAttnUpBlock2D", "UpBlock2D"),
    )
    inputs = {
        "sample": randn(1, 4, 8, 8),
        "timestep": torch.tensor([500]),
        "encoder_hidden_states": randn(1, 7, 24),
        "added_cond_kwargs": {"text_embeds": randn(1, 16), "time_ids": torch.ones(1, 6)},
    }
    return model, inputs


def sd3() -> tuple[nn.Module, dict[str, Any]]:
    from diffusers import SD3Transformer2DModel

    model = SD3Transformer2DModel(
        sample_size=8,
        patch_size=2,
        in_channels=4,
        out_channels=4,
        num_layers=2,
        attention_head_dim=8,
        num_attention_heads=4,
        joint_attention_dim=24,
        caption_projection_dim=32,
        pooled_projection_dim=16,
    )
    inputs = {
        "hidden_states": randn(1, 4, 8, 8),
        "encoder_hidden_states": randn(1, 7, 24),
        "pooled_projections": randn(1, 16),
        "timestep": torch.tensor([500]),
    }
    return model, inputs


def flux() -> tuple[nn.Module, dict[str, Any]]:
    from diffusers import FluxTransformer2DModel

    model = FluxTransformer2DModel(
        patch_size=1,
        in_channels=4,
        num_layers=1,
        num_single_layers=1,
        attention_head_dim=16,
        num_attention_heads=2,
        joint_attention_dim=24,
        pooled_projection_dim=16,
        axes_dims_rope=(4, 4, 8),
    )
    inputs = {
        "hidden_states": randn(1, 16, 4),
        "encoder_hidden_states": randn(1, 7, 24),
        "pooled_projections": randn(1, 16),
        "timestep": torch.tensor([0.5]),
        "img_ids": torch.zeros(16, 3),
        "txt_ids": torch.zeros(7, 3),
    }
    return model, inputs


def clip_text() -> tuple[nn.Module, dict[str, Any]]:
    from transformers import CLIPTextConfig, CLIPTextModel

    config = CLIPTextConfig(
        vocab_size=99,
        hidden_size=32,
        intermediate_size=40,
        num_hidden_layers=2,
        num_attention_heads=4,
        max_position_embeddings=16,
    )
    return CLIPTextModel(config), {"input_ids": torch.arange(3, 15).reshape(2, 6)}


def vit() -> tuple[nn.Module, dict[str, Any]]:
    from transformers import ViTConfig, ViTModel

    config = ViTConfig(
        hidden_size=32,
        intermediate_size=40,
        num_hidden_layers=2,
        num_attention_heads=4,
        image_size=16,
        patch_size=8,
    )
    return ViTModel(config, add_pooling_layer=False), {"pixel_values": randn(1, 3, 16, 16)}


def mlp() -> tuple[nn.Module, dict[str, Any]]:
    model = nn.Sequential(nn.Linear(24, 40), nn.GELU(), nn.Linear(40, 16, bias=False))
    return model, {"input": randn(3, 5, 24)}


BUILDERS = {
    build.__name__: build for build in (unet_sd15, unet_sdxl, sd3, flux, clip_text, vit, mlp)
}


@cache
def family_named(name: str) -> Family:
    torch.manual_seed(0)
    base, inputs = BUILDERS[name]()

    def run(model: nn.Module, **more: Any) -> Tensor:
        output = model(**inputs, **more)
        return output if isinstance(output, Tensor) else output[0]

    return Family(name, base.eval().requires_grad_(False), run)


@pytest.fixture(params=FAMILIES)
def family(request: pytest.FixtureRequest) -> Family:
    """Each family in turn."""
    return family_named(request.param)


@pytest.fixture
def mlp_family() -> Family:
    """The two-layer perceptron alone; its layers are named "0" and "2"."""
    return family_named("mlp")


@pytest.fixture
def unet_family() -> Family:
    """The Stable Diffusion 1.5-like UNet alone."""
    return family_named("unet_sd15")


@pytest.fixture
def clip_family() -> Family:
    """The CLIP text encoder alone."""
    return family_named("clip_text")
