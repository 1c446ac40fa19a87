"""Encoded prompts of one length: "text" [B, L, D] and "mask" [B, L], 1 where a token is."""

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from snell_diffusion.diffusion.families.base import Conditions


def encode_masked(pipe: Any, prompts: Sequence[str], **options: Any) -> Conditions:
    """Encode by a pipeline that pads every prompt to one length and gives a mask.

    An empty prompt is encoded as the pipeline encodes an empty negative prompt, which some
    pipelines give no instruction.

    Args:
        pipe: Its `encode_prompt` gives text, mask, negative text and negative mask.
        prompts: B prompts.
        options: More arguments of `encode_prompt`.
    """
    some_empty = "" in prompts
    text, mask, nothing, its_mask = pipe.encode_prompt(
        list(prompts),
        do_classifier_free_guidance=some_empty,
        device=pipe.text_encoder.device,
        **options,
    )
    if some_empty:
        empty = torch.tensor([not prompt for prompt in prompts], device=mask.device)[:, None]
        text = torch.where(empty[..., None], nothing, text)
        mask = torch.where(empty, its_mask, mask)
    return {"text": text, "mask": mask}


def pad_rows(rows: Sequence[Tensor], length: int) -> Conditions:
    """Tokens [L_i, D] of B prompts -> B rows of `length`, at least every L_i; zeros behind."""
    text = rows[0].new_zeros(len(rows), length, rows[0].shape[1])
    mask = torch.zeros(len(rows), length, dtype=torch.bool, device=text.device)
    for index, row in enumerate(rows):
        text[index, : len(row)] = row
        mask[index, : len(row)] = True
    return {"text": text, "mask": mask}


def unpad_rows(conditions: Conditions) -> list[Tensor]:
    """The reverse of `pad_rows`: the tokens of every prompt, [L_i, D]."""
    rows = zip(conditions["text"], conditions["mask"], strict=True)
    return [text[mask] for text, mask in rows]
