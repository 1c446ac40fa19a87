"""`python -m snell_diffusion info FILE`: check an adapter file and show what it holds."""

import argparse
import json
import sys
from collections.abc import Sequence

from snell_diffusion.errors import SnellaError


def main(arguments: Sequence[str] | None = None) -> int:
    """Exit status 0, or 1 if the file is refused (its reason goes to standard error)."""
    parser = argparse.ArgumentParser(prog="python -m snell_diffusion", description=__doc__)
    commands = parser.add_subparsers(dest="command", required=True)
    info = commands.add_parser("info", help="check an adapter file and show what it holds")
    info.add_argument("file", help="a .safetensors file")
    info.add_argument("--no-layers", action="store_true", help="leave the layer table out")
    info.add_argument("--json", action="store_true", help="the whole header as JSON")
    options = parser.parse_args(arguments)

    from snell_diffusion.adapters import inspect_adapter, read_adapter, summary

    try:
        if options.json:
            print(json.dumps(inspect_adapter(options.file), indent=2, sort_keys=True))
        else:
            print(summary(read_adapter(options.file), layers=not options.no_layers))
    except SnellaError as error:
        print(f"error: {error}", file=sys.stderr)
        return 1
    return 0


if __name__ == "__main__":
    sys.exit(main())
