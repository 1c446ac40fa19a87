"""Operations and live bytes are those on record; no clock takes part."""

import json

import pytest
import torch

from benchmarks import regression
from benchmarks.counting import Cost
from benchmarks.regression import differences, linear_cost, main, message, read
from benchmarks.shapes import Linear


def test_operations_and_live_bytes_are_those_on_record():
    found = differences(read(), regression.figures())
    assert not found, message(found)


def test_figures_do_not_depend_on_the_run():
    torch.manual_seed(1)
    first = linear_cost(Linear(64, 96, 32))
    torch.rand(3)
    assert linear_cost(Linear(64, 96, 32)) == first


def figures(**changes):
    return {"work": {"saved": 1000, "peak": 2000, "flops": 3000, **changes}}


def test_one_percent_passes_and_more_does_not():
    assert differences(figures(), figures(peak=2020)) == []
    assert differences(figures(), figures(peak=2024)) == [
        "work: peak 2,024, on record 2,000 (+1.2%)"
    ]


def test_less_must_be_recorded_too():
    assert differences(figures(), figures(flops=2900)) == [
        "work: flops 2,900, on record 3,000 (-3.3%)"
    ]


def test_works_come_and_go_by_a_new_record_only():
    assert differences(figures(), {}) == ["work: on record, but no longer counted"]
    assert len(differences({}, figures())) == 3
    assert "has no record" in differences({}, figures())[0]


def test_the_message_says_how_to_record_a_change():
    said = message(["work: peak 2,024, on record 2,000 (+1.2%)"])
    assert "work: peak 2,024" in said
    assert "If the change is meant, record it with: python -m benchmarks.regression --write" in said


@pytest.fixture
def counted(monkeypatch):
    """Figures that are quick to count."""
    now = {"work": Cost(saved=1, peak=2, backward_peak=3, flops=4).values()}
    monkeypatch.setattr(regression, "figures", lambda: now)
    return now


def test_writing_records_what_is_counted_and_comparing_reads_it(counted, tmp_path, capsys):
    path = tmp_path / "regression.json"
    assert main(["--write"], path) == 0
    assert json.loads(path.read_text()) == counted
    assert main([], path) == 0
    counted["work"]["flops"] = 5
    assert main([], path) == 1
    assert "flops 5, on record 4 (+25.0%)" in capsys.readouterr().out
