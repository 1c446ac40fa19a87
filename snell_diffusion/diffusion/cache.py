"""Encoded photos and prompts on disk, each under a fingerprint of everything it depends on.

    <folder>/latents/<fingerprint>.safetensors    mean, std: the VAE's answer to a picture
    <folder>/text/<fingerprint>.safetensors       the conditions of one prompt

A changed model, setting, photo or caption has another fingerprint, so it is never answered by an
old entry. An entry that is cut, damaged or foreign is made anew. The folder may be shared by runs
and deleted at any time.
"""

import hashlib
import json
import os
from collections.abc import Callable, Mapping
from importlib.metadata import version
from pathlib import Path
from typing import Any
from uuid import uuid4

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor, nn

from snell_diffusion.adapters.identity import config_hash
from snell_diffusion.errors import SnellaConfigError
from snell_diffusion.training.files import sweep, write_with

_LAYOUT = 1
_STALE_SECONDS = 24 * 3600.0  # runs on other machines may be writing entries here, too
_PACKAGES = ("diffusers", "transformers", "pillow")

Tensors = dict[str, Tensor]


def model_digest(model: nn.Module) -> str:
    """SHA-256 over settings and every number of a model, hex."""
    found = hashlib.sha256(config_hash(model).encode())
    for name, tensor in (*model.named_parameters(), *model.named_buffers()):
        found.update(f"{name} {tuple(tensor.shape)} {tensor.dtype}".encode())
        found.update(_bytes(tensor))
    return found.hexdigest()


def tokenizer_digest(tokenizer: Any) -> str:
    """SHA-256 over how a tokenizer splits text, hex."""
    inner = getattr(tokenizer, "backend_tokenizer", None)
    if inner is None:
        rules = sorted(tokenizer.get_vocab().items())
    else:
        # Each call leaves its own padding and truncation there.
        rules = {**json.loads(inner.to_str()), "padding": None, "truncation": None}
    text = f"{type(tokenizer).__name__} {tokenizer.model_max_length} {rules}"
    return hashlib.sha256(text.encode()).hexdigest()


class Cache:
    """A folder of tensors under fingerprints.

    Args:
        folder: Where; None = nowhere, everything is made when asked for.
        writable: Whether new entries are kept.

    Attributes:
        found: How many entries were there.
        made: How many were made.
        damaged: How many of those replaced an entry that could not be used.
    """

    def __init__(self, folder: Path | None, writable: bool = True) -> None:
        self._folder, self._writable = folder, writable
        self.found = self.made = self.damaged = 0
        self._encoders: dict[str, Any] = {}

    @property
    def used(self) -> bool:
        """Whether anything is kept on disk."""
        return self._folder is not None

    def check(self) -> None:
        """Refuse a folder that nothing can be kept in; writes nothing.

        Raises:
            SnellaConfigError: It is no folder and cannot become one, or must not be written to.
        """
        if self._folder is None:
            return
        path = self._folder.absolute()
        place = next(p for p in (path, *path.parents) if os.path.lexists(p))
        reason = "may not be written to" if place.is_dir() else "is not a folder"
        if not place.is_dir() or not os.access(place, os.W_OK | os.X_OK):
            raise SnellaConfigError(
                f"cache_dir '{self._folder}' cannot be used: '{place}' {reason}; name another "
                f"folder, or leave it out to keep the cache in memory"
            )

    def encoder(self, name: str, read: Callable[[], Any]) -> Any:
        """What entries say of an encoder, read off it once: it stays the same through a run.

        Args:
            name: Which encoder.
            read: Reads it; of large encoders that takes seconds.
        """
        if name not in self._encoders:
            self._encoders[name] = read()
        return self._encoders[name]

    def get(self, kind: str, depends_on: Mapping[str, Any], make: Callable[[], Tensors]) -> Tensors:
        """The tensors of an entry, on the CPU where they come from disk.

        Args:
            kind: "latents" or "text".
            depends_on: Everything that the tensors follow from, as plain JSON values.
            make: Makes them; only sound ones are kept.

        Raises:
            OutputError: The disk refused the write.
        """
        if self._folder is None:
            return make()
        mark = fingerprint(kind, depends_on)
        path = self._folder / kind / f"{mark}.safetensors"
        there = path.exists()
        kept = _load(path, mark) if there else None
        if kept is not None:
            self.found += 1
            return kept
        self.made += 1
        self.damaged += there
        tensors = make()
        if self._writable and all(bool(t.isfinite().all()) for t in tensors.values()):
            _save(path, mark, tensors)
        return tensors

    def summary(self) -> str | None:
        """What happened, in words; None where nothing is kept."""
        if self._folder is None:
            return None
        damaged = f", {self.damaged} of them in place of damaged ones" if self.damaged else ""
        return f"cache '{self._folder}': {self.found} entries found, {self.made} made{damaged}"


def fingerprint(kind: str, depends_on: Mapping[str, Any]) -> str:
    """SHA-256 over what an entry follows from, and over the versions of what computes it, hex."""
    versions = {name: version(name) for name in _PACKAGES}
    value = {"layout": _LAYOUT, "kind": kind, "versions": versions, **depends_on}
    return hashlib.sha256(json.dumps(value, sort_keys=True).encode()).hexdigest()


def _save(path: Path, mark: str, tensors: Tensors) -> None:
    tensors = {name: t.detach().cpu().contiguous() for name, t in tensors.items()}
    sweep(path.parent, _STALE_SECONDS)
    metadata = {"fingerprint": mark, "sha256": _digest(tensors)}

    def write(temporary: Path) -> None:
        save_file(tensors, temporary, metadata)

    ours = f"{uuid4().hex}-"
    write_with(path, write, durable=False, mark=ours, setting="cache_dir")


def _load(path: Path, mark: str) -> Tensors | None:
    """The tensors of an entry; None if it is not whole, or another's."""
    try:
        with safe_open(path, framework="pt") as file:
            metadata = file.metadata() or {}
            tensors = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118
    except (SafetensorError, OSError):
        return None
    expected = {"fingerprint": mark, "sha256": _digest(tensors)}
    return tensors if metadata == expected else None


def _digest(tensors: Tensors) -> str:
    found = hashlib.sha256()
    for name in sorted(tensors):
        found.update(f"{name} {tuple(tensors[name].shape)} {tensors[name].dtype}".encode())
        found.update(_bytes(tensors[name]))
    return found.hexdigest()


def _bytes(tensor: Tensor) -> bytes:
    flat = tensor.detach().cpu().contiguous().reshape(-1)
    return flat.view(torch.uint8).numpy().tobytes()
