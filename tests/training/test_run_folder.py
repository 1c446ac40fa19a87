"""Run folders: what may be replaced, what is in use, what a resumed run must match."""

import json
import os
import re
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch

from snell_diffusion.errors import SnellaConfigError
from snell_diffusion.training.errors import CheckpointError
from snell_diffusion.training.run_folder import RunFolder, require_same


def folder(path: Path, **changes: Any) -> RunFolder:
    options: dict[str, Any] = {"overwrite": False, "resume": None, "limit": 1, **changes}
    return RunFolder(path, ("log.jsonl", "status.json"), ("checkpoints", "logs"), **options)


def test_an_earlier_run_is_not_replaced_unasked(tmp_path: Path) -> None:
    folder(tmp_path).check()
    (tmp_path / "log.jsonl").write_text("{}\n")
    with pytest.raises(SnellaConfigError, match=r"holds an earlier run \(log.jsonl\)"):
        folder(tmp_path).check()
    folder(tmp_path, overwrite=True).check()
    folder(tmp_path, resume="latest").check()


def test_overwrite_removes_what_runs_write_and_nothing_else(tmp_path: Path) -> None:
    for name in ("log.jsonl", "notes.txt", "checkpoints/step-000001/x", ".tmp-1-old"):
        (tmp_path / name).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / name).write_text("x")
    folder(tmp_path, overwrite=True).take()
    assert {p.name for p in tmp_path.iterdir()} - {".tmp-1-old"} == {"notes.txt"}


def test_resuming_keeps_everything(tmp_path: Path) -> None:
    (tmp_path / "log.jsonl").write_text("x")
    folder(tmp_path, overwrite=True, resume="auto").take()
    assert (tmp_path / "log.jsonl").read_text() == "x"


def test_a_folder_in_use_is_refused(tmp_path: Path) -> None:
    """By a process that lives; a status left by a dead one, or by this one, is none."""
    waiting = [sys.executable, "-c", "input()"]
    with subprocess.Popen(waiting, stdin=subprocess.PIPE) as other:
        status = {"pid": other.pid, "state": "training"}
        (tmp_path / "status.json").write_text(json.dumps(status))
        for ask in (folder(tmp_path, overwrite=True).check, folder(tmp_path).take):
            with pytest.raises(SnellaConfigError, match=f"in use by process {other.pid}"):
                ask()
        (tmp_path / "status.json").write_text(json.dumps({**status, "state": "finished"}))
        folder(tmp_path, overwrite=True).check()
        (tmp_path / "status.json").write_text(json.dumps(status))
        other.communicate(b"\n")
    folder(tmp_path, overwrite=True).check()
    (tmp_path / "status.json").write_text(json.dumps({**status, "pid": os.getpid()}))
    folder(tmp_path, overwrite=True).check()


def test_checkpoints_are_found(tmp_path: Path) -> None:
    notes: list[str] = []
    assert folder(tmp_path).find_checkpoint(notes.append) is None
    assert folder(tmp_path, resume="auto").find_checkpoint(notes.append) is None
    with pytest.raises(CheckpointError, match="holds no valid checkpoint; use 'auto'"):
        folder(tmp_path, resume="latest").find_checkpoint(notes.append)
    tensors = {"adapter": {"w": torch.ones(2)}}
    path = folder(tmp_path).checkpoints.save(3, tensors, {"identity": {"seed": 1, "rank": 4}})
    for resume in ("latest", "auto", str(path)):
        found = folder(tmp_path, resume=resume).find_checkpoint(notes.append)
        assert found is not None
        assert found.step == 3
        require_same(found, {"seed": 1, "rank": 4})
        said = "rank: 4 then, 8 now; steps: 'nothing' then, 5 now"
        with pytest.raises(CheckpointError, match=re.escape(said)):
            require_same(found, {"seed": 1, "rank": 8, "steps": 5})
    path = folder(tmp_path).checkpoints.save(4, tensors, {})
    found = folder(tmp_path, resume=str(path)).find_checkpoint(notes.append)
    with pytest.raises(CheckpointError, match="does not say which run it belongs to"):
        require_same(found, {})
    assert not notes
