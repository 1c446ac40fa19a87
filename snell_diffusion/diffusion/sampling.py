"""Sample pictures from the modules that are being trained; there is no second pipeline."""

from collections.abc import Sequence
from typing import TypeVar

import torch
from PIL import Image
from torch import Tensor

from snell_diffusion.diffusion.encoded import finite_rows
from snell_diffusion.diffusion.families import Conditions, SampleRequest
from snell_diffusion.diffusion.setup import Model
from snell_diffusion.errors import shown
from snell_diffusion.training.errors import NonFiniteError
from snell_diffusion.training.randomness import generator

T = TypeVar("T")
_DRAWN_PIXELS, _DECODED_PIXELS = 4 * 512**2, 4 * 256**2


def drawn_at_once(size: int) -> int:
    """How many pictures of `size` x `size` pixels are denoised together: 4 up to 512, 1 at 1024.

    More would take more memory than a training step.
    """
    return max(1, min(4, _DRAWN_PIXELS // size**2))


def decoded_at_once(size: int) -> int:
    """How many of them the VAE decodes together, at least 1.

    In float32 a picture of 1024 pixels takes gigabytes, often more than all the rest of sampling.
    """
    return max(1, _DECODED_PIXELS // size**2)


def to_pictures(pixels: Tensor) -> list[Image.Image]:
    """Pixels [B, 3, H, W] in [0, 1] -> RGB pictures."""
    bytes_bhwc = (pixels * 255).round().to(torch.uint8).permute(0, 2, 3, 1).cpu().numpy()
    return [Image.fromarray(array) for array in bytes_bhwc]


class Sampler:
    """Draws pictures; picture `i` of a prompt has the same start noise at every call.

    Args:
        model: The base with its adapters.
        size: Side in pixels.
        steps: Denoising steps.
        guidance: Classifier-free guidance scale.
        seed: Seed of the start noise.
        batch: Pictures per call of the pipeline; default: see `drawn_at_once`.
    """

    def __init__(
        self,
        model: Model,
        *,
        size: int,
        steps: int,
        guidance: float,
        seed: int,
        batch: int | None = None,
    ) -> None:
        self._model = model
        self._size, self._steps, self._guidance = size, steps, guidance
        self._seed, self._batch = seed, batch or drawn_at_once(size)
        self._kept: dict[tuple[str, ...], Conditions] = {}

    @torch.no_grad()
    def draw(
        self, prompts: Sequence[str], purpose: str, indices: Sequence[int]
    ) -> list[Image.Image]:
        """One picture per prompt; its start noise is a function of (seed, purpose, index).

        Raises:
            NonFiniteError: A picture holds NaN or infinite values, which would be shown as black.
        """
        family, pipe, phases = self._model.family, self._model.pipe, self._model.phases
        calls = list(zip(self._calls(prompts), self._calls(indices), strict=True))
        requests = [self._request(some, purpose, numbers) for some, numbers in calls]
        phases.enter("sample")
        latents = [family.sample(pipe, request) for request in requests]
        phases.enter("decode")
        pictures: list[Image.Image] = []
        for (some, _), found in zip(calls, latents, strict=True):
            parts = found.split(decoded_at_once(self._size))
            pixels = torch.cat([family.decode_latents(pipe, part) for part in parts])
            _require_finite(found, pixels, some)
            pictures += to_pictures(pixels)
        return pictures

    @torch.no_grad()
    def prepare(self, prompts: Sequence[str]) -> None:
        """Encode prompts that `draw` will be asked for, in this order, while there are encoders.

        Call it under the precision that pictures are drawn in.
        """
        for some in self._calls(prompts):
            self._encoded(tuple(some))

    def _calls(self, values: Sequence[T]) -> list[Sequence[T]]:
        return [values[i : i + self._batch] for i in range(0, len(values), self._batch)]

    def _request(
        self, prompts: Sequence[str], purpose: str, indices: Sequence[int]
    ) -> SampleRequest:
        encoded = self._encoded(tuple(prompts))
        return SampleRequest(
            conditions={name: rows[:-1] for name, rows in encoded.items()},
            unconditional={name: rows[-1:] for name, rows in encoded.items()},
            generators=[generator(self._seed, purpose, index) for index in indices],
            size=self._size,
            steps=self._steps,
            guidance=self._guidance,
        )

    def _encoded(self, prompts: tuple[str, ...]) -> Conditions:
        """One encoder call: the rows of the prompts, then the empty prompt's."""
        if prompts in self._kept:
            return self._kept[prompts]
        encoded = self._model.encode_text([*prompts, ""])
        if self._model.text_is_frozen:
            self._kept[prompts] = encoded
        return encoded


def _require_finite(latents: Tensor, pixels: Tensor, prompts: Sequence[str]) -> None:
    for part, values in (("denoiser", latents), ("VAE", pixels)):
        sound = finite_rows(values)
        bad = [f"'{prompt}'" for prompt, ok in zip(prompts, sound, strict=True) if not ok]
        if bad:
            raise NonFiniteError(
                f"the {part} gave NaN or infinite values in the picture of {shown(set(bad), 4)}; "
                f"try mixed_precision no or bf16, or a lower guidance_scale"
            )
