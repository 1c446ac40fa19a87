"""`python -m snell_diffusion.evaluation compare | report`: see `--help`."""

import argparse
import json
from dataclasses import asdict
from pathlib import Path


def _shard(text: str) -> tuple[int, int]:
    index, _, count = text.partition("/")
    if not (index.isdigit() and count.isdigit() and int(index) < int(count)):
        raise argparse.ArgumentTypeError(f"expected I/N with 0 <= I < N, got '{text}'")
    return int(index), int(count)


def parser() -> argparse.ArgumentParser:
    """The command line."""
    top = argparse.ArgumentParser(prog="python -m snell_diffusion.evaluation", description=__doc__)
    commands = top.add_subparsers(dest="command", required=True)
    compare = commands.add_parser("compare", help="train every variant of a comparison and measure")
    compare.add_argument("--photos", type=Path, required=True, help="one folder per subject in it")
    compare.add_argument(
        "--shard", type=_shard, default=(0, 1), help="I/N: run every N-th run, from the I-th"
    )
    report = commands.add_parser("report", help="table and pictures of the finished runs")
    for command in (compare, report):
        command.add_argument("--config", type=Path, required=True, help="comparison YAML")
        command.add_argument("--output", type=Path, required=True, help="folder of the comparison")
    return top


def main(argv: list[str] | None = None) -> None:
    """Run one sub-command."""
    args = parser().parse_args(argv)
    from .comparison import Comparison, Runner, read_records
    from .report import plot_curves, plot_tradeoff, summarize, table

    plan = Comparison.read(args.config)
    if args.command == "compare":
        Runner(plan, args.photos, args.output).run_all(args.shard)
        return
    records = [r for r in read_records(args.output) if r.variant in plan.variants]
    rows = summarize(records, plan.reference)
    (args.output / "table.md").write_text(table(rows) + "\n")
    (args.output / "records.json").write_text(json.dumps([asdict(r) for r in records]))
    plot_tradeoff(rows, args.output / "tradeoff.png")
    plot_curves(records, [row.variant for row in rows], args.output / "curves.png")
    print(table(rows))


if __name__ == "__main__":
    main()
