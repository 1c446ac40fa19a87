"""PixArt-Sigma, and PixArt-Alpha: a cross-attention transformer, T5, noise prediction.

The transformer also predicts a variance, in the second half of its channels; it is not trained.
"""

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor, nn

from snell_diffusion.diffusion import kl_vae
from snell_diffusion.diffusion.families.base import Conditions, Family, SampleRequest, load_stock
from snell_diffusion.diffusion.losses import DiffusionObjective
from snell_diffusion.diffusion.prompts import encode_masked
from snell_diffusion.diffusion.timesteps import TimestepSettings


def encode_text(pipe: Any, prompts: Sequence[str]) -> Conditions:
    """Prompts, put in lower case -> "text" [B, L, D] and "mask" [B, L]; L is 300, of Alpha 120."""
    return encode_masked(pipe, prompts)


def native_size(pipe: Any) -> int:
    return int(pipe.transformer.config.sample_size * pipe.vae_scale_factor)


def objective(pipe: Any, device: torch.device, settings: TimestepSettings) -> DiffusionObjective:
    return DiffusionObjective.of(pipe.scheduler, device, settings)


def denoise(model: nn.Module, noisy: Tensor, timesteps: Tensor, conditions: Conditions) -> Tensor:
    dtype = model.pos_embed.proj.bias.dtype  # `model.dtype` walks every module
    prediction: Tensor = model(
        noisy.to(dtype),
        encoder_hidden_states=conditions["text"].to(dtype),
        encoder_attention_mask=conditions["mask"],
        timestep=timesteps,
        added_cond_kwargs=_micro_conditions(model, conditions, dtype),
        return_dict=False,
    )[0]
    return prediction[:, : noisy.shape[1]]


def _micro_conditions(
    model: nn.Module, conditions: Conditions, dtype: torch.dtype
) -> dict[str, Tensor | None]:
    """Height and width of the picture and their ratio, for the bases that take them."""
    if not model.use_additional_conditions:
        return {"resolution": None, "aspect_ratio": None}
    size = conditions["geometry"][:, 4:].to(dtype)
    return {"resolution": size, "aspect_ratio": size[:, :1] / size[:, 1:]}


def sample(pipe: Any, request: SampleRequest) -> Tensor:
    dtype = pipe.transformer.dtype
    text = request.conditions
    return pipe(  # type: ignore[no-any-return]
        prompt_embeds=text["text"].to(dtype),
        prompt_attention_mask=text["mask"],
        negative_prompt=None,
        negative_prompt_embeds=request.nothing("text").to(dtype),
        negative_prompt_attention_mask=request.nothing("mask"),
        guidance_scale=request.guidance,
        use_resolution_binning=False,
        **request.call,
    ).images


FAMILY = Family(
    name="pixart_sigma",
    pipelines=("PixArtSigmaPipeline", "PixArtAlphaPipeline"),
    denoiser="transformer",
    text_encoders=("text_encoder",),
    tokenizers=("tokenizer",),
    targets=("to_q", "to_k", "to_v", "to_out.0", "ff.net.0.proj", "ff.net.2"),
    text_targets=("q", "k", "v", "o"),
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
    lower_case=True,
)
