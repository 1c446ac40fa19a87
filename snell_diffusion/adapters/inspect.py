"""What an adapter file holds, as data and as a page of text."""

import os
from typing import Any

from snell_diffusion.adapters.read import AdapterFile, read_adapter
from snell_diffusion.adapters.schema import Component, Layer, Tokens
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
    size = sum(row.shape[0] * row.shape[1] for row in part.layers.values())
    kept = sum(row.kept for row in part.layers.values())
    trained = sum(row.r * sum(row.shape) for row in part.layers.values())
    base = f"{part.base.model} {part.base.config_hash[:12]}" if part.base else "unknown base"
    settings = ", ".join(f"{key}={value}" for key, value in sorted(part.config.items()))
    lines = [
        f"{name}: {part.method} on {base}",
        f"  {len(part.layers)} layers, {trained:,} numbers in the factors, "
        f"{kept:,} of {size:,} weights changed ({kept / size:.1%})",
        f"  {settings}",
    ]
    if layers:
        width = max(len(path) for path in part.layers)
        lines.append(f"  {'layer':<{width}}  {'[out, in]':>13}  sparsity  threshold  kept")
        lines += [
            f"  {path:<{width}}  {row.shape!s:>13}  {row.sparsity:8.4f}  "
            f"{'level' if row.threshold is None else f'{row.threshold:.3g}':>9}  "
            f"{row.kept / (row.shape[0] * row.shape[1]):.1%}{_kernel(row)}"
            for path, row in part.layers.items()
        ]
    return lines


def _kernel(row: Layer) -> str:
    return "" if row.kernel is None else f"  conv {row.kernel[0]}x{row.kernel[1]}"
