"""State dicts without a header, as other tools leave them: what the tensors alone tell.

Tools that copy only tensors (`safetensors.torch.load_file`, for one) drop the header. So a file
also carries, per component, one tensor `<component>.<method>_method` with the settings that change
the mathematics but no shape. The header stays the description that counts: where both are there,
they must agree.

    snella_method = [kernel, p, sparsify rule, scale], names by their place in the lists below,
                    which only ever grow at the end; each number in three parts (`doubles`)
"""

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor

from snell_diffusion.adapters import limits
from snell_diffusion.adapters.doubles import join_doubles, split_doubles
from snell_diffusion.core import kept_count
from snell_diffusion.errors import (
    SnellaKeyError,
    SnellaSchemaError,
    SnellaShapeError,
    quoted,
    shown,
)

_CHOICES: dict[str, dict[str, tuple[str, ...] | None]] = {
    "snella": {
        "kernel": ("mixed", "distance", "linear"),
        "p": None,
        "sparsify": (
            *("squared", "printed", "mask", "soft", "none"),
            *("squared_true", "printed_true"),
        ),
        "scale": None,
    },
}


def has_method_tensor(method: str) -> bool:
    """Whether files carry the settings of a method as a tensor, too; those of 1.0 and 1.1 do."""
    return method in _CHOICES


def method_tensor(method: str, config: Mapping[str, Any], place: str) -> Tensor:
    """The settings of `_CHOICES` as numbers in parts, float32 [settings, 3].

    Raises:
        SnellaValueError: A setting too large or too small for a file; the message names `place`.
    """
    numbers = [
        float(config[name] if choices is None else choices.index(config[name]))
        for name, choices in _CHOICES[method].items()
    ]
    settings = f"{place}: settings {', '.join(_CHOICES[method])}"
    return split_doubles(torch.tensor(numbers, dtype=torch.float64), settings)


def method_settings(method: str, tensor: Tensor, place: str) -> dict[str, Any]:
    """The inverse of `method_tensor`.

    Args:
        place: What the tensor is, for messages.

    Raises:
        SnellaSchemaError: Another shape, or a number that stands for nothing.
        SnellaValueError: Parts that make no number.
    """
    fields = _CHOICES[method]
    if tensor.shape != (len(fields), 3):
        raise SnellaSchemaError(
            f"{place}: expected shape {[len(fields), 3]} ({', '.join(fields)}, each in 3 parts), "
            f"got {list(tensor.shape)}; save the adapter again"
        )
    settings: dict[str, Any] = {}
    numbers = join_doubles(tensor, place).tolist()
    for (name, choices), number in zip(fields.items(), numbers, strict=True):
        if choices is None:
            settings[name] = number
        elif number in range(len(choices)):
            settings[name] = choices[int(number)]
        else:
            raise SnellaSchemaError(
                f"{place}: setting {name}: expected 0 to {len(choices) - 1} "
                f"({', '.join(choices)}), got {number}; a later version may know it: upgrade "
                "snell_diffusion"
            )
    return settings


def bare_header(tensors: Mapping[str, Tensor], source: str) -> dict[str, Any]:
    """A header made from tensors alone; it knows no base model and no training settings.

    Raises:
        SnellaKeyError: Tensors that are none of ours, or no method tensor.
        SnellaShapeError: Factors that are not [heads, features, columns].
    """
    words = [name for name in tensors if name.endswith(".snella_tokens")]
    if words:
        raise SnellaKeyError(
            f"{source}: has embeddings of new words ({shown(map(quoted, words))}), and only the "
            "header tells which words: load the file itself, or a dict as of snella_state_dict"
        )
    found = [name for name in tensors if _method_of(name)]
    if not 1 <= len(found) <= limits.MAX_COMPONENTS:
        raise SnellaKeyError(
            f"{source}: expected a tensor '<component>.snella_method' for each of 1 to "
            f"{limits.MAX_COMPONENTS} components, got {len(found)} among "
            f"{shown(map(quoted, tensors)) or 'nothing'}; this is no SNELLA adapter: load LoRA "
            "with load_lora_weights"
        )
    parts: dict[str, dict[str, Any]] = {}
    for name in found:
        place = f"{source}: tensor {quoted(name, 200)}"
        settings = method_settings(_method_of(name), tensors[name], place)
        parts[name.partition(".")[0]] = {
            "method": _method_of(name),
            "config": settings,
            "base": None,
            "layers": {},
        }
    for component, part in parts.items():
        part["layers"] = _layers(component, part["method"], tensors, source)
        first = next(iter(part["layers"].values()))
        part["config"] |= {"r": first["r"], "heads": first["heads"]}
    return {
        "format": limits.FORMAT,
        "writer": "unknown (bare state dict)",
        "requires": sorted({"conv", *(part["method"] for part in parts.values())}),
        "origin": {},
        "components": parts,
        "metadata": {},
    }


