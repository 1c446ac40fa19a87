"""A LoRA from an adapter, by truncated singular value decomposition, for programs that load LoRA.

    ΔW ≈ up · down,   up = U_r √S_r [O, r],   down = √S_r V_rᵀ [r, I],   U S Vᵀ = ΔW

No other pair of rank r is nearer to ΔW in the Frobenius norm (Eckart and Young, 1936). A sparse,
kernelized update has high rank, so little of it may be left: the error is measured on what is
written, per layer, and stored with it.

Names:
    lora    unet.<path>.lora_A.weight (down), .lora_B.weight (up)       diffusers, PEFT
    kohya   lora_unet_<path with _>.lora_down.weight, .lora_up.weight, .alpha   ComfyUI, A1111
"""

import os
from pathlib import Path

import torch
from torch import Tensor

from snell_diffusion.adapters.atomic import write_atomic
from snell_diffusion.adapters.container import encode
from snell_diffusion.adapters.export import (
    EXPORT_KEY,
    ExportReport,
    LayerError,
    export_dtype,
    export_notes,
    layer_updates,
)
from snell_diffusion.adapters.export_tokens import embeds_paths, export_words, require_free
from snell_diffusion.adapters.read import AdapterFile
from snell_diffusion.adapters.tokens import words_of
from snell_diffusion.errors import SnellaFileError, SnellaValueError, shown

__all__ = ["STYLES", "export_lora", "factorize"]

STYLES = ("lora", "kohya")

_KOHYA_TEXT = {"text_encoder": "lora_te", "text_encoder_2": "lora_te2"}


def export_lora(
    file: AdapterFile,
    path: str | os.PathLike[str],
    rank: int | None = 64,
    style: str = "lora",
    dtype: str = "float32",
    overwrite: bool = False,
) -> ExportReport:
    """Write an adapter as a LoRA, atomically; new words beside it, as textual inversions.

    Args:
        path: A `.safetensors` file.
        rank: Of every layer; None or more than the largest layer has means that layer's full rank,
            so that nothing is lost. Layers that have less are padded with zeros: readers disagree
            about files of mixed rank.
        style: Key names, one of STYLES.
        dtype: Of the factors: float32, float16 or bfloat16.
        overwrite: Replace a file that is there.

    Returns:
        The error made, per layer and in all.

    Raises:
        SnellaFileError: The file exists or cannot be written.
        SnellaValueError: A rank below 1, an unknown style or dtype, factors beyond the dtype's
            range, components that kohya's names do not know, or two layers of one name.
    """
    target = Path(path)
    stored = export_dtype(dtype)
    _check_request(file, target, rank, style, overwrite)
    full = max(
        min(row.shape) for part in file.header.components.values() for row in part.layers.values()
    )
    columns = full if rank is None else min(rank, full)
    tensors: dict[str, Tensor] = {}
    rows = []
    for component, module, delta in layer_updates(file):
        up, down, energy = factorize(delta, columns)
        up, down = up.to(stored), down.to(stored)
        name = f"{component}.{module}"
        if not bool(torch.isfinite(up).all() and torch.isfinite(down).all()):
            raise SnellaValueError(
                f"{file.source}: {name}: factors of the update exceed the range of {dtype}; "
                "export with dtype bfloat16 or float32"
            )
        rows.append(LayerError.of(name, delta, up.double() @ down.double(), energy))
        row = file.header.components[component].layers[module]
        up, down = _as_kernels(up, down, row.kernel, f"{file.source}: {name}", row.groups)
        named = _named(style, component, module, list(file.header.components), up, down)
        if not tensors.keys().isdisjoint(named):
            raise SnellaValueError(
                f"{file.source}: {name} and another layer have one name, {next(iter(named))!r}, in "
                f"style {style!r}; export with --format merged"
            )
        tensors |= named
    report = ExportReport(style, str(target), dtype, columns, file.source, file.digest, tuple(rows))
    write_atomic(target, encode(tensors, _metadata(file, report)))
    export_words(file, target.parent)
    return report


