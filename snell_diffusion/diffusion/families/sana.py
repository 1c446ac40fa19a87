"""Sana: a linear-attention transformer on latents of 32-pixel patches, Gemma 2, rectified flow."""

import inspect
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor, nn

from snell_diffusion.diffusion.families.base import Conditions, Family, SampleRequest, load_stock
from snell_diffusion.diffusion.flow import FlowObjective, scheduler_shift
from snell_diffusion.diffusion.kl_vae import to_pixels
from snell_diffusion.diffusion.prompts import encode_masked
from snell_diffusion.diffusion.timesteps import TimestepSettings


def encode_text(pipe: Any, prompts: Sequence[str]) -> Conditions:
    """Prompts -> "text" [B, 300, D] and "mask" [B, 300].

    Prompts are put in lower case and behind the instruction that the pipeline gives Gemma.
    """
    call = inspect.signature(type(pipe).__call__).parameters
    instruction = call["complex_human_instruction"].default
    return encode_masked(pipe, prompts, complex_human_instruction=instruction)


def encode_images(pipe: Any, pixels: Tensor) -> tuple[Tensor, Tensor]:
    """This autoencoder has no posterior: its standard deviation is zero."""
    vae = pipe.vae
    latents = vae.encode(pixels.to(vae.device, vae.dtype)).latent.float()
    return latents * vae.config.scaling_factor, torch.zeros_like(latents)


def decode_latents(pipe: Any, latents: Tensor) -> Tensor:
    vae = pipe.vae
    latents = latents.to(vae.device, vae.dtype) / vae.config.scaling_factor
    return to_pixels(vae.decode(latents).sample)


def native_size(pipe: Any) -> int:
    return int(pipe.transformer.config.sample_size * pipe.vae_scale_factor)


def objective(pipe: Any, device: torch.device, settings: TimestepSettings) -> FlowObjective:
    side = pipe.vae_scale_factor * pipe.transformer.config.patch_size
    return FlowObjective(scheduler_shift(pipe.scheduler, side**2), settings, "logit_normal")


def denoise(model: nn.Module, noisy: Tensor, timesteps: Tensor, conditions: Conditions) -> Tensor:
    dtype = model.patch_embed.proj.bias.dtype  # `model.dtype` walks every module
    prediction: Tensor = model(
        noisy.to(dtype),
        encoder_hidden_states=conditions["text"].to(dtype),
        encoder_attention_mask=conditions["mask"],
        timestep=timesteps * model.config.timestep_scale,
        return_dict=False,
    )[0]
    return prediction[:, : noisy.shape[1]]  # some bases learn the variance in further channels


def sample(pipe: Any, request: SampleRequest) -> Tensor:
    text = request.conditions
    return pipe(  # type: ignore[no-any-return]
        prompt_embeds=text["text"],
        prompt_attention_mask=text["mask"],
        negative_prompt=None,
        negative_prompt_embeds=request.nothing("text"),
        negative_prompt_attention_mask=request.nothing("mask"),
        guidance_scale=request.guidance,
        use_resolution_binning=False,
        **request.call,
    ).images


FAMILY = Family(
    name="sana",
    pipelines=("SanaPipeline",),
    denoiser="transformer",
    text_encoders=("text_encoder",),
    tokenizers=("tokenizer",),
    targets=("to_q", "to_k", "to_v", "to_out.0"),
    text_targets=("q_proj", "k_proj", "v_proj", "o_proj"),
    multiple=32,
    native_size=native_size,
    load=load_stock,
    encode_text=encode_text,
    encode_images=encode_images,
    decode_latents=decode_latents,
    objective=objective,
    denoise=denoise,
    sample=sample,
    conv_targets=("conv_inverted", "conv_depth", "conv_point"),
    large_encoders=("text_encoder",),
    lower_case=True,
)
