"""Stable Diffusion XL: a UNet told of sizes and crops, two CLIPs, epsilon or v."""

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor, nn

from snell_diffusion.diffusion import kl_vae
from snell_diffusion.diffusion.families.base import Conditions, Family, SampleRequest, load_stock
from snell_diffusion.diffusion.losses import DiffusionObjective
from snell_diffusion.diffusion.timesteps import TimestepSettings
from snell_diffusion.errors import SnellaBaseError


def load(source: str, **options: Any) -> Any:
    pipe = load_stock(source, add_watermarker=False, **options)
    if not hasattr(pipe.scheduler, "alphas_cumprod"):
        raise SnellaBaseError(
            f"base '{source}' has the scheduler {type(pipe.scheduler).__name__}, which is not one "
            f"of a discrete diffusion; Stable Diffusion XL trains with DDPM, Euler and their like"
        )
    return pipe


def encode_text(pipe: Any, prompts: Sequence[str]) -> Conditions:
    """Prompts -> "text" [B, L, D], both CLIPs side by side, and "pooled" [B, D'].

    The empty prompt gives zeros where the base was trained so (`force_zeros_for_empty_prompt`): it
    is what guidance starts from, and what a dropped caption becomes.
    """
    text, _, pooled, _ = pipe.encode_prompt(
        list(prompts),
        device=pipe.text_encoder.device,
        num_images_per_prompt=1,
        do_classifier_free_guidance=False,
    )
    if pipe.config.force_zeros_for_empty_prompt:
        empty = torch.tensor([not prompt for prompt in prompts], device=text.device)
        text = text.masked_fill(empty[:, None, None], 0)
        pooled = pooled.masked_fill(empty[:, None], 0)
    return {"text": text, "pooled": pooled}


def native_size(pipe: Any) -> int:
    return int(pipe.unet.config.sample_size * pipe.vae_scale_factor)


def objective(pipe: Any, device: torch.device, settings: TimestepSettings) -> DiffusionObjective:
    return DiffusionObjective.of(pipe.scheduler, device, settings)


def denoise(model: nn.Module, noisy: Tensor, timesteps: Tensor, conditions: Conditions) -> Tensor:
    dtype = model.conv_in.weight.dtype  # `model.dtype` walks every module
    added = {"text_embeds": conditions["pooled"].to(dtype), "time_ids": conditions["geometry"]}
    return model(  # type: ignore[no-any-return]
        noisy.to(dtype),
        timesteps,
        conditions["text"].to(dtype),
        added_cond_kwargs=added,
        return_dict=False,
    )[0]


def sample(pipe: Any, request: SampleRequest) -> Tensor:
    return pipe(  # type: ignore[no-any-return]
        prompt_embeds=request.conditions["text"],
        pooled_prompt_embeds=request.conditions["pooled"],
        negative_prompt_embeds=request.nothing("text"),
        negative_pooled_prompt_embeds=request.nothing("pooled"),
        guidance_scale=request.guidance,
        **request.call,
    ).images


FAMILY = Family(
    name="sdxl",
    pipelines=("StableDiffusionXLPipeline",),
    denoiser="unet",
    text_encoders=("text_encoder", "text_encoder_2"),
    tokenizers=("tokenizer", "tokenizer_2"),
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
    conv_targets=("conv1", "conv2", "conv_shortcut", "conv"),
)
