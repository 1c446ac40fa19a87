"""Make the embedded base: autoencoder, data, text-to-image model, probe, scores, export.

    python scripts/train_embedded_base.py all --work runs/embedded --font NotoColorEmoji.ttf

Stages: vae (7 min), data (6 min), base (95 min), probe (3 min), export, score (5 min), on one core.
Each one resumes or is skipped when its result is in the work folder, so that a stage can also be
run alone, and `base` may run while `data` is still writing. Needs scikit-image for nine photos.
"""

import argparse
import json
from pathlib import Path

import numpy as np
import torch
from diffusers import AutoencoderKL, StableDiffusionPipeline
from embedded_base.data import Painter
from embedded_base.export import assemble, export
from embedded_base.probe import (
    accuracy,
    load_probe,
    paint_batch,
    train_probe,
)
from embedded_base.report import provenance
from embedded_base.scoring import draw_classes, prompt_scores
from embedded_base.shards import BaseConfig, write_shard
from embedded_base.text_to_image import base_trainer
from embedded_base.tokenizer import build_tokenizer
from embedded_base.vae import (
    VaeConfig,
    VaeData,
    build_vae,
    held_out_crops,
    psnr,
    train_vae,
    whiten_latents,
)

ROOT = Path(__file__).resolve().parents[1]
MODEL = ROOT / "snell_diffusion" / "models" / "embedded"
DOCS = ROOT / "docs" / "embedded_base"


def load_vae(args: argparse.Namespace) -> AutoencoderKL:
    """The trained autoencoder with unit-variance latents, in evaluation mode."""
    vae = build_vae().to(memory_format=torch.channels_last)
    vae.load_state_dict(torch.load(args.work / "vae_white.pt"))
    return vae.eval().requires_grad_(False)


def stage_vae(args: argparse.Namespace) -> None:
    """Train the autoencoder, then fold the latents' normalisation into it."""
    raw, white = args.work / "vae.pt", args.work / "vae_white.pt"
    data = VaeData(Painter(args.font, args.seed), args.seed)
    vae = build_vae()
    if raw.exists():
        vae.load_state_dict(torch.load(raw))
    else:
        train_vae(vae, data, VaeConfig(), raw)
    vae.eval()
    composites = torch.cat([data.batch(64)[1::2] for _ in range(16)])
    whiten_latents(vae, composites)
    print(f"{psnr(vae, held_out_crops(64)):.2f} dB on the photo that was held out")
    print(f"{psnr(vae, composites[:256]):.2f} dB on composites")
    torch.save(vae.state_dict(), white)


def stage_data(args: argparse.Namespace) -> None:
    """Learn the tokenizer and write the shards of latents and captions."""
    folder = args.work / "shards"
    folder.mkdir(parents=True, exist_ok=True)
    tokenizer = build_tokenizer(args.work / "tokenizer", args.seed)
    painter, vae, config = Painter(args.font, args.seed), load_vae(args), BaseConfig()
    jobs = [(f"low{k:02d}", 1000 + k, False) for k in range(config.early_shards)]
    jobs += [(f"full{k:02d}", 3000 + k, True) for k in range(config.full_shards)]
    for name, seed, full in jobs:
        path = folder / f"{name}.pt"
        if not path.exists():
            write_shard(path, painter, vae, tokenizer, args.seed * 10_000 + seed, full)
            print(f"shard {name}", flush=True)


def stage_base(args: argparse.Namespace) -> None:
    """Train UNet and text encoder together."""
    base_trainer(args.work, BaseConfig(steps=args.steps, seed=args.seed)).train()


def stage_probe(args: argparse.Namespace) -> None:
    """Train the judge on fresh composites."""
    checkpoint = args.work / "probe.pt"
    if not checkpoint.exists():
        train_probe(Painter(args.font, args.seed), load_vae(args), args.seed, 900, checkpoint)


def stage_export(args: argparse.Namespace) -> None:
    """Write the averaged weights as a diffusers folder."""
    weights = torch.load(args.work / "base.pt")["average"]
    megabytes = export(assemble(load_vae(args), weights, args.work / "tokenizer"), MODEL)
    print(f"{megabytes:.2f} MB of safetensors in {MODEL.relative_to(ROOT)}")


def stage_score(args: argparse.Namespace) -> None:
    """Score the exported folder on held-out prompts; write scores.json and the grids."""
    pipeline = StableDiffusionPipeline.from_pretrained(MODEL, local_files_only=True)
    probe, painter = load_probe(args.work / "probe.pt"), Painter(args.font, args.seed)
    rng = np.random.default_rng([args.seed, 78])
    real, real_whats = paint_batch(painter, pipeline.vae, rng, 2000)
    state = torch.load(args.work / "base.pt")
    scores = {
        "probe_on_composites": accuracy(probe, real, real_whats) | {"pictures": len(real_whats)},
        **prompt_scores(pipeline, probe, args.prompts, args.seed),
        "vae_psnr_db": {"held_out_photo": round(psnr(pipeline.vae, held_out_crops(64)), 2)},
        "base": {k: state[k] for k in ("step", "samples", "process_s", "config")},
        "provenance": provenance(args.font),
    }
    DOCS.mkdir(parents=True, exist_ok=True)
    (DOCS / "scores.json").write_text(json.dumps(scores, indent=2) + "\n")
    print(json.dumps(scores["held_out_prompts"]))
    draw_classes(pipeline, args.seed, DOCS / "classes.png")


STAGES = {
    "vae": stage_vae,
    "data": stage_data,
    "base": stage_base,
    "probe": stage_probe,
    "export": stage_export,
    "score": stage_score,
}


def main() -> None:
    """Run one stage, or all of them in order."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("stage", choices=("all", *STAGES))
    parser.add_argument("--work", type=Path, required=True, help="folder for everything made")
    parser.add_argument("--font", type=Path, required=True, help="NotoColorEmoji.ttf")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--steps", type=int, default=BaseConfig.steps, help="of the base")
    parser.add_argument("--prompts", type=int, default=240, help="held-out prompts to score")
    args = parser.parse_args()
    args.work.mkdir(parents=True, exist_ok=True)
    torch.set_num_threads(1)
    for name in STAGES if args.stage == "all" else [args.stage]:
        torch.manual_seed(args.seed)
        STAGES[name](args)


if __name__ == "__main__":
    main()
