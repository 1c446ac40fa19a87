"""`python -m snell_diffusion info FILE` shows what a file is; `export FILE` converts it;
`quantize FILE` stores its factors in few bits;
`memory CONFIG` computes what a training run needs."""

import argparse
import io
import json
import os
import sys
import warnings
from argparse import Namespace
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from snell_diffusion.errors import SnellaError, SnellaValueError, printable


def main(arguments: Sequence[str] | None = None) -> int:
    """Exit status 0, or 1 if the file is refused (its reason goes to standard error)."""
    options = parser().parse_args(arguments)
    for stream in (sys.stdout, sys.stderr):
        if isinstance(stream, io.TextIOWrapper):
            # Prompts and paths may hold letters that the terminal's encoding lacks.
            stream.reconfigure(errors="backslashreplace")
    try:
        with warnings.catch_warnings():
            warnings.showwarning = _warn
            status = int(options.run(options))
        sys.stdout.flush()
        return status
    except SnellaError as error:
        say(f"error: {error}", file=sys.stderr)
    except BrokenPipeError:
        # The reader of a pipe (`| head`) has seen enough; nothing is left to flush at the exit.
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
    return 1


def _warn(message: Warning | str, *_: Any, **__: Any) -> None:
    """A warning as one line; the place in our code that gave it tells a user nothing."""
    say(f"warning: {message}", file=sys.stderr)


def parser() -> argparse.ArgumentParser:
    """The command line; each command's function is in `run`."""
    root = argparse.ArgumentParser(prog="python -m snell_diffusion", description=__doc__)
    commands = root.add_subparsers(dest="command", required=True)
    show = commands.add_parser("info", help="check an adapter file and show what it holds")
    show.add_argument("file", help="a .safetensors file, or a folder with an adapter")
    show.add_argument("--no-layers", action="store_true", help="leave the layer table out")
    show.add_argument("--json", action="store_true", help="the whole header as JSON")
    show.set_defaults(run=info)
    write = commands.add_parser("export", help="write an adapter for programs without SNELLA")
    write.add_argument("file", help="the adapter: a file, a folder, or owner/name on the hub")
    write.add_argument(
        "--format",
        required=True,
        choices=("merged", "lora", "kohya"),
        help="merged: a diffusers folder, base + adapter; lora, kohya: an approximation of low "
        "rank with the key names of diffusers (PEFT) or of kohya (ComfyUI, A1111)",
    )
    write.add_argument("--output", required=True, help="folder (merged) or .safetensors file")
    write.add_argument("--base", help="merged: 'embedded', a diffusers folder, or a hub id")
    write.add_argument("--revision", help="merged: branch, tag or commit of a base on the hub")
    write.add_argument(
        "--allow-other-base", action="store_true", help="merged: a base with other settings"
    )
    write.add_argument("--rank", default="64", help="lora, kohya: a number, or 'full' (default 64)")
    write.add_argument(
        "--dtype", default="float32", choices=("float32", "float16", "bfloat16"), help="of weights"
    )
    write.add_argument("--overwrite", action="store_true", help="replace an earlier export")
    write.set_defaults(run=export)
    few = commands.add_parser("quantize", help="store an adapter's factors in few bits per number")
    few.add_argument("file", help="the adapter: a file, a folder, or owner/name on the hub")
    few.add_argument("--bits", type=int, required=True, choices=(1, 2, 4, 8), help="per number")
    few.add_argument("--output", required=True, help="folder or .safetensors file")
    few.add_argument("--overwrite", action="store_true", help="replace an earlier file")
    few.set_defaults(run=quantize)
    need = commands.add_parser("memory", help="compute what a training run needs on a GPU")
    need.add_argument("config", help="YAML file of the run; its base is not downloaded")
    need.add_argument("settings", nargs="*", metavar="key=value", help="changes of its settings")
    need.set_defaults(run=memory)
    return root


def say(text: str, file: io.TextIOBase | None = None) -> None:
    """Print lines that may hold text from a file, without what a terminal would obey."""
    print("\n".join(map(printable, text.split("\n"))), file=file)


def info(options: Namespace) -> int:
    """Show a file: ours in full; of others, what it seems to be."""
    from snell_diffusion.adapters import inspect_adapter, read_adapter, summary

    path = _file(options.file)
    try:
        if options.json:
            print(json.dumps(inspect_adapter(path), indent=2, sort_keys=True))
        else:
            say(summary(read_adapter(path), layers=not options.no_layers))
    except SnellaError as error:
        return _info_foreign(path, error)
    return 0


def _file(source: str) -> Path:
    from snell_diffusion.diffusion.sources import locate

    path = Path(source)
    return path if path.is_file() else locate(source)


def _info_foreign(path: Path, refused: SnellaError) -> int:
    from snell_diffusion.adapters.foreign import describe_foreign

    try:
        text = describe_foreign(path)
    except SnellaError:
        raise refused from None
    if text is None:
        raise refused
    say(text)
    return 0


def export(options: Namespace) -> int:
    """Write the export and print the error it makes."""
    from snell_diffusion.adapters import read_adapter
    from snell_diffusion.adapters.export_lora import export_lora

    file = read_adapter(_file(options.file))
    shared = {"dtype": options.dtype, "overwrite": options.overwrite}
    if options.format == "merged":
        from snell_diffusion.diffusion.export import export_merged

        report = export_merged(
            file,
            _base(options.base, file.header.origin.source),
            options.output,
            revision=options.revision,
            allow_other_base=options.allow_other_base,
            **shared,
        )
    else:
        report = export_lora(file, options.output, _rank(options.rank), options.format, **shared)
    say(report.table())
    say(f"written to {report.path}")
    return 0


def quantize(options: Namespace) -> int:
    """Write the small file and print both sizes."""
    from snell_diffusion.adapters.foreign import peft_file
    from snell_diffusion.adapters.quantize import quantize_adapter
    from snell_diffusion.adapters.write import target_file

    name = peft_file(options.file)
    if name is not None:
        raise SnellaValueError(
            f"{options.file}: holds {name}, the file of one of PEFT's methods (lora, dora, oft, "
            "...), whose factors this package does not store in few bits; those of snella and "
            "binary_lora are"
        )
    source, target = Path(_file(options.file)), target_file(options.output)
    if target.exists() and not options.overwrite:
        raise SnellaValueError(f"{target} exists: pass --overwrite to replace it")
    path = quantize_adapter(source, target, options.bits)
    before, after = source.stat().st_size, path.stat().st_size
    say(f"{before:,} bytes -> {after:,} bytes ({after / before:.1%})")
    say(f"written to {path}")
    return 0


def _base(given: str | None, trained_on: str | None) -> str:
    if given is None:
        hint = f"it was trained on {trained_on!r}" if trained_on else "the file names none"
        raise SnellaValueError(f"--format merged needs the base model: pass --base ({hint})")
    return given


def memory(options: Namespace) -> int:
    """Print the computed peak of every phase."""
    import yaml

    from snell_diffusion.diffusion.config_files import make_config, read_config
    from snell_diffusion.diffusion.memory import compute

    given = dict(pair.partition("=")[::2] for pair in options.settings)
    changes = {key: yaml.safe_load(text) for key, text in given.items()}
    config = make_config({**read_config(Path(options.config)), **changes}, options.config)
    say(compute(config).table())
    return 0


def _rank(text: str) -> int | None:
    if text == "full":
        return None
    if not text.isascii() or not text.isdigit():
        raise SnellaValueError(f"--rank {text!r}: expected a number from 1 on, or 'full'")
    return int(text)


if __name__ == "__main__":
    sys.exit(main())
