"""Take each defence out, one at a time, and see that its tests fail.

    python -m scripts.check_defences [--only checkpoints] [--row R4] [--publish]

An entry of `tests/defences/*.yaml` names a row, a file, a text in it that occurs once, what to put
in its place, and the tests of which at least one must fail then. Each entry runs in a copy of the
tree, never in the tree itself. An entry whose tests still pass is an error: either the defence does
nothing or its tests do not look.
"""

import argparse
import importlib.util
import json
import os
import queue
import shutil
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterable, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor, as_completed
from dataclasses import dataclass
from pathlib import Path

import yaml

ROOT = Path(__file__).resolve().parents[1]
ENTRIES = ROOT / "tests" / "defences"
PUBLISHED = ROOT / "docs" / "reliability" / "defences.json"
_TESTS_FAILED = 1  # pytest's exit code; others mean that no test was run


@dataclass(frozen=True)
class Defence:
    """One change that takes a defence out."""

    row: str
    takes_out: str
    file: str
    old: str
    new: str
    tests: tuple[str, ...]
    part: str
    needs: str = ""  # a package without which the tests are skipped

    def problem(self, root: Path) -> str | None:
        """Why the entry does not fit the tree, if it does not."""
        path = root / self.file
        count = path.read_text("utf-8").count(self.old) if path.is_file() else 0
        return None if count == 1 else f"its text occurs {count} times in {self.file}, expected 1"


def read_defences(folder: Path = ENTRIES) -> list[Defence]:
    """All entries, in the order of the files."""
    return [
        Defence(part=path.stem, **{**entry, "tests": tuple(entry["tests"])})
        for path in sorted(folder.glob("*.yaml"))
        for entry in yaml.safe_load(path.read_text("utf-8")) or []
    ]


def tracked_files(root: Path = ROOT) -> list[str]:
    """Files of the tree that git knows or would add."""
    command = ["git", "ls-files", "-z", "--cached", "--others", "--exclude-standard"]
    listed = subprocess.run(command, cwd=root, check=True, capture_output=True, text=True).stdout
    return sorted({name for name in listed.split("\0") if name and (root / name).is_file()})


def copy_tree(target: Path, root: Path = ROOT) -> None:
    """Copy the working tree, without what git ignores."""
    for name in tracked_files(root):
        (target / name).parent.mkdir(parents=True, exist_ok=True)
        shutil.copy2(root / name, target / name)


def fails_without(defence: Defence, tree: Path) -> str | None:
    """Run the entry in `tree`, put the file back; None if a test failed, as one should."""
    problem = defence.problem(tree)
    if problem:
        return problem
    path = tree / defence.file
    original = path.read_text("utf-8")
    path.write_text(original.replace(defence.old, defence.new), "utf-8")
    command = [sys.executable, "-m", "pytest", "-x", "-q", "-n", "0", "-m", "not gpu"]
    environment = {**os.environ, "PYTHONPATH": str(tree), "PYTHONDONTWRITEBYTECODE": "1"}
    try:
        done = subprocess.run(
            [*command, *defence.tests],
            cwd=tree,
            env=environment,
            capture_output=True,
            text=True,
            timeout=900,
        )
    finally:
        path.write_text(original, "utf-8")
    if done.returncode == _TESTS_FAILED and " failed" in done.stdout:
        return None
    return f"pytest ended with {done.returncode}, expected a failing test:\n{done.stdout[-1500:]}"


def installed(defences: Iterable[Defence]) -> list[Defence]:
    """Those whose tests can run here; says which are left out."""
    kept = []
    for defence in defences:
        if defence.needs and importlib.util.find_spec(defence.needs) is None:
            print(f"{defence.row} {defence.takes_out}: not tried, {defence.needs} is not installed")
        else:
            kept.append(defence)
    return kept


def check(defences: Sequence[Defence], jobs: int) -> dict[Defence, str | None]:
    """Run every entry in one of `jobs` copies of the tree; a problem or None for each."""
    trees: queue.Queue[Path] = queue.Queue()
    began = time.monotonic()
    found: dict[Defence, str | None] = {}

    def run(defence: Defence) -> tuple[Defence, str | None]:
        tree = trees.get()
        try:
            return defence, fails_without(defence, tree)
        finally:
            trees.put(tree)

    with tempfile.TemporaryDirectory(prefix="defences-") as folder:
        for number in range(jobs):
            copy_tree(Path(folder) / str(number))
            trees.put(Path(folder) / str(number))
        with ThreadPoolExecutor(jobs) as pool:
            for done in as_completed([pool.submit(run, defence) for defence in defences]):
                defence, problem = done.result()
                found[defence] = problem
                seconds = time.monotonic() - began
                left = seconds / len(found) * (len(defences) - len(found))
                verdict = "fails without it" if problem is None else f"STILL PASSES: {problem}"
                print(
                    f"[{len(found)}/{len(defences)}, {left:.0f} s left] {defence.row} "
                    f"{defence.takes_out}: {verdict}",
                    flush=True,
                )
    return found


def publish(found: Mapping[Defence, str | None]) -> None:
    """Write which changes each row noticed, and the page's table."""
    from tests.row_table import rewrite_page

    known = json.loads(PUBLISHED.read_text("utf-8")) if PUBLISHED.is_file() else {}
    entries = read_defences()
    fresh: dict[str, dict[str, bool]] = {}
    for entry in entries:
        seen = known.get(entry.row, {}).get(entry.takes_out)
        if entry in found:
            seen = found[entry] is None
        if seen is not None:
            fresh.setdefault(entry.row, {})[entry.takes_out] = seen
    PUBLISHED.parent.mkdir(parents=True, exist_ok=True)
    PUBLISHED.write_text(json.dumps(fresh, indent=1, sort_keys=True) + "\n", "utf-8")
    rewrite_page()


def main(arguments: Sequence[str] | None = None) -> int:
    """Exit status 1 if a defence can be taken out unnoticed."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--only", help="one file of tests/defences, without .yaml")
    parser.add_argument("--row", help="one row")
    parser.add_argument("--jobs", type=int, default=2, help="entries at a time (default 2)")
    parser.add_argument("--publish", action="store_true", help="write docs/reliability")
    options = parser.parse_args(arguments)
    chosen = [
        d
        for d in read_defences()
        if options.only in (None, d.part) and options.row in (None, d.row)
    ]
    if not chosen:
        print("no entry matches", file=sys.stderr)
        return 2
    found = check(installed(chosen), options.jobs)
    if options.publish:
        publish(found)
    problems = [defence for defence, problem in found.items() if problem]
    for defence in problems:
        print(f"not noticed: {defence.row} {defence.takes_out}")
    return int(bool(problems))


if __name__ == "__main__":
    sys.exit(main())