def _method_of(name: str) -> str:
    """The method of a tensor `<component>.<method>_method`; empty for every other tensor."""
    method = name.partition(".")[2].removesuffix("_method")
    return method if name.endswith("_method") and method in _CHOICES else ""


def _layers(
    component: str, method: str, tensors: Mapping[str, Tensor], source: str
) -> dict[str, dict[str, Any]]:
    head, tail = f"{component}.", f".{method}_A"
    paths = [
        name[len(head) : -len(tail)]
        for name in tensors
        if name.startswith(head) and name.endswith(tail)
    ]
    if not paths:
        raise SnellaKeyError(
            f"{source}: component {quoted(component)}: expected tensors of layers "
            f"('<module path>{tail}' and others), got its settings alone; part of the state dict "
            "was lost: take all of it"
        )
    return {path: _row(f"{head}{path}.{method}", tensors, source) for path in sorted(paths)}


def _row(stem: str, tensors: Mapping[str, Tensor], source: str) -> dict[str, Any]:
    needed = [f"{stem}_{name}" for name in ("A", "B", "sparsity")]
    missing = [name for name in needed if name not in tensors]
    if missing:
        raise SnellaKeyError(
            f"{source}: expected the tensors {shown(needed)}, {shown(missing)} missing; part of "
            "the state dict was lost: take all of it"
        )
    A, B, level = (tensors[name] for name in needed)
    threshold = tensors.get(f"{stem}_threshold")
    for short, tensor, shape in (("sparsity", level, [3]), ("threshold", threshold, [])):
        if tensor is not None and list(tensor.shape) != shape:
            raise SnellaShapeError(
                f"{source}: tensor {quoted(f'{stem}_{short}', 200)}: expected shape {shape}, got "
                f"{list(tensor.shape)}; save the adapter again"
            )
    if A.dim() != 3 or B.dim() != 3:
        raise SnellaShapeError(
            f"{source}: tensors {quoted(stem, 200)} _A and _B: expected shapes [heads, in, "
            f"columns] and [heads, out, columns], got {list(A.shape)} and "
            f"{list(B.shape)}; save the adapter again"
        )
    kernel = tensors.get(f"{stem}_kernel")
    if kernel is not None and list(kernel.shape) != [3]:
        raise SnellaShapeError(
            f"{source}: tensor {quoted(f'{stem}_kernel', 200)}: expected shape [3], got "
            f"{list(kernel.shape)}; save the adapter again"
        )
    heads, columns = A.shape[0], A.shape[2]
    in_features, out_features = A.shape[1], B.shape[1]
    size = in_features * out_features
    sparsity = float(join_doubles(level, f"{source}: tensor {quoted(needed[2], 200)}"))
    return {
        **_kind(kernel),
        "shape": [out_features, in_features],
        "r": heads * columns,
        "heads": heads,
        "sparsity": sparsity,
        "threshold": None if threshold is None else float(threshold),
        # What is out of range here is refused with the rest of the header.
        "kept": kept_count(size, sparsity) if size and 0 <= sparsity <= 1 else 0,
    }


def _kind(kernel: Tensor | None) -> dict[str, Any]:
    """What a layer's kernel tensor tells of a row; a Linear has none."""
    if kernel is None:
        return {"kind": "linear"}
    height, width, groups = (int(number) for number in kernel.tolist())
    return {"kind": "conv2d", "kernel": [height, width], "groups": groups}
