"""`python app.py` in a process of its own over a tiny base, whose size can be measured."""

import os
import subprocess
import sys
import time
from dataclasses import dataclass
from pathlib import Path

import httpx
import psutil

from tests import tiny_models

ROOT = Path(__file__).resolve().parents[2]


@dataclass(frozen=True)
class Size:
    """Bytes of memory, open descriptors, threads, and files below its folder that hold anything."""

    memory: int
    descriptors: int
    threads: int
    files: int


class Served:
    """A running server.

    Args:
        folder: For its base, runs and log.
    """

    def __init__(self, folder: Path) -> None:
        self.runs, self.log = folder / "runs", folder / "log.txt"
        tiny_models.pipeline().save_pretrained(folder / "base")
        command = [sys.executable, "app.py", "--port", str(free_port()), "--runs", str(self.runs)]
        command += ["--base", f"tiny={folder / 'base'}"]
        environment = {**os.environ, "OMP_NUM_THREADS": "1", "HF_HUB_OFFLINE": "1"}
        with self.log.open("wb") as log:
            self._process = subprocess.Popen(
                command, cwd=ROOT, env=environment, stdout=log, stderr=subprocess.STDOUT
            )
        self.address = f"http://127.0.0.1:{command[3]}"
        self._wait()

    def _wait(self) -> None:
        end = time.monotonic() + 90
        while True:
            assert self._process.poll() is None, self.log.read_text()
            assert time.monotonic() < end, self.log.read_text()
            try:
                if httpx.get(f"{self.address}/config", timeout=5).status_code == 200:
                    return
            except httpx.TransportError:
                time.sleep(0.3)

    def size(self) -> Size:
        """How large it is now."""
        process = psutil.Process(self._process.pid)
        with process.oneshot():
            sizes = [path.stat().st_size for path in self.runs.rglob("*") if path.is_file()]
            files = sum(size > 0 for size in sizes)  # empty ones go after a minute
            return Size(process.memory_info().rss, process.num_fds(), process.num_threads(), files)

    def close(self) -> None:
        """End it, and what it started."""
        children = psutil.Process(self._process.pid).children(recursive=True)
        for process in (*children, psutil.Process(self._process.pid)):
            process.kill()
        self._process.wait(timeout=10)


def free_port() -> int:
    import socket

    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return int(probe.getsockname()[1])


def drawn(web: httpx.Client, steps: int, seed: int = 0) -> tuple[int, str]:
    """Ask for a picture: (status, the last event or why it was refused)."""
    data = ["a cat", "tiny", None, "", seed, steps, None, None, None, 1, None, False]
    asked = web.post("/gradio_api/call/generate", json={"data": data})
    if asked.status_code != 200:
        return asked.status_code, asked.text
    text = web.get(f"/gradio_api/call/generate/{asked.json()['event_id']}").text
    return 200, text[text.rindex("event: ") :]
