"""Tiny random models built from configs, for tests only: seeded, offline, a few thousand weights.

Every builder returns a fresh object; equal seeds give equal weights.
"""

from hashlib import sha256
from typing import Any

import torch
from diffusers import (
    AutoencoderKL,
    DDIMScheduler,
    FluxTransformer2DModel,
    SD3Transformer2DModel,
    StableDiffusionPipeline,
    UNet2DConditionModel,
)
from peft import inject_adapter_in_model
from torch import Tensor, nn
from transformers import CLIPTextConfig, CLIPTextModel, CLIPTokenizer

from snell_diffusion import SnellaConfig
from snell_diffusion.tuners import delta_layers

SIZE = 16  # latent height and width of the denoisers


def tokenizer() -> CLIPTokenizer:
    """A byte-level CLIP tokenizer without merges: one token per character."""
    letters = [chr(code) for code in range(33, 127)]
    words = ["<|startoftext|>", "<|endoftext|>", *letters, *(f"{a}</w>" for a in letters)]
    vocabulary = {word: index for index, word in enumerate(words)}
    return CLIPTokenizer(vocab=vocabulary, merges=[], model_max_length=16)


def text_encoder(seed: int = 0) -> CLIPTextModel:
    torch.manual_seed(seed)
    config = CLIPTextConfig(
        vocab_size=190,
        hidden_size=32,
        intermediate_size=37,
        num_hidden_layers=2,
        num_attention_heads=4,
        max_position_embeddings=16,
        projection_dim=32,
        bos_token_id=0,
        eos_token_id=1,
        pad_token_id=1,
    )
    return CLIPTextModel(config).eval()


def sd15_unet(seed: int = 0, **changes: Any) -> UNet2DConditionModel:
    torch.manual_seed(seed)
    config: dict[str, Any] = {
        "block_out_channels": (16, 32),
        "layers_per_block": 1,
        "norm_num_groups": 8,
        "sample_size": SIZE,
        "in_channels": 4,
        "out_channels": 4,
        "down_block_types": ("DownBlock2D", "CrossAttnDownBlock2D"),
        "up_block_types": ("CrossAttnUpBlock2D", "UpBlock2D"),
        "cross_attention_dim": 32,
        "attention_head_dim": 4,
    }
    return UNet2DConditionModel(**{**config, **changes}).eval()


def sdxl_unet(seed: int = 0) -> UNet2DConditionModel:
    return sd15_unet(
        seed,
        attention_head_dim=(2, 4),
        use_linear_projection=True,
        addition_embed_type="text_time",
        addition_time_embed_dim=8,
        transformer_layers_per_block=(1, 2),
        projection_class_embeddings_input_dim=80,
    )


def sd3_transformer(seed: int = 0) -> SD3Transformer2DModel:
    torch.manual_seed(seed)
    return SD3Transformer2DModel(
        sample_size=SIZE,
        patch_size=2,
        in_channels=4,
        num_layers=2,
        attention_head_dim=8,
        num_attention_heads=4,
        caption_projection_dim=32,
        joint_attention_dim=32,
        pooled_projection_dim=64,
        out_channels=4,
        pos_embed_max_size=SIZE,
    ).eval()


def flux_transformer(seed: int = 0) -> FluxTransformer2DModel:
    torch.manual_seed(seed)
    return FluxTransformer2DModel(
        patch_size=1,
        in_channels=4,
        num_layers=1,
        num_single_layers=1,
        attention_head_dim=16,
        num_attention_heads=2,
        joint_attention_dim=32,
        pooled_projection_dim=32,
        axes_dims_rope=[4, 4, 8],
    ).eval()


DENOISERS = {
    "sd15": sd15_unet,
    "sdxl": sdxl_unet,
    "sd3": sd3_transformer,
    "flux": flux_transformer,
}


def denoiser_inputs(family: str, seed: int = 7) -> dict[str, Tensor | dict[str, Tensor]]:
    """Keyword arguments for one forward pass of `DENOISERS[family]`, batch 2."""
    draw = torch.Generator().manual_seed(seed)

    def randn(*shape: int) -> Tensor:
        return torch.randn(*shape, generator=draw)

    step = torch.tensor([500.0, 20.0])
    if family == "flux":
        return {
            "hidden_states": randn(2, 16, 4),
            "encoder_hidden_states": randn(2, 6, 32),
            "pooled_projections": randn(2, 32),
            "timestep": step / 1000,
            "img_ids": randn(16, 3).round(),
            "txt_ids": torch.zeros(6, 3),
        }
    if family == "sd3":
        return {
            "hidden_states": randn(2, 4, SIZE, SIZE),
            "encoder_hidden_states": randn(2, 6, 32),
            "pooled_projections": randn(2, 64),
            "timestep": step,
        }
    inputs: dict[str, Any] = {
        "sample": randn(2, 4, SIZE, SIZE),
        "timestep": step,
        "encoder_hidden_states": randn(2, 6, 32),
    }
    if family == "sdxl":
        inputs["added_cond_kwargs"] = {"text_embeds": randn(2, 32), "time_ids": randn(2, 6)}
    return inputs


