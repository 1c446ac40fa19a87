"""Files, folders and hub ids to one file, and never outside of what was named."""

import shutil
from pathlib import Path

import pytest

from snell_diffusion.adapters import WEIGHTS_NAME
from snell_diffusion.diffusion.sources import locate
from snell_diffusion.errors import SnellaFileError, SnellaValueError


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    root = tmp_path / "mine"
    (root / "sub").mkdir(parents=True)
    (root / WEIGHTS_NAME).write_bytes(b"1")
    (root / "sub" / "other.safetensors").write_bytes(b"2")
    (tmp_path / "secret.safetensors").write_bytes(b"3")
    return root


def test_files_and_folders(folder: Path) -> None:
    assert locate(folder) == folder / WEIGHTS_NAME
    assert locate(str(folder / WEIGHTS_NAME)) == folder / WEIGHTS_NAME
    found = locate(folder, "other.safetensors", "sub")
    assert found == folder / "sub" / "other.safetensors"


def test_a_missing_name_lists_what_is_there(folder: Path) -> None:
    with pytest.raises(SnellaFileError, match=r"files there: other.safetensors\. Name the file"):
        locate(folder, subfolder="sub")
    with pytest.raises(SnellaFileError, match=r"x\.safetensors: no such file; .*pytorch_snella"):
        locate(folder, "x.safetensors")


@pytest.mark.parametrize(
    "name",
    ["../secret.safetensors", "/etc/passwd", "a/b.safetensors", "w.bin", "..\\x.safetensors"],
)
def test_file_names_are_plain(name: str, folder: Path) -> None:
    with pytest.raises(
        SnellaValueError, match=r"expected a plain file name ending in \.safetensors"
    ):
        locate(folder, name)


@pytest.mark.parametrize("subfolder", ["..", "../..", "/etc", "sub/../..", "a\\..\\b"])
def test_subfolders_stay_below(subfolder: str, folder: Path) -> None:
    with pytest.raises(SnellaValueError, match="expected a folder below the source"):
        locate(folder, subfolder=subfolder)


def test_links_that_lead_out_are_refused(folder: Path) -> None:
    (folder / "link.safetensors").symlink_to(folder.parent / "secret.safetensors")
    with pytest.raises(SnellaFileError, match="a link that leads out of"):
        locate(folder, "link.safetensors")
    (folder / "inside.safetensors").symlink_to(folder / WEIGHTS_NAME)
    assert locate(folder, "inside.safetensors").name == "inside.safetensors"


def test_a_file_takes_no_name_inside(folder: Path) -> None:
    with pytest.raises(SnellaValueError, match="is a file: weight_name and subfolder are for"):
        locate(folder / WEIGHTS_NAME, "other.safetensors")


@pytest.mark.parametrize("text", ["nowhere", "a/b/c", "./a/b", "../a", "a/.b", "/a/b", "a /b"])
def test_what_is_neither_path_nor_hub_id(text: str) -> None:
    with pytest.raises(SnellaFileError, match="no such file or folder, and not a hub id"):
        locate(text)


COMMIT = "0123456789abcdef0123456789abcdef01234567"


@pytest.fixture
def hub_cache(tmp_path: Path) -> Path:
    """A cache as huggingface_hub leaves it: blobs, and a snapshot that links to them."""
    root = tmp_path / "hub" / "models--someone--a-cat"
    snapshot = root / "snapshots" / COMMIT
    (root / "blobs").mkdir(parents=True)
    snapshot.mkdir(parents=True)
    (root / "refs").mkdir()
    (root / "refs" / "main").write_text(COMMIT)
    (root / "blobs" / "abc").write_bytes(b"weights")
    (snapshot / WEIGHTS_NAME).symlink_to("../../blobs/abc")
    return tmp_path / "hub"


def test_a_hub_id_is_found_in_the_cache(hub_cache: Path) -> None:
    for revision in (None, "main", COMMIT):
        path = locate("someone/a-cat", cache_dir=hub_cache, revision=revision)
        assert path.read_bytes() == b"weights"
        assert path.parent.name == COMMIT


def test_a_snapshot_folder_may_link_into_its_own_cache(hub_cache: Path) -> None:
    snapshot = hub_cache / "models--someone--a-cat" / "snapshots" / COMMIT
    assert locate(snapshot).read_bytes() == b"weights"
    shutil.copy(hub_cache / "models--someone--a-cat" / "refs" / "main", hub_cache / "secret")
    (snapshot / "out.safetensors").symlink_to(hub_cache / "secret")
    with pytest.raises(SnellaFileError, match="a link that leads out of"):
        locate(snapshot, "out.safetensors")


def test_a_hub_id_that_cannot_be_fetched_says_so(hub_cache: Path) -> None:
    message = r"someone/b on the hub: pytorch_snella_weights.safetensors could not be fetched"
    with pytest.raises(SnellaFileError, match=message):
        locate("someone/b", cache_dir=hub_cache, local_files_only=True)
