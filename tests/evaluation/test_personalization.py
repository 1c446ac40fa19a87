"""The protocol end to end on a tiny base: records, resuming, trials, pictures."""

import json
import shutil
from pathlib import Path

import pytest
import torch
import yaml
from PIL import Image

from snell_diffusion.diffusion.inputs import Photos
from snell_diffusion.diffusion.run_folder import RunFolder
from snell_diffusion.errors import SnellaConfigError
from snell_diffusion.evaluation import personalization
from snell_diffusion.evaluation.__main__ import main
from snell_diffusion.evaluation.base import Base
from snell_diffusion.evaluation.drift import DriftProbe, class_prompts
from snell_diffusion.evaluation.personalization import Runner, middle
from snell_diffusion.evaluation.plan import Plan
from snell_diffusion.evaluation.records import read_record, read_records
from snell_diffusion.training.errors import NonFiniteError
from tests.evaluation.plans import TUNE, command, write_plan


@pytest.fixture(scope="module")
def measured(tiny_base: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The plan's folder after a run."""
    plan = write_plan(tmp_path_factory.mktemp("measured"), tiny_base)
    assert main(command(plan)) == 0
    return plan.parent


@pytest.fixture
def copied(measured: Path, tmp_path: Path) -> Path:
    """A copy of it that a test may change, as plan file."""
    shutil.copytree(measured, tmp_path / "copy")
    return tmp_path / "copy" / "plan.yaml"


def test_every_method_is_trained_and_measured(measured: Path) -> None:
    records = {r.method: r for r in read_records(measured / "out" / "records")}
    assert set(records) == {"lora", "ours"}
    for record in records.values():
        assert [step for step, _ in record.curve] == [0, 1, 2]
        assert record.curve[-1][1] == record.loss_after != record.loss_before
        assert record.drift is not None
        assert record.drift > 0
        assert record.stored_bytes > 4 * record.trainable > 0
        assert record.scores["diversity"]["value"] > 0
        assert record.scores["diversity"]["space"] == "VAE latents"
    assert records["lora"].loss_before == records["ours"].loss_before
    assert records["lora"].kept == []
    assert records["ours"].kept
    assert all(0 <= kept <= size for _, kept, size in records["ours"].kept)


def test_a_run_leaves_pictures_and_what_it_trained_but_no_checkpoint(measured: Path) -> None:
    folder = measured / "out" / "runs" / "ours--cat--0"
    names = sorted(p.name for p in (folder / "pictures").iterdir())
    assert names == ["00-00.png", "00-01.png", "01-00.png", "01-01.png", "prompts.json"]
    assert (folder / "pytorch_snella_weights.safetensors").is_file()
    assert not (folder / "checkpoints").exists()
    with Image.open(folder / "kept.png") as picture:
        assert picture.mode == "1"
    with Image.open(folder / "sheet.png") as picture:
        assert picture.width > picture.height > 200


def test_the_layer_that_is_drawn_is_kept_in_part() -> None:
    kept = [["a", 1, 4], ["b", 0, 4], ["c", 4, 4], ["d", 4, 4], ["e", 3, 4]]
    assert middle(kept) == ["a"]
    assert middle(kept[1:]) == ["e"]
    assert middle(kept[1:3]) == ["c"]
    assert middle([]) == []


def test_start_noise_is_shared_by_all_methods(measured: Path) -> None:
    """A method's picture is nearer to the base's from the same noise than to its own other one."""
    folders = [measured / "out" / "runs" / f"{name}--cat--0" for name in ("lora", "ours")]
    folders.append(measured / "out" / "base" / "cat")
    pixels = [Image.open(f / "pictures" / "00-00.png").convert("L").tobytes() for f in folders]
    other = Image.open(folders[0] / "pictures" / "00-01.png").convert("L").tobytes()
    assert _distance(pixels[0], pixels[2]) < _distance(pixels[0], other)


def _distance(a: bytes, b: bytes) -> float:
    return sum(abs(x - y) for x, y in zip(a, b, strict=True)) / len(a)


def test_finished_runs_are_not_repeated(copied: Path) -> None:
    out = copied.parent / "out"

    def stamps() -> dict[Path, int]:
        return {f: f.stat().st_mtime_ns for f in out.rglob("*") if f.is_file()}

    before = stamps()
    assert main(command(copied)) == 0
    assert stamps() == before


def test_a_run_that_was_lost_is_made_again_with_the_same_numbers(copied: Path) -> None:
    path = copied.parent / "out" / "records" / "ours--cat--0.json"
    before = read_record(path)
    path.unlink()
    assert main(command(copied)) == 0
    after = read_record(path)
    for name in ("digest", "loss_before", "loss_after", "drift", "curve", "kept", "scores"):
        assert getattr(after, name) == getattr(before, name)


def test_lost_pictures_are_drawn_again_without_training(
    copied: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(personalization, "run", None)
    picture = copied.parent / "out" / "runs" / "lora--cat--0" / "pictures" / "01-01.png"
    before = picture.read_bytes()
    picture.unlink()
    assert main(command(copied)) == 0
    assert picture.read_bytes() == before


def test_a_changed_plan_is_noticed(copied: Path, capsys: pytest.CaptureFixture[str]) -> None:
    values = yaml.safe_load(copied.read_text())
    values["methods"]["ours"]["kernel"] = "linear"
    copied.write_text(yaml.safe_dump(values))
    assert main(command(copied)) == 2
    assert "ours--cat--0.json was measured with other settings" in capsys.readouterr().err
    path = copied.parent / "out" / "records" / "ours--cat--0.json"
    before = read_record(path)
    assert main(command(copied, "--redo")) == 0
    assert read_record(path).digest != before.digest


def test_a_changed_photo_is_noticed(copied: Path, capsys: pytest.CaptureFixture[str]) -> None:
    Image.new("RGB", (30, 30), "red").save(copied.parent / "photos" / "cat" / "0.png")
    assert main(command(copied)) == 2
    assert "pass --redo" in capsys.readouterr().err


def test_shards_divide_the_work(tiny_base: Path, tmp_path: Path) -> None:
    plan = write_plan(tmp_path, tiny_base, images={"prompts": 0})
    assert main(command(plan, "--shard", "1/2")) == 0
    assert [r.method for r in read_records(tmp_path / "out" / "records")] == ["ours"]
    assert main(command(plan, "--shard", "0/2")) == 0
    assert len(read_records(tmp_path / "out" / "records")) == 2


def test_trials_choose_the_rate_of_the_reported_runs(tiny_base: Path, tmp_path: Path) -> None:
    plan = write_plan(tmp_path, tiny_base, images={"prompts": 0}, tune=TUNE)
    assert main(command(plan)) == 0
    trials = read_records(tmp_path / "out" / "trials")
    assert sorted((t.method, t.learning_rate) for t in trials) == [
        *(("lora", 0.01), ("lora", 0.05), ("ours", 0.01), ("ours", 0.05)),
    ]
    assert {t.seed for t in trials} == {7}
    for record in read_records(tmp_path / "out" / "records"):
        own = {t.learning_rate: t.gain for t in trials if t.method == record.method}
        assert own[record.learning_rate] == min(own.values())
    assert not (tmp_path / "out" / "runs" / "trial").exists()


def test_trials_never_see_the_photo_that_is_reported_on(tiny_base: Path, tmp_path: Path) -> None:
    runner = _runner(write_plan(tmp_path, tiny_base, tune=TUNE))
    subject = runner.plan.subject("cat")
    reported = runner.config("lora", subject, 0)
    (held_out,) = Photos.find(reported, RunFolder(reported)).held_out
    folder = runner._trial_photos(subject, tmp_path / "trial")
    trial = runner.config("lora", subject, 7, instance_data_dir=str(folder))
    photos = Photos.find(trial, RunFolder(trial))
    assert len(photos.instance) + len(photos.held_out) == 3
    assert held_out.digest not in {p.digest for p in (*photos.instance, *photos.held_out)}


def test_a_run_that_diverged_is_recorded_and_never_chosen(
    tiny_base: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    train = personalization.run

    def diverging(config: personalization.TrainConfig) -> object:
        if config.learning_rate == 0.05:
            raise NonFiniteError("the loss is nan")
        return train(config)

    monkeypatch.setattr(personalization, "run", diverging)
    tune = {**TUNE, "own": {}}
    plan = write_plan(tmp_path, tiny_base, images={"prompts": 0}, tune=tune)
    assert main(command(plan)) == 0
    trials = {(t.method, t.learning_rate): t for t in read_records(tmp_path / "out" / "trials")}
    assert trials["lora", 0.05].failed == "the loss is nan"
    assert {r.learning_rate for r in read_records(tmp_path / "out" / "records")} == {0.01}
    assert "NaN" not in json.dumps([t.curve for t in trials.values()])


def test_every_mistake_is_found_before_the_first_run(tiny_base: Path, tmp_path: Path) -> None:
    bad = {"lora": {"method": "lora"}, "ours": {"kernal": "distance"}}
    plan = write_plan(tmp_path, tiny_base, methods=bad)
    with pytest.raises(SnellaConfigError, match=r"method ours of the plan: unknown key 'kernal'"):
        _runner(plan)
    plan = write_plan(tmp_path, tiny_base, common={"num_validation_photos": 0})
    with pytest.raises(SnellaConfigError, match="num_validation_photos is 0"):
        _runner(plan)
    shutil.rmtree(tmp_path / "photos")
    with pytest.raises(SnellaConfigError, match="no photo folder cat below"):
        _runner(plan)


def test_drift_is_zero_on_the_bare_base_and_grows_with_the_change(
    tiny_base: Path, tmp_path: Path
) -> None:
    runner = _runner(write_plan(tmp_path, tiny_base))
    base = Base.load(runner.config("lora", runner.plan.subject("cat"), 0))
    probe = DriftProbe.of(base, class_prompts("cat", ("dog",)), timesteps=2, steps=2)
    assert probe.inputs.shape[0] == 2 * (6 + 2)
    assert probe.measure(base) == 0
    drifts = []
    for _ in range(2):
        with torch.no_grad():
            base.pipe.unet.conv_out.weight.mul_(1.1)
        drifts.append(probe.measure(base))
    assert 0 < drifts[0] < drifts[1]


def _runner(plan: Path) -> Runner:
    return Runner(Plan.read(plan), plan.parent / "photos", plan.parent / "out")
