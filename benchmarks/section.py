"""What every section does alike: arguments, progress with the time left, results entry by entry."""

import argparse
import fnmatch
import gc
import sys
import time
import traceback
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from tqdm.auto import tqdm

from benchmarks.results import Entry, Results, default_path, stamp
from benchmarks.timing import Seconds, Work, interleaved, stopwatch


@dataclass(frozen=True)
class Run:
    """How to measure.

    Attributes:
        device: Where.
        rounds: Timed rounds of every comparison.
        quick: Small sizes that show that the code runs, and nothing else.
        label: Shown beside the progress bar.
    """

    device: torch.device = field(default_factory=lambda: torch.device("cpu"))
    rounds: int = 5
    quick: bool = False
    label: str = ""

    def time(self, works: Mapping[str, Work], times: int = 1, warmup: int = 1) -> Seconds:
        """`timing.interleaved` with a progress bar, in `times` as many rounds as usual."""
        rounds, watch = self.rounds * times, stopwatch(self.device)
        total = (rounds + warmup) * len(works)
        with tqdm(total=total, desc=f"  {self.label}", smoothing=0, leave=False) as bar:
            return interleaved(works, rounds, seconds=watch, warmup=warmup, done=bar.update)


Measure = Callable[[Run], Entry]


def main(
    section: str,
    entries: Mapping[str, Measure],
    arguments: Sequence[str] | None = None,
    *,
    command: str | None = None,
    device: str = "cpu",
    rounds: int = 5,
) -> int:
    """Measure the entries of a section that are named, or all, and write each as it is done.

    An entry that fails is reported and the others go on.

    Args:
        section: Its name in the results.
        entries: What can be measured, by name.
        arguments: Of the command line; default: those of this process.
        command: How the section is started, for its stamp; default `python -m benchmarks.SECTION`.
        device: Default device.
        rounds: Default rounds.

    Returns:
        Exit status: 1 if an entry failed.
    """
    options = _options(section, entries, arguments, device, rounds)
    torch.set_num_threads(options.threads)
    where = torch.device(options.device)
    path = options.results or default_path(where, options.quick)
    results, failed = Results(path), []
    command = command or f"python -m benchmarks.{section}"
    names = _chosen(options.names, entries)
    bar = tqdm(names, desc=section, smoothing=0)
    for name in bar:
        run = Run(where, 2 if options.quick else options.rounds, options.quick, name)
        mark, began = stamp(where, f"{command} {name}"), time.perf_counter()
        try:
            entry = entries[name](run)
        except Exception:
            failed.append(name)
            bar.write(f"{section} {name} failed:\n{traceback.format_exc()}", file=sys.stderr)
            continue
        finally:
            gc.collect()
        mark["took"] = round(time.perf_counter() - began, 1)
        results.put(section, name, {"stamp": mark, "quick": options.quick, **rounded(entry)})
    done = len(names) - len(failed)
    print(f"{section}: {done} of {len(names)} entries written to {path}")
    if failed:
        print(f"{section}: failed: {', '.join(failed)}; their earlier results stay")
    return int(bool(failed))


def _chosen(patterns: Sequence[str], entries: Mapping[str, Measure]) -> list[str]:
    """The entries that match one of the patterns, or all."""
    return [name for name in entries if any(fnmatch.fnmatch(name, p) for p in patterns or ["*"])]


def _options(
    section: str,
    entries: Mapping[str, Measure],
    arguments: Sequence[str] | None,
    device: str,
    rounds: int,
) -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        prog=f"python -m benchmarks.{section}",
        description=f"Entries: {', '.join(entries)}. Without names all of them are measured.",
    )
    parser.add_argument("names", nargs="*", metavar="ENTRY", help="these alone; * for any text")
    parser.add_argument("--quick", action="store_true", help="small sizes, to see that it runs")
    parser.add_argument("--results", type=Path, help="JSON file to change")
    parser.add_argument("--rounds", type=int, default=rounds, help=f"timed rounds ({rounds})")
    parser.add_argument("--threads", type=int, default=1, help="CPU threads (1)")
    parser.add_argument("--device", default=device, help=f"torch device ({device})")
    options = parser.parse_args(arguments)
    unknown = [name for name in options.names if not fnmatch.filter(entries, name)]
    if unknown:
        parser.error(f"no entry is called {', '.join(unknown)}; known: {', '.join(entries)}")
    if options.rounds < 1 or options.threads < 1:
        parser.error("--rounds and --threads must be 1 or more")
    return options


def rounded(value: Any) -> Any:
    """The same with floats of six significant digits: a file that people read and compare."""
    if isinstance(value, float):
        return float(f"{value:.6g}")
    if isinstance(value, dict):
        return {key: rounded(item) for key, item in value.items()}
    if isinstance(value, list | tuple):
        return [rounded(item) for item in value]
    return value
