"""A comparison of classifiers runs what its plan says, once, and goes on where it stopped."""

import argparse
import json
from collections.abc import Callable
from dataclasses import dataclass, field, replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import yaml

from snell_diffusion.errors import SnellaConfigError, SnellaFileError
from snell_diffusion.evaluation import classification
from snell_diffusion.evaluation.classification_plan import Plan
from snell_diffusion.evaluation.classification_records import (
    Record,
    at_edge,
    best_rate,
    read_record,
    save_record,
)
from snell_diffusion.training.errors import NonFiniteError
from snell_diffusion.tuners import SnellaConfig
from snell_diffusion.vision.loading import load_base
from snell_diffusion.vision.method import adapt

pytest.importorskip("sklearn", reason="the plans are about scikit-learn's digits")

PLAN: dict[str, Any] = {
    "base": "embedded-vit",
    "reference": "lora",
    "tasks": {"digits": {"dataset": "digits", "resolution": 32}},
    "shots": [1, 4, "all"],
    "seeds": [0, 1],
    "methods": {"lora": {"method": "lora", "rank": 2}, "linear_probe": {"method": "linear_probe"}},
    "common": {"max_train_steps": 2, "train_batch_size": 4, "eval_epochs": 1000},
    "few_shot": {"max_train_steps": 1},
    "whole": {"train_batch_size": 8},
    "tune": {"learning_rates": [1e-3, 1e-2], "shots": [4, "all"], "seeds": [9]},
}


def plan(tmp_path: Path, **changes: Any) -> Plan:
    path = tmp_path / "plan.yaml"
    path.write_text(yaml.safe_dump({**PLAN, **changes}, sort_keys=False))
    return Plan.read(path)


@dataclass
class Fake:
    """Stands in for training: remembers its configs and answers with a score of each."""

    score: Callable[[Any], float] = lambda config: 0.5
    configs: list[Any] = field(default_factory=list)
    tasks: list[Any] = field(default_factory=list)

    def __call__(self, config: Any, task: Any) -> Any:
        self.configs.append(config)
        self.tasks.append(task)
        accuracy = self.score(config)
        return SimpleNamespace(
            validation_accuracy=accuracy,
            validation=SimpleNamespace(loss=1 - accuracy),
            test_accuracy=accuracy / 2,
            sizes=SimpleNamespace(adapter=100, head=10),
            adapter_bytes=400,
            head_bytes=40,
            step=config.max_train_steps,
            seconds=1.5,
        )


@pytest.fixture
def fake(monkeypatch: pytest.MonkeyPatch) -> Fake:
    made = Fake()
    monkeypatch.setattr(classification, "run", made)
    return made


# -- plans -----------------------------------------------------------------------------------------


def test_runs_and_trials_are_all_combinations(tmp_path: Path) -> None:
    made = plan(tmp_path)
    assert len(set(made.runs())) == 3 * 2 * 2
    assert len(set(made.trials())) == 2 * 2 * 2
    assert {key[1] for key in made.trials()} == {4, "all"}
    assert [made.tuned_at(shots) for shots in made.shots] == [4, 4, "all"]


def test_settings_are_put_together_from_general_to_special(tmp_path: Path) -> None:
    made = plan(tmp_path)
    few = made.config("digits", 4, "lora", 3, 0.25)
    assert (few.max_train_steps, few.train_batch_size, few.shots) == (1, 4, 4)
    assert (few.method, few.rank, few.learning_rate, few.seed) == ("lora", 2, 0.25, 3)
    assert (few.output_dir, few.quiet, few.base) == (None, True, "embedded-vit")
    whole = made.config("digits", "all", "linear_probe", 0, None)
    assert (whole.max_train_steps, whole.train_batch_size, whole.shots) == (2, 8, None)
    assert whole.learning_rate == 1e-3


@pytest.mark.parametrize(
    "changes, message",
    [
        ({"reference": "dora"}, "reference 'dora' is no method; known: lora, linear_probe"),
        ({"seeds": [0, 0]}, "seeds should name at least one, each once"),
        ({"methods": {}}, "methods should name at least one"),
        ({"shots": ["some"]}, "shots"),
        ({"tune": {**PLAN["tune"], "seeds": [0]}}, "seeds that are not reported"),
        ({"tune": {**PLAN["tune"], "own": {"lora": [1]}}}, "lora 1 learning rates; .* try 2"),
        ({"tune": {**PLAN["tune"], "own": {"hra": [1, 2]}}}, "names no method: hra"),
        ({"tune": {**PLAN["tune"], "shots": [4]}}, "tune.shots has nothing near all"),
        ({"common": {"epochs": 3}}, "unknown key 'epochs'"),
        ({"bases": 1}, "bases"),
        ({"tasks": {"a/b": {}}}, "no slash"),
    ],
)
def test_a_wrong_plan_is_refused(tmp_path: Path, changes: dict[str, Any], message: str) -> None:
    with pytest.raises(SnellaConfigError, match=message):
        plan(tmp_path, **changes)


