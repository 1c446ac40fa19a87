"""Measurements on disk: one JSON file per kind of machine, changed one entry at a time.

    {"layers": {"768x768@1576": {"stamp": {...}, "seconds": {...}, ...}, ...}, "models": {...}, ...}

The stamp of an entry says where, when and from which commit it was measured, and by which command,
since entries can be measured again one by one.
"""

import json
import platform
import re
import subprocess
from datetime import UTC, datetime
from functools import cache
from pathlib import Path
from typing import Any

import torch

from snell_diffusion.training.files import write_text

ROOT = Path(__file__).resolve().parents[1]
FOLDER = ROOT / "benchmarks" / "results"
QUICK_FOLDER = ROOT / "runs" / "benchmarks"

Entry = dict[str, Any]


class Results:
    """The entries of a file, by section and name; a missing file has none."""

    def __init__(self, path: Path) -> None:
        self.path = path
        self.sections: dict[str, dict[str, Entry]] = {}
        if path.exists():
            self.sections = json.loads(path.read_text("utf-8"))

    def put(self, section: str, name: str, entry: Entry) -> None:
        """Replace one entry and write the file; what others wrote meanwhile stays."""
        self.sections = Results(self.path).sections
        self.sections.setdefault(section, {})[name] = entry
        self.path.parent.mkdir(parents=True, exist_ok=True)
        write_text(self.path, json.dumps(self.sections, indent=1, sort_keys=True) + "\n")

    def get(self, section: str, name: str) -> Entry | None:
        """An entry, or None where it was not measured."""
        return self.sections.get(section, {}).get(name)


def default_path(device: torch.device, quick: bool) -> Path:
    """Where the measurements of this machine go; quick ones never replace real ones."""
    return (QUICK_FOLDER if quick else FOLDER) / f"{machine_kind(device)}.json"


def machine_kind(device: torch.device) -> str:
    """`cpu`, or the GPU's name, as a file name."""
    if device.type != "cuda":
        return device.type
    return re.sub(r"[^a-z0-9]+", "-", torch.cuda.get_device_name(device).lower()).strip("-")


def stamp(device: torch.device, command: str) -> Entry:
    """Machine, versions, date and commit of a measurement that begins now."""
    found = {
        "machine": machine(device),
        "threads": torch.get_num_threads(),
        "torch": torch.__version__,
        "python": platform.python_version(),
        "date": datetime.now(UTC).strftime("%Y-%m-%d %H:%M UTC"),
        "commit": commit(),
        "command": command,
    }
    if device.type == "cuda":
        found["cuda"] = torch.version.cuda
        found["driver"] = driver()
    return found


def machine(device: torch.device) -> str:
    """Name of the processor that computes."""
    if device.type == "cuda":
        return str(torch.cuda.get_device_name(device))
    info = Path("/proc/cpuinfo")
    names = re.findall(r"^model name\s*: (.+)$", info.read_text(), re.M) if info.exists() else []
    return str(names[0]) if names else platform.processor() or platform.machine()


@cache
def commit() -> str:
    """Short hash of the commit, with a plus where files under version control differ from it."""
    try:
        head = _git("rev-parse", "--short", "HEAD")
        changed = _git("status", "--porcelain", "--untracked-files=no")
    except (OSError, subprocess.CalledProcessError):
        return "unknown"
    return head + "+" if changed else head


def driver() -> str:
    """Version of the NVIDIA driver."""
    query = ["nvidia-smi", "--query-gpu=driver_version", "--format=csv,noheader"]
    try:
        lines = subprocess.run(query, capture_output=True, text=True, check=True).stdout
    except (OSError, subprocess.CalledProcessError):
        return "unknown"
    return lines.splitlines()[0].strip()


def _git(*arguments: str) -> str:
    done = ["git", "-C", str(ROOT), *arguments]
    return subprocess.run(done, capture_output=True, text=True, check=True).stdout.strip()
