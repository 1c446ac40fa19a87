"""One small adapter, saved once, for all tests of the file format."""

from pathlib import Path

import pytest
from torch import nn

from snell_diffusion.adapters import AdapterFile, read_adapter, save_adapter
from tests.tiny_models import adapt, sd15_unet, text_encoder

METADATA = {"instance_prompt": "a photo of sks cat", "steps": 12, "loss": 0.25}


@pytest.fixture(scope="session")
def adapted() -> dict[str, nn.Module]:
    """Adapted components; tests must not change them."""
    return {"unet": adapt(sd15_unet()), "text_encoder": adapt(text_encoder(), seed=2)}


@pytest.fixture(scope="session")
def adapter_path(adapted: dict[str, nn.Module], tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("adapter")
    return save_adapter(folder, adapted, metadata=METADATA, base={"source": "tiny"})


@pytest.fixture
def adapter_bytes(adapter_path: Path) -> bytes:
    return adapter_path.read_bytes()


@pytest.fixture
def adapter_file(adapter_path: Path) -> AdapterFile:
    return read_adapter(adapter_path)
