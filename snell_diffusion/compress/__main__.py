"""`python -m snell_diffusion.compress`: compress a model, train it back, measure, save.

    ... --model embedded-vit --images PICTURES --ratio 2 --output runs/vit-half
    ... --model embedded --prompts prompts.txt --ratio 2 --output runs/unet-half

A classifier learns from pictures (with labels where their folders are named as its classes), a
pipeline's denoiser from the calls that the pipeline makes while it draws the prompts. A fifth of
either is held out, and what is printed before and after is measured there.
"""

import argparse
import copy
import json
import sys
import time
from collections.abc import Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any

import torch

from snell_diffusion.compress.distill import DistillSettings
from snell_diffusion.compress.files import require_empty, save_compressed
from snell_diffusion.compress.jobs import ClassifierJob, Job, PipelineJob, is_pipeline
from snell_diffusion.compress.pela import compress
from snell_diffusion.errors import SnellaError, SnellaFileError, SnellaValueError
from snell_diffusion.models import SHIPPED_BASES, VISION_BASES, embedded_path

DTYPES = {"float32": torch.float32, "float16": torch.float16, "bfloat16": torch.bfloat16}
ANSWERS = {"yes": True, "no": False, None: None}


def main(arguments: Sequence[str] | None = None) -> int:
    """Exit status 0, or 1 if something is refused (the reason goes to standard error)."""
    options = parser().parse_args(arguments)
    try:
        run(options)
    except SnellaError as error:
        print(f"error: {error}", file=sys.stderr)
        return 1
    return 0


def parser() -> argparse.ArgumentParser:
    """The command line."""
    made = argparse.ArgumentParser(
        prog="python -m snell_diffusion.compress",
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    add, defaults = made.add_argument, DistillSettings()
    add("--model", required=True, help="folder, hub id, or a shipped name such as embedded-vit")
    add("--output", required=True, type=Path, help="new or empty folder")
    add("--ratio", type=float, default=2.0, help="compression ratio c, 1 or more (default 2)")
    add("--images", type=Path, help="folder of pictures, for a classifier")
    add("--prompts", type=Path, help="text file, one prompt a line, for a pipeline")
    add("--exclude", nargs="*", default=[], metavar="LAYER", help="more layers to leave alone")
    add("--attention-output", choices=("yes", "no"), help="default: yes, but no for Swin")
    add("--steps", type=int, default=defaults.steps, help="optimizer steps; 0 trains nothing")
    add("--batch", type=int, default=16, help="pictures, or prompts drawn at once")
    add("--lr", type=float, default=defaults.lr)
    add("--kd-alpha", type=float, default=defaults.kd_alpha, help="factor on the features' loss")
    add("--kd-beta", type=float, help="on the outputs' loss; default 0 with labels, 1 without")
    add("--weight", type=float, default=defaults.weight, help="on the weight-perturbation term")
    add("--eps", type=float, default=defaults.eps, help="of that term")
    add("--hinge", action="store_true", help="that term costs nothing below eps")
    add("--draw-steps", type=int, default=20, help="steps of sampling while calls are recorded")
    add("--guidance", type=float, help="guidance scale then; default: the pipeline's own")
    add("--dtype", choices=DTYPES, default="float32", help="of the weights written")
    add("--seed", type=int, default=0)
    return made


def run(options: argparse.Namespace) -> dict[str, Any]:
    """Do what the command line asks for; returns what it writes to distillation.json."""
    if options.batch < 1:
        raise SnellaValueError(f"batch must be 1 or more, got {options.batch}")
    require_empty(options.output)
    torch.manual_seed(options.seed)
    job = _job(options)
    settings = DistillSettings(
        kd_alpha=options.kd_alpha,
        kd_beta=float(not job.labelled) if options.kd_beta is None else options.kd_beta,
        weight=options.weight,
        eps=options.eps,
        hinge=options.hinge,
        steps=options.steps,
        lr=options.lr,
    )
    student = copy.deepcopy(job.teacher)
    answer = ANSWERS[options.attention_output]
    report = compress(student, options.ratio, options.exclude, answer)
    _say(str(report))
    distiller = job.distiller(student, settings)
    before = job.measure(distiller)
    _say(f"held out, before: {_words(before)}")
    started = time.monotonic()
    distiller.train(job.batch_at, _say)
    seconds = round(time.monotonic() - started, 1)
    after = job.measure(distiller)
    _say(f"held out, after:  {_words(after)}")
    folder = save_compressed(student, options.output, options.ratio, DTYPES[options.dtype])
    result = {
        "model": options.model,
        "ratio": options.ratio,
        "parameters": {"before": report.before, "after": report.after},
        "layers": len(report.ranks),
        "held_out": {"count": job.held_out, "before": before, "after": after},
        "settings": asdict(settings) | {"batch": options.batch, "seed": options.seed},
        "seconds": seconds,
    }
    try:
        (folder / "distillation.json").write_text(json.dumps(result, indent=2) + "\n", "utf-8")
    except OSError as error:
        raise SnellaFileError(f"{folder} cannot be written: {error}") from error
    size = (folder / "model.safetensors").stat().st_size / 1e6
    _say(f"{folder}: {size:.1f} MB of weights; snell_diffusion.compress.load_compressed reads it")
    return result


def _job(options: argparse.Namespace) -> Job:
    model = options.model
    if model in SHIPPED_BASES or model in VISION_BASES:
        model = str(embedded_path(model))
    if not is_pipeline(model):
        if options.images is None:
            raise SnellaValueError(f"{options.model} is a classifier: give pictures with --images")
        return ClassifierJob(model, options.images, options.batch, options.seed, _say)
    if options.prompts is None:
        raise SnellaValueError(f"{options.model} is a pipeline: give prompts with --prompts FILE")
    sampling = {"num_inference_steps": options.draw_steps}
    if options.guidance is not None:
        sampling["guidance_scale"] = options.guidance
    return PipelineJob(model, options.prompts, options.batch, options.seed, _say, **sampling)


def _say(line: str) -> None:
    print(line, flush=True)


def _words(parts: dict[str, float]) -> str:
    return ", ".join(f"{name} {value:.4g}" for name, value in parts.items())


if __name__ == "__main__":
    sys.exit(main())
