"""The peak memory of every phase of a run, from fake tensors: nothing is loaded or measured.

The real model code runs on tensors without values; see `live` for what is counted and what is not.
"""

from collections.abc import Iterator
from dataclasses import dataclass
from itertools import chain
from typing import Any

import torch
from torch import Tensor, nn

from snell_diffusion.diffusion.config import TrainConfig
from snell_diffusion.diffusion.families import Conditions, Family, covering
from snell_diffusion.diffusion.loaded import models_of
from snell_diffusion.diffusion.losses import squared_error
from snell_diffusion.diffusion.memory.build import base_of, build
from snell_diffusion.diffusion.memory.live import FakeDevice, backward, tensors_of
from snell_diffusion.diffusion.memory.packed import pack
from snell_diffusion.diffusion.memory.updates import shorten_updates
from snell_diffusion.diffusion.phases import WORK, forget_updates, needs_of
from snell_diffusion.diffusion.quantization import IMMOVABLE
from snell_diffusion.diffusion.sampling import decoded_at_once, drawn_at_once
from snell_diffusion.diffusion.setup import (
    ADAPTER,
    DTYPES,
    Sizes,
    add_adapters,
    base_path,
    checkpoint_activations,
    precisions_of,
    sizes,
    timestep_settings,
)
from snell_diffusion.training.adapter_tensors import (
    adapter_parameters,
    adapter_tensors,
    trainable_parameters,
)
from snell_diffusion.tuners import delta_layers

# Bytes of optimizer state per trained number; 8 where the class is not listed (two moments).
_STATE = {"SGD": 0, "AdamW8bit": 2.04, "PagedAdamW8bit": 2.04, "Lion8bit": 1.02, "Lion": 4}
_STATE |= {"Prodigy": 16, "Adafactor": 0.1}


@dataclass(frozen=True)
class Computed:
    """What a run needs.

    Attributes:
        family: The family of the base.
        sizes: Layers and parameters.
        peaks: Bytes by phase.
    """

    family: str
    sizes: Sizes
    peaks: dict[str, int]

    @property
    def peak(self) -> int:
        """The largest peak, in bytes."""
        return max(self.peaks.values())

    def table(self) -> str:
        """All of it, for a terminal."""
        sizes, named = self.sizes, {phase: WORK[phase] for phase in self.peaks}
        return "\n".join(
            [
                f"family {self.family}: base {sizes.base:,} parameters, adapter "
                f"{sizes.trainable:,} in {sizes.layers} layers",
                "peak of GPU memory, computed with fake tensors, not measured:",
                *(f"  {work}: {self.peaks[p] / 2**30:.1f} GiB" for p, work in named.items()),
                f"at most {self.peak / 2**30:.1f} GiB; the CUDA context, kernels and fragmentation "
                f"take about 1 GiB more",
            ]
        )


def compute(config: TrainConfig) -> Computed:
    """Compute the peaks of a run on a GPU.

    Args:
        config: The run; its base is a diffusers folder (config files are enough) or a hub model
            that `bases` knows.

    Raises:
        SnellaBaseError: The sizes of the base are not known.
        SnellaConfigError: The settings do not fit the base.
    """
    base = base_of(base_path(config))
    family = covering(base.pipeline, base_path(config))
    pipe = build(base, precisions_of(config, family))
    denoiser: nn.Module = getattr(pipe, family.denoiser)
    pack(denoiser, config.base_quantization)
    components = add_adapters(config, family, pipe)
    for model in components.values():
        _read_levels(model)
        shorten_updates(model, ADAPTER)
        model.train()
        if config.gradient_checkpointing:
            checkpoint_activations(model)
    if config.offload_encoders is not False:
        forget_updates(components)
    half = None if config.mixed_precision == "no" else DTYPES[config.mixed_precision]
    run = _Run(config, family, pipe, components, FakeDevice(half))
    return Computed(family.name, sizes(components), dict(run.peaks()))


def _read_levels(model: nn.Module) -> None:
    """Levels are numbers that Python reads: these stay real tensors."""
    for _, layer in delta_layers(model, ADAPTER):
        if hasattr(layer, "snella_sparsity"):
            level = layer.configs[ADAPTER].init_sparsity
            layer.snella_sparsity[ADAPTER] = torch.tensor(level, dtype=torch.float64)
            layer.snella_threshold[ADAPTER] = torch.tensor(torch.nan)


