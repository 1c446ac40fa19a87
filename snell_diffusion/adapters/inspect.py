"""What an adapter file holds, as data and as a page of text."""

import math
import os
from typing import Any

from snell_diffusion.adapters.read import AdapterFile, read_adapter
from snell_diffusion.adapters.rows import Layer
from snell_diffusion.adapters.schema import Component, Tokens
from snell_diffusion.errors import printable

__all__ = ["inspect_adapter", "summary"]


def inspect_adapter(source: str | os.PathLike[str]) -> dict[str, Any]:
    """The header of a file as plain data, after every check of `read_adapter`, and its digest.

    Raises:
        SnellaError: As `read_adapter`.
    """
    file = read_adapter(source)
    return {**file.header.to_data(), "digest": file.digest, "source": file.source}


def summary(file: AdapterFile, layers: bool = True) -> str:
    """A readable page: origin, training, and per layer size, level, threshold and kept share."""
    header = file.header
    lines = [
        f"file      {file.source}",
        f"format    {header.format}, written by {header.writer}",
        f"digest    {file.digest or 'none (state dict)'}",
    ]
    origin = {name: value for name, value in header.origin.model_dump().items() if value}
    lines += [f"{name:<9} {value}" for name, value in origin.items()]
    lines += [f"  {name}: {value}" for name, value in sorted(header.metadata.items())]
    if header.tokens is not None:
        lines += ["", *_words(header.tokens)]
    for name, part in header.components.items():
        lines += ["", *_component(name, part, layers)]
    # Whatever a file says is text for people, and a terminal would obey its control characters.
    return "\n".join(printable(line) for line in lines)


def _words(tokens: Tokens) -> list[str]:
    words = [f"{w.text} ({w.vectors} vector{'s' * (w.vectors > 1)})" for w in tokens.words]
    encoders = [
        f"  {name}: {tokens.vectors} x {row.size} numbers on {row.model} {row.config_hash[:12]}"
        for name, row in tokens.encoders.items()
    ]
    return [f"new words: {', '.join(words)}", *encoders]


def _component(name: str, part: Component, layers: bool) -> list[str]:
    base = f"{part.base.model} {part.base.config_hash[:12]}" if part.base else "unknown base"
    settings = ", ".join(f"{key}={value}" for key, value in sorted(part.config.items()))
    stored = "" if part.bits is None else f", stored in {part.bits} bits each"
    lines = [
        f"{name}: {part.method} on {base}",
        f"  {len(part.layers)} layers, {numbers_of(part):,} numbers in the factors{stored}"
        + _changed(part),
        f"  {settings}",
    ]
    if layers:
        width = max(len(path) for path in part.layers)
        sparse = any(row.kept is not None for row in part.layers.values())
        columns = "sparsity  threshold  kept" if sparse else "tensors"
        lines.append(f"  {'layer':<{width}}  {'[out, in]':>13}  {columns}")
        lines += [
            f"  {path:<{width}}  {row.shape!s:>13}  {_row(row)}{_kernel(row)}"
            for path, row in part.layers.items()
        ]
    return lines


def numbers_of(part: Component) -> int:
    """How many numbers a component's factors hold."""
    return sum(
        sum(math.prod(shape) for shape in row.tensors.values())
        if row.tensors is not None
        else (row.r or 0) * sum(row.shape)
        for row in part.layers.values()
    )


def kept_of(part: Component) -> tuple[int, int] | None:
    """Entries that survive in all layers, and all entries; None where no layer has a level."""
    rows = [row for row in part.layers.values() if row.kept is not None]
    if not rows:
        return None
    return sum(row.kept or 0 for row in rows), sum(math.prod(row.shape) for row in rows)


def _changed(part: Component) -> str:
    found = kept_of(part)
    if found is None:
        return ""
    kept, size = found
    return f", {kept:,} of {size:,} weights changed ({kept / size:.1%})"


def _row(row: Layer) -> str:
    if row.tensors is not None:
        return ", ".join(f"{name} {shape}" for name, shape in row.tensors.items()) or "shared"
    threshold = "level" if row.threshold is None else f"{row.threshold:.3g}"
    share = (row.kept or 0) / math.prod(row.shape)
    return f"{row.sparsity:8.4f}  {threshold:>9}  {share:.1%}"


def _kernel(row: Layer) -> str:
    return "" if row.kernel is None else f"  conv {row.kernel[0]}x{row.kernel[1]}"
