"""The models that are measured: random weights of real sizes, inputs as in a training step.

diffusers and transformers are imported when a model of theirs is built.
"""

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

ATTENTION = ("to_q", "to_k", "to_v", "to_out.0")
JOINT = (*ATTENTION, "add_q_proj", "add_k_proj", "add_v_proj", "to_add_out")
VIT_LINEARS = ("q_proj", "k_proj", "v_proj", "o_proj", "fc1", "fc2")
PROMPT, LONG_PROMPT = 77, 512

Inputs = dict[str, Any]


@dataclass(frozen=True)
class Work:
    """A model and one batch for it.

    Attributes:
        title: As people call it.
        build: Makes it on torch's default device, in torch's default dtype.
        inputs: (batch, dtype) -> keyword arguments of one forward pass.
        targets: Endings of the Linear layers to adapt.
    """

    title: str
    build: Callable[[], nn.Module]
    inputs: Callable[[int, torch.dtype], Inputs]
    targets: tuple[str, ...]

    def model(self, dtype: torch.dtype = torch.float32) -> nn.Module:
        """Build it with weights of a dtype, seeded."""
        before = torch.get_default_dtype()
        torch.set_default_dtype(dtype)
        torch.manual_seed(0)
        try:
            return self.build()
        finally:
            torch.set_default_dtype(before)

    def paths(self, model: nn.Module) -> list[str]:
        """The Linear layers to adapt."""
        return [
            name
            for name, module in model.named_modules()
            if isinstance(module, nn.Linear) and name.endswith(self.targets)
        ]


def loss_of(answer: Any) -> Tensor:
    """A loss of one element from what a model returns: the mean square of its first output."""
    first = answer if isinstance(answer, Tensor) else answer[0]
    return first.float().square().mean()


def _randn(*shape: int, dtype: torch.dtype) -> Tensor:
    return torch.randn(shape, dtype=dtype)


def _published(base: str) -> Callable[[], nn.Module]:
    """The denoiser of a base whose sizes `diffusion.memory` knows."""

    def build() -> nn.Module:
        import diffusers

        from snell_diffusion.diffusion.memory.bases import BASES

        parts = BASES[base].parts
        _, kind, settings = parts["unet" if "unet" in parts else "transformer"]
        model: nn.Module = getattr(diffusers, kind).from_config(settings)
        return model

    return build


def unet_inputs(side: int, width: int, channels: int = 4, prompt: int = PROMPT) -> Any:
    """Inputs of a text-conditioned UNet: latents of `side`, prompts of `width` numbers a token."""

    def inputs(batch: int, dtype: torch.dtype) -> Inputs:
        return {
            "sample": _randn(batch, channels, side, side, dtype=dtype),
            "timestep": torch.full((batch,), 500.0),
            "encoder_hidden_states": _randn(batch, prompt, width, dtype=dtype),
            "return_dict": False,
        }

    return inputs


def _sdxl_inputs(batch: int, dtype: torch.dtype) -> Inputs:
    pooled = {"text_embeds": _randn(batch, 1280, dtype=dtype), "time_ids": torch.zeros(batch, 6)}
    return {**unet_inputs(128, 2048)(batch, dtype), "added_cond_kwargs": pooled}


def joint_inputs(side: int, channels: int, width: int, pooled: int, prompt: int) -> Any:
    """Inputs of a Stable Diffusion 3 transformer."""

    def inputs(batch: int, dtype: torch.dtype) -> Inputs:
        return {
            "hidden_states": _randn(batch, channels, side, side, dtype=dtype),
            "timestep": torch.full((batch,), 500.0),
            "encoder_hidden_states": _randn(batch, prompt, width, dtype=dtype),
            "pooled_projections": _randn(batch, pooled, dtype=dtype),
            "return_dict": False,
        }

    return inputs


def _flux_inputs(batch: int, dtype: torch.dtype) -> Inputs:
    return {
        "hidden_states": _randn(batch, 4096, 64, dtype=dtype),
        "timestep": torch.full((batch,), 0.5, dtype=dtype),
        "guidance": torch.full((batch,), 3.5, dtype=dtype),
        "encoder_hidden_states": _randn(batch, LONG_PROMPT, 4096, dtype=dtype),
        "pooled_projections": _randn(batch, 768, dtype=dtype),
        "img_ids": torch.zeros(4096, 3),
        "txt_ids": torch.zeros(LONG_PROMPT, 3),
        "return_dict": False,
    }


