"""A comparison end to end on a tiny base, and its settings file."""

import json
from pathlib import Path

import pytest
import torch
import yaml

from snell_diffusion.evaluation.__main__ import main
from snell_diffusion.evaluation.comparison import Comparison, Runner, read_records
from snell_diffusion.evaluation.drift import DriftProbe, class_prompts
from tests import tiny_models
from tests.diffusion.training_runs import SIDE, write_photos

PLAN = {
    "reference": "lora",
    "subjects": [{"name": "cat", "class_word": "cat", "others": ["dog"]}],
    "seeds": [0],
    "common": {
        "resolution": SIDE,
        "max_train_steps": 2,
        "train_batch_size": 2,
        "rank": 2,
        "learning_rate": 0.05,
        "validation_steps": 1,
        "validation_timesteps": 2,
    },
    "variants": {"lora": {"method": "lora"}, "ours": {"kernel": "distance"}},
}


@pytest.fixture(scope="module")
def plan_file(tiny_base: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("comparison")
    write_photos(folder / "photos" / "cat")
    (folder / "plan.yaml").write_text(yaml.safe_dump({"base": str(tiny_base), **PLAN}))
    return folder / "plan.yaml"


def test_both_methods_are_trained_and_measured_and_not_repeated(plan_file: Path) -> None:
    folder = plan_file.parent
    options = ["--config", str(plan_file), "--output", str(folder / "out")]
    compare = ["compare", *options, "--photos", str(folder / "photos")]
    main(compare)
    records = {r.variant: r for r in read_records(folder / "out")}
    assert set(records) == {"lora", "ours"}
    for r in records.values():
        assert [step for step, _ in r.curve] == [0, 1, 2]
        assert r.drift > 0
        assert r.loss_after != r.loss_before
    assert records["lora"].loss_before == records["ours"].loss_before
    assert records["ours"].parameters == records["lora"].parameters

    kept = {f: f.stat().st_mtime_ns for f in (folder / "out" / "records").iterdir()}
    main(compare)
    assert {f: f.stat().st_mtime_ns for f in (folder / "out" / "records").iterdir()} == kept

    main(["report", *options])
    assert (folder / "out" / "table.md").read_text().count("\n") == 4
    assert len(json.loads((folder / "out" / "records.json").read_text())) == 2


def test_drift_is_zero_on_the_bare_base_and_grows_with_the_change() -> None:
    pipe = tiny_models.pipeline()
    probe = DriftProbe.of(pipe, class_prompts("cat", ("dog",)), timesteps=2, steps=2)
    assert probe.inputs.shape[0] == 2 * (6 + 2)
    assert probe.measure(pipe) == 0
    drifts = []
    for _ in range(2):
        with torch.no_grad():
            pipe.unet.conv_out.weight.mul_(1.1)
        drifts.append(probe.measure(pipe))
    assert 0 < drifts[0] < drifts[1]


def test_the_settings_file_is_checked(plan_file: Path, tmp_path: Path) -> None:
    def read(**changes: object) -> Comparison:
        values = {**yaml.safe_load(plan_file.read_text()), **changes}
        path = tmp_path / "plan.yaml"
        path.write_text(yaml.safe_dump(values))
        return Comparison.read(path)

    with pytest.raises(ValueError, match="reference 'dora' is no variant; known: lora, ours"):
        read(reference="dora")
    with pytest.raises(ValueError, match=r"unknown: \['steps'\]"):
        read(steps=3)
    with pytest.raises(ValueError, match="no photo folder cat below"):
        Runner(read(), tmp_path, tmp_path / "out")
    assert [r[0] for r in read(seeds=[0, 1]).runs()] == ["lora", "ours"] * 2
