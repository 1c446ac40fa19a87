"""Make the embedded base: data, tokenizer, autoencoder, text-to-image model, probe, export.

python scripts/train_embedded_base.py vae --work /tmp/embedded --font NotoColorEmoji.ttf
... then the stages data, base, probe, score and export; each one resumes or is skipped.
"""

import argparse
from pathlib import Path

import torch
from embedded_base.data import Painter
from embedded_base.text_to_image import BaseConfig, BaseTrainer, write_shard
from embedded_base.tokenizer import build_tokenizer
from embedded_base.vae import VaeData, build_vae, held_out_crops, psnr, train_vae, whiten_latents


def painter_of(args: argparse.Namespace) -> Painter:
    return Painter(args.font, args.seed)


def load_vae(args: argparse.Namespace):
    """The trained autoencoder with unit-variance latents, in evaluation mode."""
    vae = build_vae().to(memory_format=torch.channels_last)
    vae.load_state_dict(torch.load(args.work / "vae_white.pt"))
    return vae.eval().requires_grad_(False)


def stage_vae(args: argparse.Namespace) -> None:
    raw, white = args.work / "vae.pt", args.work / "vae_white.pt"
    data = VaeData(painter_of(args), args.seed)
    vae = build_vae()
    if raw.exists():
        vae.load_state_dict(torch.load(raw))
    else:
        print(train_vae(vae, data, args.vae_seconds, 16, 1.2e-3, raw))
    vae.eval()
    composites = torch.cat([data.batch(64)[1::2] for _ in range(16)])
    before = psnr(vae, held_out_crops(64))
    whiten_latents(vae, composites)
    print(f"held-out {before:.2f} dB, after whitening {psnr(vae, held_out_crops(64)):.2f} dB")
    print(f"composites {psnr(vae, composites[:256]):.2f} dB")
    torch.save(vae.state_dict(), white)


def stage_data(args: argparse.Namespace) -> None:
    folder = args.work / "shards"
    folder.mkdir(parents=True, exist_ok=True)
    tokenizer = build_tokenizer(args.work / "tokenizer", args.seed)
    painter, vae, config = painter_of(args), load_vae(args), BaseConfig()
    jobs = [(f"low{k:02d}", 1000 + k, 1.0) for k in range(config.shards)]
    jobs += [(f"wide{k:02d}", 2000 + k, 2.0) for k in range(config.wide_shards)]
    for name, seed, jitter in jobs:
        path = folder / f"{name}.pt"
        if not path.exists():
            write_shard(path, painter, vae, tokenizer, args.seed * 10_000 + seed, jitter)
            print(f"shard {name}", flush=True)


def stage_base(args: argparse.Namespace) -> None:
    config = BaseConfig(steps=args.steps, muon=args.muon, lr=args.lr, seed=args.seed)
    BaseTrainer(args.work, config, args.name).train(max_s=args.max_seconds)


STAGES = {"vae": stage_vae, "data": stage_data, "base": stage_base}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("stage", choices=STAGES)
    parser.add_argument("--work", type=Path, required=True, help="folder for everything made")
    parser.add_argument("--font", type=Path, required=True, help="NotoColorEmoji.ttf")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--vae-seconds", type=float, default=420)
    parser.add_argument("--steps", type=int, default=BaseConfig.steps)
    parser.add_argument("--lr", type=float, default=BaseConfig.lr)
    parser.add_argument("--muon", action="store_true")
    parser.add_argument("--name", default="base", help="of the base checkpoint")
    parser.add_argument("--max-seconds", type=float, default=float("inf"))
    args = parser.parse_args()
    args.work.mkdir(parents=True, exist_ok=True)
    torch.set_num_threads(1)
    torch.manual_seed(args.seed)
    STAGES[args.stage](args)


if __name__ == "__main__":
    main()
