"""Published numbers of the reliability rows: JSON, and the table of docs/reliability.md."""

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from tests.row_claims import ROWS, Claim

PAGE = Path(__file__).resolve().parents[1] / "docs" / "reliability.md"
BEGIN, END = "<!-- table begin -->", "<!-- table end -->"
HEAD = "| row | claim | how tested | cases | figure | seen to fail | command |\n"


def publish(tallies: Mapping[tuple[str, str], Any], page: Path = PAGE) -> None:
    """Merge the numbers of a run into `reliability/results.json` beside `page`; redo its table."""
    results = page.parent / "reliability" / "results.json"
    known = json.loads(results.read_text("utf-8")) if results.is_file() else {}
    for (name, tier), tally in sorted(tallies.items()):
        known.setdefault(name, {})[tier] = {
            "cases": tally.cases,
            "failed": tally.failed,
            "skipped": tally.skipped,
            "seconds": round(tally.seconds, 1),
            "figures": sorted(set(tally.figures.values())),
        }
    results.parent.mkdir(parents=True, exist_ok=True)
    results.write_text(json.dumps(known, indent=1, sort_keys=True) + "\n", "utf-8")
    rewrite_page(page)


def rewrite_page(page: Path = PAGE) -> None:
    """Put the table made of the published numbers between the marks of the page."""
    text = page.read_text("utf-8")
    before, _, rest = text.partition(BEGIN)
    _, _, after = rest.partition(END)
    page.write_text(f"{before}{BEGIN}\n{table(page.parent / 'reliability')}{END}{after}", "utf-8")


def table(folder: Path) -> str:
    """The table as Markdown, from `results.json` and `defences.json` in `folder`."""
    results = _read(folder / "results.json")
    defences = _read(folder / "defences.json")
    rule = "|---|---|---|---|---|---|---|\n"
    rows = [_row(n, claim, results.get(n, {}), defences.get(n)) for n, claim in ROWS.items()]
    return HEAD + rule + "".join(rows)


def _read(path: Path) -> dict[str, Any]:
    return json.loads(path.read_text("utf-8")) if path.is_file() else {}


def _row(name: str, claim: Claim, result: dict[str, Any], seen: dict[str, bool] | None) -> str:
    figures = "; ".join(dict.fromkeys(f for tier in result.values() for f in tier["figures"]))
    counts = " and ".join(
        _count(result[tier], wanted, " (full tier)" if tier == "full" else "")
        for tier, wanted in (("change", claim.count), ("full", claim.full_count))
        if tier in result and wanted
    )
    failed = f"{sum(seen.values())} of {len(seen)}" if seen else "-"
    option = " -m full" if claim.full_count and not claim.count else ""
    if not figures and result:
        figures = "no case failed" if not any(t["failed"] for t in result.values()) else "-"
    cells = [name, claim.claim, claim.how, counts or "not run", figures or "-", failed]
    return f"| {' | '.join(cells)} | `pytest {claim.files}{option}` |\n"


def _count(tier: dict[str, Any], wanted: int, suffix: str) -> str:
    total = tier["cases"] + tier["failed"] + tier["skipped"]
    text = f"{tier['cases']:,} of {max(total, wanted):,}"
    return text + (f", {tier['skipped']:,} skipped" if tier["skipped"] else "") + suffix