def factorize(delta: Tensor, rank: int) -> tuple[Tensor, Tensor, float]:
    """The best pair of rank `rank` for ΔW [O, I], padded with zeros if ΔW has less.

    Returns:
        up [O, rank], down [rank, I], and the share of |ΔW|² in up · down, 0 to 1 (1 for ΔW = 0).
    """
    U, S, Vh = torch.linalg.svd(delta, full_matrices=False)
    kept = min(rank, S.numel())
    root = S[:kept].sqrt()
    up, down = delta.new_zeros(delta.shape[0], rank), delta.new_zeros(rank, delta.shape[1])
    up[:, :kept] = U[:, :kept] * root
    down[:kept] = root[:, None] * Vh[:kept]
    squares = S.double().square()
    total = float(squares.sum())
    return up, down, float(squares[:kept].sum()) / total if total > 0 else 1.0


def _as_kernels(
    up: Tensor, down: Tensor, kernel: list[int] | None, place: str, groups: int | None
) -> tuple[Tensor, Tensor]:
    """A convolution's LoRA is a convolution to r channels, then one of 1x1; a Linear's is as it is.

    Raises:
        SnellaValueError: Groups, which neither PEFT's nor kohya's LoRA splits like this.
    """
    if kernel is None:
        return up, down
    if groups != 1:
        raise SnellaValueError(
            f"{place}: a convolution with {groups} groups has no LoRA of this form; export with "
            "--format merged"
        )
    return up[:, :, None, None].contiguous(), down.reshape(down.shape[0], -1, *kernel)


def _check_request(
    file: AdapterFile, target: Path, rank: int | None, style: str, overwrite: bool
) -> None:
    if style not in STYLES:
        raise SnellaValueError(f"style {style!r}: expected one of {', '.join(STYLES)}")
    if rank is not None and rank < 1:
        raise SnellaValueError(f"rank must be at least 1, or None for full rank; got {rank}")
    if target.suffix != ".safetensors":
        raise SnellaFileError(f"{target}: a LoRA is one file; give a name ending in .safetensors")
    if file.header.tokens is not None:
        words = words_of(file.header.tokens)
        if target in embeds_paths(target.parent, words):
            raise SnellaFileError(
                f"{target}: the file of a new word goes there; choose another name for the LoRA"
            )
        require_free(target.parent, words, overwrite)
    if target.exists() and not overwrite:
        raise SnellaFileError(f"{target}: exists already; choose another name or pass overwrite")
    if style == "kohya":
        unknown = set(file.header.components) - {"unet", *_KOHYA_TEXT}
        if unknown:
            raise SnellaValueError(
                f"{file.source}: kohya's names cover unet, text_encoder and text_encoder_2, this "
                f"adapter also has {shown(unknown)}; export with style 'lora'"
            )


def _named(
    style: str, component: str, module: str, components: list[str], up: Tensor, down: Tensor
) -> dict[str, Tensor]:
    module = _text_model_path(component, module)
    if style == "lora":
        stem = f"{component}.{module}"
        return {f"{stem}.lora_A.weight": down, f"{stem}.lora_B.weight": up}
    prefix = _KOHYA_TEXT.get(component, "lora_unet")
    if component == "text_encoder" and "text_encoder_2" in components:
        prefix = "lora_te1"
    stem = f"{prefix}_{module.replace('.', '_')}"
    # Readers scale by alpha / rank; equal numbers leave the update as it is.
    alpha = torch.tensor(float(down.shape[0]), dtype=torch.float32)
    return {
        f"{stem}.lora_down.weight": down,
        f"{stem}.lora_up.weight": up,
        f"{stem}.alpha": alpha,
    }


def _text_model_path(component: str, module: str) -> str:
    """CLIP's path as LoRA files spell it: transformers 5 dropped the module `text_model`."""
    if component.startswith("text_encoder") and module.startswith("encoder.layers."):
        return f"text_model.{module}"
    return module


def _metadata(file: AdapterFile, report: ExportReport) -> dict[str, str]:
    texts = {"format": "pt", **export_notes(file), EXPORT_KEY: report.to_json()}
    if report.format == "kohya":
        texts |= {
            "ss_network_module": "networks.lora",
            "ss_network_dim": str(report.rank),
            "ss_network_alpha": str(report.rank),
        }
    return texts
