"""Plans: what is refused, and in which order runs come."""

from pathlib import Path
from typing import Any

import pytest
import yaml

from snell_diffusion.errors import SnellaConfigError
from snell_diffusion.evaluation.personalization import Runner
from snell_diffusion.evaluation.plan import Plan
from snell_diffusion.tuners.recipes import RECIPES
from tests.evaluation.plans import PLAN, TUNE

CONFIGS = Path(__file__).resolve().parents[2] / "configs" / "evaluation"
CAT, DOG = {"name": "cat", "class_word": "cat"}, {"name": "dog", "class_word": "dog"}


def read(folder: Path, **changes: Any) -> Plan:
    path = folder / "plan.yaml"
    path.write_text(yaml.safe_dump({"base": "embedded", **PLAN, **changes}))
    return Plan.read(path)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"reference": "dora"}, "reference 'dora' is no method; known: lora, ours"),
        ({"steps": 3}, "steps Unexpected keyword argument"),
        ({"subjects": [CAT, CAT]}, "subjects should name at least one, each once"),
        ({"seeds": []}, "seeds should name at least one"),
        ({"subjects": [{**CAT, "report": False}]}, "subjects should hold one with `report` on"),
        ({"subjects": [{**CAT, "name": "../cat"}]}, "subjects.0.name should begin with a letter"),
        ({"methods": {"a--b": {}}, "reference": "a--b"}, "no slash and no '--'"),
        ({"tune": {**TUNE, "seed": 0}}, "tune.seed 0 is a reported seed"),
        ({"tune": {**TUNE, "subjects": ["fox"]}}, "tune.subjects should name some of cat, got"),
        ({"tune": {**TUNE, "own": {"dora": [1.0, 2.0]}}}, "tune.own names no method: dora"),
        ({"tune": {**TUNE, "own": {"ours": [1.0]}}}, "gives ours 1 learning rates; every method"),
        ({"tune": {**TUNE, "own": {"ours": [1.0, 1.0]}}}, "gives ours 1 learning rates"),
        ({"images": {"prompts": -1}}, "images.prompts Input should be greater than or equal to 0"),
    ],
)
def test_a_plan_that_contradicts_itself_is_refused(
    changes: dict[str, Any], message: str, tmp_path: Path
) -> None:
    with pytest.raises(SnellaConfigError, match=message):
        read(tmp_path, **changes)


def test_an_unreadable_plan_is_named(tmp_path: Path) -> None:
    with pytest.raises(SnellaConfigError, match=r"gone.yaml cannot be read"):
        Plan.read(tmp_path / "gone.yaml")
    (tmp_path / "bad.yaml").write_text("base: [")
    with pytest.raises(SnellaConfigError, match=r"bad.yaml cannot be read"):
        Plan.read(tmp_path / "bad.yaml")


def test_runs_come_in_whole_blocks_of_methods(tmp_path: Path) -> None:
    plan = read(tmp_path, seeds=[0, 1], subjects=[CAT, {**DOG, "report": False}])
    assert [(m, s.name, seed) for m, s, seed in plan.runs()] == [
        *(("lora", "cat", 0), ("ours", "cat", 0), ("lora", "cat", 1), ("ours", "cat", 1)),
    ]
    assert list(plan.trials()) == []


def test_every_method_tries_as_many_rates(tmp_path: Path) -> None:
    tune = {**TUNE, "subjects": ["dog"], "own": {"ours": [1.0, 2.0]}}
    plan = read(tmp_path, tune=tune, subjects=[CAT, {**DOG, "report": False}])
    assert [(m, s.name, rate) for m, s, rate in plan.trials()] == [
        *(("lora", "dog", 0.05), ("lora", "dog", 0.01), ("ours", "dog", 1.0), ("ours", "dog", 2.0)),
    ]


@pytest.mark.parametrize("name", ["methods", "personalization"])
def test_our_plans_are_read_and_their_settings_are_known(name: str, tmp_path: Path) -> None:
    plan = Plan.read(CONFIGS / f"{name}.yaml")
    for subject in plan.subjects:
        (tmp_path / subject.name).mkdir()
    runner = Runner(plan, tmp_path, tmp_path / "out")
    for method in plan.methods:
        config = runner.config(method, plan.subjects[0], 0)
        assert config.method in RECIPES
        assert config.resolution == 64
