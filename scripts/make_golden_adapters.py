"""Write the adapters that later versions must still load: once per release, from a clean tree.

    python -m scripts.make_golden_adapters [--force]

Makes tests/compat/golden/<version>/: one adapter of each kind, and `expected.safetensors` with the
noise predictions of the base and of each adapter. Files of a release that is out never change; a
format that is not out yet may be written anew with --force.
"""

import argparse
import json
import subprocess
import sys
from collections.abc import Sequence
from importlib import metadata
from pathlib import Path

import torch
from safetensors.torch import save_file

from snell_diffusion import __version__
from snell_diffusion.adapters import read_adapter
from tests.compat.golden_adapters import (
    EXPECTED,
    FOLDER,
    KINDS,
    LIMIT,
    base,
    prediction,
    with_file,
    write_golden,
)

ROOT = Path(__file__).resolve().parents[1]


def main(arguments: Sequence[str] | None = None) -> int:
    """Exit status 0, or 1 with the reason on standard error."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--force", action="store_true", help="changed tree, or files that exist")
    options = parser.parse_args(arguments)
    folder = FOLDER / __version__
    reason = None if options.force else refusal(folder)
    if reason:
        print(f"error: {reason}; --force writes all the same", file=sys.stderr)
        return 1
    torch.set_num_threads(1)
    write(folder)
    print(f"{len(KINDS)} adapters and their predictions are in {folder}")
    return 0


def refusal(folder: Path) -> str | None:
    """Why nothing should be written now, or None."""
    if folder.exists():
        return f"{folder} exists: the files of a release stay as they are"
    done = subprocess.run(
        ["git", "status", "--porcelain"], cwd=ROOT, capture_output=True, text=True, check=True
    )
    changed = done.stdout.splitlines()
    if changed:
        return f"the tree has {len(changed)} uncommitted changes ({changed[0].strip()}, ...)"
    return None


def write(folder: Path) -> None:
    """All kinds and their predictions.

    Raises:
        ValueError: A file became larger than the repository should hold.
    """
    folder.mkdir(parents=True, exist_ok=True)
    expected = {"base": prediction(base())}
    digests = {}
    for kind in KINDS:
        path = folder / f"{kind}.safetensors"
        write_golden(kind, path)
        if path.stat().st_size > LIMIT:
            raise ValueError(f"{path}: {path.stat().st_size} bytes, at most {LIMIT} are kept")
        file = read_adapter(path)
        expected[kind] = prediction(with_file(file))
        digests[kind] = file.digest
    notes = {"digests": json.dumps(digests)} | {
        name: metadata.version(name) for name in ("torch", "diffusers", "transformers", "peft")
    }
    save_file(expected, folder / EXPECTED, notes)


if __name__ == "__main__":
    sys.exit(main())