class _Run:
    """The phases of one run on a fake device."""

    def __init__(
        self,
        config: TrainConfig,
        family: Family,
        pipe: Any,
        components: dict[str, nn.Module],
        device: FakeDevice,
    ) -> None:
        self._config, self._family, self._pipe = config, family, pipe
        self._components, self._device = components, device
        self._models = models_of(pipe)
        for model in self._models.values():
            device.take(model)
        self._needs = needs_of(
            list(self._models),
            family.denoiser,
            cached_text=len(components) == 1,
            cached_latents=config.cache_latents,
        )

    def peaks(self) -> Iterator[tuple[str, int]]:
        """Every phase with its peak, in bytes."""
        pictures = min(
            drawn_at_once(self._config.resolution),
            len(self._config.prompts) * self._config.num_validation_images,
        )
        with self._phase("text") as live, torch.no_grad():
            self._encode(pictures + 1 if pictures else 1)
            yield "text", live.peak
        with self._phase("latents") as live, torch.no_grad():
            side = self._config.resolution
            latents, _ = self._family.encode_images(self._pipe, torch.zeros(1, 3, side, side))
            self._shape = tuple(latents.shape[1:])
            yield "latents", live.peak
        with self._phase("train") as live:
            self._train()
            yield "train", live.peak
        if pictures:
            yield from self._sample(pictures)

    def _phase(self, name: str) -> Any:
        """Count from what is on the device in a phase: its models and every adapter."""
        return self._device.counting(chain(self._present(name), self._kept()))

    def _present(self, phase: str) -> Iterator[Tensor]:
        config = self._config
        fixed = config.base_quantization in IMMOVABLE
        pinned = {self._family.denoiser} if fixed else set()
        names = (
            self._needs[phase] | pinned if config.offload_encoders is not False else self._models
        )
        for name in names:
            yield from tensors_of(self._models[name])

    def _kept(self) -> Iterator[Tensor]:
        """Adapters, their average, and the optimizer's state, which stay on the device."""
        yield from adapter_tensors(self._components).values()
        copies = 1 if self._config.ema_decay is not None else 0
        name = self._config.optimizer.rpartition(".")[2]
        trained = sum(p.numel() for p in trainable_parameters(self._components).values())
        whole = sum(p.numel() for p in adapter_parameters(self._components))
        size = int(trained * _STATE.get(name, 8) + 4 * copies * whole)
        yield self._device.fake(torch.empty(size, dtype=torch.uint8, device="meta"))

    def _encode(self, rows: int) -> Conditions:
        return self._family.encode_text(self._pipe, ["a prompt"] * rows)

    def _conditions(self, rows: int) -> Conditions:
        """Encoded prompts; counted only where the phase encodes them itself."""
        if len(self._components) > 1:
            found = self._encode(rows)
        else:
            with self._device.uncounted(), torch.no_grad():
                found = self._encode(rows)
        return {**found, "geometry": torch.zeros(rows, 6)}

    def _train(self) -> None:
        config = self._config
        answered = config.with_prior_preservation and not config.uses_class_images
        rows = config.train_batch_size * (2 if answered else 1)
        if config.uses_class_images:
            rows += config.class_batch_size or config.train_batch_size
        for _ in range(min(2, config.gradient_accumulation_steps)):
            if not config.cache_latents:
                side = config.resolution
                with torch.no_grad():
                    self._family.encode_images(self._pipe, torch.zeros(1, 3, side, side))
            with self._device.autocast():
                answer = self._denoise(rows)
                loss = squared_error(answer, torch.zeros(rows, *self._shape)).mean()
            del answer
            backward(loss)

    def _denoise(self, rows: int) -> Tensor:
        objective = self._family.objective(
            self._pipe, torch.device("cpu"), timestep_settings(self._config)
        )
        timesteps = objective.timesteps(torch.full((rows,), 0.5), self._config.resolution**2)
        noisy = torch.zeros(rows, *self._shape)
        model = getattr(self._pipe, self._family.denoiser)
        return self._family.denoise(model, noisy, timesteps, self._conditions(rows))

    def _sample(self, pictures: int) -> Iterator[tuple[str, int]]:
        config = self._config
        for model in self._components.values():
            model.eval()
        settings = getattr(self._pipe, self._family.denoiser).config
        # Guided pictures take two rows, unless guidance is an input of the model.
        guided = config.guidance_scale > 1 and not getattr(settings, "guidance_embeds", False)
        with self._phase("sample") as live, torch.no_grad(), self._device.autocast():
            self._denoise(pictures * (2 if guided else 1))
            yield "sample", live.peak
        with self._phase("decode") as live, torch.no_grad(), self._device.autocast():
            rows = min(pictures, decoded_at_once(config.resolution))
            self._family.decode_latents(self._pipe, torch.zeros(rows, *self._shape))
            yield "decode", live.peak
