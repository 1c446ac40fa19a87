"""Shards of latents and captions, and the batches that training draws from them.

Shapes: B batch, z latents (B, 8, 16, 16), ids (B, 32) tokens.
"""

import time
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from diffusers import AutoencoderKL
from torch import Tensor
from transformers import CLIPTokenizer

from .data import (
    BACKGROUNDS,
    CLASSES,
    EARLY_BACKGROUNDS,
    EARLY_CLASSES,
    Composite,
    Painter,
    caption,
    sample_combination,
)
from .tokenizer import MAX_LENGTH
from .vae import LATENT_CHANNELS, to_tensor

SHARD = 6000  # composites per shard
CAPTIONS = 4  # caption variants per composite


@dataclass(frozen=True)
class BaseConfig:
    """How a diffusion model is trained."""

    steps: int = 8800  # optimizer steps in all
    batch: int = 32  # composites per step
    lr: float = 1e-3  # AdamW, peak
    warmup: int = 200  # steps of linear warm-up
    decay_from: float = 0.6  # share of the steps after which lr falls linearly to 0
    early_shards: int = 12  # 20 classes, low jitter; shard k joins at step 150 * (k - 1)
    full_from: int = 3600  # step at which shards of all classes and backgrounds start to join
    full_shards: int = 8  # half of each has wide jitter; shard k joins at full_from + 200 * k
    full_share: float = 0.8  # of a batch from then on
    caption_drop: float = 0.1  # share of captions replaced by ''
    ema: float = 0.999
    seed: int = 0


def write_shard(
    path: Path,
    painter: Painter,
    vae: AutoencoderKL,
    tokenizer: CLIPTokenizer,
    seed: int,
    full: bool,
) -> None:
    """Paint, caption and encode SHARD composites; a finished shard is one .pt file.

    Args:
        full: All classes and backgrounds, every second picture with wide jitter; else the early
            classes and backgrounds with low jitter.
    """
    rng = np.random.default_rng(seed)
    world = (tuple(CLASSES), tuple(BACKGROUNDS)) if full else (EARLY_CLASSES, EARLY_BACKGROUNDS)
    whats: list[Composite] = [sample_combination(rng, *world) for _ in range(SHARD)]
    jitters = (1.0, 2.0) if full else (1.0, 1.0)
    latents = torch.empty(SHARD, LATENT_CHANNELS, 16, 16, dtype=torch.float16)
    for start in range(0, SHARD, 100):
        chunk = whats[start : start + 100]
        images = np.stack([painter.paint(w, rng, jitters[k % 2]) for k, w in enumerate(chunk)])
        with torch.no_grad():
            latents[start : start + 100] = vae.encode(to_tensor(images)).latent_dist.mode().half()
    texts = [caption(w, rng) for w in whats for _ in range(CAPTIONS)]
    ids = encode_text(tokenizer, texts).view(SHARD, CAPTIONS, MAX_LENGTH).to(torch.int16)
    part = path.with_suffix(".part")
    torch.save({"latents": latents, "ids": ids}, part)
    part.rename(path)


def encode_text(tokenizer: CLIPTokenizer, texts: list[str]) -> Tensor:
    """Token ids, (len(texts), 32) int64, padded with the end token."""
    out = tokenizer(
        texts,
        padding="max_length",
        max_length=MAX_LENGTH,
        truncation=True,
        return_tensors="pt",
    )
    return out.input_ids


class ShardStream:
    """Deterministic batches from shards that may still be in the making.

    Which shards step s may use depends on s alone; a missing one is waited for.
    """

    def __init__(self, folder: Path, config: BaseConfig):
        self.folder, self.config = folder, config
        self.loaded: dict[str, dict[str, Tensor]] = {}

    def _pick(self, step: int, rng: np.random.Generator) -> tuple[str, int]:
        """Shard name and row of one sample."""
        c = self.config
        joined = 1 + (step - c.full_from) // 200
        if joined > 0 and rng.random() < c.full_share:
            return f"full{rng.integers(min(c.full_shards, joined)):02d}", rng.integers(SHARD)
        return f"low{rng.integers(min(c.early_shards, 2 + step // 150)):02d}", rng.integers(SHARD)

    def _shard(self, name: str) -> dict[str, Tensor]:
        path = self.folder / f"{name}.pt"
        while name not in self.loaded:
            if path.exists():
                self.loaded[name] = torch.load(path)
            else:
                time.sleep(2)
        return self.loaded[name]

    def batch(self, step: int, empty: Tensor) -> tuple[Tensor, Tensor]:
        """Latents (B, 8, 16, 16) float32 and ids (B, 32) int64 of a step."""
        rng = np.random.default_rng([self.config.seed, step])
        picks = [self._pick(step, rng) for _ in range(self.config.batch)]
        z = torch.stack([self._shard(n)["latents"][i] for n, i in picks]).float()
        ids = torch.stack(
            [self._shard(n)["ids"][i, rng.integers(CAPTIONS)] for n, i in picks]
        ).long()
        drop = torch.from_numpy(rng.random(len(picks)) < self.config.caption_drop)
        return z, torch.where(drop[:, None], empty[None], ids)
