"""Tables and pictures of a classification comparison say what its records say."""

import math
from pathlib import Path
from typing import Any

import pytest
from PIL import Image

from snell_diffusion.evaluation.classification_plan import Plan
from snell_diffusion.evaluation.classification_records import Record
from snell_diffusion.evaluation.classification_report import (
    Cell,
    difference,
    summarize,
    table,
    write_report,
)


def plan(**changes: Any) -> Plan:
    values: dict[str, Any] = {
        "base": "embedded-vit",
        "reference": "lora",
        "tasks": {"digits": {"dataset": "digits"}},
        "shots": (1, "all"),
        "seeds": (0, 1, 2),
        "methods": {"lora": {"method": "lora"}, "full": {"method": "full"}, "hta": {}},
        "budget": 1000,
        "tune": {"learning_rates": (1.0, 2.0, 3.0), "shots": (1, "all"), "seeds": (9,)},
    }
    return Plan(**{**values, **changes})


def record(method: str, shots: Any, seed: int, accuracy: float | None, **more: Any) -> Record:
    given = {"trainable": 1000, "adapter_bytes": 4000, "head_bytes": 40, "seconds": 2.0, **more}
    return Record("digits", shots, method, seed, "d", 2.0, accuracy, 1.0, accuracy, **given)


def records() -> list[Record]:
    found = []
    for seed, shift in enumerate((0.0, 0.02, -0.02)):
        for shots, base in ((1, 0.4), ("all", 0.8)):
            found.append(record("lora", shots, seed, base + shift))
            found.append(record("full", shots, seed, base + shift + 0.1, trainable=5000))
    return found


def trials(best: float) -> list[Record]:
    return [
        Record("digits", shots, "full", 9, "d", rate, 0.9 if rate == best else 0.1, 1.0)
        for shots in (1, "all")
        for rate in (1.0, 2.0, 3.0)
    ]


def test_cells_hold_mean_and_spread_over_seeds() -> None:
    lora, full = summarize(plan(), records(), [])
    assert (lora.method, full.method) == ("lora", "full")  # hta has no record
    assert lora.cells[1].mean == pytest.approx(0.4)
    assert lora.cells[1].spread == pytest.approx(0.02)  # standard deviation of 0, 2, -2 percent
    assert lora.few == pytest.approx(0.4)
    assert lora.cells["all"].mean == pytest.approx(0.8)
    assert (lora.stored, lora.trainable) == (4040, 1000)
    assert lora.difference is None


def test_differences_are_paired_by_seed_and_shots() -> None:
    full = summarize(plan(), records(), [])[1]
    assert full.difference is not None
    # Every seed is 10 points better, so however seeds are drawn again, the mean is 10 points.
    assert full.difference.mean == pytest.approx(0.1)
    assert full.difference.low == pytest.approx(0.1)
    assert full.difference.high == pytest.approx(0.1)


def test_the_interval_is_that_of_seeds() -> None:
    reference = {(1, seed): record("lora", 1, seed, 0.5) for seed in range(4)}
    mine = [record("full", 1, seed, 0.5 + 0.1 * seed) for seed in range(4)]
    found = difference(mine, reference)
    assert found is not None
    assert found.mean == pytest.approx(0.15)
    assert 0.0 <= found.low < 0.1 < 0.2 < found.high <= 0.3
    assert difference(mine[:1], reference) is None
    assert difference([record("full", 4, 0, 0.9), *mine[:1]], reference) is None


def test_the_table_names_the_best_the_sizes_and_the_rates() -> None:
    text = table(plan(), summarize(plan(), records(), trials(2.0)))
    lora, full = (line for line in text.splitlines() if line.startswith(("| lora", "| full")))
    assert lora == "| lora | 40.0 ± 2.0 | 80.0 ± 2.0 | itself | 1,000 | 4,040 | 2 |"
    assert "| **50.0 ± 2.0** | **90.0 ± 2.0** | +10.0 [+10.0, +10.0] |" in full
    assert "5,000 (+400 %)" in full
    assert "1 per class" in text
    assert "all images" in text
    assert "Every method tried 3 learning rates on validation images." in text


def test_a_rate_at_the_edge_is_marked() -> None:
    text = table(plan(), summarize(plan(), records(), trials(3.0)))
    full = next(line for line in text.splitlines() if line.startswith("| full"))
    assert "| 2* |" in full
    assert "*: its best one is the lowest or highest tried" in text


def test_diverged_runs_are_said_and_left_out_of_means() -> None:
    failed = [record("hta", 1, seed, None, failed="NaN", trainable=0) for seed in range(3)]
    mixed = [record("hta", "all", 0, 0.7), record("hta", "all", 1, None, failed="NaN")]
    rows = summarize(plan(), [*records(), *failed, *mixed], [])
    text = table(plan(), rows)
    hta = next(line for line in text.splitlines() if line.startswith("| hta"))
    assert "| diverged | 70.0 ± 0.0 (1 diverged) |" in hta
    assert math.isnan(rows[2].cells[1].mean)
    assert str(Cell(())) == ""


def test_the_report_is_written_without_the_runs(tmp_path: Path) -> None:
    text = write_report(plan(), records(), trials(2.0), tmp_path)
    assert (tmp_path / "table.md").read_text() == text + "\n"
    for name in ("shots.png", "parameters.png"):
        with Image.open(tmp_path / name) as picture:
            assert min(picture.size) > 300
