"""The size-quality curve: what is trained, how points become rows, which setting is shipped."""

import json
from pathlib import Path

import pytest
import yaml

from snell_diffusion.adapters import read_adapter
from snell_diffusion.evaluation.__main__ import main
from snell_diffusion.evaluation.bits import Point, plot, smallest, summarize, table
from tests import tiny_models
from tests.diffusion.training_runs import SIDE, write_photos

ROOT = Path(__file__).resolve().parents[2]


def point(kind: str, rank: int, bits: int, gain: float, size: int, seed: int = 0) -> Point:
    return Point(kind, rank, bits, "cup", seed, gain, size, size // 2)


POINTS = [
    point("float", 8, 32, 0.20, 1000),
    point("float", 8, 32, 0.10, 1000, seed=1),
    point("float", 4, 32, 0.15, 600),
    point("float", 4, 32, 0.14, 600, seed=1),
    point("trained", 8, 2, 0.20, 100),
    point("trained", 8, 2, 0.092, 100, seed=1),
    point("trained", 8, 1, 0.12, 70),
    point("trained", 8, 1, 0.06, 70, seed=1),
    point("post-training", 8, 2, 0.02, 100),
    point("lora", 8, 16, 0.18, 500),
    point("lora", 8, 16, 0.10, 500, seed=1),
    Point("trained", 8, 1, "without a float run", 0, 0.9, 1, 1),
]


def test_rows_are_means_and_shares_of_the_largest_floats_gain():
    rows = {(row.kind, row.rank, row.bits): row for row in summarize(POINTS)}
    two = rows["trained", 8, 2]
    assert (two.runs, two.file_bytes, two.factor_bytes) == (2, 100, 50)
    assert two.gain == pytest.approx(0.146)
    assert two.kept == pytest.approx(0.146 / 0.15)
    assert rows["float", 8, 32].kept == pytest.approx(1.0)
    assert rows["post-training", 8, 2].kept == pytest.approx(0.1)
    assert rows["trained", 8, 1].runs == 2


def test_the_smallest_is_the_smallest_that_keeps_enough():
    rows = summarize(POINTS)
    best = smallest(rows)
    assert best is not None
    assert (best.kind, best.bits) == ("trained", 2)
    assert smallest([row for row in rows if row.kind in ("lora", "post-training")]) is None
    assert table(POINTS).count("smallest with 95 %") == 1
    lines = table(POINTS).splitlines()[2:]
    assert len(lines) == len(rows)
    assert lines[0].startswith("| trained | 8 | 1 | 2 | 0.0900 | 60.0% | 70 B |")


def test_the_picture_is_drawn(tmp_path: Path):
    plot(POINTS, tmp_path / "bits.png")
    assert (tmp_path / "bits.png").read_bytes().startswith(b"\x89PNG")


def test_a_whole_plan_runs_and_goes_on(tmp_path: Path, capsys: pytest.CaptureFixture):
    tiny_models.pipeline().save_pretrained(tmp_path / "base")
    write_photos(tmp_path / "photos" / "cup")
    plan = {
        "base": str(tmp_path / "base"),
        "subjects": [{"name": "cup", "class_word": "cup"}],
        "seeds": [0],
        "common": {
            "resolution": SIDE,
            "max_train_steps": 3,
            "train_batch_size": 2,
            "validation_timesteps": 2,
            "target_modules": ["to_q", "to_v"],
        },
        "snella": {"learning_rate": 1.0e-2},
        "lora": {"method": "lora", "learning_rate": 1.0e-2},
        "ranks": [4],
        "lora_ranks": [2],
        "bits": [1, 8],
    }
    (tmp_path / "plan.yaml").write_text(yaml.safe_dump(plan))
    arguments = ["bits", "--config", str(tmp_path / "plan.yaml")]
    arguments += ["--photos", str(tmp_path / "photos"), "--output", str(tmp_path / "out")]
    assert main(arguments) == 0
    kept = json.loads((tmp_path / "out" / "bits.json").read_text())
    kinds = [(row["kind"], row["bits"]) for row in kept["points"]]
    expected = [("lora", 16), ("float", 32), ("post-training", 1), ("post-training", 8)]
    assert kinds == [*expected, ("trained", 1), ("trained", 8)]
    gains = {(row["kind"], row["bits"]): row["gain"] for row in kept["points"]}
    assert gains["post-training", 8] == pytest.approx(gains["float", 32], abs=2e-3)
    small = tmp_path / "out" / "runs" / "trained-4-1-cup-0" / "pytorch_snella_weights.safetensors"
    assert read_adapter(small).header.components["unet"].bits == 1
    assert (tmp_path / "out" / "bits.md").read_text() in capsys.readouterr().out
    before = (tmp_path / "out" / "bits.json").read_bytes()
    assert main(arguments) == 0
    assert (tmp_path / "out" / "bits.json").read_bytes() == before


def test_another_file_is_no_plan(tmp_path: Path, capsys: pytest.CaptureFixture):
    (tmp_path / "plan.yaml").write_text("base: embedded\n")
    arguments = ["--config", str(tmp_path / "plan.yaml"), "--photos", ".", "--output", "x"]
    assert main(["bits", *arguments]) == 2
    assert "expected the keys base, bits, common" in capsys.readouterr().err


def test_the_plan_that_ships_is_one():
    from snell_diffusion.evaluation.bits import KEYS, _jobs

    plan = yaml.safe_load((ROOT / "configs/evaluation/bits.yaml").read_text())
    assert set(plan) == KEYS
    one = len(plan["lora_ranks"]) + len(plan["ranks"]) * (1 + len(plan["bits"]))
    assert len(list(_jobs(plan))) == 3 * one == 57
