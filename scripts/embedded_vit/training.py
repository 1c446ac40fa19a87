"""The network with all its heads, its loss, and the loop: resumable, one seed, averaged weights.

Shapes: B batch, x (B, 3, 64, 64) float32 in [-1, 1], labels (B, 4) int64, geometry (B, 5) float32.
"""

import time
from dataclasses import asdict, dataclass
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from transformers import ViTConfig, ViTModel

from .painter import Batch, ScenePainter, paint_batch
from .world import HEADS, IGNORED, NOTHING, OBJECTS

WIDTH = 192
WEIGHTS = {
    "object": 1.0,
    "color": 0.3,
    "background": 0.3,
    "count": 0.3,
    "geometry": 1.0,
    "patch": 1.0,
}
CLASSIFIED = tuple(HEADS)[:4]  # in the order of the labels


@dataclass(frozen=True)
class VitTraining:
    """How the embedded ViT is trained."""

    steps: int = 4900  # optimizer steps in all
    batch: int = 32  # pictures per step, all of them new
    lr: float = 1e-3  # AdamW, peak
    warmup: int = 200  # steps of linear warm-up
    decay_from: float = 0.714  # share of the steps after which lr falls linearly to 0
    spread_by: float = 0.49  # share of the steps until tilt, size and count vary fully
    weight_decay: float = 0.03
    clip: float = 1.0  # norm of the gradient
    ema: float = 0.998
    seed: int = 0


def vit_config() -> ViTConfig:
    """6 layers of width 192, 3 heads, patches of 8x8 on 64x64 pixels: 65 tokens."""
    return ViTConfig(
        hidden_size=WIDTH,
        num_hidden_layers=6,
        num_attention_heads=3,
        intermediate_size=4 * WIDTH,
        image_size=64,
        patch_size=8,
        id2label=dict(enumerate(OBJECTS)),
        label2id={name: k for k, name in enumerate(OBJECTS)},
        hidden_dropout_prob=0.0,
        attention_probs_dropout_prob=0.0,
    )


class SceneNet(nn.Module):
    """The ViT, one linear head per question on the class token, and one on the patches' tokens.

    That last one names the object that a patch shows: 64 answers a picture instead of one, with
    which a ViT learns to see shapes much sooner.
    """

    def __init__(self) -> None:
        super().__init__()
        self.vit = ViTModel(vit_config(), add_pooling_layer=False)
        self.vit.set_attn_implementation("eager")  # the fused one trains slower on this CPU
        self.heads = nn.ModuleDict({name: nn.Linear(WIDTH, n) for name, n in HEADS.items()})
        self.patch_head = nn.Linear(WIDTH, NOTHING + 1)

    def forward(self, x: Tensor) -> dict[str, Tensor]:
        """Answers: logits (B, n), the geometry (B, 5), those of patches (B, 64, n)."""
        tokens = self.vit(pixel_values=x).last_hidden_state
        answers = {name: head(tokens[:, 0]) for name, head in self.heads.items()}
        return {**answers, "patch": self.patch_head(tokens[:, 1:])}


def to_input(images: np.ndarray) -> Tensor:
    """(B, 64, 64, 3) uint8 to (B, 3, 64, 64) in [-1, 1], as the preprocessor of the model does."""
    return torch.from_numpy(images).permute(0, 3, 1, 2).float() / 127.5 - 1


def augment(x: Tensor, labels: Tensor, generator: torch.Generator) -> tuple[Tensor, Tensor]:
    """Contrast, brightness, grey, noise, and a rectangle of grey over a quarter of the pictures.

    Pictures that turn grey lose their colour label.
    """
    n = len(x)

    def uniform(low: float, high: float) -> Tensor:
        return low + (high - low) * torch.rand(n, 1, 1, 1, generator=generator)

    x = x * uniform(0.75, 1.25) + uniform(-0.2, 0.2)
    grey = torch.rand(n, generator=generator) < 0.12
    x = torch.where(grey[:, None, None, None], x.mean(1, keepdim=True), x)
    labels = labels.clone()
    labels[grey, CLASSIFIED.index("color")] = IGNORED
    x = x + uniform(0.0, 0.12) * torch.randn(x.shape, generator=generator)
    boxes = torch.rand(n, 5, generator=generator)
    for k in torch.nonzero(boxes[:, 4] < 0.25).flatten().tolist():
        height, width = (int(8 + 14 * v) for v in boxes[k, :2])
        top, left = int((64 - height) * boxes[k, 2]), int((64 - width) * boxes[k, 3])
        x[k, :, top : top + height, left : left + width] = 0
    return x.clamp(-1, 1), labels


