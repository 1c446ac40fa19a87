"""FLUX.1 dev and schnell: a transformer over packed latents, CLIP and T5, rectified flow.

Guidance of dev is an input: the model was distilled to answer as classifier-free guidance of that
scale would. At scale 1 its answer is the plain velocity, which is what the target is; so training
asks at scale 1, and sampling at the scale that the user wants. Schnell has no such input.
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
from snell_diffusion.diffusion.packing import grid, pack, unpack
from snell_diffusion.diffusion.timesteps import TimestepSettings

TRAINING_GUIDANCE = 1.0


def encode_text(pipe: Any, prompts: Sequence[str]) -> Conditions:
    """Prompts -> "text" [B, L, D] of T5 and "pooled" [B, D'] of CLIP."""
    text, pooled, _ = pipe.encode_prompt(list(prompts), device=pipe.text_encoder.device)
    return {"text": text, "pooled": pooled}


def native_size(pipe: Any) -> int:
    return int(pipe.default_sample_size * pipe.vae_scale_factor)


def objective(pipe: Any, device: torch.device, settings: TimestepSettings) -> FlowObjective:
    side = 2 * pipe.vae_scale_factor
    return FlowObjective(scheduler_shift(pipe.scheduler, side**2), settings, "logit_normal")


def denoise(model: nn.Module, noisy: Tensor, timesteps: Tensor, conditions: Conditions) -> Tensor:
    dtype = model.x_embedder.bias.dtype  # the weight may be quantized
    height, width = noisy.shape[-2:]
    text = conditions["text"].to(dtype)
    row_column = grid(height // 2, width // 2, noisy.device)
    guided = model.config.guidance_embeds
    tokens = model(
        hidden_states=pack(noisy).to(dtype),
        timestep=timesteps / 1000,
        guidance=torch.full_like(timesteps, TRAINING_GUIDANCE) if guided else None,
        pooled_projections=conditions["pooled"].to(dtype),
        encoder_hidden_states=text,
        txt_ids=row_column.new_zeros(text.shape[1], 3),
        img_ids=torch.nn.functional.pad(row_column, (1, 0)),
        return_dict=False,
    )[0]
    return unpack(tokens, height, width)


def sample(pipe: Any, request: SampleRequest) -> Tensor:
    """Latents; `guidance` is the input of dev, and of no effect with schnell."""
    dtype = pipe.transformer.dtype
    tokens = pipe(
        prompt_embeds=request.conditions["text"].to(dtype),
        pooled_prompt_embeds=request.conditions["pooled"].to(dtype),
        guidance_scale=request.guidance,
        **request.call,
    ).images
    side = request.size // pipe.vae_scale_factor
    return unpack(tokens, side, side)


FAMILY = Family(
    name="flux",
    pipelines=("FluxPipeline",),
    denoiser="transformer",
    text_encoders=("text_encoder",),
    tokenizers=("tokenizer",),
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
    large_encoders=("text_encoder_2",),
)
