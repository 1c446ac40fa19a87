"""FLUX.2 klein: a transformer over patches of normalised latents, hidden states of Qwen3, flow."""

import math
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor, nn

from snell_diffusion.diffusion.families.base import (
    JOINT_TARGETS,
    Conditions,
    Family,
    SampleRequest,
    load_stock,
)
from snell_diffusion.diffusion.flow import FlowObjective
from snell_diffusion.diffusion.kl_vae import to_pixels
from snell_diffusion.diffusion.packing import grid
from snell_diffusion.diffusion.timesteps import TimestepSettings

_MANY_STEPS = 200


def encode_text(pipe: Any, prompts: Sequence[str]) -> Conditions:
    """Prompts -> "text" [B, L, D]: hidden states of three layers of Qwen3 side by side."""
    return {"text": pipe.encode_prompt(list(prompts), device=pipe.text_encoder.device)[0]}


def encode_images(pipe: Any, pixels: Tensor) -> tuple[Tensor, Tensor]:
    """Latents in 2 x 2 patches, [B, 4 C, h/2, w/2], each channel normalised by the VAE."""
    posterior = pipe.vae.encode(pixels.to(pipe.vae.device, pipe.vae.dtype)).latent_dist
    mean, std = _normal(pipe.vae)
    return (_patches(posterior.mean) - mean) / std, _patches(posterior.std) / std


def decode_latents(pipe: Any, latents: Tensor) -> Tensor:
    mean, std = _normal(pipe.vae)
    patches = latents.to(mean) * std + mean
    latents = nn.functional.pixel_shuffle(patches, 2).to(pipe.vae.dtype)
    return to_pixels(pipe.vae.decode(latents).sample)


def _normal(vae: Any) -> tuple[Tensor, Tensor]:
    """Mean and standard deviation of every channel of a patch, float32 [1, 4 C, 1, 1]."""
    variance = vae.bn.running_var.float() + vae.config.batch_norm_eps
    return vae.bn.running_mean.float().view(1, -1, 1, 1), variance.sqrt().view(1, -1, 1, 1)


def _patches(latents: Tensor) -> Tensor:
    return nn.functional.pixel_unshuffle(latents.float(), 2)


def native_size(pipe: Any) -> int:
    return int(pipe.default_sample_size * pipe.vae_scale_factor)


def objective(pipe: Any, device: torch.device, settings: TimestepSettings) -> FlowObjective:
    """Flow with the shift that the pipeline samples with in many steps.

    It raises the shift further where the steps are few, to make up for their size; training has no
    steps.
    """
    from diffusers.pipelines.flux2.pipeline_flux2_klein import compute_empirical_mu

    side = 2 * pipe.vae_scale_factor

    def shift(pixels: int) -> float:
        return math.exp(compute_empirical_mu(pixels // side**2, _MANY_STEPS))

    return FlowObjective(shift, settings, "logit_normal")


def denoise(model: nn.Module, noisy: Tensor, timesteps: Tensor, conditions: Conditions) -> Tensor:
    dtype = model.transformer_blocks[0].attn.norm_q.weight.dtype  # others may be quantized
    text = conditions["text"].to(dtype)
    count, _, height, width = noisy.shape
    pad = nn.functional.pad
    # Positions are (picture, row, column, place in the text).
    image_ids = pad(grid(height, width, noisy.device), (1, 1))
    text_ids = pad(torch.arange(text.shape[1], device=noisy.device).float()[:, None], (3, 0))
    tokens = model(
        hidden_states=noisy.flatten(2).transpose(1, 2).to(dtype),
        timestep=timesteps / 1000,
        guidance=None,
        encoder_hidden_states=text,
        txt_ids=text_ids.expand(count, -1, -1),
        img_ids=image_ids.expand(count, -1, -1),
        return_dict=False,
    )[0]
    return tokens.transpose(1, 2).reshape(noisy.shape)


def sample(pipe: Any, request: SampleRequest) -> Tensor:
    dtype = pipe.transformer.dtype
    latents = pipe(
        prompt_embeds=request.conditions["text"].to(dtype),
        negative_prompt_embeds=request.nothing("text").to(dtype),
        guidance_scale=request.guidance,
        **request.call,
    ).images
    # The pipeline gives the VAE's own latents, not those that the denoiser knows.
    mean, std = _normal(pipe.vae)
    return (_patches(latents).to(mean) - mean) / std


FAMILY = Family(
    name="flux2",
    pipelines=("Flux2KleinPipeline",),
    denoiser="transformer",
    text_encoders=("text_encoder",),
    tokenizers=("tokenizer",),
    targets=(*JOINT_TARGETS, "to_qkv_mlp_proj"),
    text_targets=("q_proj", "k_proj", "v_proj", "o_proj"),
    multiple=16,
    native_size=native_size,
    load=load_stock,
    encode_text=encode_text,
    encode_images=encode_images,
    decode_latents=decode_latents,
    objective=objective,
    denoise=denoise,
    sample=sample,
    large_encoders=("text_encoder",),
)