def vit(width: int, layers: int, heads: int, patch: int) -> Callable[[], nn.Module]:
    """A ViT for pictures of 224 pixels, without a head."""

    def build() -> nn.Module:
        from transformers import ViTConfig, ViTModel

        config = ViTConfig(
            hidden_size=width,
            num_hidden_layers=layers,
            num_attention_heads=heads,
            intermediate_size=4 * width,
            patch_size=patch,
        )
        return ViTModel(config, add_pooling_layer=False)

    return build


def _pictures(batch: int, dtype: torch.dtype) -> Inputs:
    return {"pixel_values": _randn(batch, 3, 224, 224, dtype=dtype), "return_dict": False}


def _embedded(name: str, part: str) -> Callable[[], nn.Module]:
    """The denoiser of a shipped base with its trained weights."""

    def build() -> nn.Module:
        import diffusers

        from snell_diffusion.models import embedded_path

        folder = embedded_path(name) / part
        kind = "UNet2DConditionModel" if part == "unet" else "SD3Transformer2DModel"
        model: nn.Module = getattr(diffusers, kind).from_pretrained(folder, use_safetensors=True)
        return model

    return build


def _embedded_inputs(name: str, part: str) -> Any:
    """Inputs of the sizes that the shipped base's own settings say."""

    def inputs(batch: int, dtype: torch.dtype) -> Inputs:
        import json

        from snell_diffusion.models import embedded_path

        size = json.loads((embedded_path(name) / part / "config.json").read_text("utf-8"))
        side, channels = size["sample_size"], size["in_channels"]
        if part == "unet":
            make = unet_inputs(side, size["cross_attention_dim"], channels, 32)
        else:
            widths = size["joint_attention_dim"], size["pooled_projection_dim"]
            make = joint_inputs(side, channels, *widths, 32)
        found: Inputs = make(batch, dtype)
        return found

    return inputs


_SD35 = joint_inputs(128, 16, 4096, 2048, PROMPT + 256)

WORKS: dict[str, Work] = {
    "embedded-unet": Work(
        "embedded UNet",
        _embedded("embedded", "unet"),
        _embedded_inputs("embedded", "unet"),
        ATTENTION,
    ),
    "embedded-dit": Work(
        "embedded DiT",
        _embedded("embedded-dit", "transformer"),
        _embedded_inputs("embedded-dit", "transformer"),
        JOINT,
    ),
    "vit-b": Work("ViT-B/16", vit(768, 12, 12, 16), _pictures, VIT_LINEARS),
    "vit-l": Work("ViT-L/16", vit(1024, 24, 16, 16), _pictures, VIT_LINEARS),
    "vit-h": Work("ViT-H/14", vit(1280, 32, 16, 14), _pictures, VIT_LINEARS),
    "sd15": Work(
        "SD 1.5",
        _published("stable-diffusion-v1-5/stable-diffusion-v1-5"),
        unet_inputs(64, 768),
        ATTENTION,
    ),
    "sdxl": Work(
        "SDXL",
        _published("stabilityai/stable-diffusion-xl-base-1.0"),
        _sdxl_inputs,
        ATTENTION,
    ),
    "sd35": Work(
        "SD 3.5 medium",
        _published("stabilityai/stable-diffusion-3.5-medium"),
        _SD35,
        JOINT,
    ),
    "flux": Work("FLUX.1", _published("black-forest-labs/FLUX.1-dev"), _flux_inputs, JOINT),
}

# The embedded models stand in for large ones where the code only has to run.
QUICK = {
    **dict.fromkeys(("vit-b", "vit-l", "vit-h", "sd15", "sdxl"), "embedded-unet"),
    **dict.fromkeys(("sd35", "flux"), "embedded-dit"),
}


def checkpoint_activations(model: nn.Module) -> None:
    """Have a model of diffusers or transformers compute its activations again backwards."""
    from snell_diffusion.diffusion import setup

    setup.checkpoint_activations(model)
