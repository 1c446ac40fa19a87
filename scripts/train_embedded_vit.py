"""Make the embedded ViT: train it on generated scenes, export it, score it.

    python scripts/train_embedded_vit.py all --work runs/embedded_vit --font NotoColorEmoji.ttf

Stages: train (20 min of one core), export, score (1 min). Training resumes from its checkpoint, and
export takes whatever that holds, so that a snapshot can be exported while training goes on. By
itself, `pictures` writes new scenes as an image folder, one folder per object.
"""

import argparse
import json
import platform
from importlib.metadata import version
from pathlib import Path

import numpy as np
import torch
from embedded_base.data import sha256_of
from embedded_vit.export import assemble, export
from embedded_vit.painter import ScenePainter, paint_batch
from embedded_vit.scoring import digits_scores, draw_scenes, scene_scores, sheet_scores
from embedded_vit.training import SceneNet, VitTrainer, VitTraining
from embedded_vit.world import OBJECTS
from PIL import Image
from transformers import ViTForImageClassification

ROOT = Path(__file__).resolve().parents[1]
MODEL = ROOT / "snell_diffusion" / "models" / "embedded_vit"
DOCS = ROOT / "docs" / "embedded_vit"


def stage_train(args: argparse.Namespace) -> None:
    """Train, or go on training."""
    config = VitTraining(steps=args.steps, seed=args.seed)
    VitTrainer(ScenePainter(args.font, args.seed), args.work / "vit.pt", config).train()


def stage_export(args: argparse.Namespace) -> None:
    """Write the averaged weights as a transformers folder."""
    state = torch.load(args.work / "vit.pt")
    megabytes = export(assemble(state["average"]), MODEL)
    print(f"step {state['step']}: {megabytes:.2f} MB in {MODEL.relative_to(ROOT)}")


def stage_score(args: argparse.Namespace) -> None:
    """Score the checkpoint's answers and the exported folder's features; write scores.json."""
    state = torch.load(args.work / "vit.pt")
    net = SceneNet().eval()
    net.load_state_dict(state["average"])
    model = ViTForImageClassification.from_pretrained(MODEL, local_files_only=True).eval()
    painter = ScenePainter(args.font, args.seed)
    DOCS.mkdir(parents=True, exist_ok=True)
    sheet = draw_scenes(painter, np.random.default_rng([args.seed, 4]), DOCS)
    scores = {
        "new_scenes": scene_scores(net, painter, args.seed, 3000, held_out=False),
        "held_out_combinations": scene_scores(net, painter, args.seed, 3000, held_out=True),
        "sheet": sheet_scores(model, sheet),
        "digits": digits_scores(model, args.seed),
        "training": {
            "step": state["step"],
            "pictures": state["step"] * state["config"]["batch"],
            "process_s": round(state["process_s"]),
            "config": state["config"],
        },
        "model_sha256": sha256_of(MODEL / "model.safetensors"),
        "font": {"name": args.font.name, "sha256": sha256_of(args.font)},
        "packages": {n: version(n) for n in ("torch", "transformers", "numpy", "pillow")},
        "python": platform.python_version(),
    }
    (DOCS / "scores.json").write_text(json.dumps(scores, indent=2) + "\n")
    print(json.dumps({k: scores[k] for k in list(scores)[:4]}, indent=1))


def stage_pictures(args: argparse.Namespace) -> None:
    """Write scenes as an image folder, `work/pictures/OBJECT/00000.png`."""
    rng = np.random.default_rng([args.seed, 5])
    batch = paint_batch(ScenePainter(args.font, args.seed), rng, args.pictures)
    for k, (image, labels) in enumerate(zip(batch.images, batch.labels, strict=True)):
        folder = args.work / "pictures" / OBJECTS[labels[0]]
        folder.mkdir(parents=True, exist_ok=True)
        Image.fromarray(image).save(folder / f"{k:05}.png")


STAGES = {"train": stage_train, "export": stage_export, "score": stage_score}
ALONE = {"pictures": stage_pictures}


def main() -> None:
    """Run one stage, or all of them in order."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("stage", choices=("all", *STAGES, *ALONE))
    parser.add_argument("--work", type=Path, required=True, help="folder for checkpoints")
    parser.add_argument("--font", type=Path, required=True, help="NotoColorEmoji.ttf")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--steps", type=int, default=VitTraining.steps)
    parser.add_argument("--pictures", type=int, default=1500, help="how many `pictures` writes")
    args = parser.parse_args()
    args.work.mkdir(parents=True, exist_ok=True)
    torch.set_num_threads(1)
    for name in STAGES if args.stage == "all" else [args.stage]:
        torch.manual_seed(args.seed)
        (STAGES | ALONE)[name](args)


if __name__ == "__main__":
    main()
