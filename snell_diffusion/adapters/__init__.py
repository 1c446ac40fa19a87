"""The adapter file format: schema, digest, save, read, load, inspect (docs/adapter_format.md)."""

# ruff: noqa: E402  a library that is too old must be named before its import fails

from snell_diffusion.versions import require

require("torch", "pydantic")

from snell_diffusion.adapters.inspect import inspect_adapter, summary
from snell_diffusion.adapters.limits import FORMAT, WEIGHTS_NAME
from snell_diffusion.adapters.load import LoadReport, check_adapter_name, load_adapter
from snell_diffusion.adapters.read import AdapterFile, read_adapter, read_header
from snell_diffusion.adapters.state import adapter_names, adapter_state
from snell_diffusion.adapters.write import adapter_file_bytes, save_adapter, state_with_header

__all__ = [
    "FORMAT",
    "WEIGHTS_NAME",
    "AdapterFile",
    "LoadReport",
    "adapter_file_bytes",
    "adapter_names",
    "adapter_state",
    "check_adapter_name",
    "inspect_adapter",
    "load_adapter",
    "read_adapter",
    "read_header",
    "save_adapter",
    "state_with_header",
    "summary",
]
