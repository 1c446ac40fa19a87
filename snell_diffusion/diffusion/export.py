"""A whole pipeline with an adapter merged into its weights, as a folder any program can load."""

import json
import os
import tempfile
from pathlib import Path
from typing import Any

import torch
from torch import nn

from snell_diffusion.adapters.atomic import sync_path
from snell_diffusion.adapters.export import NAME, ExportReport, export_dtype
from snell_diffusion.adapters.export_merge import merge_adapter
from snell_diffusion.adapters.limits import MAX_RELATIVE_UPDATE
from snell_diffusion.adapters.read import AdapterFile
from snell_diffusion.adapters.schema import Tokens
from snell_diffusion.adapters.tokens import (
    TENSOR,
    check_tokens,
    set_end,
    tokenizer_of,
    words_of,
)
from snell_diffusion.adapters.vocabulary import Vocabulary
from snell_diffusion.diffusion.families.base import load_stock
from snell_diffusion.diffusion.loaded import models_of, tokenizers_of
from snell_diffusion.errors import SnellaBaseError, SnellaFileError
from snell_diffusion.models import SHIPPED_BASES, embedded_path

__all__ = ["REPORT_NAME", "export_merged"]

REPORT_NAME = "snella_export.json"


def export_merged(
    file: AdapterFile,
    base: str | os.PathLike[str],
    output: str | os.PathLike[str],
    dtype: str = "float32",
    overwrite: bool = False,
    revision: str | None = None,
    allow_other_base: bool = False,
) -> ExportReport:
    """Write base + adapter as a diffusers folder that `from_pretrained` loads.

    The folder appears whole, by one rename. It also holds `snella_export.json`: what the adapter
    was and what rounding took from its update, per layer.

    Args:
        base: The model it was trained on: "embedded", a diffusers folder or a hub id. Read in
            float32; only safetensors weights, no code from the repository.
        output: Folder to make.
        dtype: Of all weights written: float32, float16 or bfloat16.
        overwrite: Replace a folder that an export made (and no other).
        revision: Branch, tag or commit of a base on the hub.

    Raises:
        SnellaFileError: The folder exists or cannot be written.
        SnellaBaseError: No such base, or not the one the adapter was trained on.
        SnellaError: As `load_adapter`.
    """
    target = Path(output)
    stored = export_dtype(dtype)
    _check_target(target, overwrite)
    pipe = _load(str(base), revision)
    words = file.header.tokens
    if words is not None:
        check_tokens(
            *(models_of(pipe), tokenizers_of(pipe), words, file.tensors, file.source),
            *(allow_other_base, MAX_RELATIVE_UPDATE),
        )
    rows = merge_adapter(models_of(pipe), file.without_tokens(), stored, allow_other_base)
    if words is not None:
        _write_words(pipe, file, words)
    for model in models_of(pipe).values():
        nn.Module.to(model, dtype=stored)  # diffusers' own `to` warns about any 16-bit dtype
    report = ExportReport("merged", str(target), dtype, None, file.source, file.digest, rows)
    _publish(pipe, target, report)
    return report


@torch.no_grad()
def _write_words(pipe: Any, file: AdapterFile, tokens: Tokens) -> None:
    """Make new words part of tokenizers and embedding tables, for good."""
    for name in tokens.encoders:
        encoder, tokenizer = getattr(pipe, name), getattr(pipe, tokenizer_of(name))
        ids = Vocabulary.of(tokenizer).add(NAME, words_of(tokens))
        size = max(encoder.get_input_embeddings().num_embeddings, max(ids) + 1)
        encoder.resize_token_embeddings(size, mean_resizing=False)
        rows = file.tensors[f"{name}.{TENSOR}"]
        encoder.get_input_embeddings().weight[ids] = rows.float()
        set_end(encoder, tokenizer.eos_token_id, for_good=True)


def _check_target(target: Path, overwrite: bool) -> None:
    if not target.exists():
        return
    if not overwrite:
        raise SnellaFileError(f"{target}: exists already; choose another name or pass overwrite")
    if not (target / REPORT_NAME).is_file():
        raise SnellaFileError(
            f"{target}: overwrite replaces only a folder that an export made, and this one has no "
            f"{REPORT_NAME}; choose another name"
        )


def _load(base: str, revision: str | None) -> Any:
    if base in SHIPPED_BASES:
        base = str(embedded_path(base))
    try:
        return load_stock(base, revision=revision, dtype=torch.float32)
    except (OSError, ValueError) as error:
        reason = str(error).partition("\n")[0][:200]
        raise SnellaBaseError(
            f"base {base!r} cannot be loaded ({reason}): give "
            "'embedded', a diffusers folder with safetensors weights, or a hub id"
        ) from error


def _publish(pipe: Any, target: Path, report: ExportReport) -> None:
    try:
        target.parent.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryDirectory(prefix=f".{target.name}.", dir=target.parent) as scratch:
            made = Path(scratch) / "new"
            pipe.save_pretrained(made, safe_serialization=True)
            hide_paths(made)
            (made / REPORT_NAME).write_text(report.to_json() + "\n", "utf-8")
            for path in (*made.rglob("*"), made):
                sync_path(path)
            _replace(made, target, Path(scratch) / "old")
    except OSError as error:
        raise SnellaFileError(
            f"{target}: could not be written ({error.strerror}); check the free space"
        ) from error


def hide_paths(folder: Path) -> None:
    """Take out of a saved pipeline's configs where a local base lay on this machine."""
    for path in folder.rglob("*.json"):
        data = json.loads(path.read_text("utf-8"))
        origin = data.get("_name_or_path") if isinstance(data, dict) else None
        if isinstance(origin, str) and os.path.exists(origin):
            del data["_name_or_path"]
            path.write_text(json.dumps(data, indent=2, sort_keys=True) + "\n", "utf-8")


def _replace(made: Path, target: Path, aside: Path) -> None:
    """Put `made` in the place of `target`; if that fails, the old folder comes back."""
    if target.exists():
        target.rename(aside)
    try:
        made.rename(target)
    except OSError:
        if aside.exists():
            aside.rename(target)
        raise
    sync_path(target.parent)
