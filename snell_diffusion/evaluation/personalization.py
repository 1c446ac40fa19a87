"""The DreamBooth protocol: train every method on every subject with every seed, and measure.

    output/trials/   records of the runs that choose learning rates
    output/records/  one record per reported run
    output/runs/     their run folders, with pictures and weights
    output/base/     pictures of the base itself, and their scores

Each run trains on a subject's photos but the last, with the trainer of this package in this
process. Finished runs are not repeated.
"""

import json
import math
import shutil
import tempfile
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import AbstractContextManager, contextmanager, nullcontext
from dataclasses import asdict, dataclass, replace
from datetime import UTC, datetime
from functools import cached_property
from pathlib import Path
from typing import Any

from PIL import Image
from tqdm.auto import tqdm

from snell_diffusion.diffusion.config import TrainConfig
from snell_diffusion.diffusion.config_files import config_values, make_config
from snell_diffusion.diffusion.data import find_photos
from snell_diffusion.diffusion.decoding import read_photo
from snell_diffusion.diffusion.inputs import Photos
from snell_diffusion.diffusion.restore import attach
from snell_diffusion.diffusion.results import RunResult
from snell_diffusion.diffusion.run_folder import RunFolder
from snell_diffusion.diffusion.training import run
from snell_diffusion.errors import SnellaConfigError
from snell_diffusion.evaluation import pictures
from snell_diffusion.evaluation.base import Base
from snell_diffusion.evaluation.drift import DriftProbe, class_prompts
from snell_diffusion.evaluation.kept import KEPT, kept_entries, kept_picture
from snell_diffusion.evaluation.memory import Peak, peak_memory
from snell_diffusion.evaluation.pictures import Task
from snell_diffusion.evaluation.plan import Plan, Subject
from snell_diffusion.evaluation.prompts import PROMPTS, PromptSet
from snell_diffusion.evaluation.records import Record, digest_of, read_record, save_record
from snell_diffusion.evaluation.results import ABOUT, read_table
from snell_diffusion.evaluation.scoring import Scorer
from snell_diffusion.evaluation.stamp import program, stamp
from snell_diffusion.evaluation.tuning import best_rate
from snell_diffusion.training.errors import NonFiniteError
from snell_diffusion.training.files import remove, write_json

Shard = tuple[int, int]
# Where a run reads and writes; what it reads is in the digest by content.
_PLACES = {"output_dir", "instance_data_dir", "overwrite", "cache_dir"}
_DEFAULTS = config_values(TrainConfig(instance_data_dir=".", instance_prompt="."))


@dataclass(frozen=True)
class Options:
    """What is not part of a plan.

    Attributes:
        redo: Run again what was run with other settings; otherwise that is an error.
        prompts: Templates of the prompts.
        clip: Hub id or folder of a CLIP model, or None.
        dino: Hub id or folder of a DINO model, or None.
    """

    redo: bool = False
    prompts: PromptSet = PROMPTS
    clip: str | None = None
    dino: str | None = None


_USUAL = Options()


