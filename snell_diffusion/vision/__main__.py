"""Fine-tune a vision model for image classification.

    accelerate launch -m snell_diffusion.vision --config configs/vision/digits.yaml
    python -m snell_diffusion.vision --dataset image_folder --data_dir photos --method lora
    python -m snell_diffusion.vision --list-methods
    python -m snell_diffusion.vision predict runs/vision photo.jpg other.png

Exit codes: 0 finished, 2 bad input (nothing was replaced), 3 the loss became NaN or infinite (the
last good state is kept), 4 the processes of the run disagree, 130 or 143 stopped by SIGINT or
SIGTERM (the state is saved; continue with --resume_from_checkpoint latest). `accelerate launch`
itself turns every failure into 1.
"""

import argparse
import os
import sys
from collections.abc import Sequence
from pathlib import Path

from snell_diffusion.errors import SnellaError
from snell_diffusion.training.errors import TrainingError


def main(arguments: Sequence[str]) -> int:
    """Do what a command line asks for; return the exit code."""
    try:
        if "--list-methods" in arguments:
            from snell_diffusion.vision.method import methods_table

            print(methods_table())
        elif arguments[:1] == ["predict"]:
            _predict(arguments[1:])
        else:
            _train(arguments)
    except TrainingError as error:
        print(f"{type(error).__name__}: {error}", file=sys.stderr)
        return error.exit_code
    except SnellaError as error:
        print(f"{type(error).__name__}: {error}", file=sys.stderr)
        return 2
    return 0


def _train(arguments: Sequence[str]) -> None:
    from snell_diffusion.vision.config import parse_config
    from snell_diffusion.vision.run import run

    result = run(parse_config(arguments))
    if int(os.environ.get("RANK", "0")):
        return
    if result.adapter_path is not None:
        print(f"adapter: {result.adapter_path} ({result.adapter_bytes:,} bytes)")
    if result.level is not None:
        tried = ", ".join(f"{level}: {share:.2%}" for level, share in result.tried.items())
        print(f"level {result.level}, the best on validation of {tried}")
    print(f"trained: {result.sizes.adapter:,} numbers, and {result.sizes.head:,} of the head")
    print(f"validation accuracy: {result.validation.accuracy:.2%} (step {result.kept_step})")
    if result.test is not None:
        print(f"test accuracy: {result.test.accuracy:.2%}")
    print(f"time: {result.seconds:.0f} s, peak memory: {result.peak_memory / 2**30:.2f} GiB")


def _predict(arguments: Sequence[str]) -> None:
    from snell_diffusion.errors import SnellaConfigError
    from snell_diffusion.vision.classifier import load_classifier
    from snell_diffusion.vision.data.pictures import PictureError, read_picture

    parser = argparse.ArgumentParser(
        prog="python -m snell_diffusion.vision predict",
        description="Name what is on pictures with a trained classifier.",
    )
    parser.add_argument("folder", type=Path, help="output_dir of a finished run")
    parser.add_argument("images", type=Path, nargs="+", help="image files")
    parser.add_argument("--base", help="the base, where it is not the one that the run names")
    parser.add_argument("--top", type=int, default=1, help="how many classes to tell; default 1")
    given = parser.parse_args(list(arguments))
    if given.top < 1:
        raise SnellaConfigError(f"--top must be at least 1, got {given.top}")
    pictures = []
    for path in given.images:
        try:
            pictures.append(read_picture(path))
        except PictureError as error:
            raise SnellaConfigError(f"image '{path}' {error}") from error
    classifier = load_classifier(given.folder, given.base)
    for path, found in zip(given.images, classifier.predict(pictures), strict=True):
        best = ", ".join(f"{label} {share:.1%}" for label, share in found.ranked[: given.top])
        print(f"{path}: {best}")


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
