"""A damaged checkpoint is never continued from: `latest` steps back and says why, a path raises."""

import hashlib
import json
import os
import pickle
import random
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from snell_diffusion.diffusion.config import TrainConfig
from snell_diffusion.diffusion.run_folder import RunFolder
from snell_diffusion.training.checkpoints import CheckpointFolder
from snell_diffusion.training.errors import CheckpointError
from tests.reliability import harness
from tests.reliability.harness import copy_run, resumed, small_run

FILES = (
    "adapter.safetensors",
    "optimizer.safetensors",
    "competition.safetensors",
    "state.json",
    "manifest.json",
)
NEWEST, BEFORE = "step-000003", "step-000002"


@pytest.fixture(scope="module")
def finished(tiny_base: Path, tmp_path_factory: pytest.TempPathFactory) -> TrainConfig:
    """A finished run of 3 steps with all its checkpoints."""
    settings = small_run(
        tiny_base,
        tmp_path_factory.mktemp("finished"),
        max_train_steps=3,
        checkpoints_total_limit=None,
    )
    harness.train_to_the_end(settings)
    return settings


@pytest.fixture
def copy(finished: TrainConfig, tmp_path: Path) -> TrainConfig:
    """The same in a folder of its own, to damage and to resume."""
    folder = copy_run(Path(finished.output_dir), tmp_path / "run")
    return resumed(TrainConfig(**{**vars(finished), "output_dir": str(folder)}))


def missing(file: Path, other: Path) -> None:
    file.unlink()