def test_a_plan_that_cannot_be_read_is_an_error(tmp_path: Path) -> None:
    with pytest.raises(SnellaConfigError, match="cannot be read"):
        Plan.read(tmp_path / "none.yaml")


# -- the choice of learning rates ------------------------------------------------------------------


def trial(rate: float, accuracy: float | None, loss: float | None = 1.0) -> Record:
    return Record("digits", 4, "lora", 9, "d", rate, accuracy, loss)


def test_the_best_rate_wins_and_ties_go_by_loss_then_to_the_lower() -> None:
    assert best_rate([trial(1, 0.5), trial(2, 0.7), trial(3, 0.6)], "x") == 2
    assert best_rate([trial(1, 0.7, 0.9), trial(2, 0.7, 0.8)], "x") == 2
    assert best_rate([trial(2, 0.7, 0.8), trial(1, 0.7, 0.8)], "x") == 1
    assert best_rate([trial(1, 0.4), trial(1, 0.8), trial(2, 0.5)], "x") == 1  # means
    assert best_rate([trial(1, None, None), trial(1, 0.9), trial(2, 0.1)], "x") == 2
    with pytest.raises(SnellaConfigError, match="x: no trial ended with a finite loss"):
        best_rate([trial(1, None, None)], "x")


def test_a_best_rate_at_the_edge_is_noticed() -> None:
    assert at_edge([trial(1, 0.5), trial(2, 0.7), trial(3, 0.8)], "x")
    assert not at_edge([trial(1, 0.5), trial(2, 0.7), trial(3, 0.6)], "x")
    assert not at_edge([trial(1, 0.5)], "x")


# -- running ---------------------------------------------------------------------------------------


def test_every_method_gets_its_own_best_rate_and_the_same_trials(
    tmp_path: Path, fake: Fake
) -> None:
    fake.score = lambda c: 0.9 if (c.method == "lora") == (c.learning_rate == 1e-3) else 0.2
    made = classification.Comparison(plan(tmp_path), tmp_path)
    made.run_all()
    assert len(fake.configs) == 8 + 12
    tried = [(c.method, c.shots, c.learning_rate) for c in fake.configs[:8]]
    assert len(set(tried)) == 8
    for config in fake.configs[8:]:
        assert config.learning_rate == (1e-3 if config.method == "lora" else 1e-2)
    assert {c.seed for c in fake.configs[:8]} == {9}
    assert {c.seed for c in fake.configs[8:]} == {0, 1}


def test_trials_never_see_a_test_image(tmp_path: Path, fake: Fake) -> None:
    made = classification.Comparison(plan(tmp_path), tmp_path)
    made.run_all()
    tests = {key for task in fake.tasks[8:] for key in task.test.keys}
    for task in fake.tasks[:8]:
        assert task.test is task.validation
        assert not tests & {*task.train.keys, *task.validation.keys, *task.test.keys}
    assert all(record.test_accuracy is None for record in made.trials())
    assert all(record.test_accuracy == 0.25 for record in made.records())


def test_methods_share_the_images_of_a_seed(tmp_path: Path, fake: Fake) -> None:
    classification.Comparison(plan(tmp_path), tmp_path).run_all()
    seen: dict[tuple[int, Any], set[tuple[str, ...]]] = {}
    for config, task in zip(fake.configs[8:], fake.tasks[8:], strict=True):
        seen.setdefault((config.seed, config.shots), set()).add(tuple(task.train.keys))
        assert len(task.train) == (10 * config.shots if config.shots else 1259)
    assert all(len(keys) == 1 for keys in seen.values())
    assert seen[0, 4] != seen[1, 4]


def test_a_comparison_goes_on_where_it_stopped(tmp_path: Path, fake: Fake) -> None:
    def stop(config: Any) -> float:
        if len(fake.configs) == 13:
            raise KeyboardInterrupt
        return 0.5

    fake.score = stop
    with pytest.raises(KeyboardInterrupt):
        classification.Comparison(plan(tmp_path), tmp_path).run_all()
    fake.score = lambda config: 0.5
    made = classification.Comparison(plan(tmp_path), tmp_path)
    assert (len(made.trials()), len(made.records())) == (8, 4)
    made.run_all()
    assert len(fake.configs) == 8 + 12 + 1
    assert len(made.records()) == 12
    made.run_all()
    assert len(fake.configs) == 8 + 12 + 1


def test_records_of_other_settings_are_measured_again(tmp_path: Path, fake: Fake) -> None:
    classification.Comparison(plan(tmp_path), tmp_path).run_all()
    methods = {**PLAN["methods"], "lora": {"method": "lora", "rank": 4}}
    made = classification.Comparison(plan(tmp_path, methods=methods), tmp_path)
    assert {record.method for record in made.records()} == {"linear_probe"}
    fake.configs.clear()
    made.run_all()
    assert {config.method for config in fake.configs} == {"lora"}
    assert len(fake.configs) == 4 + 6


