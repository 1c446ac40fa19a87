#!/usr/bin/env python
"""Personalize a text-to-image model from a few photos with SNELLA.

    accelerate launch train_dreambooth_snella.py --config configs/dreambooth/demo.yaml
    accelerate launch train_dreambooth_snella.py --base embedded --resolution 64 \\
        --instance_data_dir photos --instance_prompt "a photo of a sks cat" --output_dir runs/cat

    python train_dreambooth_snella.py --list-methods

Exit codes: 0 finished, 2 bad input (nothing was replaced), 3 the loss became NaN or infinite (the
last good state is kept), 4 the processes of the run disagree, 5 the run is complete but could not
be uploaded (--push_to_hub), 130 or 143 stopped by SIGINT or SIGTERM (the state is saved; continue
with --resume_from_checkpoint latest). `accelerate launch` itself turns every failure into 1.
"""

import os
import sys
from collections.abc import Sequence

from snell_diffusion.diffusion.config_files import parse_config
from snell_diffusion.diffusion.training import run
from snell_diffusion.errors import SnellaError
from snell_diffusion.training.errors import TrainingError
from snell_diffusion.tuners.recipes import list_methods


def main(arguments: Sequence[str]) -> int:
    """Train with the given command line; return the exit code."""
    if "--list-methods" in arguments:
        print(list_methods())
        return 0
    try:
        result = run(parse_config(arguments))
    except TrainingError as error:
        print(f"{type(error).__name__}: {error}", file=sys.stderr)
        return error.exit_code
    except SnellaError as error:
        print(f"{type(error).__name__}: {error}", file=sys.stderr)
        return 2
    if int(os.environ.get("RANK", "0")):
        return 0
    if result.adapter_path is not None:
        print(f"adapter: {result.adapter_path}")
    if result.validation_loss_after is not None:
        before, after = result.validation_loss_before, result.validation_loss_after
        print(f"held-out loss of the subject: {before:.4f} (base) -> {after:.4f} (adapted)")
    print(f"time: {result.seconds:.0f} s, peak memory: {result.peak_memory / 2**30:.2f} GiB")
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