class Runner:
    """Executes the runs of one plan.

    Args:
        plan: What to run.
        photos: Folder that holds one folder of photos per subject.
        output: Where records and run folders go.
        options: What else decides what is measured.

    Raises:
        SnellaConfigError: A subject has no photo folder, or settings are not those of a run.
    """

    def __init__(self, plan: Plan, photos: Path, output: Path, options: Options = _USUAL) -> None:
        self.plan, self.photos, self.output, self.options = plan, photos, output, options
        missing = [s.name for s in plan.subjects if not (photos / s.name).is_dir()]
        if missing:
            raise SnellaConfigError(f"no photo folder {', '.join(missing)} below {photos}")
        for method in plan.methods:  # every mistake before the first run
            self.config(method, plan.subjects[0], plan.seeds[0])
        self._base: Base | None = None
        self._probes: dict[str, DriftProbe] = {}
        self._chosen: dict[str, dict[str, float]] = {}
        self._noted = False

    def run_all(self, shard: Shard = (0, 1)) -> None:
        """Every run of this shard (i of n) that has no record yet, with the time left.

        Trials come first. What of them other shards have not done when they are needed is done
        here too: a trial's numbers do not depend on who runs it.
        """
        self._note_plan()
        trials = list(self.plan.trials())
        for trial in self._mine(trials, shard, "trials"):
            self.trial(*trial)
        for method, subject, seed in self._mine(list(self.plan.runs()), shard, "runs"):
            self.reported(method, subject, seed)
        for subject in self._mine(list(self.plan.reported), shard, "base"):
            self.bare(subject)

    def _note(self) -> None:
        """Say where and how it is measured, once this process measures anything."""
        if not self._noted:
            write_json(self.output / ABOUT, {**stamp(program()), "plan": asdict(self.plan)})
            self._noted = True

    def _note_plan(self) -> None:
        """Say it also where a finished comparison was made with another plan, or says nothing."""
        path, plan = self.output / ABOUT, json.loads(json.dumps(asdict(self.plan)))
        if not path.exists() or read_table(path).get("plan") != plan:
            self._note()

    @staticmethod
    def _mine(runs: list[Any], shard: Shard, what: str) -> Iterator[Any]:
        return iter(tqdm(runs[shard[0] :: shard[1]], desc=what, smoothing=0))

    def trial(self, method: str, subject: Subject, rate: float) -> Record:
        """The record of a trial, from its file or from a run made now."""
        assert self.plan.tune is not None
        seed = self.plan.tune.seed
        path = self.output / "trials" / f"{method}--{subject.name}--{rate:g}.json"
        with tempfile.TemporaryDirectory(prefix="snella-trial-") as scratch:
            config = self.config(
                *(method, subject, seed),
                learning_rate=rate,
                output_dir=str(Path(scratch) / "run"),
                instance_data_dir=str(self._trial_photos(subject, Path(scratch) / "photos")),
            )
            found = self._known(path, self.digest(config, subject))
            if found is None:
                found = self._measured(method, subject, config)
                save_record(path, found)
        return found

    def _trial_photos(self, subject: Subject, folder: Path) -> Path:
        """The subject's photos; without those that its reported runs hold out, where it has any."""
        source = self.photos / subject.name
        if not subject.report:
            return source
        config = self.config(next(iter(self.plan.methods)), subject, self.plan.seeds[0])
        held_out = {p.path.name for p in Photos.find(config, RunFolder(config)).held_out}
        shutil.copytree(source, folder, ignore=lambda *_: held_out)
        return folder

    def reported(self, method: str, subject: Subject, seed: int) -> Record:
        """The record of a reported run, from its file or from a run made now."""
        config = self.config(method, subject, seed, **self.chosen(method))
        path = self.output / "records" / f"{self.name(method, subject, seed)}.json"
        found = self._known(path, self.digest(config, subject))
        if found is None:
            found = self._measured(method, subject, config)
            save_record(path, found)
        if found.failed:
            return found
        folder = Path(config.output_dir)
        return self._judged(path, found, subject, folder, lambda: self.adapted(folder))

    def bare(self, subject: Subject) -> Record:
        """Pictures of the bare base for a subject's prompts, and their scores."""
        folder = self.output / "base" / subject.name
        path = folder.with_suffix(".json")
        config = self.config(self.plan.reference, subject, 0)
        digest = digest_of({"base": self.plan.base, "size": config.resolution})
        record = self._known(path, digest) or Record("base", subject.name, 0, digest, 0.0)
        return self._judged(path, record, subject, folder, lambda: nullcontext(self.base()))

    def _judged(
        self,
        path: Path,
        record: Record,
        subject: Subject,
        folder: Path,
        adapted: Callable[[], AbstractContextManager[Base]],
    ) -> Record:
        """The record with scores of its pictures; draws and measures what is missing."""
        images = self.plan.images
        if not images.prompts:
            return record
        task = Task.of(subject, self.plan.token, images, self.options.prompts)
        drawn = task.digest(record.digest)
        if record.images != drawn or not pictures.complete(task, folder):
            with adapted() as base:
                pictures.draw(base, task, folder)
            record = replace(record, images=drawn, scores={})
            save_record(path, record)
        missing = self.scorer.missing(task, record.scores)
        if missing:
            found = self.scorer.measure(
                missing, task, pictures.read(task, folder), self._photos(subject), subject.name
            )
            record = replace(record, scores={**record.scores, **found})
            save_record(path, record)
        return record

    @cached_property
    def scorer(self) -> Scorer:
        """Measures pictures."""
        return Scorer(self.base(), self.options.clip, self.options.dino)

    def _photos(self, subject: Subject) -> list[Image.Image]:
        """All photos of a subject, upright."""
        photos = find_photos(self.photos / subject.name, "")
        return [read_photo(photo.path)[0] for photo in photos]

    def chosen(self, method: str) -> dict[str, float]:
        """The settings that the trials choose for a method; missing trials are run now."""
        if self.plan.tune is None:
            return {}
        if method not in self._chosen:
            trials = [self.trial(*trial) for trial in self.plan.trials() if trial[0] == method]
            self._chosen[method] = {"learning_rate": best_rate(trials, method)}
        return self._chosen[method]

    @staticmethod
    def name(method: str, subject: Subject, seed: int) -> str:
        """What the files of a reported run are called."""
        return f"{method}--{subject.name}--{seed}"

    def config(self, method: str, subject: Subject, seed: int, **changes: Any) -> TrainConfig:
        """The training settings of one run.

        Raises:
            SnellaConfigError: They are not settings of a run.
        """
        token = self.plan.token
        settings: dict[str, Any] = {
            "pretrained_model_name_or_path": self.plan.base,
            "instance_data_dir": str(self.photos / subject.name),
            "instance_prompt": f"a photo of a {token} {subject.class_word}",
            "num_validation_photos": 1,
            "output_dir": str(self.output / "runs" / self.name(method, subject, seed)),
            "overwrite": True,
            "seed": seed,
            **self.plan.common,
            **self.plan.methods[method],
            **changes,
        }
        config = make_config(settings, where=f"method {method} of the plan")
        if not config.num_validation_photos and config.validation_data_dir is None:
            raise SnellaConfigError(
                f"method {method} of the plan: num_validation_photos is 0, but every run is "
                f"measured on photos that it does not train on; take 1"
            )
        return config

    def digest(self, config: TrainConfig, subject: Subject) -> str:
        """Of everything that a run's numbers depend on: settings, photos, prompts of the drift."""
        given = {
            name: value
            for name, value in config_values(config).items()
            if name not in _PLACES and value != _DEFAULTS[name]
        }
        photos = Photos.find(config, RunFolder(config)).digest()
        drift = class_prompts(subject.class_word, subject.others)
        return digest_of({**given, "photos": photos, "drift": drift})

    def _known(self, path: Path, digest: str) -> Record | None:
        """The record of a file, if it was made with the settings of the plan.

        Raises:
            SnellaConfigError: It was made with others, and `redo` is off.
        """
        if not path.exists():
            return None
        record = read_record(path)
        if record.digest == digest:
            return record
        if self.options.redo:
            return None
        raise SnellaConfigError(
            f"{path} was measured with other settings or photos than the plan's (digest "
            f"{record.digest}, now {digest}): pass --redo to run it again, or choose another output"
        )

    def _measured(self, method: str, subject: Subject, config: TrainConfig) -> Record:
        """Train one method on one subject, then measure it; a run that diverged says so."""
        self._note()
        probe = self._probe(subject)  # before the memory is counted
        record = _fresh(method, subject, config, self.digest(config, subject))
        folder = Path(config.output_dir)
        try:
            with peak_memory() as peak:
                result = run(config)
        except NonFiniteError as error:
            return replace(record, failed=str(error))
        finally:
            remove(folder / "checkpoints")
        with self.adapted(folder) as base:
            record = replace(record, kept=kept_entries(base.pipe))
            for layer in middle(record.kept):
                kept_picture(base.pipe, layer, folder / KEPT)
            drift = probe.measure(base)
        return _filled(record, result, peak, drift)

    def _probe(self, subject: Subject) -> DriftProbe:
        if subject.name not in self._probes:
            prompts = class_prompts(subject.class_word, subject.others)
            self._probes[subject.name] = DriftProbe.of(self.base(), prompts)
        return self._probes[subject.name]

    def base(self) -> Base:
        """The bare base, loaded at the first call."""
        if self._base is None:
            first = next(iter(self.plan.methods))
            self._base = Base.load(self.config(first, self.plan.subjects[0], self.plan.seeds[0]))
        return self._base

    @contextmanager
    def adapted(self, folder: Path) -> Iterator[Base]:
        """The base with what a run folder holds, bare again afterwards."""
        base = self.base()
        detach = attach(base.pipe, folder)
        try:
            yield base
        finally:
            detach()


