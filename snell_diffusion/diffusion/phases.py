"""Which models are on the device: those that a phase of the run needs, where memory is scarce.

    text     prompts -> embeddings         text encoders
    latents  photos -> latents             VAE
    train    steps, held-out loss, drift   denoiser, and what is not cached
    sample   denoising of pictures         denoiser
    decode   latents -> pictures           VAE

Each piece of work says which phase it belongs to; models move only when one is missing. What a run
computes does not depend on it: a model gives the same numbers wherever it waited before.
"""

from collections.abc import Callable, Collection, Iterable, Mapping

import torch
from torch import nn

from snell_diffusion.diffusion.config import TrainConfig
from snell_diffusion.diffusion.quantization import IMMOVABLE
from snell_diffusion.errors import SnellaConfigError, SnellaError
from snell_diffusion.training.adapter_tensors import tuner_layers
from snell_diffusion.training.parallel import Parallel
from snell_diffusion.tuners import DeltaLayer

WORK = {
    "text": "encoding prompts",
    "latents": "encoding photos",
    "train": "a training step",
    "sample": "denoising pictures",
    "decode": "decoding pictures",
}
Needs = Mapping[str, frozenset[str]]
Listener = Callable[[str], None]

CPU = torch.device("cpu")


def needs_of(
    names: Collection[str], denoiser: str, *, cached_text: bool, cached_latents: bool
) -> dict[str, frozenset[str]]:
    """The models that every phase uses.

    Args:
        names: All models of the pipeline; the VAE is `vae`, others than the denoiser encode text.
        denoiser: Which of them is trained.
        cached_text: Prompts are encoded once, before the first step.
        cached_latents: So are photos.
    """
    vae, text = frozenset({"vae"}), frozenset(names) - {denoiser, "vae"}
    one = frozenset({denoiser})
    train = one | (frozenset() if cached_text else text) | (frozenset() if cached_latents else vae)
    return {"text": text, "latents": vae, "train": train, "sample": one, "decode": vae}


class Phases:
    """Moves models between the device and the CPU as the phases of a run follow each other.

    Args:
        models: All models of the pipeline by name, on the CPU if `offload`, else on the device.
        needs: Which of them each phase uses.
        device: Where the run computes.
        offload: Keep only what the phase needs on the device; otherwise nothing ever moves.
        pinned: Models that stay where they are (shards, 8-bit weights).
        move: How a model is moved.
    """

    def __init__(
        self,
        models: Mapping[str, nn.Module],
        needs: Needs,
        device: torch.device,
        *,
        offload: bool,
        pinned: Iterable[str] = (),
        move: Callable[[nn.Module, torch.device], object] = nn.Module.to,
    ) -> None:
        self._models, self._needs, self._device = dict(models), needs, device
        self._pinned, self._offload, self._move = frozenset(pinned), offload, move
        self._present = set(self._pinned) if offload else set(models)
        self._freed: set[str] = set()
        self._listeners: list[Listener] = []

    @property
    def present(self) -> frozenset[str]:
        """The models on the device now."""
        return frozenset(self._present)

    def listen(self, listener: Listener) -> None:
        """Have `listener` called with the phase whenever work of a phase begins."""
        self._listeners.append(listener)

    def enter(self, phase: str) -> None:
        """Bring what a phase needs to the device, and take away what it does not.

        Nothing moves while all it needs is there, so a step that encodes its own prompts does not
        send the denoiser away.

        Raises:
            SnellaError: A model it needs was freed.
        """
        for listener in self._listeners:
            listener(phase)
        wanted = self._needs[phase]
        missing = sorted(wanted - self._present)
        if not missing:
            return
        gone = sorted(self._freed & set(missing))
        if gone:
            raise SnellaError(
                f"{', '.join(gone)} of the base was freed, but phase '{phase}' needs it: set "
                f"offload_encoders false"
            )
        for name in sorted(self._present - wanted - self._pinned):
            self._move(self._models[name], CPU)
            self._present.discard(name)
        for name in missing:
            self._move(self._models[name], self._device)
            self._present.add(name)

    def free(self, *phases: str) -> list[str]:
        """Give up the memory of models that only these phases need, for good.

        Returns:
            Which models; none where nothing is offloaded.
        """
        if not self._offload:
            return []
        kept = frozenset[str]().union(*(n for p, n in self._needs.items() if p not in phases))
        given = frozenset[str]().union(*(self._needs[phase] for phase in phases))
        names = sorted(given - kept - self._freed - self._pinned)
        for name in names:
            _release(self._models[name])
        self._present -= set(names)
        self._freed |= set(names)
        return names


def _release(model: nn.Module) -> None:
    """Drop the numbers of a model that will not be called again; dtype and device stay known."""
    for tensor in (*model.parameters(), *model.buffers()):
        tensor.data = tensor.data.new_empty(0)


def place(
    config: TrainConfig,
    models: Mapping[str, nn.Module],
    components: Mapping[str, nn.Module],
    device: torch.device,
    parallel: Parallel | None = None,
) -> Phases:
    """Bring to the device what stays there through a run; the phases bring the rest.

    Adapters are there from the start, since optimizer, average and scores are made beside them.

    Args:
        config: Caches, offloading, quantization.
        models: All models of the pipeline.
        components: The adapted ones, denoiser first.
        device: Where the run computes.
        parallel: Whether adapted models are whole or in shards; without it they are whole.

    Raises:
        SnellaConfigError: A quantized base cannot be sharded.
    """
    denoiser, *_ = components
    sharded = parallel if parallel is not None and parallel.shares_forward else None
    fixed = config.base_quantization in IMMOVABLE
    if sharded and config.base_quantization != "none":
        raise SnellaConfigError(
            f"base_quantization {config.base_quantization} cannot be sharded by {sharded.name}: "
            f"use one process or plain data parallelism, or base_quantization none"
        )
    offload = config.offload_encoders
    offload = device.type != "cpu" if offload is None else offload
    pinned = set(components) if sharded else {denoiser} if fixed else set[str]()
    needs = needs_of(
        list(models),
        denoiser,
        cached_text=len(components) == 1,
        cached_latents=config.cache_latents,
    )
    if sharded:
        sharded.divide(components)
    else:
        _place_adapters(components, device)
    for name, model in models.items():
        if not offload and name not in pinned:
            model.to(device)
    if offload:
        forget_updates(components)
    return Phases(models, needs, device, offload=offload, pinned=pinned)


def forget_updates(components: Mapping[str, nn.Module]) -> None:
    """Have pictures build each layer's update anew in every denoising step instead of keeping it.

    Kept, the updates of all layers take 4 bytes per adapted weight: more than a base in 4 bits.
    """
    for _, layer in tuner_layers(components):
        if isinstance(layer, DeltaLayer):
            layer.cache_in_eval = False


def _place_adapters(components: Mapping[str, nn.Module], device: torch.device) -> None:
    for _, layer in tuner_layers(components):
        for name, part in layer.named_children():
            if name != "base_layer":
                part.to(device)
