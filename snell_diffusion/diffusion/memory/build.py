"""A real pipeline whose models have shapes but no values, from a base's published sizes."""

import importlib
import json
from pathlib import Path
from typing import Any

import torch
from torch import nn
from transformers import BatchEncoding

from snell_diffusion.diffusion.memory.bases import BASES, Base
from snell_diffusion.errors import SnellaBaseError


class FullPrompts:
    """In place of a tokenizer: every prompt is as long as prompts can be, which costs most.

    Args:
        length: Tokens of a prompt where the caller gives no `max_length`.
    """

    pad_token = eos_token = "<pad>"
    pad_token_id = eos_token_id = 0
    padding_side = "right"

    def __init__(self, length: int) -> None:
        self.model_max_length = length
        self.added_tokens_encoder: dict[str, int] = {}

    def __call__(self, text: str | list[str], max_length: int | None = None, **_: Any) -> Any:
        count = 1 if isinstance(text, str) else len(text)
        ones = [[1] * min(max_length or self.model_max_length, self.model_max_length)] * count
        values = {"input_ids": torch.tensor(ones), "attention_mask": torch.tensor(ones)}
        return BatchEncoding(values)

    def apply_chat_template(self, messages: Any, tokenize: bool = False, **options: Any) -> Any:
        return self("", **options) if tokenize else "prompt"

    def tokenize(self, text: str, **_: Any) -> list[str]:
        return text.split()

    def encode(self, text: str, **_: Any) -> list[int]:
        return [1] * max(1, len(text.split()))

    def batch_decode(self, ids: Any, **_: Any) -> list[str]:
        return [""] * len(ids)


def base_of(source: str) -> Base:
    """The sizes of a base: of a diffusers folder, or of a hub model written down here.

    Raises:
        SnellaBaseError: Neither.
    """
    folder = Path(source)
    if (folder / "model_index.json").is_file():
        return _read(folder)
    if source in BASES:
        return BASES[source]
    raise SnellaBaseError(
        f"the sizes of base '{source}' are not known here: give a diffusers folder, or one of "
        f"{', '.join(BASES)}"
    )


def _read(folder: Path) -> Base:
    """Sizes from the config files of a diffusers folder; its weights are not needed."""
    index = json.loads((folder / "model_index.json").read_text("utf-8"))
    parts, tokens = {}, {}
    for name, entry in index.items():
        if name.startswith("_") or not isinstance(entry, list) or entry[0] is None:
            continue
        for file in ("config.json", "scheduler_config.json"):
            if (folder / name / file).is_file():
                settings = json.loads((folder / name / file).read_text("utf-8"))
                parts[name] = (*entry, settings)
        if (folder / name / "tokenizer_config.json").is_file():
            settings = json.loads((folder / name / "tokenizer_config.json").read_text("utf-8"))
            tokens[name] = min(int(settings.get("model_max_length", 512)), 512)
    return Base(index["_class_name"], parts, tokens)


def build(base: Base, dtypes: dict[str, torch.dtype]) -> Any:
    """The pipeline on the meta device.

    Args:
        base: Its parts.
        dtypes: Dtype by component; float32 where there is none.
    """
    found: dict[str, Any] = {name: FullPrompts(tokens) for name, tokens in base.tokens.items()}
    for name, (library, kind, settings) in base.parts.items():
        found[name] = _part(library, kind, settings, dtypes.get(name, torch.float32))
    cls = getattr(importlib.import_module("diffusers"), base.pipeline)
    if "safety_checker" in cls.__init__.__annotations__:
        found |= {
            "safety_checker": None,
            "feature_extractor": None,
            "requires_safety_checker": False,
        }
    pipe = cls(**found)
    pipe.set_progress_bar_config(disable=True)
    return pipe


def _part(library: str, kind: str, settings: dict[str, Any], dtype: torch.dtype) -> Any:
    module = importlib.import_module(library)
    cls = getattr(module, kind)
    if not issubclass(cls, nn.Module):
        return cls.from_config(settings)
    before = torch.get_default_dtype()
    torch.set_default_dtype(dtype)
    try:
        with torch.device("meta"):
            if library == "diffusers":
                model = cls.from_config(settings)
            else:
                model = cls._from_config(cls.config_class(**settings), dtype=dtype)
    finally:
        torch.set_default_dtype(before)
    return model.requires_grad_(False).eval()
