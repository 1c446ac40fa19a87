"""Files of other format versions: read, migrated or refused by name."""

import json
import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file

from snell_diffusion import load_adapter, read_adapter, save_adapter
from snell_diffusion.adapters.doubles import join_doubles
from snell_diffusion.adapters.schema import FORMAT_KEY
from snell_diffusion.errors import SnellaFileError
from snell_diffusion.tuners import delta_layers
from tests.adapters.files import container, rebuilt, split
from tests.security.corpus import good_bytes
from tests.tiny_models import hash_bytes, sd15_unet, text_encoder

pytestmark = pytest.mark.row("V2")

# Written by the development version, before format 1.0 had its final form; expected.json holds the
# SHA-256 of each tensor's bytes as it was then, and float64 numbers in hexadecimal.
OLD = Path(__file__).parent / "golden" / "version0" / "pytorch_snella_weights.safetensors"
EXPECTED = json.loads(OLD.with_name("expected.json").read_text("utf-8"))


def of_version(
    version: str, change: Callable[[dict[str, Any]], Any] = lambda header: None
) -> bytes:
    def apply(header: dict[str, Any]) -> None:
        header["format"] = version
        change(header)

    return rebuilt(good_bytes(), apply, version=version)


def test_a_later_minor_version_with_unknown_fields_costs_one_warning() -> None:
    def change(header: dict[str, Any]) -> None:
        header |= {"novelty": 1, "writer": "snell_diffusion 1.4.0"}
        header["components"]["unet"]["colour"] = "red"

    with pytest.warns(UserWarning, match="a later version; ignored") as caught:
        file = read_adapter(of_version("1.4", change))
    assert len(caught) == 1
    text = str(caught[0].message)
    assert "written by 'snell_diffusion 1.4.0', a later version" in text
    assert "ignored: components.unet.colour, novelty; upgrade snell_diffusion to use them" in text
    same = read_adapter(good_bytes())
    assert all(torch.equal(tensor, file.tensors[name]) for name, tensor in same.tensors.items())
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        read_adapter(of_version("1.4"))  # nothing in it is unknown


@pytest.mark.parametrize(
    "writer, install",
    [
        ("snell_diffusion 2.3.0", "pip install --upgrade 'snell-diffusion>=2.3.0'"),
        ("snell_diffusion 2.3.0.dev1", "pip install --upgrade 'snell-diffusion>=2.3.0'"),
        ("'; rm -rf ~ #", "pip install --upgrade snell-diffusion"),
        (None, "pip install --upgrade snell-diffusion"),
    ],
)
def test_a_later_major_version_names_what_to_install(writer: str | None, install: str) -> None:
    with pytest.raises(SnellaFileError) as caught:
        read_adapter(of_version("2.0", lambda header: header.update(writer=writer)))
    text = str(caught.value)
    assert "'snella.format': expected 1.x, which this version reads, got 2.0" in text
    assert text.endswith(install)


def test_a_later_major_version_may_look_quite_different() -> None:
    table, body = split(good_bytes())
    table["__metadata__"] = {FORMAT_KEY: "7.1", "snella.header": "not even JSON"}
    with pytest.raises(SnellaFileError, match=r"expected 1.x.*got 7.1; install another version"):
        read_adapter(container(table, body))


@pytest.mark.parametrize("version", ["1.0", "1.9"])
def test_an_unknown_required_feature_is_refused(version: str) -> None:
    """Before any other field of a later version, which may mean something else there."""

    def change(header: dict[str, Any]) -> None:
        header |= {"requires": ["snella", "tucker"], "writer": "snell_diffusion 1.9.2"}
        if version == "1.9":
            header["components"]["unet"]["layers"] = "elsewhere"

    message = r"'requires': expected features .*snella.*, got 'tucker'; .*snell-diffusion>=1.9.2'"
    with pytest.raises(SnellaFileError, match=message):
        read_adapter(of_version(version, change))


def test_a_file_without_a_version_is_refused() -> None:
    table, body = split(good_bytes())
    del table["__metadata__"][FORMAT_KEY]
    with pytest.raises(
        SnellaFileError, match=r"expected snella.format too, got only snella.digest, s"
    ):
        read_adapter(container(table, body))


def check_version0(tensors: dict[str, torch.Tensor]) -> None:
    assert set(tensors) == set(EXPECTED["tensors"])
    for name, tensor in tensors.items():
        assert tensor.dtype == torch.float32
        expected = EXPECTED["tensors"][name]
        if isinstance(expected, str):
            assert hash_bytes(tensor) == expected
        else:
            numbers = join_doubles(tensor, name).reshape(-1).tolist()
            assert [number.hex() for number in numbers] == expected


def test_a_file_of_the_development_version_is_read_exactly_with_one_warning() -> None:
    with pytest.warns(UserWarning, match=r"by a development version .*12 F64.* save it again") as w:
        file = read_adapter(OLD)
    assert len(w) == 1
    check_version0(file.tensors)
    assert file.digest == EXPECTED["digest"]


def test_its_bare_tensors_are_migrated_too() -> None:
    with pytest.warns(UserWarning, match="by a development version") as caught:
        file = read_adapter(load_file(OLD))
    assert len(caught) == 1
    check_version0(file.tensors)


def test_loaded_and_saved_again_it_is_a_file_of_this_version(tmp_path: Path) -> None:
    components = {"unet": sd15_unet(), "text_encoder": text_encoder()}
    with pytest.warns(UserWarning, match="by a development version"):
        load_adapter(components, read_adapter(OLD))
    levels = {
        f"{component}.{path}.snella_sparsity": [layer.sparsity("default").hex()]
        for component, model in components.items()
        for path, layer in delta_layers(model)
    }
    assert levels.items() <= EXPECTED["tensors"].items()
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        check_version0(read_adapter(save_adapter(tmp_path, components)).tensors)
