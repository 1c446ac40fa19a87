"""The reliability rows: which tests prove which claim, counted by the test run itself.

A test names its row with `@pytest.mark.row("R1")` and counts as one case of it; one that covers
several cases says so through the fixture `row`:

    def test_mutations(row):
        row.cases(4000)
        row.figure("0 accepted")

The run prints what each row reached. With `--publish-rows` it writes the numbers to
`docs/reliability/results.json` and the table of `docs/reliability.md`. A run of the whole suite
fails if a row has fewer cases than it promises, or skipped some without leave.
"""

from collections import defaultdict
from dataclasses import dataclass, field
from typing import Any

import pytest

from tests.row_claims import ROWS, Claim
from tests.row_table import publish


@dataclass
class Tally:
    """What one tier of one row reached in this run."""

    cases: int = 0
    failed: int = 0
    skipped: int = 0
    seconds: float = 0.0
    figures: dict[str, str] = field(default_factory=dict)


class RowRecord:
    """What a test tells about its row."""

    def __init__(self, properties: list[tuple[str, Any]]) -> None:
        self._properties = properties

    def cases(self, count: int) -> None:
        """Count this test as `count` cases instead of one."""
        self._properties.append(("cases", count))

    def figure(self, text: str) -> None:
        """Publish a measured figure, for example "largest difference 3.1e-7"."""
        self._properties.append(("figure", text))


@pytest.fixture
def row(request: pytest.FixtureRequest) -> RowRecord:
    """How a test counts its cases and publishes its figure."""
    return RowRecord(request.node.user_properties)


class RowCounter:
    """Counts the reports of a run, its own or those of its xdist workers."""

    def __init__(self, config: pytest.Config) -> None:
        self.config = config
        self.tallies: dict[tuple[str, str], Tally] = defaultdict(Tally)

    def pytest_runtest_logreport(self, report: pytest.TestReport) -> None:
        said = dict(report.user_properties)
        if "row" not in said:
            return
        tally = self.tallies[said["row"], said["tier"]]
        tally.seconds += report.duration
        cases = int(said.get("cases", 1))
        if report.failed:
            tally.failed += cases
        elif report.skipped:
            tally.skipped += cases
        elif report.when == "call":
            tally.cases += cases
            if "figure" in said:
                tally.figures[report.nodeid] = said["figure"]

    def shortfalls(self) -> list[str]:
        """What a run of the whole suite promised and did not do."""
        lines = []
        for name, claim in ROWS.items():
            for tier, wanted in self._wanted(claim).items():
                tally = self.tallies[name, tier]
                missing = wanted - tally.cases - (tally.skipped if claim.may_skip else 0)
                if missing > 0 or (tally.skipped and not claim.may_skip):
                    lines.append(
                        f"row {name} ({tier} tier): {tally.cases} cases passed, {tally.skipped} "
                        f"skipped, {wanted} promised"
                    )
        return lines

    def _wanted(self, claim: Claim) -> dict[str, int]:
        with_full = "not full" not in str(self.config.option.markexpr)
        wanted = {"change": claim.count} | ({"full": claim.full_count} if with_full else {})
        return {tier: count for tier, count in wanted.items() if count}

    @property
    def _whole_suite(self) -> bool:
        option = self.config.option
        from_paths = self.config.args_source == pytest.Config.ArgsSource.TESTPATHS
        return from_paths and not (
            option.keyword or option.collectonly or getattr(option, "lf", False)
        )

    @pytest.hookimpl(trylast=True)
    def pytest_sessionfinish(self, session: pytest.Session) -> None:
        if self.config.option.publish_rows:
            publish(self.tallies)
        if self._whole_suite and self.shortfalls() and session.exitstatus == 0:
            session.exitstatus = pytest.ExitCode.TESTS_FAILED

    def pytest_terminal_summary(self, terminalreporter: Any) -> None:
        if not self.tallies:
            return
        terminalreporter.section("reliability rows")
        parts = [
            f"{name}{'' if tier == 'change' else ' full'} {tally.cases}"
            + (f" ({tally.failed} FAILED)" if tally.failed else "")
            + (f" ({tally.skipped} skipped)" if tally.skipped else "")
            for (name, tier), tally in sorted(self.tallies.items())
            if tally.cases or tally.failed or tally.skipped
        ]
        terminalreporter.write_line("cases passed: " + ", ".join(parts))
        if self._whole_suite:
            for line in self.shortfalls():
                terminalreporter.write_line(f"FAILED {line}", red=True)


def pytest_addoption(parser: pytest.Parser) -> None:
    parser.addoption(
        "--publish-rows",
        action="store_true",
        help="write docs/reliability/results.json and the table of docs/reliability.md",
    )


def pytest_configure(config: pytest.Config) -> None:
    config.addinivalue_line("markers", "row(name): the reliability row this test proves")
    if not hasattr(config, "workerinput"):
        config.pluginmanager.register(RowCounter(config), "row-counter")


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    for item in items:
        marker = item.get_closest_marker("row")
        if marker is None:
            continue
        name = marker.args[0]
        if name not in ROWS:
            raise pytest.UsageError(f"{item.nodeid}: row {name!r} is not in tests/row_claims.py")
        tier = "full" if item.get_closest_marker("full") else "change"
        item.user_properties += [("row", name), ("tier", tier)]
