"""The judge: a small CNN that names class, colour and background of a 64x64 picture.

It learns from freshly painted composites passed through the autoencoder (so that it judges what is
drawn and not how sharp it is), never from generated pictures.
"""

import time
from itertools import pairwise
from pathlib import Path
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from diffusers import AutoencoderKL
from torch import Tensor, nn

from .data import (
    ALL_COMBINATIONS,
    BACKGROUNDS,
    CLASSES,
    COLORS,
    NATURAL,
    Composite,
    Painter,
    plain_prompt,
)
from .vae import to_tensor

HEADS = {"object": tuple(CLASSES), "color": (*COLORS, NATURAL), "background": tuple(BACKGROUNDS)}


class Probe(nn.Module):
    """Four strided convolutions and one linear head per question, 0.3 M parameters."""

    def __init__(self) -> None:
        super().__init__()
        widths = (3, 32, 64, 96, 128)
        layers: list[nn.Module] = []
        for i, o in pairwise(widths):
            layers += [nn.Conv2d(i, o, 3, 2, 1, bias=False), nn.BatchNorm2d(o), nn.ReLU()]
        self.trunk = nn.Sequential(*layers, nn.Flatten(), nn.Dropout(0.1))
        self.heads = nn.ModuleDict({k: nn.Linear(128 * 16, len(v)) for k, v in HEADS.items()})

    def forward(self, x: Tensor) -> dict[str, Tensor]:
        """(B, 3, 64, 64) in [-1, 1] to logits per head, (B, number of answers)."""
        features = self.trunk(x)
        return {name: head(features) for name, head in self.heads.items()}


def labels_of(whats: list[Composite]) -> dict[str, Tensor]:
    """Answer indices per head, (B,) int64."""
    answers = {
        "object": [w.noun for w in whats],
        "color": [w.color for w in whats],
        "background": [w.background for w in whats],
    }
    return {k: torch.tensor([HEADS[k].index(a) for a in v]) for k, v in answers.items()}


def paint_batch(
    painter: Painter, vae: AutoencoderKL, rng: np.random.Generator, size: int
) -> tuple[Tensor, list[Composite]]:
    """Composites of all combinations, wide jitter; a quarter as the autoencoder sees them."""
    whats = [ALL_COMBINATIONS[i] for i in rng.integers(len(ALL_COMBINATIONS), size=size)]
    x = to_tensor(np.stack([painter.paint(w, rng, rng.uniform(0.5, 2.5)) for w in whats]))
    quarter = size // 4
    with torch.no_grad(), torch.autocast("cpu", torch.bfloat16):
        x[:quarter] = vae.decode(vae.encode(x[:quarter]).latent_dist.mode()).sample.float()
    return x.clamp(-1, 1), whats


def train_probe(
    painter: Painter, vae: AutoencoderKL, seed: int, steps: int, checkpoint: Path
) -> None:
    """Train from scratch on endless fresh composites and save."""
    torch.manual_seed(seed)
    rng = np.random.default_rng([seed, 77])
    probe = Probe().to(memory_format=torch.channels_last)
    optimizer = torch.optim.AdamW(probe.parameters(), lr=2e-3, weight_decay=0.02, fused=True)
    schedule = torch.optim.lr_scheduler.OneCycleLR(optimizer, 2e-3, total_steps=steps)
    started = time.time()
    for step in range(steps):
        x, whats = paint_batch(painter, vae, rng, 64)
        x = x + 0.1 * torch.rand(64, 1, 1, 1) * torch.randn_like(x)
        logits, labels = probe(x), labels_of(whats)
        loss = sum(F.cross_entropy(logits[k], labels[k], label_smoothing=0.02) for k in HEADS)
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        schedule.step()
        if (step + 1) % 100 == 0:
            left = (time.time() - started) / (step + 1) * (steps - step - 1)
            print(f"probe step {step + 1} loss {loss.item():.3f} {left:.0f} s left", flush=True)
    probe.eval()
    torch.save(probe.state_dict(), checkpoint)


def load_probe(checkpoint: Path) -> Probe:
    probe = Probe()
    probe.load_state_dict(torch.load(checkpoint))
    return probe.eval()


@torch.no_grad()
def accuracy(probe: Probe, x: Tensor, whats: list[Composite]) -> dict[str, float]:
    """Share of right answers per head, in [0, 1]; colour counts only where a word was given."""
    logits, labels = probe(x), labels_of(whats)
    right = {k: (logits[k].argmax(1) == labels[k]).float() for k in HEADS}
    worded = torch.tensor([w.color != NATURAL for w in whats])
    right["color"] = right["color"][worded]
    return {k: round(float(v.mean()), 4) for k, v in right.items()}


@torch.no_grad()
def accuracy_by_class(probe: Probe, x: Tensor, whats: list[Composite]) -> dict[str, float]:
    """Share of right objects per class."""
    right = probe(x)["object"].argmax(1) == labels_of(whats)["object"]
    by_class = {
        n: [bool(r) for r, w in zip(right, whats, strict=True) if w.noun == n] for n in CLASSES
    }
    return {n: round(float(np.mean(v)), 3) for n, v in by_class.items() if v}


def generate(
    pipeline, whats: list[Composite], seed: int, guidance: float, steps: int, **options: Any
) -> Tensor:
    """Pictures of the plain prompts, (B, 3, 64, 64) in [-1, 1], 25 at a time.

    Args:
        options: Of the pipeline's call.
    """
    pipeline.set_progress_bar_config(disable=True)
    parts = []
    for start in range(0, len(whats), 25):
        images = pipeline(
            [plain_prompt(w) for w in whats[start : start + 25]],
            num_inference_steps=steps,
            guidance_scale=guidance,
            generator=torch.Generator().manual_seed(seed + start),
            output_type="np",
            **options,
        ).images
        parts.append(to_tensor(images * 255))
    return torch.cat(parts)


def held_out_prompts(count: int, seed: int) -> list[Composite]:
    """Combinations that training never saw, the same number per class as far as possible."""
    rng = np.random.default_rng([seed, 79])
    pools = {n: [w for w in ALL_COMBINATIONS if w.noun == n and w.held_out] for n in CLASSES}
    per_class = count // len(CLASSES)
    return [
        pools[n][i]
        for n in CLASSES
        for i in rng.choice(len(pools[n]), per_class, replace=per_class > len(pools[n]))
    ]
