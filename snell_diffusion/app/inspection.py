"""What an adapter is: facts of its file, the size of its update, and its overlap with another one.

Shape legend: O out features, I in features of a layer.
"""

import math
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import lru_cache
from typing import Any

import torch
from torch import Tensor

from snell_diffusion.adapters.export import NAME, update_layers
from snell_diffusion.adapters.read import AdapterFile, read_adapter
from snell_diffusion.adapters.schema import Header
from snell_diffusion.app.allocation import block
from snell_diffusion.app.base_weights import weight_norms
from snell_diffusion.app.bases import Base, Bases
from snell_diffusion.app.library import Adapter
from snell_diffusion.errors import SnellaError, SnellaValueError, printable
from snell_diffusion.training.plots import place_of

DEADLINE = 300.0  # seconds that a measurement may take
LITTLE, MUCH = 0.1, 0.4  # interference below and above which combining is easy and hard
ALIKE = 0.5  # agreement from which two updates mostly point the same way

Watch = Callable[[], None]


@dataclass(frozen=True)
class LayerFact:
    """One row of a file's layer table.

    Attributes:
        name: `<component>.<module path>`.
        block: Short label of its part of the network.
        shape: (out features, in features).
        sparsity: Level: share of the update's entries that are zero.
        kept_share: Share of the entries that survive, as counted when the file was written.
    """

    name: str
    block: str
    shape: tuple[int, int]
    sparsity: float
    kept_share: float


@dataclass(frozen=True)
class LayerSize:
    """How large a layer's update is.

    Attributes:
        name: `<component>.<module path>`.
        update: |ΔW|, Frobenius norm.
        weight: |W| of the base's weight; None where the base's files do not have it.
    """

    name: str
    update: float
    weight: float | None

    @property
    def ratio(self) -> float | None:
        """|ΔW| / |W|; None where the weight is not known or zero."""
        return self.update / self.weight if self.weight else None


@dataclass(frozen=True)
class LayerOverlap:
    """Two updates a, b of one layer, summed over its entries.

    Attributes:
        name: `<component>.<module path>`.
        either, both: Entries that one of them changes at least, and that both change.
        dot: Σ a·b.
        touch: Σ |a·b|.
        norms: (|a|², |b|²).
    """

    name: str
    either: int
    both: int
    dot: float
    touch: float
    norms: tuple[float, float]

    @property
    def cosine(self) -> float:
        """Σ a·b / (|a| |b|), −1 to 1; 0 where one of them is zero."""
        return _share(self.dot, math.sqrt(self.norms[0] * self.norms[1]))

    @property
    def interference(self) -> float:
        """Σ |a·b| / (|a| |b|), 0 to 1."""
        return _share(self.touch, math.sqrt(self.norms[0] * self.norms[1]))

    @property
    def shared(self) -> float:
        """both / either, 0 to 1."""
        return _share(self.both, self.either)


@dataclass(frozen=True)
class Overlap:
    """How much two adapters will interfere when they are used together.

    Attributes:
        layers: Those that both change.
        only: (layers that the first alone changes, layers that the second alone changes).
        norms: (|a|², |b|²) over all layers of each.
    """

    layers: tuple[LayerOverlap, ...]
    only: tuple[int, int]
    norms: tuple[float, float]

    @property
    def interference(self) -> float:
        """Σ |a·b| / (|a| |b|), over all layers of both.

        0: they change different weights. 1: each weight is changed in the same proportion by both.
        Two unrelated dense updates with normal entries have 2/π = 0.64.
        """
        touch = sum(layer.touch for layer in self.layers)
        return _share(touch, math.sqrt(self.norms[0] * self.norms[1]))

    @property
    def agreement(self) -> float:
        """Σ a·b / Σ |a·b|: 1 the same directions, −1 opposite ones, 0 neither."""
        touch = sum(layer.touch for layer in self.layers)
        return _share(sum(layer.dot for layer in self.layers), touch)

    @property
    def cosine(self) -> float:
        """Σ a·b / (|a| |b|), which is interference × agreement."""
        return self.interference * self.agreement

    @property
    def shared(self) -> float:
        """Of the weights in common layers that either changes, the share that both change."""
        both = sum(layer.both for layer in self.layers)
        return _share(both, sum(layer.either for layer in self.layers))

    def sentence(self) -> str:
        """What it means, for somebody who wants to use both."""
        if not self.layers:
            return "They change no layer in common: they can be used together as they are."
        start = f"Of the weights that either changes, both change {self.shared:.0%}"
        if self.interference < LITTLE:
            return f"{start}: they hardly touch and can be used together as they are."
        way, hint = _direction(self.agreement)
        much = "much" if self.interference >= MUCH else "some"
        where = f"they do {much} of their work on the same weights"
        return f"{start}, {way}: {where} (interference {self.interference:.2f} of 1). {hint}"


