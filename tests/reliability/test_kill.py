"""A run that dies at any moment is resumed to the same adapter file, bit for bit."""

import json
import os
import random
import signal
from pathlib import Path

import psutil
import pytest

from tests.reliability import harness
from tests.reliability.faults import DIED, Point, die_at
from tests.reliability.harness import (
    adapter_digest,
    require_nothing_lost,
    require_same_result,
    small_run,
)

_TEMPORARY = r"/\.tmp-\d+-step-\d{6}"
IN_A_CHECKPOINT = {
    "before its folder": Point("mkdir", _TEMPORARY + "$", "before"),
    "before its first file": Point("mkdir", _TEMPORARY + "$", "after"),
    "half of the adapter": Point("fsync", _TEMPORARY + r"/adapter\.safetensors$", "half"),
    "after the adapter": Point("fsync", _TEMPORARY + r"/adapter\.safetensors$", "after"),
    "half of the optimizer": Point("fsync", _TEMPORARY + r"/optimizer\.safetensors$", "half"),
    "half of the state": Point("fsync", _TEMPORARY + r"/state\.json$", "half"),
    "before the manifest": Point("fsync", _TEMPORARY + r"/state\.json$", "after"),
    "half of the manifest": Point("fsync", _TEMPORARY + r"/manifest\.json$", "half"),
    "before the rename": Point("rename", r"/step-\d{6}$", "before"),
    "after the rename": Point("rename", r"/step-\d{6}$", "after"),
    "before an old one is removed": Point("rmtree", r"step-\d{6}$", "before"),
    "half-way through removing an old one": Point("rmtree", r"step-\d{6}$", "half"),
}
ELSEWHERE = {
    "half of config.yaml": Point("fsync", r"-config\.yaml$", "half"),
    "before a line of the log": Point("line", '"event": "step", "step": 2', "before"),
    "half of a line of the log": Point("line", '"event": "step", "step": 2', "half"),
    "half of status.json": Point("replace", r"/status\.json$", "half"),
    "half of the final adapter": Point("fsync", rf"/\.{harness.ADAPTER}\.\w+$", "half"),
    "before the final adapter's rename": Point("replace", rf"/{harness.ADAPTER}$", "before"),
    "after the final adapter's rename": Point("replace", rf"/{harness.ADAPTER}$", "after"),
    "half of the model card": Point("fsync", r"-README\.md$", "half"),
}


@pytest.fixture(scope="module")
def whole(tiny_base: Path, tmp_path_factory: pytest.TempPathFactory) -> tuple[str, float]:
    """SHA-256 of the adapter of an undisturbed run, and the seconds it computed."""
    settings = small_run(tiny_base, tmp_path_factory.mktemp("whole"))
    outcome = harness.train(settings)
    harness.assert_finished(outcome)
    return adapter_digest(Path(settings.output_dir)), outcome.cpu_seconds


def die_and_resume(base: Path, folder: Path, point: Point, occurrence: int, whole: str) -> None:
    settings = small_run(base, folder)
    outcome = harness.train(settings, die_at(point, occurrence))
    assert outcome.code == DIED, f"the point was not reached: {outcome.said[-2000:]}"
    harness.resume(settings, require_nothing_lost(folder / "run"))
    require_same_result(settings, whole)


@pytest.mark.row("R1")
@pytest.mark.parametrize("occurrence", [1, 2], ids=["first", "later"])
@pytest.mark.parametrize("name", IN_A_CHECKPOINT)
def test_death_in_a_checkpoint(
    tiny_base: Path, tmp_path: Path, whole: tuple[str, float], name: str, occurrence: int
) -> None:
    die_and_resume(tiny_base, tmp_path, IN_A_CHECKPOINT[name], occurrence, whole[0])


@pytest.mark.row("R1")
@pytest.mark.parametrize("name", ELSEWHERE)
def test_death_in_another_write(
    tiny_base: Path, tmp_path: Path, whole: tuple[str, float], name: str
) -> None:
    die_and_resume(tiny_base, tmp_path, ELSEWHERE[name], 1, whole[0])


# -- killed at random -----------------------------------------------------------------------------


def kill_and_resume(base: Path, folder: Path, seconds: float, whole: str) -> bool:
    """Kill a run after some seconds of computing and resume it; False if it finished first."""
    settings = small_run(base, folder)
    log = harness.log_of(settings)
    pid = harness.start(harness.trainer(settings), log)
    harness.kill_after(pid, seconds)
    outcome = harness.wait(pid, log)
    assert outcome.code in (0, -signal.SIGKILL), outcome.said[-3000:]
    harness.resume(settings, require_nothing_lost(folder / "run"))
    require_same_result(settings, whole)
    return outcome.code != 0


def kill_often(
    request: pytest.FixtureRequest,
    base: Path,
    folder: Path,
    whole: tuple[str, float],
    default: int,
) -> tuple[int, int]:
    """Kills done and the seed they were drawn with; runs that finished first do not count."""
    wanted = request.config.getoption("kills") or default
    seed = request.config.getoption("seed")
    seed = int.from_bytes(os.urandom(4)) if seed is None else seed
    print(f"{wanted} kills at times drawn with --seed {seed}")
    draw, (digest, seconds), kills = random.Random(seed), whole, 0
    for attempt in range(2 * wanted):
        kills += kill_and_resume(base, folder / str(attempt), draw.uniform(0, seconds), digest)
        if kills == wanted:
            break
    assert kills == wanted, f"{2 * wanted - kills} of {2 * wanted} runs ended before their kill"
    return kills, seed


@pytest.mark.row("R2")
def test_killed_at_random(
    tiny_base: Path, tmp_path: Path, whole: tuple[str, float], request: pytest.FixtureRequest, row
) -> None:
    kills, seed = kill_often(request, tiny_base, tmp_path, whole, default=12)
    row.cases(kills)
    row.figure(f"{kills} kills, 0 lost runs, 0 differing bits (seed {seed})")


@pytest.mark.full
@pytest.mark.row("R2")
@pytest.mark.timeout(1200)
def test_killed_at_random_often(
    tiny_base: Path, tmp_path: Path, whole: tuple[str, float], request: pytest.FixtureRequest, row
) -> None:
    kills, seed = kill_often(request, tiny_base, tmp_path, whole, default=60)
    row.cases(kills)
    row.figure(f"{kills} kills, 0 lost runs, 0 differing bits (seed {seed})")


@pytest.mark.row("R2")
@pytest.mark.parametrize("same_start", [False, True], ids=["another", "the same"])
def test_the_id_of_a_killed_run_may_be_used_again(
    tiny_base: Path, tmp_path: Path, whole: tuple[str, float], same_start: bool
) -> None:
    """In a new container the id of the dead trainer often is that of another program."""
    settings = small_run(tiny_base, tmp_path)
    outcome = harness.train(settings, die_at(IN_A_CHECKPOINT["before the rename"], 2))
    assert outcome.code == DIED
    path = tmp_path / "run" / "status.json"
    status = json.loads(path.read_text())
    status["pid"] = 1
    if same_start:
        status["created"] = psutil.Process(1).create_time()
    path.write_text(json.dumps(status))
    if same_start:
        refused = harness.run_script(harness.resumed(settings))
        assert refused.code == 2
        assert "is in use by process 1; wait, stop it, or choose another output_dir" in refused.said
        return
    harness.resume(settings, require_nothing_lost(tmp_path / "run"))
    require_same_result(settings, whole[0])
