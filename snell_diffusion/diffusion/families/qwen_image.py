"""Qwen-Image: a two-stream transformer, Qwen 2.5-VL, a video autoencoder, rectified flow."""

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.utils.rnn import pad_sequence

from snell_diffusion.diffusion.families.base import (
    JOINT_TARGETS,
    Conditions,
    Family,
    SampleRequest,
    load_stock,
)
from snell_diffusion.diffusion.flow import NUM_TIMESTEPS, FlowObjective, scheduler_shift
from snell_diffusion.diffusion.kl_vae import to_pixels
from snell_diffusion.diffusion.packing import pack, unpack
from snell_diffusion.diffusion.prompts import pad_rows, unpad_rows
from snell_diffusion.diffusion.timesteps import TimestepSettings

_PROMPT_LENGTH = 512  # as the pipeline's own


def encode_text(pipe: Any, prompts: Sequence[str]) -> Conditions:
    """Prompts in the pipeline's template, without its start -> "text" [B, 512, D] and "mask"."""
    text, mask = pipe.encode_prompt(
        list(prompts), device=pipe.text_encoder.device, max_sequence_length=_PROMPT_LENGTH
    )
    rows = text if mask is None else unpad_rows({"text": text, "mask": mask.bool()})
    return pad_rows(list(rows), _PROMPT_LENGTH)


def encode_images(pipe: Any, pixels: Tensor) -> tuple[Tensor, Tensor]:
    """Pictures are films of one frame to this autoencoder; latents are normalised by channel."""
    vae = pipe.vae
    posterior = vae.encode(pixels.to(vae.device, vae.dtype).unsqueeze(2)).latent_dist
    mean, std = _moments(vae)
    latents = (posterior.mean.squeeze(2).float() - mean) / std
    return latents, posterior.std.squeeze(2).float() / std


def decode_latents(pipe: Any, latents: Tensor) -> Tensor:
    vae = pipe.vae
    mean, std = _moments(vae)
    film = (latents.to(vae.device, torch.float32) * std + mean).unsqueeze(2)
    return to_pixels(vae.decode(film.to(vae.dtype)).sample.squeeze(2))


def _moments(vae: Any) -> tuple[Tensor, Tensor]:
    """Mean and standard deviation of every latent channel, each [C, 1, 1]."""
    mean, std = torch.tensor([vae.config.latents_mean, vae.config.latents_std], device=vae.device)
    return mean[:, None, None], std[:, None, None]


def native_size(pipe: Any) -> int:
    return int(pipe.default_sample_size * pipe.vae_scale_factor)


def objective(pipe: Any, device: torch.device, settings: TimestepSettings) -> FlowObjective:
    side = pipe.vae_scale_factor * 2
    return FlowObjective(scheduler_shift(pipe.scheduler, side**2), settings, "logit_normal")


def denoise(model: nn.Module, noisy: Tensor, timesteps: Tensor, conditions: Conditions) -> Tensor:
    height, width = noisy.shape[2:]
    dtype = model.img_in.bias.dtype  # the weight may be quantized
    text, mask = _as_long_as_needed(conditions)
    tokens = model(
        hidden_states=pack(noisy).to(dtype),
        timestep=timesteps / NUM_TIMESTEPS,
        encoder_hidden_states=text.to(dtype),
        encoder_hidden_states_mask=mask,
        img_shapes=[[(1, height // 2, width // 2)]] * len(noisy),
        return_dict=False,
    )[0]
    return unpack(tokens, height, width)


def _as_long_as_needed(conditions: Conditions) -> tuple[Tensor, Tensor | None]:
    """Text cut to the longest prompt of the batch, and a mask where prompts differ in length.

    Padding to a fixed length and a mask would cost time and the fast attention kernels.
    """
    rows = unpad_rows(conditions)
    lengths = {len(row) for row in rows}
    text = pad_sequence(rows, batch_first=True)
    return text, None if len(lengths) == 1 else conditions["mask"][:, : max(lengths)]


def sample(pipe: Any, request: SampleRequest) -> Tensor:
    dtype = pipe.transformer.dtype
    text = request.conditions
    guided = request.guidance > 1
    tokens = pipe(
        prompt_embeds=text["text"].to(dtype),
        prompt_embeds_mask=text["mask"],
        negative_prompt_embeds=request.nothing("text").to(dtype) if guided else None,
        negative_prompt_embeds_mask=request.nothing("mask") if guided else None,
        true_cfg_scale=request.guidance,
        max_sequence_length=_PROMPT_LENGTH,
        **request.call,
    ).images
    side = request.size // pipe.vae_scale_factor
    return unpack(tokens, side, side)


FAMILY = Family(
    name="qwen_image",
    pipelines=("QwenImagePipeline",),
    denoiser="transformer",
    text_encoders=("text_encoder",),
    tokenizers=("tokenizer",),
    targets=JOINT_TARGETS,
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