def _direction(agreement: float) -> tuple[str, str]:
    if agreement >= ALIKE:
        return "mostly in the same direction", (
            "Together they may be too strong: lower both strengths, to about 0.7."
        )
    if agreement <= -ALIKE:
        return "mostly in opposite directions", (
            "Together they weaken each other: use one of them, or give one a low strength."
        )
    return "in no common direction", (
        "Together each disturbs the other a little: lower both strengths, or raise the sparsity."
    )


def _share(part: float, whole: float) -> float:
    return part / whole if whole > 0 else 0.0


def read(adapter: Adapter) -> AdapterFile:
    """The file of an adapter with every check, its digest included; messages say its label.

    Raises:
        SnellaError: Damaged, changed or gone.
    """
    return read_adapter(adapter.path.read_bytes(), adapter.label)


def facts(adapter: Adapter, file: AdapterFile, bases: Bases) -> list[tuple[str, str]]:
    """(name, value) of what a file says about itself and what was found out about it."""
    header = file.header
    rows = [
        ("Name", adapter.label),
        ("Came from", "an uploaded file" if adapter.uploaded else "a run of this page"),
        ("File", f"{adapter.path.stat().st_size / 2**20:.2f} MB, format {header.format}"),
        ("Written by", header.writer),
        ("Digest check", f"passed: header and tensors are as they were written ({file.digest})"),
        ("Base", _base(adapter, header, bases)),
        *_components(header),
    ]
    if header.tokens is not None:
        rows.append(("New words", ", ".join(word.text for word in header.tokens.words)))
    rows += [(f"Note: {name}", str(value)) for name, value in sorted(header.metadata.items())]
    return [(printable(name), printable(value)) for name, value in rows]


def _base(adapter: Adapter, header: Header, bases: Bases) -> str:
    named = header.origin.source or "not named"
    if adapter.base_id is None:
        return f"{named}; none of the base models of this page fits"
    return f"{named}; fits {bases.get(adapter.base_id).label}"


def _components(header: Header) -> list[tuple[str, str]]:
    rows = []
    for name, part in header.components.items():
        layers = part.layers.values()
        size = sum(row.shape[0] * row.shape[1] for row in layers)
        kept = sum(row.kept for row in layers)
        trained = sum(row.r * sum(row.shape) for row in layers)
        levels = [row.sparsity for row in layers]
        rows += [
            (f"Method ({name})", part.method),
            (f"Layers ({name})", f"{len(levels)}, rank {_span([row.r for row in layers], 'd')}"),
            (f"Levels ({name})", f"{_span(levels, '.0%')} of each update is zero"),
            (f"Weights ({name})", f"{kept:,} of {size:,} changed ({_share(kept, size):.1%})"),
            (f"Trained numbers ({name})", f"{trained:,}"),
        ]
    return rows


def _span(values: Sequence[Any], form: str) -> str:
    low, high = format(min(values), form), format(max(values), form)
    return low if low == high else f"{low} to {high}"


def layer_facts(header: Header) -> list[LayerFact]:
    """One row per layer, in the order of the network."""
    rows = [
        LayerFact(
            f"{name}.{path}",
            block(f"{name}.{path}"),
            (row.shape[0], row.shape[1]),
            row.sparsity,
            row.kept / (row.shape[0] * row.shape[1]),
        )
        for name, part in header.components.items()
        for path, row in part.layers.items()
    ]
    return sorted(rows, key=lambda row: place_of(row.name))


