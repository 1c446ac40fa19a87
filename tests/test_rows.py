"""The counting of reliability rows, the published table, and the check that takes defences out."""

import json
from pathlib import Path

import pytest

from scripts.check_defences import ENTRIES, Defence, fails_without, read_defences
from tests.row_claims import ROWS
from tests.row_table import BEGIN, END, PAGE, publish, table
from tests.rows import RowCounter, Tally

ROOT = Path(__file__).resolve().parents[1]


def counter(**tallies: Tally) -> RowCounter:
    config = type("Config", (), {"option": type("O", (), {"markexpr": "not full"})()})()
    found = RowCounter(config)
    for name, claim in ROWS.items():
        found.tallies[name, "change"] = tallies.get(name, Tally(cases=claim.count))
    return found


def test_a_complete_run_has_no_shortfall():
    assert counter().shortfalls() == []


def test_missing_cases_are_named_with_their_count():
    (line,) = counter(R1=Tally(cases=23)).shortfalls()
    assert line == "row R1 (change tier): 23 cases passed, 0 skipped, 24 promised"


def test_cases_may_be_skipped_only_where_a_row_says_so():
    assert counter(R6=Tally(cases=5, skipped=1)).shortfalls() == []
    (line,) = counter(R3=Tally(cases=4, skipped=1)).shortfalls()
    assert "row R3" in line
    assert "1 skipped" in line


def test_the_slow_tier_counts_only_where_it_ran():
    found = counter()
    found.config.option.markexpr = "not gpu"
    assert {line.split()[1] for line in found.shortfalls()} == {"R2", "A2", "D5", "G7", "G9"}


def test_publishing_merges_tiers_and_renders_them(tmp_path):
    page = tmp_path / "reliability.md"
    page.write_text(f"before\n{BEGIN}\nstale rows\n{END}\nafter\n")
    publish({("R2", "change"): Tally(cases=12, figures={"a": "12 of 12 equal"})}, page)
    publish({("R2", "full"): Tally(cases=59, failed=1)}, page)
    results = json.loads((tmp_path / "reliability" / "results.json").read_text())
    assert set(results["R2"]) == {"change", "full"}
    text = page.read_text()
    assert text.startswith("before\n")
    assert text.endswith("after\n")
    assert "stale" not in text
    (line,) = [line for line in text.splitlines() if line.startswith("| R2 ")]
    assert "12 of 12 and 59 of 60 (full tier) | 12 of 12 equal | - |" in line


def test_a_row_that_did_not_run_says_so(tmp_path):
    assert "| not run |" in table(tmp_path)


def test_the_page_shows_the_published_numbers():
    text = PAGE.read_text("utf-8")
    assert text[text.index(BEGIN) + len(BEGIN) + 1 : text.index(END)] == table(
        PAGE.parent / "reliability"
    )


def tiny_tree(folder: Path, test: str) -> Path:
    (folder / "value.py").write_text("def value():\n    return 1\n")
    (folder / "test_value.py").write_text(f"from value import value\n\n{test}\n")
    return folder


def defence(**changes) -> Defence:
    values = {
        "row": "R1",
        "takes_out": "the value",
        "file": "value.py",
        "old": "return 1",
        "new": "return 2",
        "tests": ("test_value.py",),
        "part": "x",
    }
    return Defence(**{**values, **changes})


def test_a_change_that_a_test_notices_is_no_problem(tmp_path):
    tree = tiny_tree(tmp_path, "def test_it():\n    assert value() == 1")
    assert fails_without(defence(), tree) is None
    assert "return 1" in (tree / "value.py").read_text()


def test_a_change_that_no_test_notices_is_a_problem(tmp_path):
    tree = tiny_tree(tmp_path, "def test_it():\n    assert value()")
    assert "pytest ended with 0" in fails_without(defence(), tree)


def test_an_entry_whose_test_is_not_there_is_a_problem(tmp_path):
    tree = tiny_tree(tmp_path, "def test_it():\n    assert value() == 1")
    assert "pytest ended with 4" in fails_without(defence(tests=("test_no.py",)), tree)


def test_an_entry_whose_text_is_gone_is_a_problem(tmp_path):
    tree = tiny_tree(tmp_path, "")
    assert "occurs 0 times" in fails_without(defence(old="return 3"), tree)


@pytest.mark.parametrize("entry", read_defences(), ids=lambda d: f"{d.part}-{d.row}-{d.takes_out}")
def test_every_entry_fits_the_tree(entry):
    assert entry.problem(ROOT) is None
    assert entry.row in ROWS
    for test in entry.tests:
        path, _, name = test.partition("::")
        assert f"def {name.partition('[')[0]}" in (ROOT / path).read_text("utf-8")


def test_every_row_has_a_defence_to_take_out():
    assert {entry.row for entry in read_defences(ENTRIES)} == set(ROWS)
