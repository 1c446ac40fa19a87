"""Train several methods on the same classification tasks; one record per run.

    python -m snell_diffusion.evaluation classification \\
        --config configs/evaluation/classification.yaml --output runs/classification

A comparison goes on where it was cut off. Every method tries equally many learning rates on
validation images; the test images are looked at by reported runs alone, once each.
"""

import argparse
from collections.abc import Callable, Sequence
from dataclasses import replace
from datetime import UTC, datetime
from functools import lru_cache
from pathlib import Path
from typing import Any

from tqdm.auto import tqdm

from snell_diffusion.errors import SnellaConfigError, shown
from snell_diffusion.evaluation.classification_plan import Plan, RunKey, Shots, TrialKey
from snell_diffusion.evaluation.classification_records import (
    Record,
    best_rate,
    read_record,
    save_record,
)
from snell_diffusion.evaluation.records import digest_of
from snell_diffusion.training.errors import NonFiniteError
from snell_diffusion.vision.config import VisionConfig, config_values
from snell_diffusion.vision.data import Data, Task, load_task
from snell_diffusion.vision.run import run

_OF_IMAGES = (
    *("dataset", "data_dir", "task", "shots", "validation_shots", "validation_fraction"),
    *("test_fraction", "split_seed", "check_images"),
)
"""Settings that decide, with seed and select_on, which images there are."""

ImageKey = tuple[tuple[tuple[str, Any], ...], int, str]


@lru_cache(maxsize=8)  # runs that share their images follow each other
def _images(key: ImageKey) -> Task:
    settings, seed, select_on = key
    return load_task(Data(**dict(settings)), seed, select_on)


@lru_cache(maxsize=4096)
def _image_digest(key: ImageKey) -> str:
    return _images(key).digest()


def _image_key(config: VisionConfig) -> ImageKey:
    settings = tuple((name, getattr(config, name)) for name in _OF_IMAGES)
    return settings, config.seed, config.select_on


