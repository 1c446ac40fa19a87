"""Run the same personalization work with several settings, and keep one record per run.

A comparison is a YAML file: `base`, `subjects` (name and class word), `seeds`, `common` settings
and `variants` (name -> settings that differ). Settings are those of the training script. Each run
trains on all photos of a subject but the last, then measures the held-out loss and the drift.
"""

import json
import time
from collections.abc import Iterable, Iterator
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

import torch
import yaml
from safetensors import safe_open
from tqdm.auto import tqdm

from ..diffusion.config import TrainConfig
from ..diffusion.setup import base_path
from ..diffusion.training import run
from .drift import DriftProbe, class_prompts


@dataclass(frozen=True)
class Subject:
    """One subject: `name` is the photo folder below the photo root, `class_word` its noun."""

    name: str
    class_word: str
    others: tuple[str, ...] = ()
    """Class words of other things, on whose prompts drift is measured too."""


@dataclass(frozen=True)
class Comparison:
    """What to run: every variant on every subject with every seed."""

    base: str
    subjects: tuple[Subject, ...]
    seeds: tuple[int, ...]
    common: dict[str, Any]
    variants: dict[str, dict[str, Any]]
    reference: str
    """Variant that the report divides by."""

    @classmethod
    def read(cls, path: Path) -> "Comparison":
        """Read a YAML file.

        Raises:
            ValueError: a key is unknown or missing, or `reference` names no variant.
        """
        raw = yaml.safe_load(path.read_text())
        known = set(cls.__dataclass_fields__)
        if set(raw) != known:
            raise ValueError(
                f"{path}: expected the keys {', '.join(sorted(known))}; "
                f"unknown: {sorted(set(raw) - known)}, missing: {sorted(known - set(raw))}"
            )
        raw["subjects"] = tuple(
            Subject(s["name"], s["class_word"], tuple(s.get("others", ()))) for s in raw["subjects"]
        )
        raw["seeds"] = tuple(raw["seeds"])
        if raw["reference"] not in raw["variants"]:
            raise ValueError(
                f"{path}: reference '{raw['reference']}' is no variant; "
                f"known: {', '.join(raw['variants'])}"
            )
        return cls(**raw)

    def runs(self) -> Iterator[tuple[str, Subject, int]]:
        """All runs, so ordered that a comparison cut short has whole blocks of variants."""
        for seed in self.seeds:
            for subject in self.subjects:
                for variant in self.variants:
                    yield variant, subject, seed


@dataclass(frozen=True)
class Record:
    """What one run measured.

    Losses are mean squared errors of the denoiser on the held-out photo at fixed timesteps and
    noise; drift is relative (see `drift`); seconds are of this machine, training alone.
    """

    variant: str
    subject: str
    seed: int
    loss_before: float
    loss_after: float
    drift: float
    parameters: int
    adapter_bytes: int
    seconds: float
    curve: list[tuple[int, float]] = field(default_factory=list)

    @property
    def name(self) -> str:
        return f"{self.variant}--{self.subject}--{self.seed}"