def test_processes_can_share_a_comparison_by_methods(tmp_path: Path, fake: Fake) -> None:
    for name in PLAN["methods"]:
        classification.Comparison(plan(tmp_path), tmp_path, [name]).run_all()
    assert len(classification.Comparison(plan(tmp_path), tmp_path).records()) == 12
    with pytest.raises(SnellaConfigError, match="no method dora; it has lora, linear_probe"):
        classification.Comparison(plan(tmp_path), tmp_path, ["dora"])


def test_a_run_that_diverges_is_recorded(tmp_path: Path, fake: Fake) -> None:
    def diverge(config: Any) -> float:
        if config.seed == 1 and config.method == "lora":
            raise NonFiniteError("the loss is not finite")
        return 0.5

    fake.score = diverge
    made = classification.Comparison(plan(tmp_path), tmp_path)
    made.run_all()
    failed = [record for record in made.records() if record.failed]
    assert {(record.method, record.seed) for record in failed} == {("lora", 1)}
    assert all(record.test_accuracy is None for record in failed)


def test_without_records_the_report_says_what_to_do(tmp_path: Path) -> None:
    with pytest.raises(SnellaConfigError, match="run the comparison first"):
        classification.Comparison(plan(tmp_path, tune=None), tmp_path).records()


def test_records_are_read_back_and_strange_ones_refused(tmp_path: Path) -> None:
    record = replace(trial(1e-3, 0.5), shots="all", failed="it diverged")
    save_record(tmp_path / "a.json", record)
    assert read_record(tmp_path / "a.json") == record
    (tmp_path / "b.json").write_text('{"task": "x", "colour": 1}')
    with pytest.raises(SnellaFileError, match="unknown: colour"):
        read_record(tmp_path / "b.json")
    (tmp_path / "c.json").write_text("{")
    with pytest.raises(SnellaFileError, match="not a readable record"):
        read_record(tmp_path / "c.json")


def test_it_runs_for_real_from_the_command_line(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    values = {
        **PLAN,
        "shots": [1],
        "seeds": [0],
        "tune": {"learning_rates": [1e-3], "shots": [1], "seeds": [9]},
    }
    (tmp_path / "plan.yaml").write_text(yaml.safe_dump(values, sort_keys=False))
    parser = argparse.ArgumentParser()
    classification.add_arguments(parser)
    out = tmp_path / "out"
    given = ["--config", str(tmp_path / "plan.yaml"), "--output", str(out)]
    classification.main(parser.parse_args(given))
    shown = capsys.readouterr().out
    assert "| lora |" in shown
    results = json.loads((out / "results.json").read_text())
    assert [r["method"] for r in results["records"]] == ["lora", "linear_probe"]
    assert [r["trainable"] for r in results["records"]] == [41472, 0]
    assert all(r["head"] == 1930 and r["steps"] == 1 for r in results["records"])
    assert all(0 <= r["test_accuracy"] <= 1 for r in results["records"])
    assert all(r["adapter_bytes"] > 0 for r in results["records"] if r["method"] == "lora")
    assert {path.name for path in out.iterdir()} == {
        *("trials", "records", "table.md", "results.json", "shots.png", "parameters.png"),
    }
    before = {path: path.stat().st_mtime_ns for path in (out / "records").iterdir()}
    classification.main(parser.parse_args([*given, "--report-only"]))
    assert before == {path: path.stat().st_mtime_ns for path in (out / "records").iterdir()}


# -- the plan that is shipped ----------------------------------------------------------------------


def test_the_shipped_plan_compares_methods_of_equal_size() -> None:
    shipped = Plan.read(
        Path(__file__).parents[2] / "configs" / "evaluation" / "classification.yaml"
    )
    assert shipped.shots == (1, 2, 4, 8, 16, "all")
    assert len(shipped.seeds) == 5
    assert set(shipped.methods) == {
        *("linear_probe", "full", "lora", "dora", "shira", "snell", "snella_paper"),
        *("spt_lora", "arc", "hta", "binary_lora"),
    }
    trained = {}
    for name in sorted(set(shipped.methods) - {"spt_lora", "full"}):  # SPT's needs images
        config = shipped.config("digits", "all", name, 0, None)
        base = load_base(config.base, 10)
        trained[name] = adapt(config, base, 80, lambda settings: settings).adapter
    assert trained.pop("linear_probe") == 0
    assert trained.pop("dora") == 51840
    assert all(abs(size / shipped.budget - 1) < 0.005 for size in trained.values()), trained
    assert shipped.config("digits", "all", "spt_lora", 0, None).method_settings == {"budget": 41472}
    assert SnellaConfig.vision() == SnellaConfig.paper()  # or ours is a row of its own
