"""Stable Diffusion 3 with and without T5."""

import torch

from snell_diffusion.diffusion.encoded import text_fingerprint
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


def test_cached_embeddings_know_of_t5() -> None:
    """Although it is never adapted; and what of the pipeline is not text does not count."""
    with_t5, without = (tiny_sd3.pipeline(t5=t5) for t5 in (True, False))
    prints = [text_fingerprint(sd3.FAMILY, pipe) for pipe in (with_t5, without)]
    with torch.no_grad():
        with_t5.text_encoder_3.shared.weight[0, 0] += 1
        without.transformer.pos_embed.proj.weight[0] += 1
    assert text_fingerprint(sd3.FAMILY, without) == prints[1]
    assert len({str(p) for p in (*prints, text_fingerprint(sd3.FAMILY, with_t5))}) == 3