def scene_loss(answers: dict[str, Tensor], labels: Tensor, batch: Batch) -> Tensor:
    """Weighted sum of cross entropies and the smooth L1 error of the geometry.

    Args:
        answers: Of `SceneNet`, float32.
        labels: (B, 4) int64, those of the batch after `augment`.
        batch: Has geometry and patches.
    """
    geometry = torch.from_numpy(batch.geometry)
    loss = WEIGHTS["geometry"] * F.smooth_l1_loss(answers["geometry"], geometry, beta=0.1)
    targets = {name: labels[:, k] for k, name in enumerate(CLASSIFIED)}
    targets["patch"] = torch.from_numpy(batch.patches).flatten()
    for name, target in targets.items():
        smoothing = 0.05 if name == "object" else 0.0
        part = F.cross_entropy(
            answers[name].flatten(0, -2),
            target,
            ignore_index=IGNORED,
            label_smoothing=smoothing,
        )
        loss = loss + WEIGHTS[name] * part
    return loss


def learning_rate(step: int, config: VitTraining) -> float:
    """Warm-up, plateau, then linear decay to zero."""
    hot = config.decay_from * config.steps
    decay = 1.0 if step < hot else (config.steps - step) / (config.steps - hot)
    return config.lr * min(1.0, (step + 1) / config.warmup) * decay


class VitTrainer:
    """Trains SceneNet on endless new pictures; a step's data depend on seed and step alone.

    Args:
        painter: Of the scenes.
        checkpoint: File that the run writes and resumes from.
        config: The schedule.
    """

    def __init__(self, painter: ScenePainter, checkpoint: Path, config: VitTraining):
        torch.manual_seed(config.seed)
        self.painter, self.checkpoint, self.config = painter, checkpoint, config
        self.net = SceneNet()
        self.average = {k: v.clone() for k, v in self.net.state_dict().items()}
        decayed = [p for p in self.net.parameters() if p.ndim > 1]
        plain = [p for p in self.net.parameters() if p.ndim <= 1]
        self.optimizer = torch.optim.AdamW(
            [
                {"params": decayed, "weight_decay": config.weight_decay},
                {"params": plain, "weight_decay": 0.0},
            ],
            lr=config.lr,
            betas=(0.9, 0.98),
            fused=True,
        )
        self.step, self.process_s = 0, 0.0
        if checkpoint.exists():
            self._resume()

    def _resume(self) -> None:
        state = torch.load(self.checkpoint)
        self.net.load_state_dict(state["net"])
        self.average = state["average"]
        self.optimizer.load_state_dict(state["optimizer"])
        self.step, self.process_s = state["step"], state["process_s"]
        print(f"resumed at step {self.step}", flush=True)

    def save(self, process_s: float) -> None:
        """Write the checkpoint at once, so that a stop never leaves half a file."""
        part = self.checkpoint.with_suffix(".part")
        state = {
            "net": self.net.state_dict(),
            "average": self.average,
            "optimizer": self.optimizer.state_dict(),
            "step": self.step,
            "process_s": process_s,
            "config": asdict(self.config),
        }
        torch.save(state, part)
        part.rename(self.checkpoint)

    def _one_step(self) -> tuple[float, float]:
        """Loss and share of right objects of one optimizer step."""
        config = self.config
        for group in self.optimizer.param_groups:
            group["lr"] = learning_rate(self.step, config)
        rng = np.random.default_rng([config.seed, 1, self.step])
        spread = min(1.0, 0.15 + 0.85 * self.step / (config.spread_by * config.steps))
        batch = paint_batch(self.painter, rng, config.batch, spread=spread)
        generator = torch.Generator().manual_seed(int(rng.integers(2**62)))
        x, target = augment(to_input(batch.images), torch.from_numpy(batch.labels), generator)
        with torch.autocast("cpu", torch.bfloat16):
            answers = self.net(x)
        answers = {k: v.float() for k, v in answers.items()}
        loss = scene_loss(answers, target, batch)
        self.optimizer.zero_grad(set_to_none=True)
        loss.backward()
        nn.utils.clip_grad_norm_(self.net.parameters(), config.clip)
        self.optimizer.step()
        keep = min(config.ema, (1 + self.step) / (10 + self.step))
        for name, value in self.net.state_dict().items():
            self.average[name].lerp_(value, 1 - keep)
        self.step += 1
        right = (answers["object"].argmax(1) == target[:, 0]).float().mean()
        return float(loss.detach()), float(right)

    def train(self) -> None:
        """Run to the last step, with a line and a checkpoint now and then."""
        self.net.train()
        process0, wall0, first = time.process_time() - self.process_s, time.time(), self.step
        seen: list[tuple[float, float]] = []
        while self.step < self.config.steps:
            seen.append(self._one_step())
            if self.step % 100 == 0 or self.step == self.config.steps:
                loss, right = np.mean(seen, 0)
                left = (time.time() - wall0) / (self.step - first) * (self.config.steps - self.step)
                print(
                    f"step {self.step} loss {loss:.3f} object {right:.3f} of the last "
                    f"{len(seen)}, {time.process_time() - process0:.0f} process s, "
                    f"{left / 60:.1f} min left",
                    flush=True,
                )
                seen = []
            if self.step % 250 == 0 or self.step == self.config.steps:
                self.save(time.process_time() - process0)
