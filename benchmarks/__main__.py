"""Every section on the CPU, each in a process of its own, and then the page.

    python -m benchmarks                  all (make bench), half an hour on one core
    python -m benchmarks --quick          small sizes, into runs/benchmarks/, without the page

A section that fails, or that the system kills for memory, loses no other: entries are written one
by one, and the exit status says that something is missing.
"""

import subprocess
import sys
import time
from collections.abc import Sequence

from tqdm.auto import tqdm

SECTIONS = ("layers", "scaling", "models", "inference", "loading", "profile", "memory")


def run(arguments: Sequence[str], sections: Sequence[str] = SECTIONS) -> int:
    """Start every section with these arguments; 1 if one of them failed."""
    failed, began = [], time.monotonic()
    for section in tqdm(sections, desc="sections", smoothing=0):
        command = [sys.executable, "-m", f"benchmarks.{section}", *arguments]
        if subprocess.run(command, check=False).returncode != 0:
            failed.append(section)
    print(f"{len(sections) - len(failed)} of {len(sections)} sections in full, ", end="")
    print(f"{(time.monotonic() - began) / 60:.1f} minutes")
    if failed:
        print(f"not in full: {', '.join(failed)}; what they measured is written, see above")
    if "--quick" not in arguments:
        page = [sys.executable, "-m", "benchmarks.page"]
        failed += ["page"] if subprocess.run(page, check=False).returncode != 0 else []
    return int(bool(failed))


if __name__ == "__main__":
    sys.exit(run(sys.argv[1:]))
