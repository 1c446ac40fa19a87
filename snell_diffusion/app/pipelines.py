"""One base model in memory, the adapters it wears now, and its pictures."""

import inspect
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from PIL import Image

from snell_diffusion.app.bases import Base
from snell_diffusion.app.library import Adapter, header_of
from snell_diffusion.errors import SnellaError, SnellaValueError

Watch = Callable[[], None]
"""Called after every denoising step; ends the work by raising."""


@dataclass(frozen=True)
class Look:
    """Everything that decides one picture, beside the adapters.

    Attributes:
        prompt, negative_prompt, seed, steps, guidance, width, height: As in `DrawRequest`.
    """

    prompt: str
    negative_prompt: str
    seed: int
    steps: int
    guidance: float
    width: int
    height: int


@dataclass(frozen=True)
class Garment:
    """One version of an adapter file."""

    id: str
    path: Path
    version: int  # of its last change, in nanoseconds
    label: str
    has_words: bool

    @classmethod
    def of(cls, adapter: Adapter) -> "Garment":
        """What is in an adapter's file now.

        Raises:
            SnellaValueError: The file is gone or cannot be read.
        """
        header = header_of(adapter.path)
        if header is None:
            raise SnellaValueError(f"{adapter.label} cannot be read any more: choose another")
        version = adapter.path.stat().st_mtime_ns
        words = header.tokens is not None
        return cls(adapter.id, adapter.path, version, adapter.label, words)


class Loaded:
    """A pipeline and what it wears. Not for use from several threads.

    Args:
        base: Which base to load, on the GPU in bfloat16 where there is one.

    Raises:
        SnellaValueError: It cannot be loaded.
    """

    def __init__(self, base: Base) -> None:
        self.base = base
        self.pipe = load(base)
        self._worn: dict[str, Garment] = {}
        self._counts: dict[tuple[Garment, float | None], tuple[int, int]] = {}

    def wear(
        self, worn: Sequence[tuple[Garment, float]], sparsity: float | None, watch: Watch
    ) -> None:
        """Have exactly these adapters loaded and active.

        Args:
            worn: Adapters and their strengths.
            sparsity: One level for all, or None for their own.
            watch: Called between two loads.

        Raises:
            SnellaError: An adapter does not fit the base, or has no levels.
        """
        wanted = {garment.id: garment for garment, _ in worn}
        for name, garment in list(self._worn.items()):
            if wanted.get(name) != garment:
                self.pipe.unload_snella_weights(name)
                del self._worn[name]
        for garment, _ in worn:
            if garment.id not in self._worn:
                watch()
                self._put_on(garment)
        if worn:
            self.pipe.enable_snella()
            self.pipe.set_snella_adapters(list(wanted), [strength for _, strength in worn])
            self._set_level(sparsity)

    def _put_on(self, garment: Garment) -> None:
        try:
            self.pipe.load_snella_weights(garment.path, adapter_name=garment.id)
        except SnellaError as error:
            raise type(error)(_by_label(error, [garment])) from error
        self._worn[garment.id] = garment

    def _set_level(self, sparsity: float | None) -> None:
        try:
            self.pipe.set_snella_sparsity(sparsity)
        except SnellaError as error:
            raise type(error)(_by_label(error, self._worn.values())) from error

    def take_off(self) -> None:
        """Draw what the base alone draws, until the next `wear`.

        Adapters stay in memory, switched off; those with new words go, as a prompt would name them.
        """
        if any(garment.has_words for garment in self._worn.values()):
            self.wear((), None, lambda: None)
        elif self._worn:
            self.pipe.disable_snella()

    def kept(self, sparsity: float | None) -> tuple[int, int]:
        """(entries that survive, entries) of the updates worn now, counted over all layers."""
        counts = [self._count(garment, sparsity) for garment in self._worn.values()]
        return sum(kept for kept, _ in counts), sum(size for _, size in counts)

    def _count(self, garment: Garment, sparsity: float | None) -> tuple[int, int]:
        from snell_diffusion.diffusion.loaded import opened
        from snell_diffusion.tuners import delta_layers

        key = garment, sparsity
        if key not in self._counts:
            with opened(self.pipe) as models:
                layers: list[Any] = [
                    layer
                    for model in models.values()
                    for _, layer in delta_layers(model, garment.id)
                ]
                kept = sum(layer.kept(garment.id) for layer in layers)
                size = sum(layer.in_features * layer.out_features for layer in layers)
            self._counts[key] = kept, size
        return self._counts[key]

    def picture(self, look: Look, watch: Watch) -> Image.Image:
        """Draw one picture, RGB; noise comes from the CPU, so that it is the same on any device."""
        call = {
            "prompt": look.prompt,
            "num_inference_steps": look.steps,
            "width": look.width,
            "height": look.height,
            "generator": torch.Generator().manual_seed(look.seed),
            **guided(self.base, look),
            **_watched(self.pipe, watch),
        }
        with torch.inference_mode(False):
            return self.pipe(**call).images[0].convert("RGB")


def load(base: Base) -> Any:
    """The pipeline that the base's model_index.json names; safetensors only, no code of its own.

    Raises:
        SnellaValueError: It cannot be loaded; the message has no path.
    """
    from snell_diffusion.diffusion.families.base import load_stock

    on_gpu = torch.cuda.is_available()
    options = {"local_files_only": True} if base.shipped else {}
    try:
        pipe = load_stock(
            base.location, dtype=torch.bfloat16 if on_gpu else torch.float32, **options
        )
        return pipe.to("cuda") if on_gpu else pipe
    except (OSError, ValueError, KeyError) as error:
        raise SnellaValueError(
            f"the base {base.id} cannot be loaded ({type(error).__name__}): whoever started this "
            "server should check its folder or hub id"
        ) from error


def guided(base: Base, look: Look) -> dict[str, Any]:
    """Guidance and negative prompt, as the pipelines of a family call them."""
    negative = {"negative_prompt": look.negative_prompt} if base.takes_negative else {}
    if base.family == "qwen_image":
        return {"negative_prompt": look.negative_prompt or " ", "true_cfg_scale": look.guidance}
    if base.family == "z_image" and look.guidance <= 1:
        return {"guidance_scale": 0.0}
    exact = {"use_resolution_binning": False} if base.family in ("pixart_sigma", "sana") else {}
    return {"guidance_scale": look.guidance, **negative, **exact}


def _watched(pipe: Any, watch: Watch) -> dict[str, Any]:
    """How a pipeline is told to call `watch` after every step."""
    known = inspect.signature(type(pipe).__call__).parameters

    def stepped(*_: Any) -> dict[str, Any]:
        watch()
        return {}  # nothing of the step is changed

    if "callback_on_step_end" in known:
        return {"callback_on_step_end": stepped}
    return {"callback": stepped, "callback_steps": 1}


def _by_label(error: SnellaError, garments: Any) -> str:
    """An error's text with adapters as lists call them: no paths, no ids."""
    text = str(error)
    for garment in garments:
        text = text.replace(str(garment.path), garment.label).replace(garment.id, garment.label)
    return text
