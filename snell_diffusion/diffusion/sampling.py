"""Sample pictures from the modules that are being trained; there is no second pipeline."""

from collections.abc import Iterator, Sequence
from contextlib import contextmanager

import torch
from PIL import Image
from torch import Tensor

from snell_diffusion.diffusion.encoded import finite_rows
from snell_diffusion.diffusion.families import Conditions, SampleRequest
from snell_diffusion.diffusion.setup import Model
from snell_diffusion.errors import shown
from snell_diffusion.training.errors import NonFiniteError
from snell_diffusion.training.randomness import generator


def to_pictures(pixels: Tensor) -> list[Image.Image]:
    """Pixels [B, 3, H, W] in [0, 1] -> RGB pictures."""
    bytes_bhwc = (pixels * 255).round().to(torch.uint8).permute(0, 2, 3, 1).cpu().numpy()
    return [Image.fromarray(array) for array in bytes_bhwc]


def rest(model: Model) -> None:
    """Move the frozen encoders off the GPU; `Sampler` brings them back while it draws."""
    if model.device.type != "cpu":
        for part in model.frozen_encoders():
            part.to("cpu")


@contextmanager
def _awake(model: Model) -> Iterator[None]:
    """The frozen encoders on the denoiser's device inside this context, then where they were."""
    places = [(part, next(part.parameters()).device) for part in model.frozen_encoders()]
    for part, place in places:
        if place != model.device:
            part.to(model.device)
    try:
        yield
    finally:
        for part, place in places:
            if place != model.device:
                part.to(place)


class Sampler:
    """Draws pictures; picture `i` of a prompt has the same start noise at every call.

    Args:
        model: The base with its adapters.
        size: Side in pixels.
        steps: Denoising steps.
        guidance: Classifier-free guidance scale.
        seed: Seed of the start noise.
        batch: Pictures per call of the pipeline.
    """

    def __init__(
        self,
        model: Model,
        *,
        size: int,
        steps: int,
        guidance: float,
        seed: int,
        batch: int = 4,
    ) -> None:
        self._model = model
        self._size, self._steps, self._guidance = size, steps, guidance
        self._seed, self._batch = seed, batch

    @torch.no_grad()
    def draw(
        self, prompts: Sequence[str], purpose: str, indices: Sequence[int]
    ) -> list[Image.Image]:
        """One picture per prompt; its start noise is a function of (seed, purpose, index).

        Raises:
            NonFiniteError: A picture holds NaN or infinite values, which would be shown as black.
        """
        pictures: list[Image.Image] = []
        with _awake(self._model):
            for start in range(0, len(prompts), self._batch):
                some = slice(start, start + self._batch)
                pictures += self._call(prompts[some], purpose, indices[some])
        return pictures

    def _call(
        self, prompts: Sequence[str], purpose: str, indices: Sequence[int]
    ) -> list[Image.Image]:
        # One encoder call: the rows of the prompts, then the empty prompt's.
        family, pipe = self._model.family, self._model.pipe
        encoded = self._model.encode_text([*prompts, ""])
        conditions: Conditions = {name: rows[:-1] for name, rows in encoded.items()}
        request = SampleRequest(
            conditions=conditions,
            unconditional={name: rows[-1:] for name, rows in encoded.items()},
            generators=[generator(self._seed, purpose, index) for index in indices],
            size=self._size,
            steps=self._steps,
            guidance=self._guidance,
        )
        latents = family.sample(pipe, request)
        pixels = family.decode_latents(pipe, latents)
        _require_finite(latents, pixels, prompts)
        return to_pictures(pixels)


def _require_finite(latents: Tensor, pixels: Tensor, prompts: Sequence[str]) -> None:
    for part, values in (("denoiser", latents), ("VAE", pixels)):
        sound = finite_rows(values)
        bad = [f"'{prompt}'" for prompt, ok in zip(prompts, sound, strict=True) if not ok]
        if bad:
            raise NonFiniteError(
                f"the {part} gave NaN or infinite values in the picture of {shown(set(bad), 4)}; "
                f"try mixed_precision no or bf16, or a lower guidance_scale"
            )
