"""Stable Diffusion 1.x and 2.x: a cross-attention UNet, one CLIP text encoder, epsilon or v."""

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor, nn

from snell_diffusion.diffusion import kl_vae
from snell_diffusion.diffusion.families.base import Conditions, Family, SampleRequest, load_stock
from snell_diffusion.diffusion.losses import DiffusionObjective
from snell_diffusion.diffusion.timesteps import TimestepSettings


def load(source: str, **options: Any) -> Any:
    from diffusers import DDPMScheduler

    pipe = load_stock(source, safety_checker=None, requires_safety_checker=False, **options)
    if not hasattr(pipe.scheduler, "alphas_cumprod"):
        pipe.scheduler = DDPMScheduler.from_config(pipe.scheduler.config)
    return pipe


def encode_text(pipe: Any, prompts: Sequence[str]) -> Conditions:
    """Prompts -> {"text": [B, L, D]}, the last hidden state as the pipeline uses it."""
    tokens = pipe.tokenizer(
        list(prompts),
        padding="max_length",
        max_length=pipe.tokenizer.model_max_length,
        truncation=True,
        return_tensors="pt",
    )
    encoder = pipe.text_encoder
    masked = getattr(encoder.config, "use_attention_mask", False)
    mask = tokens.attention_mask.to(encoder.device) if masked else None
    return {"text": encoder(tokens.input_ids.to(encoder.device), attention_mask=mask)[0]}


def native_size(pipe: Any) -> int:
    return int(pipe.unet.config.sample_size * pipe.vae_scale_factor)


def objective(pipe: Any, device: torch.device, settings: TimestepSettings) -> DiffusionObjective:
    return DiffusionObjective.of(pipe.scheduler, device, settings)


def denoise(model: nn.Module, noisy: Tensor, timesteps: Tensor, conditions: Conditions) -> Tensor:
    # `model.dtype` walks every module, which is a tenth of a step on a small model.
    dtype = model.conv_in.weight.dtype
    return model(  # type: ignore[no-any-return]
        noisy.to(dtype), timesteps, conditions["text"].to(dtype), return_dict=False
    )[0]


def sample(pipe: Any, request: SampleRequest) -> Tensor:
    guided = request.guidance > 1
    text = request.conditions["text"]
    return pipe(  # type: ignore[no-any-return]
        prompt_embeds=text,
        negative_prompt_embeds=request.nothing("text") if guided else None,
        guidance_scale=request.guidance if guided else 1.0,
        **request.call,
    ).images


FAMILY = Family(
    name="sd",
    pipelines=("StableDiffusionPipeline",),
    denoiser="unet",
    text_encoders=("text_encoder",),
    tokenizers=("tokenizer",),
    targets=("to_q", "to_k", "to_v", "to_out.0", "ff.net.0.proj", "ff.net.2"),
    text_targets=("q_proj", "k_proj", "v_proj", "out_proj"),
    multiple=8,
    native_size=native_size,
    load=load,
    encode_text=encode_text,
    encode_images=kl_vae.encode_images,
    decode_latents=kl_vae.decode_latents,
    objective=objective,
    denoise=denoise,
    sample=sample,
    conv_targets=("conv1", "conv2", "conv_shortcut", "conv", "proj_in", "proj_out"),
)
