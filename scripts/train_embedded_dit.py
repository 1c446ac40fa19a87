"""Make the embedded DiT: train it on the embedded base's shards, export and score it.

    python scripts/train_embedded_dit.py all --work runs/embedded

The work folder is the one of train_embedded_base.py, which makes shards, tokenizer and probe; text
encoder and autoencoder are those of the exported base. Stages: dit (75 min on one core, resumes),
export, score (5 min).
"""

import argparse
import json
from pathlib import Path

import torch
from diffusers import StableDiffusion3Pipeline
from embedded_base.export import assemble_dit, export
from embedded_base.flow import flow_trainer, with_projection
from embedded_base.probe import load_probe
from embedded_base.scoring import draw_classes, prompt_scores
from embedded_base.shards import BaseConfig
from transformers import CLIPTextModel

ROOT = Path(__file__).resolve().parents[1]
MODELS = ROOT / "snell_diffusion" / "models"
BASE, DIT = MODELS / "embedded", MODELS / "embedded_dit"
DOCS = ROOT / "docs" / "embedded_base"
CONFIG = BaseConfig(steps=12_000, batch=64, lr=2e-3, full_from=2000)
SEED = 0


def stage_dit(args: argparse.Namespace) -> None:
    """Train the transformer on the frozen text encoder of the base."""
    encoder = with_projection(CLIPTextModel.from_pretrained(BASE / "text_encoder"))
    flow_trainer(args.work, CONFIG, encoder).train()


def stage_export(args: argparse.Namespace) -> None:
    """Write the averaged weights as a diffusers folder."""
    weights = torch.load(args.work / "dit.pt")["average"]
    megabytes = export(assemble_dit(BASE, weights), args.target)
    print(f"{megabytes:.2f} MB of safetensors in {args.target}")


def stage_score(args: argparse.Namespace) -> None:
    """Score the exported folder on held-out prompts; write the scores and the grid."""
    pipeline = StableDiffusion3Pipeline.from_pretrained(
        args.target, text_encoder_3=None, tokenizer_3=None, local_files_only=True
    )
    probe, state = load_probe(args.work / "probe.pt"), torch.load(args.work / "dit.pt")
    scores = {
        **prompt_scores(pipeline, probe, args.prompts, SEED),
        "without_padding": prompt_scores(
            pipeline, probe, args.prompts, SEED, max_sequence_length=0
        ),
        "dit": {k: state[k] for k in ("step", "samples", "process_s", "config")},
    }
    args.docs.mkdir(parents=True, exist_ok=True)
    (args.docs / "scores_dit.json").write_text(json.dumps(scores, indent=2) + "\n")
    print(json.dumps(scores["held_out_prompts"]))
    draw_classes(pipeline, SEED, args.docs / "classes_dit.png")


STAGES = {"dit": stage_dit, "export": stage_export, "score": stage_score}


def main() -> None:
    """Run one stage, or all of them in order."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("stage", choices=("all", *STAGES))
    parser.add_argument("--work", type=Path, required=True, help="folder of the embedded base")
    parser.add_argument("--target", type=Path, default=DIT, help="folder of the exported model")
    parser.add_argument("--docs", type=Path, default=DOCS, help="folder of scores and grid")
    parser.add_argument("--prompts", type=int, default=240, help="held-out prompts to score")
    args = parser.parse_args()
    torch.set_num_threads(1)
    for name in STAGES if args.stage == "all" else [args.stage]:
        STAGES[name](args)


if __name__ == "__main__":
    main()
