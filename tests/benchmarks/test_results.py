"""Measurements are kept entry by entry, with their origin, and a failure loses none of them."""

import json

import pytest
import torch

from benchmarks import results, section
from benchmarks.results import FOLDER, QUICK_FOLDER, Results, default_path, stamp
from benchmarks.section import main, rounded


@pytest.fixture
def file(tmp_path):
    return tmp_path / "deep" / "cpu.json"


def measure(file, entries, *arguments):
    return main("layers", entries, [*arguments, "--results", str(file)])


def test_a_rerun_replaces_its_own_entries_alone(file):
    Results(file).put("models", "vit", {"seconds": 1})
    assert measure(file, {"a": lambda run: {"v": 1}, "b": lambda run: {"v": 1}}) == 0
    assert measure(file, {"a": lambda run: {"v": 2}, "b": lambda run: {"v": 2}}, "b") == 0
    found = json.loads(file.read_text())
    assert found["models"] == {"vit": {"seconds": 1}}
    assert {name: entry["v"] for name, entry in found["layers"].items()} == {"a": 1, "b": 2}


def test_what_another_process_wrote_meanwhile_stays(file):
    mine, other = Results(file), Results(file)
    other.put("memory", "x", {"v": 1})
    mine.put("layers", "y", {"v": 2})
    assert set(Results(file).sections) == {"memory", "layers"}


def test_an_entry_that_fails_is_told_and_loses_no_other(file, capsys):
    def broken(run):
        raise RuntimeError("out of paper")

    Results(file).put("layers", "bad", {"v": "before"})
    status = measure(file, {"a": lambda run: {"v": 1}, "bad": broken, "c": lambda run: {"v": 3}})
    said = capsys.readouterr()
    assert status == 1
    assert "RuntimeError: out of paper" in said.err
    assert "failed: bad; their earlier results stay" in said.out
    assert {n: e["v"] for n, e in Results(file).sections["layers"].items()} == {
        "a": 1,
        "bad": "before",
        "c": 3,
    }


def test_an_entry_says_where_when_and_how_it_was_measured(file):
    measure(file, {"768x768@77": lambda run: {}}, "--rounds", "7")
    mark = Results(file).get("layers", "768x768@77")["stamp"]
    assert mark["command"] == "python -m benchmarks.layers 768x768@77"
    assert mark["machine"]
    assert mark["threads"] == 1
    assert mark["torch"] == torch.__version__
    assert mark["took"] >= 0
    assert mark["date"].endswith("UTC")


def test_a_changed_tree_marks_its_commit(monkeypatch):
    answers = {"rev-parse": "abc1234", "status": " M file.py"}
    monkeypatch.setattr(results, "_git", lambda verb, *_: answers[verb])
    results.commit.cache_clear()
    assert stamp(torch.device("cpu"), "x")["commit"] == "abc1234+"
    answers["status"] = ""
    results.commit.cache_clear()
    assert stamp(torch.device("cpu"), "x")["commit"] == "abc1234"
    results.commit.cache_clear()


def test_patterns_choose_entries(file):
    names = ("1x1@256", "1x1@77", "2x2@256")
    measure(file, {name: lambda run: {} for name in names}, "*@256")
    assert list(Results(file).sections["layers"]) == ["1x1@256", "2x2@256"]


@pytest.mark.parametrize(
    "arguments, message",
    [
        (["nothing"], "no entry is called nothing; known: a"),
        (["--rounds", "0"], "must be 1 or more"),
        (["--threads", "0"], "must be 1 or more"),
    ],
)
def test_bad_arguments_are_told(file, capsys, arguments, message):
    with pytest.raises(SystemExit):
        measure(file, {"a": lambda run: {}}, *arguments)
    assert message in capsys.readouterr().err
    assert not file.exists()


def test_quick_measurements_never_replace_real_ones():
    cpu = torch.device("cpu")
    assert default_path(cpu, quick=False) == FOLDER / "cpu.json"
    assert default_path(cpu, quick=True) == QUICK_FOLDER / "cpu.json"


def test_quick_runs_say_so_and_take_two_rounds(file):
    seen = []

    def entry(run):
        seen.append(run)
        return {}

    measure(file, {"a": entry}, "--quick")
    assert (seen[0].quick, seen[0].rounds) == (True, 2)
    assert Results(file).get("layers", "a")["quick"] is True


def test_a_run_times_by_its_rounds(file):
    run = section.Run(rounds=3)
    found = run.time({"a": object, "b": object}, times=2)
    assert {name: len(values) for name, values in found.items()} == {"a": 6, "b": 6}


def test_floats_have_six_digits():
    assert rounded({"a": [1 / 3, 2], "b": (1234567.8,)}) == {"a": [0.333333, 2], "b": [1234570.0]}