def half(file: Path, other: Path) -> None:
    os.truncate(file, file.stat().st_size // 2)


def empty(file: Path, other: Path) -> None:
    os.truncate(file, 0)


def bit_flip(file: Path, other: Path) -> None:
    harness.flip_bit(file, 0.98)  # among the numbers: a flipped name would be found without digests


def from_another_step(file: Path, other: Path) -> None:
    shutil.copyfile(other / file.name, file)


def newest(settings: TrainConfig) -> Path:
    return Path(settings.output_dir) / "checkpoints" / NEWEST


def refusal(settings: TrainConfig) -> str:
    """What is said of the newest checkpoint when it is named; it must be refused."""
    named = resumed(settings, str(newest(settings)))
    with pytest.raises(CheckpointError) as refused:
        RunFolder(named).find_checkpoint(pytest.fail)
    return str(refused.value)


def require_step_back(settings: TrainConfig, reason: str, finished: TrainConfig) -> None:
    """A resume from `latest` says why, takes the one before, and ends with the same adapter."""
    harness.assert_finished(harness.train(settings))
    folder = Path(settings.output_dir)
    notes = [e["message"] for e in harness.events(folder) if e["event"] == "note"]
    assert f"{reason}; trying the one before" in notes
    assert [e["step"] for e in harness.events(folder) if e["event"] == "start"][-1] == 2
    whole = harness.adapter_digest(Path(finished.output_dir))
    harness.require_same_result(settings, whole)


@pytest.mark.row("R4")
@pytest.mark.parametrize("damage", [missing, half, empty, bit_flip, from_another_step])
@pytest.mark.parametrize("name", FILES)
def test_damage(
    copy: TrainConfig, finished: TrainConfig, name: str, damage: Callable[[Path, Path], None]
) -> None:
    damage(newest(copy) / name, newest(copy).with_name(BEFORE))
    reason = refusal(copy)
    assert str(newest(copy)) in reason
    require_step_back(copy, reason, finished)


class _Canary:
    """Makes a folder when it is unpickled."""

    def __init__(self, path: Path) -> None:
        self.path = str(path)

    def __reduce__(self) -> Any:
        return os.mkdir, (self.path,)


@pytest.mark.row("R4")
def test_planted_pickle_is_not_read(
    copy: TrainConfig, finished: TrainConfig, tmp_path: Path
) -> None:
    canary = tmp_path / "code-ran"
    planted = pickle.dumps(_Canary(canary))
    for name in ("optimizer.bin", "random_states_0.pkl", "state.pkl", "adapter.pt"):
        (newest(copy) / name).write_bytes(planted)
    harness.train_to_the_end(copy)
    assert not canary.exists()
    rewrite(newest(copy), "optimizer.safetensors", planted)
    reason = refusal(copy)
    assert "optimizer.safetensors cannot be read" in reason
    require_step_back(copy, reason, finished)
    assert not canary.exists()


# -- a manifest that was made to fit --------------------------------------------------------------


def rewrite(folder: Path, name: str, data: bytes) -> None:
    """Replace a file and correct its size and digest in the manifest."""
    (folder / name).write_bytes(data)
    manifest = json.loads((folder / "manifest.json").read_text())
    manifest["files"][name] = {"bytes": len(data), "sha256": hashlib.sha256(data).hexdigest()}
    (folder / "manifest.json").write_text(json.dumps(manifest))


@pytest.mark.row("R4")
@pytest.mark.parametrize("name", FILES[:4])
def test_file_of_another_step_with_its_digest_corrected(copy: TrainConfig, name: str) -> None:
    folder = newest(copy)
    rewrite(folder, name, (folder.with_name(BEFORE) / name).read_bytes())
    assert f"{name} is of step 2, the manifest of step 3: files of two checkpoints" in refusal(copy)


@pytest.mark.row("R4")
def test_whole_folder_of_another_step(copy: TrainConfig) -> None:
    shutil.rmtree(newest(copy))
    shutil.copytree(newest(copy).with_name(BEFORE), newest(copy))
    assert "manifest.json is of step 2, not of step 3: the folder was renamed" in refusal(copy)


@pytest.mark.row("R4")
@pytest.mark.parametrize(
    "name",
    ["../../secret.safetensors", "/etc/passwd", "a/b.safetensors", "..", "", "x.bin", "A.pkl"],
)
def test_manifest_may_name_files_of_its_folder_only(copy: TrainConfig, name: str) -> None:
    path = newest(copy) / "manifest.json"
    manifest = json.loads(path.read_text())
    manifest["files"][name] = manifest["files"]["adapter.safetensors"]
    path.write_text(json.dumps(manifest))
    assert f"manifest.json names {name!r}; only state.json and <group>.safetensors" in refusal(copy)


@pytest.mark.row("R4")
@pytest.mark.parametrize("name", FILES)
def test_links_and_pipes_are_not_followed(copy: TrainConfig, tmp_path: Path, name: str) -> None:
    file = newest(copy) / name
    shutil.move(file, tmp_path / "elsewhere")
    file.symlink_to(tmp_path / "elsewhere")
    assert f"{name} is missing or unreadable (Too many levels of symbolic links)" in refusal(copy)
    file.unlink()
    os.mkfifo(file)
    assert f"{name} is not a regular file" in refusal(copy)


@pytest.mark.row("R4")
@pytest.mark.parametrize("name", FILES)
def test_huge_file_is_refused_unread(copy: TrainConfig, name: str) -> None:
    os.truncate(newest(copy) / name, 2**40)  # sparse: takes no space, but would fill the memory
    assert f"{name} is damaged: {2**40} bytes, expected " in refusal(copy)


@pytest.mark.row("R4")
@pytest.mark.parametrize(
    "content, said",
    [
        (b"[1, 2]", "expected a JSON table, got list"),
        (b'{"a": 1, "a": 2}', "a key occurs twice"),
        (b"[" * 100_000, "not valid JSON"),
        (b"\xff\xfe", "not valid JSON"),
        (b"null", "expected a JSON table, got NoneType"),
    ],
)
def test_json_that_is_no_table(copy: TrainConfig, content: bytes, said: str) -> None:
    rewrite(newest(copy), "state.json", content)
    assert said in refusal(copy)
    (newest(copy) / "manifest.json").write_bytes(content)
    assert said in refusal(copy)


@pytest.mark.row("R4")
@pytest.mark.parametrize(
    "change",
    [
        {"step": "3"},
        {"step": True},
        {"step": -1},
        {"step": 3.0},
        {"files": []},
        {"files": {}},
        {"files": None},
        {"format": "2"},
        {"more": 1},
        {"files": {"state.json": {"bytes": 1}}},
        {"files": {"state.json": {"bytes": -1, "sha256": "0" * 64}}},
        {"files": {"state.json": {"bytes": 2**60, "sha256": "0" * 64}}},
        {"files": {"state.json": {"bytes": 10, "sha256": "x" * 64}}},
        {"files": {"state.json": {"bytes": 10, "sha256": None}}},
    ],
    ids=str,
)
def test_manifest_of_wrong_types(copy: TrainConfig, change: dict[str, Any]) -> None:
    path = newest(copy) / "manifest.json"
    path.write_text(json.dumps({**json.loads(path.read_text()), **change}))
    reason = refusal(copy)
    assert "manifest.json is damaged: " in reason or "this version reads 2" in reason


@pytest.mark.row("R4")
def test_no_flipped_bit_of_a_manifest_goes_unnoticed(finished: TrainConfig, tmp_path: Path) -> None:
    shutil.copytree(newest(finished), tmp_path / NEWEST)
    path, folder = tmp_path / NEWEST / "manifest.json", CheckpointFolder(tmp_path)
    data, draw = path.read_bytes(), random.Random(0)
    for place in range(len(data)):
        flipped = bytearray(data)
        flipped[place] ^= 1 << draw.randrange(8)
        path.write_bytes(flipped)
        with pytest.raises(CheckpointError, match=NEWEST):
            folder.load(tmp_path / NEWEST)
    path.write_bytes(data)
    assert folder.load(tmp_path / NEWEST).step == 3


@pytest.mark.row("R4")
@pytest.mark.parametrize(
    "key, value, said",
    [
        ("scheduler", {"last_epoch": "3"}, "state.json scheduler: missing ['_get_lr_called"),
        ("scheduler", [], "state.json scheduler: expected a table, got []"),
        ("optimizer", {"state": {}, "groups": []}, "optimizer.groups: expected a list of 2, got"),
        ("competition", {}, "state.json competition: missing ['keep.unet"),
        ("identity", None, "state.json does not say which run it belongs to"),
        ("class_images", 7, "state.json does not say which run it belongs to"),
    ],
)
def test_state_of_wrong_types_ends_the_run_before_it_writes(
    copy: TrainConfig, key: str, value: object, said: str
) -> None:
    state = json.loads((newest(copy) / "state.json").read_text())
    rewrite(newest(copy), "state.json", json.dumps({**state, key: value}).encode())
    log = Path(copy.output_dir) / "log.jsonl"
    before = log.read_bytes()
    outcome = harness.run_script(copy)
    assert outcome.code == 2
    assert said in outcome.said
    assert "Traceback" not in outcome.said
    assert log.read_bytes() == before