class Runner:
    """Executes runs of one comparison; a finished run is a JSON file and is not repeated.

    Args:
        plan: what to run.
        photos: folder that holds one folder of photos per subject.
        output: records go to `output/records`, run folders to `output/runs`.
    """

    def __init__(self, plan: Comparison, photos: Path, output: Path) -> None:
        self.plan, self.photos, self.output = plan, photos, output
        missing = [s.name for s in plan.subjects if not (photos / s.name).is_dir()]
        if missing:
            raise ValueError(f"no photo folder {', '.join(missing)} below {photos}")
        self.records = output / "records"
        self.records.mkdir(parents=True, exist_ok=True)
        self._pipe: Any = None
        self._probes: dict[str, DriftProbe] = {}

    def run_all(self, shard: tuple[int, int] = (0, 1)) -> None:
        """Every run of this shard (i of n) that has no record yet, with the time left."""
        todo = [r for i, r in enumerate(self.plan.runs()) if i % shard[1] == shard[0]]
        todo = [r for r in todo if not self._file(*r).exists()]
        for variant, subject, seed in tqdm(todo, desc="runs", smoothing=0):
            record = self.run_one(variant, subject, seed)
            self._file(variant, subject, seed).write_text(json.dumps(asdict(record)))

    def run_one(self, variant: str, subject: Subject, seed: int) -> Record:
        """Train one variant on one subject, then measure it."""
        config = self.config(variant, subject, seed)
        began = time.perf_counter()
        result = run(config)
        seconds = time.perf_counter() - began
        path = Path(result.adapter_path)
        return Record(
            variant,
            subject.name,
            seed,
            result.validation_loss_before,
            result.validation_loss_after,
            self.drift(subject, path, config),
            factor_numbers(path),
            path.stat().st_size,
            seconds,
            validation_curve(result.history),
        )

    def config(self, variant: str, subject: Subject, seed: int) -> TrainConfig:
        """The settings of one run."""
        settings: dict[str, Any] = {
            "pretrained_model_name_or_path": self.plan.base,
            "instance_data_dir": str(self.photos / subject.name),
            "instance_prompt": f"a photo of a sks {subject.class_word}",
            "num_validation_photos": 1,
            "output_dir": str(self.output / "runs" / f"{variant}--{subject.name}--{seed}"),
            "overwrite": True,
            "seed": seed,
        }
        return TrainConfig(**{**settings, **self.plan.common, **self.plan.variants[variant]})

    def drift(self, subject: Subject, adapter: Path, config: TrainConfig) -> float:
        """Drift of a saved adapter on the subject's class prompts; the pipeline is left bare."""
        pipe = self._pipeline(config)
        if subject.name not in self._probes:
            prompts = class_prompts(subject.class_word, subject.others)
            self._probes[subject.name] = DriftProbe.of(pipe, prompts)
        load, unload = (
            (pipe.load_lora_weights, pipe.unload_lora_weights)
            if config.method == "lora"
            else (pipe.load_snella_weights, pipe.unload_snella_weights)
        )
        load(str(adapter))
        try:
            return self._probes[subject.name].measure(pipe)
        finally:
            unload()

    def _pipeline(self, config: TrainConfig) -> Any:
        if self._pipe is None:
            from diffusers import StableDiffusionPipeline

            source = base_path(config)
            self._pipe = StableDiffusionPipeline.from_pretrained(
                source, dtype=torch.float32, use_safetensors=True
            )
        return self._pipe

    def _file(self, variant: str, subject: Subject, seed: int) -> Path:
        return self.records / f"{variant}--{subject.name}--{seed}.json"


def factor_numbers(adapter: Path) -> int:
    """Numbers in the factor matrices of an adapter file, which is what equal size means here.

    SNELLA's mixing scalars, three a layer, head signs, levels and settings are not counted.
    """
    with safe_open(adapter, "pt") as file:
        factors = [key for key in file.keys() if not key.endswith("_method")]  # noqa: SIM118
        shapes = [file.get_slice(key).get_shape() for key in factors]
    return sum(torch.Size(shape).numel() for shape in shapes if len(shape) > 1)


def validation_curve(history: Iterable[dict[str, Any]]) -> list[tuple[int, float]]:
    """Pairs (step, held-out loss) of a run's history."""
    return [(h["step"], h["validation_loss"]) for h in history if "validation_loss" in h]


def read_records(output: Path) -> list[Record]:
    """All records below `output/records`, sorted by name.

    Raises:
        ValueError: there are none.
    """
    files = sorted((output / "records").glob("*.json"))
    if not files:
        raise ValueError(f"no records in {output / 'records'}: run `compare` first")
    rows = [json.loads(file.read_text()) for file in files]
    return [Record(**{**row, "curve": [tuple(p) for p in row["curve"]]}) for row in rows]