@torch.no_grad()
def predict(model: nn.Module, family: str, **more: Any) -> Tensor:
    """The denoiser's output on `denoiser_inputs`."""
    return model(**denoiser_inputs(family), **more, return_dict=False)[0]


def vae(seed: int = 0, channels: int = 4, **config: Any) -> AutoencoderKL:
    """A VAE that halves every side."""
    torch.manual_seed(seed)
    return AutoencoderKL(
        block_out_channels=[8, 16],
        norm_num_groups=8,
        in_channels=3,
        out_channels=3,
        down_block_types=["DownEncoderBlock2D", "DownEncoderBlock2D"],
        up_block_types=["UpDecoderBlock2D", "UpDecoderBlock2D"],
        latent_channels=channels,
        **config,
    ).eval()


def pipeline(seed: int = 0) -> StableDiffusionPipeline:
    """A whole Stable Diffusion pipeline; pictures are 2 * SIZE pixels wide."""
    pipe = StableDiffusionPipeline(
        vae=vae(seed),
        text_encoder=text_encoder(seed),
        tokenizer=tokenizer(),
        unet=sd15_unet(seed),
        scheduler=DDIMScheduler(
            beta_start=0.00085,
            beta_end=0.012,
            beta_schedule="scaled_linear",
            clip_sample=False,
            set_alpha_to_one=False,
            steps_offset=1,
        ),
        safety_checker=None,
        feature_extractor=None,
        requires_safety_checker=False,
    )
    pipe.set_progress_bar_config(disable=True)
    return pipe


def picture(pipe: StableDiffusionPipeline, prompt: str = "a sks cat", **more: Any) -> Tensor:
    """Pixels of one two-step sample at a fixed seed, (1, height, width, 3), in [0, 1]."""
    generator = torch.Generator().manual_seed(3)
    result = pipe(prompt, num_inference_steps=2, generator=generator, output_type="np", **more)
    return torch.from_numpy(result.images)


def adapt(
    model: nn.Module, adapter_name: str = "default", seed: int | None = 1, **config: Any
) -> nn.Module:
    """Add a SNELLA adapter whose update shows and whose layers have different sparsity levels.

    A stand-in for training: factors are scaled up and levels spread from 0 to 0.5.
    """
    settings = SnellaConfig(**{"r": 4, "seed": seed, **config})
    inject_adapter_in_model(settings, model, adapter_name)
    layers = list(delta_layers(model, adapter_name))
    with torch.no_grad():
        for index, (_, layer) in enumerate(layers):
            layer.snella_A[adapter_name].mul_(30)
            layer.set_sparsity(adapter_name, 0.5 * index / len(layers))
    return model


def fingerprint(pipe: Any) -> dict[str, Any]:
    """What a refused load must leave alone: modules, bytes, flags, PEFT's traces, hooks, RNG."""
    state: dict[str, Any] = {"rng": torch.get_rng_state().tolist()}
    for name, model in pipe.components.items():
        if not isinstance(model, nn.Module):
            continue
        modules = list(model.named_modules())
        state[name] = {
            "modules": [(path, type(module), id(module)) for path, module in modules],
            "processors": [type(getattr(module, "processor", None)) for _, module in modules],
            "bytes": {key: hash_bytes(tensor) for key, tensor in model.state_dict().items()},
            "trainable": [(key, p.requires_grad) for key, p in model.named_parameters()],
            "peft": sorted(getattr(model, "peft_config", None) or {}),
            "peft_flag": vars(model).get("_hf_peft_config_loaded"),
            "active": [(path, layer.active_adapters) for path, layer in delta_layers(model)],
            "scales": [(path, dict(layer.scaling)) for path, layer in delta_layers(model)],
            "own": [(path, sorted(vars(module))) for path, module in modules],
            "hooks": [len(module._forward_pre_hooks) for _, module in modules],
        }
    return state


def hash_bytes(tensor: Tensor) -> str:
    return sha256(
        tensor.detach().contiguous().reshape(-1).view(torch.uint8).numpy().tobytes()
    ).hexdigest()
