"""Frozen bases in 4 or 8 bits: diffusers quantizes the denoiser's Linear layers as it loads them.

Adapters on top stay float32. An adapter is a property of the exact weights it was trained beside,
but the file fits the base as it is, too: settings of a quantized base count as those of the base.
"""

import importlib.util
from typing import Any

import torch

from snell_diffusion.errors import SnellaConfigError

_PACKAGES = {"bnb": "bitsandbytes", "torchao": "torchao"}
# Quantized on the GPU as they load, and left there.
IMMOVABLE = frozenset({"bnb_nf4", "bnb_int8"})


def loading_options(kind: str, denoiser: str, dtype: torch.dtype) -> dict[str, Any]:
    """What to add to `from_pretrained` for a quantized denoiser; nothing for kind "none".

    Args:
        kind: A value of `base_quantization`.
        denoiser: Name of the component.
        dtype: What the layers compute in.

    Raises:
        SnellaConfigError: The package or the GPU that it needs is missing.
    """
    if kind == "none":
        return {}
    _require_package(kind)
    from diffusers import PipelineQuantizationConfig

    settings = {
        "bnb_nf4": _nf4,
        "bnb_int8": _int8,
        "torchao_int8": _torchao_int8,
        "torchao_fp8": _torchao_fp8,
    }[kind](dtype)
    return {
        "quantization_config": PipelineQuantizationConfig(quant_mapping={denoiser: settings}),
    }


def _require_package(kind: str) -> None:
    package = _PACKAGES[kind.partition("_")[0]]
    if importlib.util.find_spec(package) is None:
        raise SnellaConfigError(
            f"base_quantization {kind} needs {package}, which is not installed: "
            f"pip install 'snell-diffusion[quant]'"
        )
    if package == "bitsandbytes" and not torch.cuda.is_available():
        raise SnellaConfigError(
            f"base_quantization {kind} needs a GPU, on which diffusers quantizes; on the CPU use "
            f"torchao_int8"
        )


def _nf4(dtype: torch.dtype) -> Any:
    from diffusers import BitsAndBytesConfig

    return BitsAndBytesConfig(
        load_in_4bit=True,
        bnb_4bit_quant_type="nf4",
        bnb_4bit_use_double_quant=True,
        bnb_4bit_compute_dtype=dtype,
    )


def _int8(dtype: torch.dtype) -> Any:
    from diffusers import BitsAndBytesConfig

    return BitsAndBytesConfig(load_in_8bit=True)


def _torchao_int8(dtype: torch.dtype) -> Any:
    from diffusers import TorchAoConfig
    from torchao.quantization import Int8WeightOnlyConfig

    return TorchAoConfig(Int8WeightOnlyConfig())


def _torchao_fp8(dtype: torch.dtype) -> Any:
    from diffusers import TorchAoConfig
    from torchao.quantization import Float8WeightOnlyConfig

    return TorchAoConfig(Float8WeightOnlyConfig())


def plain_values(weight: torch.Tensor) -> torch.Tensor:
    """The stored numbers of a weight, flat: dequantized where it has no plain storage."""
    weight = weight.detach()
    if type(weight) not in (torch.Tensor, torch.nn.Parameter) and hasattr(weight, "dequantize"):
        weight = weight.dequantize()
    return weight.flatten()


def entries(layer: torch.nn.Module) -> int:
    """Numbers in the weight of a layer, also where they are packed several to a byte."""
    if isinstance(layer, torch.nn.Linear):
        return layer.in_features * layer.out_features
    weight: torch.Tensor = layer.weight  # type: ignore[assignment]
    return weight.numel()