def sizes(file: AdapterFile, base: Base | None) -> list[LayerSize]:
    """|ΔW| of each layer and |W| of the base weight it is added to, in the order of the network.

    Args:
        file: The adapter.
        base: Its base; None leaves the weights unknown.

    Raises:
        SnellaError: The tensors do not fit each other, or it takes too long.
    """
    watch = _deadline()
    layers = update_layers(file)
    norms = {} if base is None else weight_norms(base, list(layers))
    rows = []
    with torch.no_grad():
        for (component, path), layer in layers.items():
            watch()
            update = float(torch.linalg.vector_norm(layer.get_delta_weight(NAME).double()))
            rows.append(LayerSize(f"{component}.{path}", update, norms.get((component, path))))
    return sorted(rows, key=lambda row: place_of(row.name))


def overlap(first: AdapterFile, second: AdapterFile) -> Overlap:
    """Compare two adapters of one base, entry by entry.

    Raises:
        SnellaValueError: A layer has other sizes in the other one: they are of two bases.
        SnellaError: The tensors of one do not fit each other, or it takes too long.
    """
    watch = _deadline()
    left, right = update_layers(first), update_layers(second)
    rows: list[LayerOverlap] = []
    alone: tuple[list[float], list[float]] = ([], [])
    with torch.no_grad():
        for place, layer in left.items():
            watch()
            if place in right:
                pair = layer.get_delta_weight(NAME), right[place].get_delta_weight(NAME)
                rows.append(layer_overlap(".".join(place), *pair))
            else:
                alone[0].append(_square(layer.get_delta_weight(NAME)))
        for place in right.keys() - left.keys():
            watch()
            alone[1].append(_square(right[place].get_delta_weight(NAME)))
    rows.sort(key=lambda row: place_of(row.name))
    total = [sum(rest) + sum(row.norms[i] for row in rows) for i, rest in enumerate(alone)]
    return Overlap(tuple(rows), (len(alone[0]), len(alone[1])), (total[0], total[1]))


def _square(delta: Tensor) -> float:
    return float(delta.double().square().sum())


def layer_overlap(name: str, a: Tensor, b: Tensor) -> LayerOverlap:
    """Compare two updates of one layer, both (O, I), in float64.

    Raises:
        SnellaValueError: They differ in shape.
    """
    if a.shape != b.shape:
        raise SnellaValueError(
            f"{name} has {list(a.shape)} weights in one and {list(b.shape)} in the other: they "
            "were trained on two base models and cannot be combined; choose two of one base"
        )
    a, b = a.double(), b.double()
    product = a * b
    return LayerOverlap(
        name,
        either=int(((a != 0) | (b != 0)).sum()),
        both=int(((a != 0) & (b != 0)).sum()),
        dot=float(product.sum()),
        touch=float(product.abs().sum()),
        norms=(_square(a), _square(b)),
    )


def sizes_of(adapter: Adapter, bases: Bases) -> tuple[LayerSize, ...]:
    """`sizes` of an adapter on its base; kept while its file does not change.

    Raises:
        SnellaError: As `read` and `sizes`.
    """
    return _sizes_of(adapter, bases, adapter.path.stat().st_mtime_ns)


@lru_cache(maxsize=32)
def _sizes_of(adapter: Adapter, bases: Bases, version: int) -> tuple[LayerSize, ...]:
    base = None if adapter.base_id is None else bases.get(adapter.base_id)
    return tuple(sizes(read(adapter), base))


def size_sentence(rows: Sequence[LayerSize]) -> str:
    """How large the whole update is, and where it is largest."""
    known = [row for row in rows if row.ratio is not None]
    if not known:
        return "The base model's weights are not on this machine, so there is nothing to compare."
    update = math.sqrt(sum(row.update**2 for row in known))
    weight = math.sqrt(sum((row.weight or 0.0) ** 2 for row in known))
    largest = max(known, key=lambda row: row.ratio or 0.0)
    return (
        f"The whole update is {update / weight:.1%} of the weights it is added to; the largest is "
        f"in {largest.name}, {largest.ratio:.1%}."
    )


def _deadline(seconds: float = DEADLINE) -> Watch:
    end = time.monotonic() + seconds

    def watch() -> None:
        if time.monotonic() > end:
            raise SnellaError(
                f"this adapter is too large to be measured in {seconds / 60:.0f} minutes here; use "
                "python -m snell_diffusion info instead"
            )

    return watch
