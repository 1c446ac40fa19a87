"""The one pipeline of the app: draws the base model's and an adapter's picture side by side."""

import threading
from pathlib import Path
from typing import Any

import torch
from PIL import Image

from snell_diffusion.errors import SnellaValueError

ADAPTER = "studio"  # name of the one loaded adapter
MAX_PROMPT = 300  # characters
MAX_SEED = 2**31 - 1
STEPS = 25
GUIDANCE = 3.0


class Studio:
    """Loads the embedded base on first use; calls take turns, as a pipeline serves one at a time.

    Args:
        base: diffusers folder of the base model.
    """

    def __init__(self, base: str | Path) -> None:
        self.base = base
        self._pipe: Any = None
        self._loaded: tuple[Path, int] | None = None
        self._turn = threading.Lock()

    def draw(
        self,
        prompt: str,
        seed: int,
        adapter: Path,
        strength: float = 1.0,
        sparsity: float | None = None,
    ) -> tuple[Image.Image, Image.Image]:
        """Pictures of the base model and of the adapted model from the same seed.

        Args:
            prompt: 1 to MAX_PROMPT characters.
            seed: 0 to MAX_SEED.
            adapter: Adapter file.
            strength: Factor of the update; 0 leaves the base as it is, 1 is as trained.
            sparsity: Share of zeros in every layer's update, 0 to 1; None keeps the trained levels.

        Raises:
            SnellaValueError: A value is out of range.
            SnellaError: The adapter file cannot be loaded.
        """
        check_request(prompt, seed)
        with self._turn:
            pipe = self._with_adapter(adapter)
            pipe.disable_snella()
            base = self._picture(prompt, seed)
            pipe.enable_snella()
            pipe.set_snella_adapters([ADAPTER], [strength])
            pipe.set_snella_sparsity(sparsity)
            return base, self._picture(prompt, seed)

    def _with_adapter(self, adapter: Path) -> Any:
        if self._pipe is None:
            self._pipe = load_pipeline(self.base)
        version = (adapter, adapter.stat().st_mtime_ns)
        if self._loaded != version:
            if self._loaded is not None:
                self._loaded = None
                self._pipe.unload_snella_weights()
            self._pipe.load_snella_weights(adapter, adapter_name=ADAPTER)
            self._loaded = version
        return self._pipe

    def _picture(self, prompt: str, seed: int) -> Image.Image:
        generator = torch.Generator().manual_seed(seed)
        return self._pipe(
            prompt, num_inference_steps=STEPS, guidance_scale=GUIDANCE, generator=generator
        ).images[0]


def check_request(prompt: str, seed: int) -> None:
    """Refuse an empty or very long prompt and a seed out of range, with a sentence.

    Raises:
        SnellaValueError: As said.
    """
    if not prompt.strip():
        raise SnellaValueError("the prompt is empty: say what to draw, with the word sks in it")
    if len(prompt) > MAX_PROMPT:
        raise SnellaValueError(f"the prompt has {len(prompt)} characters; {MAX_PROMPT} are taken")
    if not 0 <= seed <= MAX_SEED:
        raise SnellaValueError(f"the seed must be 0 to {MAX_SEED}, got {seed}")


def load_pipeline(base: str | Path) -> Any:
    """A stock StableDiffusionPipeline with a silent progress bar."""
    from diffusers import StableDiffusionPipeline

    pipe = StableDiffusionPipeline.from_pretrained(
        base, use_safetensors=True, local_files_only=True
    )
    pipe.set_progress_bar_config(disable=True)
    return pipe
