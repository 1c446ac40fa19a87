"""V1: adapter files of every release load, bit for bit, and predict what they predicted."""

import json
import struct
from pathlib import Path

import pytest
import torch
from safetensors import safe_open
from safetensors.torch import load_file
from torch import Tensor

from scripts import make_golden_adapters
from snell_diffusion import __version__
from snell_diffusion.adapters import adapter_state, read_adapter
from tests.compat.golden_adapters import (
    EXPECTED,
    FOLDER,
    KINDS,
    LIMIT,
    base,
    prediction,
    releases,
    with_file,
    write_golden,
)
from tests.rows import RowRecord

TOLERANCE = 1e-4  # relative, Frobenius: PEFT's figure for its own old releases


def relative(got: Tensor, expected: Tensor) -> float:
    return float((got - expected).norm() / expected.norm())


@pytest.mark.row("V1")
@pytest.mark.parametrize("release, kind", releases())
def test_a_file_of_a_release_is_what_it_was(release: str, kind: str, row: RowRecord) -> None:
    path = FOLDER / release / f"{kind}.safetensors"
    file = read_adapter(path)
    written = load_file(path)
    assert file.tensors.keys() == written.keys()
    assert all(torch.equal(file.tensors[name], tensor) for name, tensor in written.items())
    with safe_open(FOLDER / release / EXPECTED, "pt") as stored:
        assert file.digest == json.loads(stored.metadata()["digests"])[kind]
        expected, plain = stored.get_tensor(kind), stored.get_tensor("base")

    models = with_file(file)
    live = adapter_state(models)
    for name, tensor in written.items():
        if name in live:  # the rest are settings, which the header repeats
            assert torch.equal(live[name].to(tensor.dtype), tensor), name
    off = relative(prediction(models), expected)
    assert off <= TOLERANCE
    assert relative(prediction(base()), plain) <= TOLERANCE
    assert relative(expected, plain) > 100 * TOLERANCE  # or the adapter would not be tested
    row.figure(f"{release} {kind}: predictions within {max(off, 1e-8):.0e}")


def test_this_release_has_its_files() -> None:
    assert {kind for release, kind in releases() if release == __version__} == set(KINDS)
    sizes = [path.stat().st_size for path in FOLDER.rglob("*.safetensors")]
    assert max(sizes) <= LIMIT


@pytest.mark.parametrize("kind", KINDS)
def test_the_files_are_still_written_like_this(kind: str, tmp_path: Path) -> None:
    """Of the release that is being worked on: a change of the format shows here first."""
    write_golden(kind, tmp_path / "x.safetensors")
    new = read_adapter(tmp_path / "x.safetensors")
    kept = read_adapter(FOLDER / __version__ / f"{kind}.safetensors")
    assert new.tensors.keys() == kept.tensors.keys()
    for name, tensor in kept.tensors.items():
        assert torch.allclose(new.tensors[name].double(), tensor.double(), atol=1e-6), name
    assert new.header.model_dump(exclude={"writer", "components"}) == kept.header.model_dump(
        exclude={"writer", "components"}
    )


def test_a_flipped_bit_in_a_factor_would_be_seen() -> None:
    path = FOLDER / __version__ / "mixed_squared.safetensors"
    data = bytearray(path.read_bytes())
    start = 8 + struct.unpack("<Q", data[:8])[0]
    data[start + 100] ^= 0x10
    with pytest.raises(ValueError, match="digest"):
        read_adapter(bytes(data))


def test_goldens_are_not_written_over(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    before = {path: path.read_bytes() for path in FOLDER.rglob("*.safetensors")}
    assert make_golden_adapters.main([]) == 1
    assert "exists: the files of a release stay as they are" in capsys.readouterr().err
    assert {path: path.read_bytes() for path in FOLDER.rglob("*.safetensors")} == before
    root = tmp_path / "tree"
    root.mkdir()
    monkeypatch.setattr(make_golden_adapters, "ROOT", root)
    git = ["git", "-c", "init.defaultBranch=main"]
    make_golden_adapters.subprocess.run([*git, "init", "-q"], cwd=root, check=True)
    assert make_golden_adapters.refusal(tmp_path / "new") is None
    (root / "work").write_text("not committed")
    assert "1 uncommitted changes (?? work" in str(make_golden_adapters.refusal(tmp_path / "new"))
