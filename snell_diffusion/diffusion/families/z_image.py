"""Z-Image: one transformer over picture and text, Qwen 3, rectified flow.

Its time runs backwards, t = 1 - s, from noise at 0 to the picture at 1, so it predicts x_0 - e.
Pictures and prompts enter as lists, one tensor each, without padding.
"""

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor, nn

from snell_diffusion.diffusion import kl_vae
from snell_diffusion.diffusion.families.base import Conditions, Family, SampleRequest, load_stock
from snell_diffusion.diffusion.flow import NUM_TIMESTEPS, FlowObjective, scheduler_shift
from snell_diffusion.diffusion.prompts import pad_rows, unpad_rows
from snell_diffusion.diffusion.timesteps import TimestepSettings

_PROMPT_LENGTH = 512  # as the pipeline's own
_PATCH = 2


def encode_text(pipe: Any, prompts: Sequence[str]) -> Conditions:
    """Prompts in the chat template -> "text" [B, 512, D], zeros behind, and "mask" [B, 512]."""
    rows, _ = pipe.encode_prompt(
        list(prompts),
        device=pipe.text_encoder.device,
        do_classifier_free_guidance=False,
        max_sequence_length=_PROMPT_LENGTH,
    )
    return pad_rows(rows, _PROMPT_LENGTH)


def native_size(pipe: Any) -> int:
    return 1024  # the pipeline's own default; nothing in the files says it


def objective(pipe: Any, device: torch.device, settings: TimestepSettings) -> FlowObjective:
    side = pipe.vae_scale_factor * _PATCH
    return FlowObjective(scheduler_shift(pipe.scheduler, side**2), settings, "logit_normal")


def denoise(model: nn.Module, noisy: Tensor, timesteps: Tensor, conditions: Conditions) -> Tensor:
    dtype = model.cap_pad_token.dtype  # the weights may be quantized
    velocity = model(
        list(noisy.to(dtype).unsqueeze(2)),
        1 - timesteps / NUM_TIMESTEPS,
        [row.to(dtype) for row in unpad_rows(conditions)],
        patch_size=_PATCH,
        return_dict=False,
    )[0]
    return -torch.stack(velocity).squeeze(2)


def sample(pipe: Any, request: SampleRequest) -> Tensor:
    dtype = pipe.transformer.dtype
    text = [row.to(dtype) for row in unpad_rows(request.conditions)]
    nothing = [row.to(dtype) for row in unpad_rows(request.unconditional)]
    return pipe(  # type: ignore[no-any-return]
        prompt_embeds=text,
        negative_prompt_embeds=nothing * len(text),
        # This pipeline guides above 0, with another formula.
        guidance_scale=request.guidance if request.guidance > 1 else 0.0,
        **request.call,
    ).images


FAMILY = Family(
    name="z_image",
    pipelines=("ZImagePipeline",),
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
