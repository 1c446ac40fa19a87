"""State dicts without a header, as other tools leave them: what the tensors alone tell.

Tools that copy only tensors (`safetensors.torch.load_file`, for one) drop the header. So a file
also carries, per component, one float64 tensor `<component>.<method>_method` with the settings that
change the mathematics but no shape. The header stays the description that counts: where both are
there, they must agree.

    snella_method = [kernel, p, sparsify rule, scale], names by their place in the lists below,
                    which only ever grow at the end
"""

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor

from snell_diffusion.adapters import limits
from snell_diffusion.core import kept_count
from snell_diffusion.errors import SnellaKeyError, SnellaSchemaError, SnellaShapeError, shown

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


def method_tensor(method: str, config: Mapping[str, Any]) -> Tensor:
    """The settings of `_CHOICES` as numbers, float64 [settings]."""
    numbers = [
        float(config[name] if choices is None else choices.index(config[name]))
        for name, choices in _CHOICES[method].items()
    ]
    return torch.tensor(numbers, dtype=torch.float64)


def method_settings(method: str, tensor: Tensor, source: str) -> dict[str, Any]:
    """The inverse of `method_tensor`.

    Raises:
        SnellaSchemaError: Another length, or a number that stands for nothing.
    """
    fields = _CHOICES[method]
    place = f"{source}: tensor '{method}_method'"
    if tensor.dim() != 1 or tensor.numel() != len(fields):
        raise SnellaSchemaError(
            f"{place}: shape {tuple(tensor.shape)}, expected {len(fields)} numbers "
            f"({', '.join(fields)})"
        )
    settings: dict[str, Any] = {}
    for (name, choices), number in zip(fields.items(), tensor.tolist(), strict=True):
        if choices is None:
            settings[name] = number
        elif number in range(len(choices)):
            settings[name] = choices[int(number)]
        else:
            raise SnellaSchemaError(
                f"{place}: {name} is {number}, expected 0 to {len(choices) - 1} "
                f"({', '.join(choices)})"
            )
    return settings


def bare_header(tensors: Mapping[str, Tensor], source: str) -> dict[str, Any]:
    """A header made from tensors alone; it knows no base model and no training settings.

    Raises:
        SnellaKeyError: Tensors that are none of ours, or no method tensor.
        SnellaShapeError: Factors that are not [heads, features, columns].
    """
    parts: dict[str, dict[str, Any]] = {}
    for name, tensor in tensors.items():
        component, _, method = name.partition(".")
        if method.endswith("_method") and method.removesuffix("_method") in _CHOICES:
            parts[component] = _part(component, method.removesuffix("_method"), tensor, source)
    if not parts:
        raise SnellaKeyError(
            f"{source}: no tensor '<component>.snella_method' among {shown(tensors) or 'nothing'}; "
            "this is no SNELLA adapter (for LoRA use load_lora_weights)"
        )
    for component, part in parts.items():
        part["layers"] = _layers(component, part["method"], tensors, source)
        first = next(iter(part["layers"].values()))
        part["config"] |= {"r": first["r"], "heads": first["heads"]}
    return {
        "format": limits.FORMAT,
        "writer": "unknown (bare state dict)",
        "requires": sorted({part["method"] for part in parts.values()}),
        "origin": {},
        "components": parts,
        "metadata": {},
    }


def _part(component: str, method: str, tensor: Tensor, source: str) -> dict[str, Any]:
    settings = method_settings(method, tensor, f"{source}: {component}")
    return {"method": method, "config": settings, "base": None, "layers": {}}


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
            f"{source}: component {component!r} has settings but no layer tensors (…{tail})"
        )
    return {path: _row(f"{head}{path}.{method}", tensors, source) for path in sorted(paths)}


def _row(stem: str, tensors: Mapping[str, Tensor], source: str) -> dict[str, Any]:
    needed = [f"{stem}_{name}" for name in ("A", "B", "sparsity")]
    missing = [name for name in needed if name not in tensors]
    if missing:
        raise SnellaKeyError(f"{source}: tensors missing: {shown(missing)}")
    A, B, level = (tensors[name] for name in needed)
    if A.dim() != 3 or B.dim() != 3 or level.numel() != 1:
        raise SnellaShapeError(
            f"{source}: {stem}_A/_B/_sparsity have shapes {tuple(A.shape)}, {tuple(B.shape)}, "
            f"{tuple(level.shape)}; expected [heads, in, columns], [heads, out, columns], []"
        )
    threshold = tensors.get(f"{stem}_threshold")
    heads, columns = A.shape[0], A.shape[2]
    in_features, out_features = A.shape[1], B.shape[1]
    sparsity = float(level)
    return {
        "kind": "linear",
        "shape": [out_features, in_features],
        "r": heads * columns,
        "heads": heads,
        "sparsity": sparsity,
        "threshold": None if threshold is None else float(threshold),
        "kept": kept_count(in_features * out_features, sparsity) if 0 <= sparsity <= 1 else 0,
    }
