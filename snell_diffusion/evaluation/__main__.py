"""Measure methods against each other: `python -m snell_diffusion.evaluation COMMAND --help`."""

import argparse
import sys
from pathlib import Path

from snell_diffusion.errors import SnellaError


def _shard(text: str) -> tuple[int, int]:
    index, _, count = text.partition("/")
    if not (index.isdigit() and count.isdigit() and int(index) < int(count)):
        raise argparse.ArgumentTypeError(f"expected I/N with 0 <= I < N, got '{text}'")
    return int(index), int(count)


def parser() -> argparse.ArgumentParser:
    """The command line."""
    top = argparse.ArgumentParser(prog="python -m snell_diffusion.evaluation", description=__doc__)
    commands = top.add_subparsers(dest="command", required=True)
    _personalization(commands)
    _classification(commands)
    _bits(commands)
    _report(commands)
    return top


def _personalization(commands: "argparse._SubParsersAction[argparse.ArgumentParser]") -> None:
    command = commands.add_parser(
        "personalization", help="the DreamBooth protocol: train every method, then measure it"
    )
    command.add_argument("--config", type=Path, required=True, help="plan: YAML")
    command.add_argument("--photos", type=Path, required=True, help="one folder per subject in it")
    command.add_argument("--output", type=Path, required=True, help="folder for records and runs")
    command.add_argument(
        "--shard", type=_shard, default=(0, 1), help="I/N: run every N-th run, from the I-th"
    )
    command.add_argument(
        "--redo", action="store_true", help="run again what was measured with other settings"
    )
    command.add_argument("--clip", help="CLIP model, hub id or folder: measures CLIP-I and CLIP-T")
    command.add_argument("--dino", help="DINO model, hub id or folder: measures DINO")
    command.add_argument(
        "--prompts", type=Path, help="prompts_and_classes.txt of the DreamBooth data set"
    )
    command.set_defaults(main=run_personalization)


def run_personalization(args: argparse.Namespace) -> None:
    """Train and measure all runs of a plan."""
    from snell_diffusion.evaluation.personalization import Options, Runner
    from snell_diffusion.evaluation.plan import Plan
    from snell_diffusion.evaluation.prompts import PROMPTS, read_prompts

    prompts = read_prompts(args.prompts) if args.prompts else PROMPTS
    options = Options(args.redo, prompts, args.clip, args.dino)
    Runner(Plan.read(args.config), args.photos, args.output, options).run_all(args.shard)


def _classification(commands: "argparse._SubParsersAction[argparse.ArgumentParser]") -> None:
    command = commands.add_parser(
        "classification", help="train every method on classification tasks, then measure it"
    )
    from snell_diffusion.evaluation.classification import add_arguments

    add_arguments(command)
    command.set_defaults(main=run_classification)


def run_classification(args: argparse.Namespace) -> None:
    """Train and measure all runs of a plan, and note where and how."""
    from dataclasses import asdict

    from snell_diffusion.evaluation.classification import main as run
    from snell_diffusion.evaluation.classification_plan import Plan
    from snell_diffusion.evaluation.results import ABOUT
    from snell_diffusion.evaluation.stamp import program, stamp
    from snell_diffusion.training.files import write_json

    if not args.report_only:
        about = {**stamp(program()), "plan": asdict(Plan.read(args.config))}
        write_json(args.output / ABOUT, about)
    run(args)


def _bits(commands: "argparse._SubParsersAction[argparse.ArgumentParser]") -> None:
    command = commands.add_parser(
        "bits", help="how many bits a number of SNELLA's factors needs, against LoRA's ranks"
    )
    command.add_argument("--config", type=Path, required=True, help="plan: YAML")
    command.add_argument("--photos", type=Path, required=True, help="one folder per subject in it")
    command.add_argument(
        "--output", type=Path, required=True, help="folder for points and pictures"
    )
    command.set_defaults(main=run_bits)


def run_bits(args: argparse.Namespace) -> None:
    """Train, round and measure."""
    from snell_diffusion.evaluation.bits import measure_all

    measure_all(args.config, args.photos, args.output)


def _report(commands: "argparse._SubParsersAction[argparse.ArgumentParser]") -> None:
    command = commands.add_parser("report", help="pages of finished comparisons: HTML and Markdown")
    command.add_argument("--personalization", type=Path, help="folder of a comparison on subjects")
    command.add_argument("--classification", type=Path, help="folder of a comparison on tasks")
    command.add_argument(
        *("--from", "--from_results"),
        dest="saved",
        type=Path,
        nargs="+",
        default=[],
        help="kept results, for example benchmarks/results/personalization.json",
    )
    command.add_argument("--keep", type=Path, help="also keep the results in this folder")
    command.add_argument("--output", type=Path, required=True, help="folder for the pages")
    command.set_defaults(main=run_report)


def run_report(args: argparse.Namespace) -> None:
    """Write the pages and say where they are."""
    from snell_diffusion.evaluation.report import report

    for page in report(
        args.output, args.personalization, args.classification, args.saved, args.keep
    ):
        print(page)


def main(argv: list[str] | None = None) -> int:
    """Run one sub-command; returns its exit code."""
    args = parser().parse_args(argv)
    try:
        args.main(args)
    except SnellaError as error:
        print(f"error: {error}", file=sys.stderr)
        return int(getattr(error, "exit_code", 2))
    return 0


if __name__ == "__main__":
    sys.exit(main())
