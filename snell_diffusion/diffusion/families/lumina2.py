"""Lumina-Image 2.0: one transformer over text and picture, Gemma 2, rectified flow.

Its time runs backwards, t = 1 - s, from noise at 0 to the picture at 1, so it predicts x_0 - e.
"""

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor, nn

from snell_diffusion.diffusion import kl_vae
from snell_diffusion.diffusion.families.base import Conditions, Family, SampleRequest, load_stock
from snell_diffusion.diffusion.flow import NUM_TIMESTEPS, FlowObjective, scheduler_shift
from snell_diffusion.diffusion.prompts import encode_masked
from snell_diffusion.diffusion.timesteps import TimestepSettings


def encode_text(pipe: Any, prompts: Sequence[str]) -> Conditions:
    """Prompts behind the system prompt -> "text" [B, 256, D] and "mask" [B, 256]."""
    return encode_masked(pipe, prompts)


def native_size(pipe: Any) -> int:
    return int(pipe.default_image_size)


def objective(pipe: Any, device: torch.device, settings: TimestepSettings) -> FlowObjective:
    # The pipeline gives a scheduler that shifts dynamically the number of channels for the length
    # of the sequence, so that size does not matter. The released base has one fixed shift.
    shift = scheduler_shift(pipe.scheduler, 1)(pipe.transformer.config.in_channels)
    return FlowObjective(lambda pixels: shift, settings, "logit_normal")


def denoise(model: nn.Module, noisy: Tensor, timesteps: Tensor, conditions: Conditions) -> Tensor:
    dtype = model.x_embedder.bias.dtype  # the weight may be quantized
    velocity: Tensor = model(
        hidden_states=noisy.to(dtype),
        timestep=1 - timesteps / NUM_TIMESTEPS,
        encoder_hidden_states=conditions["text"].to(dtype),
        encoder_attention_mask=conditions["mask"],
        return_dict=False,
    )[0]
    return -velocity


def sample(pipe: Any, request: SampleRequest) -> Tensor:
    dtype = pipe.transformer.dtype
    text = request.conditions
    return pipe(  # type: ignore[no-any-return]
        prompt_embeds=text["text"].to(dtype),
        prompt_attention_mask=text["mask"],
        negative_prompt_embeds=request.nothing("text").to(dtype),
        negative_prompt_attention_mask=request.nothing("mask"),
        guidance_scale=request.guidance,
        **request.call,
    ).images


FAMILY = Family(
    name="lumina2",
    pipelines=("Lumina2Pipeline",),
    denoiser="transformer",
    text_encoders=("text_encoder",),
    tokenizers=("tokenizer",),
    targets=("to_q", "to_k", "to_v", "to_out.0"),
    text_targets=("q_proj", "k_proj", "v_proj", "o_proj"),
    multiple=16,
    native_size=native_size,
    load=load_stock,
    encode_text=encode_text,
    encode_images=kl_vae.encode_images,
    decode_latents=kl_vae.decode_latents,
    objective=objective,
    denoise=denoise,
    sample=sample,
    large_encoders=("text_encoder",),
)
