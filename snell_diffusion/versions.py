"""Lowest versions of the libraries this package stands on, checked before each one is imported."""

from importlib import metadata

from packaging.version import Version

__all__ = ["FLOORS", "require"]

FLOORS = {
    "torch": "2.10",  # CVE-2026-24747, CVE-2025-32434: `weights_only=True` could be bypassed
    "diffusers": "0.42",  # attention modules and pipeline verbs as this package knows them
    "transformers": "5.3",  # CVE-2026-4372, CVE-2026-5241: config bypassed `trust_remote_code`
    "accelerate": "1.15",  # launch and device hooks as this package knows them
    "peft": "0.21",  # state-dict hooks live on the tuner
    "safetensors": "0.8",  # refuses overlapping and missing bytes
    "huggingface_hub": "1.0",
    "gradio": "6.16",  # GHSA-j36p-7w88-g82j, CVE-2026-28414
    "pillow": "12.2",  # GHSA-whj4-6x5x-4v2j: FITS decompression bomb
    "pydantic": "2.0",
}

_EXTRAS = {"gradio": "app"}


def require(*packages: str) -> None:
    """Raise unless each package is installed at its lowest supported version or a later one.

    Raises:
        ImportError: The first that is missing or too old; the text says what to install.
    """
    for package in packages:
        _require(package, FLOORS[package])


def _require(package: str, floor: str) -> None:
    try:
        installed = metadata.version(package)
    except metadata.PackageNotFoundError:
        wanted = f"{package}>={floor}"
        if package in _EXTRAS:
            wanted = f"snell-diffusion[{_EXTRAS[package]}]"
        raise ImportError(
            f"snell_diffusion needs {package}>={floor}, which is not installed: "
            f"pip install '{wanted}'"
        ) from None
    if Version(installed) < Version(floor):
        raise ImportError(
            f"snell_diffusion needs {package}>={floor}, but {package} {installed} is installed: "
            f"pip install --upgrade '{package}>={floor}'"
        )
