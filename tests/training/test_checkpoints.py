"""A checkpoint is whole or absent, and a damaged one never loads."""

import json
import os
from pathlib import Path

import pytest
import torch

from snell_diffusion.training import checkpoints
from snell_diffusion.training.checkpoints import CheckpointFolder
from snell_diffusion.training.errors import CheckpointError

TENSORS = {
    "adapter": {
        "a": torch.arange(6.0).view(2, 3),
        "level": torch.tensor(0.25, dtype=torch.float64),
    },
    "optimizer": {"0.exp_avg": torch.tensor([1e-30, float("nan")])},
}
STATE = {"step": 3, "lr": [0.1, 1e-7], "name": "x"}
FILES = ("adapter.safetensors", "optimizer.safetensors", "state.json", "manifest.json")


def saved(folder: CheckpointFolder, *steps: int) -> None:
    for step in steps:
        folder.save(step, TENSORS, STATE)


def no_warning(message: str) -> None:
    pytest.fail(f"unexpected warning: {message}")


def test_round_trip_is_exact(tmp_path: Path) -> None:
    folder = CheckpointFolder(tmp_path / "checkpoints")
    path = folder.save(3, TENSORS, STATE)
    found = folder.load(path)
    assert path.name == "step-000003"
    assert found.step == 3
    assert found.state == STATE
    for group, values in TENSORS.items():
        for name, tensor in values.items():
            loaded = found.tensors[group][name]
            assert loaded.dtype == tensor.dtype
            assert torch.equal(loaded.nan_to_num(7.0), tensor.nan_to_num(7.0))


def test_nothing_is_pickled(tmp_path: Path) -> None:
    path = CheckpointFolder(tmp_path).save(1, TENSORS, STATE)
    assert sorted(p.name for p in path.iterdir()) == sorted(FILES)


@pytest.mark.parametrize("name", FILES)
@pytest.mark.parametrize("damage", ["missing", "cut", "empty", "flipped"])
def test_damage_is_found_and_named(tmp_path: Path, name: str, damage: str) -> None:
    folder = CheckpointFolder(tmp_path)
    saved(folder, 1, 2)
    file = folder.path(2) / name
    data = bytearray(file.read_bytes())
    data[len(data) // 2] ^= 1
    if damage == "missing":
        file.unlink()
    elif damage == "flipped":
        file.write_bytes(data)
    else:
        os.truncate(file, 0 if damage == "empty" else file.stat().st_size // 2)
    with pytest.raises(CheckpointError, match=str(folder.path(2))):
        folder.load(folder.path(2))
    warnings: list[str] = []
    found = folder.latest(warnings.append)
    assert found is not None
    assert found.step == 1
    assert len(warnings) == 1
    assert "trying the one before" in warnings[0]


def test_another_step_s_file_is_refused(tmp_path: Path) -> None:
    folder = CheckpointFolder(tmp_path)
    saved(folder, 1)
    folder.save(2, {**TENSORS, "adapter": {**TENSORS["adapter"], "a": torch.ones(2, 3)}}, STATE)
    (folder.path(2) / "adapter.safetensors").write_bytes(
        (folder.path(1) / "adapter.safetensors").read_bytes()
    )
    with pytest.raises(CheckpointError, match=r"adapter.safetensors is damaged: its SHA-256"):
        folder.load(folder.path(2))


def test_format_of_the_future_is_refused(tmp_path: Path) -> None:
    path = CheckpointFolder(tmp_path).save(1, TENSORS, STATE)
    manifest = json.loads((path / "manifest.json").read_text())
    (path / "manifest.json").write_text(json.dumps({**manifest, "format": 99}))
    with pytest.raises(
        CheckpointError, match="has format 99, this version reads 2; continue it with the version"
    ):
        CheckpointFolder(tmp_path).load(path)


def test_oldest_go_after_the_newest_is_there(tmp_path: Path) -> None:
    folder = CheckpointFolder(tmp_path, limit=2)
    saved(folder, 1, 2, 3)
    assert folder.steps() == [2, 3]


def test_limit_one_keeps_the_old_one_until_the_new_one_is_published(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    folder = CheckpointFolder(tmp_path, limit=1)
    saved(folder, 1)

    def full(descriptor: int) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(checkpoints.os, "fsync", full)
    with pytest.raises(
        CheckpointError, match=r"No space left on device; the disk at .* free; free space there"
    ):
        folder.save(2, TENSORS, STATE)
    monkeypatch.undo()
    assert [p.name for p in tmp_path.iterdir()] == ["step-000001"]
    found = folder.latest(no_warning)
    assert found is not None
    assert found.step == 1


def test_limit_zero_is_refused(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="at least 1, got 0"):
        CheckpointFolder(tmp_path, limit=0)


def test_strangers_are_ignored_and_litter_is_swept(tmp_path: Path) -> None:
    folder = CheckpointFolder(tmp_path)
    for name in ("checkpoint-tmp", "step-x", "step-1", ".tmp-999999999-step-000009"):
        (tmp_path / name).mkdir()
    assert folder.steps() == []
    assert folder.latest(no_warning) is None
    saved(folder, 4)
    left = sorted(p.name for p in tmp_path.iterdir())
    assert left == ["checkpoint-tmp", "step-000004", "step-1", "step-x"]


def test_same_step_again_replaces(tmp_path: Path) -> None:
    folder = CheckpointFolder(tmp_path)
    saved(folder, 4)
    folder.save(4, TENSORS, {"name": "again"})
    assert folder.load(folder.path(4)).state == {"name": "again", "step": 4}
    assert [p.name for p in tmp_path.iterdir()] == ["step-000004"]


def test_what_reads_back_damaged_is_not_published_and_costs_nothing(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A disk that says yes and stores something else: the older checkpoint stays."""
    folder = CheckpointFolder(tmp_path, limit=1)
    saved(folder, 1)
    write = checkpoints._write

    def lie(path: Path, data: bytes) -> tuple[int, str]:
        done = write(path, data)
        if path.name == "adapter.safetensors":
            path.write_bytes(data[:-1] + bytes([data[-1] ^ 1]))
        return done

    monkeypatch.setattr(checkpoints, "_write", lie)
    with pytest.raises(CheckpointError, match=r"adapter.safetensors is damaged: its SHA-256"):
        folder.save(2, TENSORS, STATE)
    assert [p.name for p in tmp_path.iterdir()] == ["step-000001"]


@pytest.mark.parametrize("renames", [1, 2])
def test_death_while_a_step_is_replaced_loses_nothing(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, renames: int
) -> None:
    """Saving the only step again: between the two renames the old one is put back."""
    folder, left = CheckpointFolder(tmp_path, limit=1), renames
    folder.save(4, TENSORS, {"name": "old"})
    rename = Path.rename

    class Died(BaseException):
        pass

    def die(self: Path, target: Path) -> Path:
        nonlocal left
        left -= 1
        done = rename(self, target)
        if left == 0:
            monkeypatch.undo()
            # A process that dies cleans nothing up.
            monkeypatch.setattr(checkpoints, "remove", lambda path: None)
            raise Died
        return done

    monkeypatch.setattr(Path, "rename", die)
    with pytest.raises(Died):
        folder.save(4, TENSORS, {"name": "new"})
    monkeypatch.undo()
    folder.restore_replaced()
    found = folder.latest(no_warning)
    assert found is not None
    assert found.state["name"] == ("old" if renames == 1 else "new")
    folder.save(5, TENSORS, STATE)
    assert [p.name for p in tmp_path.iterdir()] == ["step-000005"]
