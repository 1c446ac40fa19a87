"""Where disk or memory ends: the run fails with its reason, the page answers, the room is freed."""

import json
import resource
import time
import urllib.request
from dataclasses import replace

import pytest

from snell_diffusion.app import jobs as jobs_module
from snell_diffusion.app.limits import LIMITS
from snell_diffusion.app.workspace import Workspaces
from snell_diffusion.errors import SnellaError, SnellaValueError
from tests.app import tiny_runs

pytestmark = pytest.mark.row("G5")

ANSWER = 1.0  # seconds within which the page answers, whatever happens to a run

TRAINER = f"""
import resource, sys
sys.path.insert(0, {str(jobs_module.SCRIPT.parent)!r})
import train_dreambooth_snella
from snell_diffusion.diffusion import training
{{scarcity}}
sys.exit(train_dreambooth_snella.main(sys.argv[1:]))
"""
SMALL_FILES = "resource.setrlimit(resource.RLIMIT_FSIZE, (30_000, 30_000))"
LITTLE_MEMORY = """
def train(*_):
    pages = int(open("/proc/self/statm").read().split()[0])
    most = pages * resource.getpagesize() + 64 * 2**20
    resource.setrlimit(resource.RLIMIT_AS, (most, most))
    import torch
    return [torch.ones(2**22) for _ in range(100)]
training.train = train
"""
NO_CUDA_MEMORY = """
def train(*_):
    import torch
    raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2.00 GiB. GPU 0 has a ...")
training.train = train
"""
KILLED = "import os, signal, time; time.sleep(0.2); os.kill(os.getpid(), signal.SIGKILL)"


@pytest.fixture
def jobs(page_server, monkeypatch):
    """The runs of the page's owner, trained without a launcher in between."""
    monkeypatch.setattr(jobs_module, "launch_command", tiny_runs.without_launcher)
    return page_server.app.workspaces.of(None).jobs


@pytest.fixture(scope="module")
def look(page_server):
    """look(job): seconds that the page's own question for a run takes, over HTTP."""
    with urllib.request.urlopen(f"{page_server.address}config", timeout=60) as answer:
        config = json.load(answer)
    ids = {p["props"].get("elem_id"): p["id"] for p in config["components"]}
    choice, curves = ids["runs-choice"], ids["runs-run-curves"]
    events = [d for d in config["dependencies"] if d["inputs"][:1] == [choice]]
    loads = [d for d in events if any(name == "load" for _, name in d["targets"])]
    lists = next(d["id"] for d in loads if choice in d["outputs"])
    looks = next(d["id"] for d in events if curves in d["outputs"])

    def asked(event, data):
        body = json.dumps({"data": data, "fn_index": event, "session_hash": "scarce"}).encode()
        kind = {"Content-Type": "application/json"}
        address = f"{page_server.address}gradio_api/run/predict"
        with urllib.request.urlopen(urllib.request.Request(address, body, kind), timeout=30) as got:
            return json.load(got)["data"]

    def seconds(job):
        asked(lists, [None])
        start = time.monotonic()
        asked(looks, [job, None])
        return time.monotonic() - start

    return seconds


@pytest.mark.parametrize(
    "scarcity, said, then",
    [
        (SMALL_FILES, "The disk is full.", "Delete runs"),
        (LITTLE_MEMORY, "The computer ran out of memory.", "smaller resolution"),
        (NO_CUDA_MEMORY, "The graphics card ran out of memory.", "smaller resolution"),
        (KILLED, "The system ended the run", "Close other programs"),
    ],
    ids=["disk full", "address space", "CUDA", "killed"],
)
def test_a_run_that_lacks_something_says_what(
    page_server, jobs, look, tiny_base, tmp_path, monkeypatch, row, scarcity, said, then
):
    script = tmp_path / "train.py"
    script.write_text(scarcity if scarcity is KILLED else TRAINER.format(scarcity=scarcity))
    monkeypatch.setattr(jobs, "script", script)
    job = tiny_runs.start(jobs, tiny_runs.settings(tiny_base, tmp_path / "photos"))
    slowest = 0.0
    while jobs.alive(job):
        slowest = max(slowest, look(job))
        time.sleep(0.1)
    status = tiny_runs.ended(jobs, job)
    assert status.state == "failed", (jobs.folder(job) / "train.log").read_text()[-2000:]
    assert status.message.startswith(said)
    assert then in status.message
    assert str(page_server.root) not in status.message
    assert slowest <= ANSWER
    row.figure(f"the page answers within {slowest:.2f} s")
    unfinished = [path for path in jobs.folder(job).rglob("*") if ".tmp-" in path.name]
    assert unfinished == []
    jobs.delete(job)
    assert job not in [path.name for path in jobs.root.iterdir()]


def test_a_disk_that_is_full_when_a_run_starts(jobs, tiny_base, tmp_path):
    values = tiny_runs.settings(tiny_base, tmp_path / "photos")
    job = jobs.new()
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (100, hard))
    try:
        with pytest.raises(SnellaError, match="the disk is full: delete runs") as error:
            jobs.start(job, values, "a cat")
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))
    assert "/" not in str(error.value)
    assert (job not in jobs.all(), jobs.active()) == (True, None)
    assert list(jobs.folder(job).iterdir()) == []
    jobs.delete(job)


def test_a_user_over_the_quota_starts_no_run(tmp_path):
    limits = replace(LIMITS, quota_bytes=1000)
    workspace = Workspaces(tmp_path / "runs", limits=limits).of("ann")
    with pytest.raises(SnellaValueError, match=r"there is no room: .*delete runs in the Runs tab"):
        workspace.quota.require_run()
    assert workspace.jobs.all() == []
