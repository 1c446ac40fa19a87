"""Lowest versions of the libraries this package stands on, checked where each one is first used."""

from importlib import metadata

from packaging.version import Version

__all__ = ["FLOORS", "require"]

FLOORS = {
    "torch": "2.10",  # CVE-2026-24747, CVE-2025-32434: `weights_only=True` could be bypassed
    "diffusers": "0.42",  # attention modules and pipeline verbs as this package knows them
    "transformers": "5.3",  # CVE-2026-4372, CVE-2026-5241: config bypassed `trust_remote_code`
    "peft": "0.21",  # state-dict hooks live on the tuner
    "huggingface_hub": "1.0",
    "gradio": "6.16",  # GHSA-j36p-7w88-g82j, CVE-2026-28414
    "pillow": "12.2",  # GHSA-whj4-6x5x-4v2j: FITS decompression bomb
    "pydantic": "2.0",
}


def require(package: str) -> None:
    """Raise unless `package` is installed at its lowest supported version or a later one.

    Raises:
        ImportError: The package is missing or too old; the text says what to install.
    """
    floor = FLOORS[package]
    try:
        installed = metadata.version(package)
    except metadata.PackageNotFoundError:
        raise ImportError(
            f"snell_diffusion needs {package}>={floor}, which is not installed: "
            f"pip install '{package}>={floor}'"
        ) from None
    if Version(installed) < Version(floor):
        raise ImportError(
            f"snell_diffusion needs {package}>={floor}, but {package} {installed} is installed: "
            f"pip install --upgrade '{package}>={floor}'"
        )
