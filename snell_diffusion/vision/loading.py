"""A base with a fresh head, from a folder or the hub."""

import hashlib
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import nn
from transformers import AutoConfig
from transformers.utils import logging

from snell_diffusion.errors import SnellaBaseError
from snell_diffusion.models import VISION_BASES, embedded_path
from snell_diffusion.training.randomness import generator
from snell_diffusion.vision.models import HEAD, Family, family_for, image_size, new_head

DTYPES = {"no": torch.float32, "bf16": torch.bfloat16, "fp16": torch.float16}
_SAMPLE = 64  # numbers of each weight that tell one base from another


@dataclass(frozen=True)
class Base:
    """A pretrained model and how to use it.

    Attributes:
        family: Its kind.
        model: The classifier, frozen, in eval mode, on the CPU.
        side: Pixels per side that it was trained at.
        source: Folder or hub id.
        revision: Of a hub model.
    """

    family: Family
    model: nn.Module
    side: int
    source: str
    revision: str | None = None


def source_of(name: str) -> str:
    """Folder or hub id of a base; some names stand for models that ship with this package."""
    return str(embedded_path(name)) if name in VISION_BASES else name


def load_base(
    name: str, classes: int, *, revision: str | None = None, precision: str = "no", seed: int = 0
) -> Base:
    """Load a base on the CPU, frozen, with a new head for so many classes.

    Args:
        name: Shipped base, folder, or hub id.
        classes: Outputs of the head, 1 or more.
        revision: Of a hub model.
        precision: "no", "bf16" or "fp16": what the base's weights are kept in; the head is float32.
        seed: Of the new head.

    Raises:
        SnellaBaseError: It cannot be reached or read, or no family covers it.
    """
    source = source_of(name)
    options = {"revision": revision} if revision else {}
    try:
        read = AutoConfig.from_pretrained(source, **options)
        family = family_for(read.model_type, name)
        config = family.classifier_config(read)
        config.num_labels = classes
        side = image_size(config)
        with _quiet():
            model, report = family.model_class.from_pretrained(  # type: ignore[attr-defined]
                source,
                config=config,
                dtype=DTYPES[precision],
                ignore_mismatched_sizes=True,  # the head that it came with
                output_loading_info=True,
                use_safetensors=True,  # never a pickle
                **options,
            )
    except (OSError, ValueError, KeyError) as error:
        if isinstance(error, SnellaBaseError):
            raise
        what = str(error).splitlines()[0] if str(error) else type(error).__name__
        raise SnellaBaseError(
            f"base '{name}' could not be loaded: {what}. Give a transformers folder or a hub id of "
            f"a ViT, Swin or ConvNeXt"
        ) from error
    _require_weights(report, name)
    model.requires_grad_(False).eval()
    getattr(model, HEAD).float()
    new_head(model, generator(seed, "head"))
    return Base(family, model, side, source, revision)


def _require_weights(report: dict, name: str) -> None:
    """Refuse a base of which a part would stay random: transformers only warns."""
    absent = sorted(key for key in report["missing_keys"] if not key.startswith(f"{HEAD}."))
    odd = sorted(str(row[0]) for row in report["mismatched_keys"])
    odd = [key for key in odd if not key.startswith(f"{HEAD}.")]
    if absent or odd:
        raise SnellaBaseError(
            f"base '{name}' does not hold all weights of its model: missing {absent[:3]} "
            f"({len(absent)} in all), of another shape {odd[:3]} ({len(odd)} in all)"
        )


@contextmanager
def _quiet() -> Iterator[None]:
    """Without transformers' report on the head, which is new on purpose."""
    before = logging.get_verbosity()
    bars = logging.is_progress_bar_enabled()
    logging.set_verbosity_error()
    logging.disable_progress_bar()
    try:
        yield
    finally:
        logging.set_verbosity(before)
        if bars:
            logging.enable_progress_bar()


def base_digest(model: nn.Module) -> str:
    """SHA-256 over names, shapes and 64 numbers of each weight but the head's."""
    found = hashlib.sha256()
    for path, weight in model.named_parameters():
        if path.startswith(f"{HEAD}."):
            continue
        values = weight.detach().flatten()
        some = values[:: max(1, len(values) // _SAMPLE)].float().cpu()
        found.update(f"{path} {tuple(weight.shape)}".encode())
        found.update(some.numpy().tobytes())
    return found.hexdigest()


def is_local(base: Base) -> bool:
    """Whether the base is a folder here."""
    return Path(base.source).is_dir()
