"""Stable Diffusion 3 and 3.5: a joint-attention transformer, two CLIPs and T5, rectified flow.

T5 may be absent (`text_encoder_3` is null in model_index.json). Its place in the prompt's sequence
then holds zeros, in training as in the stock pipeline. Where it is there, it stays frozen: it has
more weights than the denoiser, and diffusers' scripts train the CLIPs alone, too.
"""

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor, nn

from snell_diffusion.diffusion import kl_vae
from snell_diffusion.diffusion.families.base import (
    JOINT_TARGETS,
    Conditions,
    Family,
    SampleRequest,
    load_stock,
)
from snell_diffusion.diffusion.flow import FlowObjective, scheduler_shift
from snell_diffusion.diffusion.timesteps import TimestepSettings


def encode_text(pipe: Any, prompts: Sequence[str]) -> Conditions:
    """Prompts -> "text" [B, L, D], the two CLIPs' tokens and then T5's, and "pooled" [B, D']."""
    text, _, pooled, _ = pipe.encode_prompt(
        list(prompts),
        prompt_2=None,
        prompt_3=None,
        device=pipe.text_encoder.device,
        do_classifier_free_guidance=False,
    )
    return {"text": text, "pooled": pooled}


def native_size(pipe: Any) -> int:
    return int(pipe.transformer.config.sample_size * pipe.vae_scale_factor)


def objective(pipe: Any, device: torch.device, settings: TimestepSettings) -> FlowObjective:
    side = pipe.vae_scale_factor * pipe.transformer.config.patch_size
    return FlowObjective(scheduler_shift(pipe.scheduler, side**2), settings, "logit_normal")


def denoise(model: nn.Module, noisy: Tensor, timesteps: Tensor, conditions: Conditions) -> Tensor:
    dtype = model.pos_embed.proj.weight.dtype  # `model.dtype` walks every module
    return model(  # type: ignore[no-any-return]
        hidden_states=noisy.to(dtype),
        timestep=timesteps,
        encoder_hidden_states=conditions["text"].to(dtype),
        pooled_projections=conditions["pooled"].to(dtype),
        return_dict=False,
    )[0]


def sample(pipe: Any, request: SampleRequest) -> Tensor:
    dtype = pipe.transformer.dtype
    return pipe(  # type: ignore[no-any-return]
        prompt_embeds=request.conditions["text"].to(dtype),
        pooled_prompt_embeds=request.conditions["pooled"].to(dtype),
        negative_prompt_embeds=request.nothing("text").to(dtype),
        negative_pooled_prompt_embeds=request.nothing("pooled").to(dtype),
        guidance_scale=request.guidance,
        **request.call,
    ).images


FAMILY = Family(
    name="sd3",
    pipelines=("StableDiffusion3Pipeline",),
    denoiser="transformer",
    text_encoders=("text_encoder", "text_encoder_2"),
    tokenizers=("tokenizer", "tokenizer_2"),
    targets=JOINT_TARGETS,
    text_targets=("q_proj", "k_proj", "v_proj", "out_proj"),
    multiple=16,
    native_size=native_size,
    load=load_stock,
    encode_text=encode_text,
    encode_images=kl_vae.encode_images,
    decode_latents=kl_vae.decode_latents,
    objective=objective,
    denoise=denoise,
    sample=sample,
    large_encoders=("text_encoder_3",),
)
