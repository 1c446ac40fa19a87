"""What a personalization comparison runs: a YAML file, checked before anything is trained.

Reported runs are subjects x methods x seeds. With `tune`, every method first gets the same number
of trial runs, one per learning rate, on photos that no reported number is measured on.
"""

from collections.abc import Iterator
from dataclasses import field
from pathlib import Path
from typing import Any

from pydantic import model_validator
from pydantic.dataclasses import dataclass

from snell_diffusion.evaluation import planning
from snell_diffusion.evaluation.planning import Name
from snell_diffusion.training.config_types import FROZEN, Count, NotNegative, Positive, Whole


@dataclass(**FROZEN)
class Subject:
    """One subject of the comparison.

    Attributes:
        name: Its photo folder below the photo root.
        class_word: Its noun, as in "a photo of a sks dog".
        live: Whether it is a living being, which has prompts of its own.
        others: Class words of other things, on whose prompts drift is measured too.
        report: Whether it has reported runs; others only serve to tune.
    """

    name: Name
    class_word: str
    live: bool = False
    others: tuple[str, ...] = ()
    report: bool = True


@dataclass(**FROZEN)
class Tune:
    """Trial runs that choose each method's learning rate, the same number for every method.

    The choice is the lowest mean held-out loss. A subject that is reported too lends other photos:
    the photos that its reported runs hold out are put aside, and the last of the rest are held out.

    Attributes:
        learning_rates: Rates to try.
        subjects: Names of subjects to try them on.
        seed: Seed of the trials; not one of the reported ones.
        own: Rates of a method that the common ones do not suit; as many as the common ones.
    """

    learning_rates: tuple[Positive, ...]
    subjects: tuple[str, ...]
    seed: Whole = 0
    own: dict[str, tuple[Positive, ...]] = field(default_factory=dict)


@dataclass(**FROZEN)
class Images:
    """Pictures drawn with every reported run.

    Attributes:
        prompts: How many of a subject's prompts, evenly spread over the list of 25; 0 draws none.
        per_prompt: Pictures per prompt n; at least 2 for diversity.
        steps: Denoising steps.
        guidance: Classifier-free guidance scale; 1 = none.
        sheet: How many of the prompts a sample sheet shows.
    """

    prompts: Whole = 25
    per_prompt: Count = 4
    steps: Count = 25
    guidance: NotNegative = 7.5
    sheet: Count = 6


@dataclass(**FROZEN)
class Plan:
    """A comparison.

    Attributes:
        base: Base model, as in a training config.
        reference: Method that paired differences are taken against.
        subjects: Whose photos are learned.
        seeds: Seeds of the reported runs.
        common: Training settings of all runs.
        methods: Name -> training settings that differ: method, rank, learning_rate, method_args.
        token: The rare token of the prompts.
        tune: How learning rates are chosen; none: those of the settings are used.
        images: Pictures per run.
    """

    base: str
    reference: str
    subjects: tuple[Subject, ...]
    seeds: tuple[Whole, ...]
    methods: dict[Name, dict[str, Any]]
    common: dict[str, Any] = field(default_factory=dict)
    token: str = "sks"
    tune: Tune | None = None
    images: Images = field(default_factory=Images)

    @model_validator(mode="after")
    def _consistent(self) -> "Plan":
        planning.require_each_once("subjects", [subject.name for subject in self.subjects])
        planning.require_each_once("seeds", self.seeds)
        if not self.reported:
            raise ValueError("subjects should hold one with `report` on")
        planning.require_reference(self.reference, self.methods)
        if self.tune is not None:
            self._require_fair(self.tune)
        return self

    def _require_fair(self, tune: Tune) -> None:
        known = [subject.name for subject in self.subjects]
        unknown = [name for name in tune.subjects if name not in known]
        if unknown or not tune.subjects:
            raise ValueError(f"tune.subjects should name some of {', '.join(known)}, got {unknown}")
        if tune.seed in self.seeds:
            raise ValueError(f"tune.seed {tune.seed} is a reported seed; take another one")
        planning.require_fair(tune, self.methods)

    @classmethod
    def read(cls, path: Path) -> "Plan":
        """Read a YAML file.

        Raises:
            SnellaConfigError: No such file, no YAML, or what it says is unknown or contradictory.
        """
        return planning.read_plan(cls, path)

    @property
    def reported(self) -> tuple[Subject, ...]:
        """Subjects with reported runs."""
        return tuple(subject for subject in self.subjects if subject.report)

    def subject(self, name: str) -> Subject:
        """The subject of that name."""
        return next(subject for subject in self.subjects if subject.name == name)

    def rates(self, method: str) -> tuple[float, ...]:
        """Learning rates that a method tries; none without `tune`."""
        return planning.rates(self.tune, method)

    def trials(self) -> Iterator[tuple[str, Subject, float]]:
        """All runs that choose learning rates."""
        for name in self.tune.subjects if self.tune else ():
            for method in self.methods:
                for rate in self.rates(method):
                    yield method, self.subject(name), rate

    def runs(self) -> Iterator[tuple[str, Subject, int]]:
        """All reported runs, so ordered that a comparison cut short has whole blocks of methods."""
        for seed in self.seeds:
            for subject in self.reported:
                for method in self.methods:
                    yield method, subject, seed
