"""What a classification comparison runs: a YAML file, checked before anything is trained.

Reported runs are tasks x shots x methods x seeds. With `tune`, every method first gets the same
number of trial runs, which choose its learning rate on validation images; trials never see a test
image.
"""

import math
from collections.abc import Iterator
from dataclasses import field
from pathlib import Path
from typing import Any, Literal

from pydantic import model_validator
from pydantic.dataclasses import dataclass

from snell_diffusion.errors import SnellaError
from snell_diffusion.evaluation import planning
from snell_diffusion.evaluation.planning import Name
from snell_diffusion.training.config_types import FROZEN, Count, Positive, Whole
from snell_diffusion.vision.config import VisionConfig, make_config

Shots = Count | Literal["all"]
"""Training images per class, or all there are."""
RunKey = tuple[str, Shots, str, int]
"""(task, shots, method, seed)."""
TrialKey = tuple[str, Shots, str, float, int]
"""(task, shots, method, learning rate, seed)."""


@dataclass(**FROZEN)
class Tune:
    """Trial runs that choose each method's learning rate, the same number for every method.

    The choice is the highest mean validation accuracy, and of equal ones the lowest mean loss.

    Attributes:
        learning_rates: Rates to try.
        shots: Shots to try them with; other shots take the choice of the nearest of these (by
            ratio; all images that of all images).
        seeds: Seeds of the trials; none of the reported ones.
        own: Rates of a method that the common ones do not suit; as many as the common ones.
    """

    learning_rates: tuple[Positive, ...]
    shots: tuple[Shots, ...]
    seeds: tuple[Whole, ...]
    own: dict[str, tuple[Positive, ...]] = field(default_factory=dict)


@dataclass(**FROZEN)
class Plan:
    """A comparison.

    Attributes:
        base: Base model, as in a training config.
        reference: Method that paired differences are taken against.
        tasks: Name -> settings of its images.
        shots: Training images per class; "all" takes all.
        seeds: Seeds of the reported runs; a seed chooses few-shot images, order and fresh weights.
        methods: Name -> settings: method, rank, method_args, learning_rate and so on.
        common: Settings of all runs.
        few_shot: Settings of the runs with few shots, beside the common ones.
        whole: Settings of the runs with all images, beside the common ones.
        budget: Trained numbers, head apart, that methods aim at; the table says who differs.
        tune: How learning rates are chosen; none: those of the settings are used.
    """

    base: str
    reference: str
    tasks: dict[Name, dict[str, Any]]
    shots: tuple[Shots, ...]
    seeds: tuple[Whole, ...]
    methods: dict[Name, dict[str, Any]]
    common: dict[str, Any] = field(default_factory=dict)
    few_shot: dict[str, Any] = field(default_factory=dict)
    whole: dict[str, Any] = field(default_factory=dict)
    budget: Count | None = None
    tune: Tune | None = None

    @model_validator(mode="after")
    def _consistent(self) -> "Plan":
        for what in ("tasks", "shots", "seeds", "methods"):
            planning.require_each_once(what, list(getattr(self, what)))
        planning.require_reference(self.reference, self.methods)
        if self.tune is not None:
            self._require_fair(self.tune)
        try:
            for task, shots, method, seed in self.runs():
                self.config(task, shots, method, seed, 1e-3)
        except SnellaError as error:
            raise ValueError(str(error)) from error
        return self

    def _require_fair(self, tune: Tune) -> None:
        if not tune.seeds or set(tune.seeds) & set(self.seeds):
            raise ValueError(
                f"tune.seeds should name seeds that are not reported, got {list(tune.seeds)}"
            )
        planning.require_fair(tune, self.methods)
        for shots in self.shots:
            if not [other for other in tune.shots if (other == "all") == (shots == "all")]:
                raise ValueError(f"tune.shots has nothing near {shots}")

    @classmethod
    def read(cls, path: Path) -> "Plan":
        """Read a YAML file.

        Raises:
            SnellaConfigError: No such file, no YAML, or what it says is unknown or contradictory.
        """
        return planning.read_plan(cls, path)

    def rates(self, method: str) -> tuple[float, ...]:
        """Learning rates that a method tries; none without `tune`."""
        return planning.rates(self.tune, method)

    def tuned_at(self, shots: Shots) -> Shots:
        """The shots whose trials choose the learning rate for others."""
        assert self.tune is not None
        if shots == "all":
            return "all"
        return min(
            (other for other in self.tune.shots if other != "all"),
            key=lambda other: abs(math.log(other / shots)),
        )

    def trials(self) -> Iterator[TrialKey]:
        """All runs that choose learning rates."""
        if self.tune is None:
            return
        for task in self.tasks:
            for shots in dict.fromkeys(self.tuned_at(shots) for shots in self.shots):
                for method in self.methods:
                    for rate in self.rates(method):
                        for seed in self.tune.seeds:
                            yield task, shots, method, rate, seed

    def runs(self) -> Iterator[RunKey]:
        """All reported runs, so ordered that a comparison cut short has whole blocks of methods."""
        for seed in self.seeds:
            for task in self.tasks:
                for shots in self.shots:
                    for method in self.methods:
                        yield task, shots, method, seed

    def config(
        self, task: str, shots: Shots, method: str, seed: int, learning_rate: float | None
    ) -> VisionConfig:
        """The settings of one run; it writes nothing.

        Args:
            task: Its name.
            shots: Training images per class.
            method: Its name.
            seed: Of the run.
            learning_rate: In place of that of the settings; None keeps it.

        Raises:
            SnellaConfigError: A setting is unknown or out of range.
        """
        values = {
            "base": self.base,
            **self.common,
            **self.tasks[task],
            **(self.whole if shots == "all" else self.few_shot),
            **self.methods[method],
            "shots": None if shots == "all" else shots,
            "seed": seed,
            "output_dir": None,
            "quiet": True,
        }
        if learning_rate is not None:
            values["learning_rate"] = learning_rate
        return make_config(values, f"task {task}, method {method}")
