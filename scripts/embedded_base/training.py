"""The training loop of the embedded diffusion models: resumable, one seed, averaged weights."""

import time
from collections.abc import Callable
from dataclasses import asdict
from pathlib import Path

import numpy as np
import torch
from torch import Tensor, nn
from transformers import CLIPTokenizer

from .shards import BaseConfig, ShardStream, encode_text


def learning_rate(step: int, config: BaseConfig) -> float:
    """Warm-up, plateau, then linear decay to zero."""
    hot = config.decay_from * config.steps
    decay = 1.0 if step < hot else (config.steps - step) / (config.steps - hot)
    return config.lr * min(1.0, (step + 1) / config.warmup) * decay


class Trainer:
    """Modules that learn together, their average and optimizer; resumes from its checkpoint.

    Args:
        work: Folder with `tokenizer/`, `shards/` and the checkpoint.
        config: The schedule.
        name: Of the checkpoint file.
        modules: What learns.
        loss: (z, ids, generator) to the loss of a batch; all its noise comes from the generator.
    """

    def __init__(
        self,
        work: Path,
        config: BaseConfig,
        name: str,
        modules: nn.ModuleDict,
        loss: Callable[[Tensor, Tensor, torch.Generator], Tensor],
    ):
        self.config, self.checkpoint = config, work / f"{name}.pt"
        self.tokenizer = CLIPTokenizer.from_pretrained(work / "tokenizer")
        self.modules, self.loss = modules, loss
        self.average = {k: v.clone() for k, v in self.modules.state_dict().items()}
        self.optimizer = torch.optim.AdamW(
            self.modules.parameters(),
            lr=config.lr,
            betas=(0.9, 0.98),
            weight_decay=0.01,
            fused=True,
        )
        self.stream = ShardStream(work / "shards", config)
        self.step, self.samples, self.process_s = 0, 0, 0.0
        if self.checkpoint.exists():
            self._resume()

    def _resume(self) -> None:
        state = torch.load(self.checkpoint)
        self.modules.load_state_dict(state["model"])
        self.average = state["average"]
        self.optimizer.load_state_dict(state["optimizer"])
        self.step, self.samples = state["step"], state["samples"]
        self.process_s = state["process_s"]
        print(f"resumed at step {self.step}", flush=True)

    def save(self, process_s: float) -> None:
        part = self.checkpoint.with_suffix(".part")
        state = {
            "model": self.modules.state_dict(),
            "average": self.average,
            "optimizer": self.optimizer.state_dict(),
            "step": self.step,
            "samples": self.samples,
            "process_s": process_s,
            "config": asdict(self.config),
        }
        torch.save(state, part)
        part.rename(self.checkpoint)

    @torch.no_grad()
    def _update_average(self) -> None:
        decay = min(self.config.ema, (1 + self.step) / (10 + self.step))
        model = self.modules.state_dict()
        keys = [k for k, v in model.items() if v.is_floating_point()]
        torch._foreach_lerp_(
            [self.average[k] for k in keys], [model[k] for k in keys], weight=1 - decay
        )

    def train(self, save_every_s: float = 240, max_s: float = float("inf")) -> None:
        """Run to the last step, or for `max_s` seconds of wall clock."""
        empty = encode_text(self.tokenizer, [""])[0]
        started = saved = time.time()
        first, cpu, losses = self.step, time.process_time(), []
        while self.step < self.config.steps and time.time() - started < max_s:
            lr = learning_rate(self.step, self.config)
            for group in self.optimizer.param_groups:
                group["lr"] = lr
            z, ids = self.stream.batch(self.step, empty)
            rng = torch.Generator().manual_seed(self.config.seed * 10_000_019 + self.step)
            loss = self.loss(z, ids, rng)
            loss.backward()
            nn.utils.clip_grad_norm_(self.modules.parameters(), 1.0)
            self.optimizer.step()
            self.optimizer.zero_grad(set_to_none=True)
            self.step += 1
            self.samples += len(z)
            self._update_average()
            losses.append(loss.item())
            if self.step % 50 == 0:
                rate = (self.step - first) / (time.time() - started)
                left = (self.config.steps - self.step) / rate / 60
                print(
                    f"{self.checkpoint.stem} step {self.step} samples {self.samples} "
                    f"loss {np.mean(losses):.4f} lr {lr:.1e} {rate * len(z):.0f} img/s, "
                    f"{left:.0f} min left",
                    flush=True,
                )
                losses = []
            if time.time() - saved > save_every_s:
                self.save(self.process_s + time.process_time() - cpu)
                saved = time.time()
        self.save(self.process_s + time.process_time() - cpu)