class Comparison:
    """Executes the runs of one plan; a finished run is a JSON file and is not repeated.

    A record that was made with other settings or images than the plan has now counts as none.

    Args:
        plan: What to run.
        output: Trials go to `output/trials`, reported runs to `output/records`.
        methods: Names of the methods to run; None runs all.

    Raises:
        SnellaConfigError: A name is unknown.
    """

    def __init__(self, plan: Plan, output: Path, methods: Sequence[str] | None = None) -> None:
        unknown = set(methods or ()) - set(plan.methods)
        if unknown:
            raise SnellaConfigError(
                f"the plan has no method {shown(unknown)}; it has {', '.join(plan.methods)}"
            )
        self.plan, self.output = plan, output
        self._methods = tuple(plan.methods if methods is None else methods)

    def run_all(self) -> None:
        """Every trial and every reported run that has no record yet, with the time left."""
        todo = [key for key in self._trials() if self._trial(key) is None]
        for key in tqdm(todo, desc="trials", smoothing=0):
            record = self._measured(*self._trial_settings(key), test=False)
            self._save("trials", _trial_name(key), replace(record, task=key[0], method=key[2]))
        runs = [key for key in self.plan.runs() if key[2] in self._methods]
        todo_runs = [key for key in runs if self._reported(key) is None]
        for run_key in tqdm(todo_runs, desc="runs", smoothing=0):
            record = self._measured(*self._run_settings(run_key), test=True)
            record = replace(record, task=run_key[0], method=run_key[2])
            self._save("records", _run_name(run_key), record)

    def trials(self) -> list[Record]:
        """The trials that fit the plan as it is."""
        found = (self._trial(key) for key in self._trials())
        return [record for record in found if record is not None]

    def records(self) -> list[Record]:
        """The reported runs that fit the plan as it is.

        Raises:
            SnellaConfigError: There is none.
        """
        runs = (key for key in self.plan.runs() if key[2] in self._methods)
        found = [record for key in runs if (record := self._reported(key)) is not None]
        if not found:
            other = len(list((self.output / "records").glob("*.json")))
            raise SnellaConfigError(
                f"no record in '{self.output / 'records'}' fits the plan ({other} of other "
                "settings): run the comparison first"
            )
        return found

    def rate(self, task: str, shots: Shots, method: str) -> float | None:
        """The learning rate that the trials chose; None where the plan has no trials.

        Raises:
            SnellaConfigError: No trial of it ended well.
        """
        if self.plan.tune is None:
            return None
        found = self._trials_for(task, shots, method)
        at = self.plan.tuned_at(shots)
        return best_rate(found, f"task {task}, method {method}, {at} per class")

    def _trials_for(self, task: str, shots: Shots, method: str) -> list[Record]:
        """The trials that choose the learning rate of a run."""
        mine = (task, self.plan.tuned_at(shots), method)
        keys = [key for key in self.plan.trials() if key[:3] == mine]
        return [record for key in keys if (record := self._trial(key)) is not None]

    def _trials(self) -> list[TrialKey]:
        return [key for key in self.plan.trials() if key[2] in self._methods]

    def _trial_settings(self, key: TrialKey) -> tuple[Shots, VisionConfig]:
        task, shots, method, rate, seed = key
        return shots, self.plan.config(task, shots, method, seed, rate)

    def _run_settings(self, key: RunKey) -> tuple[Shots, VisionConfig]:
        task, shots, method, seed = key
        rate = self.rate(task, shots, method)
        return shots, self.plan.config(task, shots, method, seed, rate)

    def _trial(self, key: TrialKey) -> Record | None:
        return self._read("trials", _trial_name(key), lambda: self._trial_settings(key)[1])

    def _reported(self, key: RunKey) -> Record | None:
        if self.plan.tune is not None and not self._trials_for(*key[:3]):
            return None
        return self._read("records", _run_name(key), lambda: self._run_settings(key)[1])

    def _read(self, folder: str, name: str, config: Callable[[], VisionConfig]) -> Record | None:
        """A record, where there is one and it was made with these settings."""
        path = self.output / folder / f"{name}.json"
        if not path.exists():
            return None
        record = read_record(path)
        return record if record.digest == _digest(config()) else None

    def _save(self, folder: str, name: str, record: Record) -> None:
        path = self.output / folder / f"{name}.json"
        path.parent.mkdir(parents=True, exist_ok=True)
        save_record(path, record)

    def _measured(self, shots: Shots, config: VisionConfig, test: bool) -> Record:
        images = _images(_image_key(config))
        if not test:  # what the trials measure as test is the validation split
            images = replace(images, test=images.validation)
        known = Record(
            task="",
            shots=shots,
            method="",
            seed=config.seed,
            digest=_digest(config),
            learning_rate=config.learning_rate,
            date=datetime.now(UTC).isoformat(timespec="seconds"),
        )
        try:
            result = run(config, task=images)
        except NonFiniteError as error:
            return replace(known, failed=str(error))
        return replace(
            known,
            validation_accuracy=result.validation_accuracy,
            validation_loss=result.validation.loss,
            test_accuracy=result.test_accuracy if test else None,
            trainable=result.sizes.adapter,
            head=result.sizes.head,
            adapter_bytes=result.adapter_bytes,
            head_bytes=result.head_bytes,
            steps=result.step,
            seconds=result.seconds,
        )


def _digest(config: VisionConfig) -> str:
    values = config_values(config)
    for name in ("output_dir", "quiet", "overwrite", "num_workers", "cache_images"):
        values.pop(name)
    return digest_of({**values, "images": _image_digest(_image_key(config))})


def _run_name(key: RunKey) -> str:
    task, shots, method, seed = key
    return f"{task}--{shots}--{method}--{seed}"


def _trial_name(key: TrialKey) -> str:
    task, shots, method, rate, seed = key
    return f"{task}--{shots}--{method}--lr {rate:g}--{seed}"


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """The command line of the comparison."""
    parser.add_argument("--config", type=Path, required=True, help="plan of the comparison, YAML")
    parser.add_argument(
        "--output", type=Path, required=True, help="folder of records, table and pictures"
    )
    parser.add_argument(
        "--methods",
        nargs="+",
        metavar="NAME",
        help="methods of the plan to run; several processes can share a comparison by methods",
    )
    parser.add_argument(
        "--report-only", action="store_true", help="run nothing, only write table and pictures"
    )


def main(args: argparse.Namespace) -> None:
    """Run what is missing, then write `table.md`, two pictures and `results.json`.

    Raises:
        SnellaError: The plan is wrong, or there is nothing to report.
    """
    from snell_diffusion.evaluation.classification_report import write_report

    comparison = Comparison(Plan.read(args.config), args.output, args.methods)
    if not args.report_only:
        comparison.run_all()
    print(write_report(comparison.plan, comparison.records(), comparison.trials(), args.output))
