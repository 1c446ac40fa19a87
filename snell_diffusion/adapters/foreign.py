"""What a file that is no SNELLA adapter seems to be, told from its names; it is not loaded."""

import json
import os
from collections.abc import Iterable
from pathlib import Path

from snell_diffusion.adapters.container import open_regular, parse_strict_json
from snell_diffusion.adapters.export import EXPORT_KEY
from snell_diffusion.adapters.limits import MAX_HEADER_BYTES, WEIGHTS_NAME
from snell_diffusion.adapters.schema import HEADER_KEY
from snell_diffusion.errors import SnellaFileError, printable, shown

__all__ = ["PEFT_FILES", "describe_foreign", "peft_file"]

PEFT_FILES = (
    "adapter_model.safetensors",
    "pytorch_lora_weights.safetensors",
    "pytorch_peft_weights.safetensors",
)
"""What runs with PEFT's methods leave: of classifiers, of LoRA and DoRA in pipelines, of others."""

LOAD_LORA = "load it with pipe.load_lora_weights(file)"

# (part of a tensor name, what such a file is, how to use it); the first that occurs decides.
_KINDS = (
    (
        ".snella_A.",
        "the adapter's tensors in a training checkpoint of ours",
        f"continue it with resume_from_checkpoint; the adapter to load is the run's {WEIGHTS_NAME}",
    ),
    (
        ".snella_method",
        "the tensors of one, without its header",
        "load it with pipe.load_snella_weights(safetensors.torch.load_file(file))",
    ),
    ("lokr_", "a LoKr adapter of LyCORIS", "load it with LyCORIS or ComfyUI"),
    ("hada_", "a LoHa adapter of LyCORIS", "load it with LyCORIS or ComfyUI"),
    ("lora_unet_", "a LoRA with kohya's names (ComfyUI, A1111)", LOAD_LORA),
    ("lora_te", "a LoRA with kohya's names (ComfyUI, A1111)", LOAD_LORA),
    ("base_model.model.", "an adapter of PEFT", "load it with peft.PeftModel.from_pretrained"),
    (".lora_A.", "a LoRA with the names of diffusers and PEFT", LOAD_LORA),
    (".lora.down.", "a LoRA of an early diffusers version", LOAD_LORA),
    ("_lora.down.", "a LoRA of an early diffusers version", LOAD_LORA),
    (
        "model.diffusion_model.",
        "a whole Stable Diffusion checkpoint",
        "load it with StableDiffusionPipeline.from_single_file(file)",
    ),
    ("emb_params", "a textual inversion", "load it with pipe.load_textual_inversion(file)"),
    ("string_to_param", "a textual inversion", "load it with pipe.load_textual_inversion(file)"),
    (
        "down_blocks.",
        "the weights of a diffusers model",
        "load its folder, with config.json, by from_pretrained",
    ),
    (
        "transformer_blocks.",
        "the weights of a diffusers model",
        "load its folder, with config.json, by from_pretrained",
    ),
)


def peft_file(folder: str | os.PathLike[str]) -> str | None:
    """The name of a file of PEFT's methods in a folder without an adapter of ours; None for any
    other folder, and for what is no folder. Nothing is opened."""
    if not os.path.isdir(folder):
        return None
    there = os.listdir(folder)
    if WEIGHTS_NAME in there:
        return None
    return next((name for name in PEFT_FILES if name in there), None)


def describe_foreign(path: str | os.PathLike[str]) -> str | None:
    """A few lines about a safetensors file of another program; None for a SNELLA adapter.

    Only its header is read, at most 4 MiB; any dtype is fine.

    Raises:
        SnellaFileError: Not a safetensors file.
    """
    source = str(path)
    table = _header(Path(path), source)
    metadata = table.pop("__metadata__", None)
    metadata = metadata if isinstance(metadata, dict) else {}
    if HEADER_KEY in metadata:
        return None
    kind, use = _kind(table)
    lines = [
        f"file      {printable(source)}",
        f"kind      not a SNELLA adapter; {kind}",
        f"next      {use}",
        f"tensors   {len(table)}: {shown(table, 4)}",
    ]
    return "\n".join([*lines, *_export_lines(metadata.get(EXPORT_KEY))])


def _header(path: Path, source: str) -> dict[str, object]:
    stream, size = open_regular(path)
    with stream:
        length = int.from_bytes(stream.read(8), "little")
        if not 2 <= length <= min(MAX_HEADER_BYTES, size - 8):
            raise SnellaFileError(f"{printable(source)}: not a safetensors file")
        raw = stream.read(length)
    try:
        text = raw.decode("utf-8")
    except UnicodeDecodeError as error:
        raise SnellaFileError(f"{printable(source)}: not a safetensors file") from error
    return parse_strict_json(text, printable(source))


def _kind(names: Iterable[str]) -> tuple[str, str]:
    names = list(names)
    for mark, kind, use in _KINDS:
        if any(mark in name for name in names):
            return kind, use
    return "a safetensors file of unknown purpose", "ask where it came from what loads it"


def _export_lines(text: object) -> list[str]:
    """The error that an export of ours carries; whatever does not read as one is left out."""
    if not isinstance(text, str):
        return []
    try:
        data = json.loads(text)
        error, energy = float(data["relative_error"]), float(data["energy_kept"])
        origin = printable(str(data["adapter_digest"])[:80])
        rank = int(data["rank"])
    except (ValueError, KeyError, TypeError, RecursionError):
        return ["export    its export note is not readable"]
    return [
        f"export    from the SNELLA adapter {origin}, rank {rank}: relative error {error:.3g}, "
        f"{energy:.2%} of the energy kept"
    ]