def _fresh(method: str, subject: Subject, config: TrainConfig, digest: str) -> Record:
    """A record that nothing was measured for yet."""
    return Record(
        method=method,
        subject=subject.name,
        seed=config.seed,
        digest=digest,
        learning_rate=config.learning_rate,
        date=datetime.now(UTC).strftime("%Y-%m-%d %H:%M"),
    )


def _filled(record: Record, result: RunResult, peak: Peak, drift: float) -> Record:
    """The record with what a run measured."""
    assert result.adapter_path is not None
    if result.validation_loss_after is None:
        record = replace(record, failed="the held-out loss after training is not finite")
    return replace(
        record,
        loss_before=result.validation_loss_before,
        loss_after=result.validation_loss_after,
        drift=drift if math.isfinite(drift) else None,
        trainable=result.sizes.trainable,
        stored_bytes=stored_bytes(result.adapter_path),
        seconds=round(result.seconds, 2),
        peak_bytes=peak.bytes,
        peak_kind=peak.kind,
        curve=validation_curve(result.history),
    )


def middle(kept: Sequence[Sequence[Any]]) -> list[str]:
    """The layer whose kept weights are drawn: nearest to the middle, of those kept in part.

    Where there is none, the middle one.
    """
    partly = [i for i, (_, some, size) in enumerate(kept) if 0 < some < size]
    nearest = min(partly or range(len(kept)), key=lambda i: abs(i - len(kept) // 2), default=None)
    return [] if nearest is None else [kept[nearest][0]]


def stored_bytes(path: Path) -> int:
    """Size of a file, or of all files of a folder."""
    files = [path] if path.is_file() else [p for p in path.rglob("*") if p.is_file()]
    return sum(file.stat().st_size for file in files)


def validation_curve(history: Iterable[Mapping[str, Any]]) -> list[list[float]]:
    """[step, held-out loss] of a run's history."""
    return [[h["step"], h["validation_loss"]] for h in history if h.get("validation_loss")]
