"""Stable Diffusion 3 with and without T5."""

import torch

from snell_diffusion.diffusion.families import sd3
from tests.families import tiny_sd3


@torch.no_grad()
def test_the_place_of_a_missing_t5_holds_zeros() -> None:
    """The pipeline's own default: 256 tokens behind those of the CLIPs."""
    clips = 16
    text = sd3.encode_text(tiny_sd3.pipeline(t5=False), ["a cat"])["text"]
    assert text.shape[1] == clips + 256
    assert text[:, :clips].any()
    assert not text[:, clips:].any()
    assert sd3.encode_text(tiny_sd3.pipeline(t5=True), ["a cat"])["text"][:, clips:].any()
