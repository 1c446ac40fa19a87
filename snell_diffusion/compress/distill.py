"""Train a compressed model against the original: same features, block by block.

    loss = task + kd_alpha * mean over blocks of MSE(feature) + kd_beta * MSE(output) + weight * R

Features are the outputs of transformer and ResNet blocks, caught by forward hooks. The teacher is
frozen and in eval mode. The public DeiT program runs the student twice per step, under two draws
of drop-path; here it runs once.
"""

import math
import re
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any, TypeVar

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from snell_diffusion.compress.low_rank import LowRankLinear
from snell_diffusion.compress.pela import low_rank_layers, penalty
from snell_diffusion.errors import SnellaKeyError, SnellaValueError, shown

__all__ = ["DistillSettings", "Distiller", "block_names", "caught_features", "feature_loss"]

B = TypeVar("B")
Features = dict[str, list[Tensor]]
_BLOCK = re.compile(r"(TransformerBlock|ResnetBlock2D|ResBlock|Layer|^Block|ViTBlock)$")


@dataclass(frozen=True)
class DistillSettings:
    """How a compressed model is trained back. The first five as methods.md's defaults for DeiT.

    Attributes:
        kd_alpha: Factor on the features' loss, 0 or more.
        kd_beta: Factor on the outputs' loss, 0 or more.
        weight: Factor on the weight-perturbation term R, 0 or more; 0 leaves it out.
        eps: Of R, 0 or more.
        hinge: R costs nothing below eps, see `penalty`.
        steps: Optimizer steps, 0 or more.
        lr: Peak learning rate of AdamW, above 0; warm-up over a twentieth, then a cosine to 0.
        weight_decay: On weights, not on biases and norms.
        max_grad_norm: Norm above which gradients are scaled down; 0 = never.
    """

    kd_alpha: float = 1.0
    kd_beta: float = 0.0
    weight: float = 0.0
    eps: float = 1e-3
    hinge: bool = False
    steps: int = 300
    lr: float = 3e-4
    weight_decay: float = 0.01
    max_grad_norm: float = 1.0

    def __post_init__(self) -> None:
        for name in ("kd_alpha", "kd_beta", "weight", "eps", "weight_decay", "max_grad_norm"):
            value = getattr(self, name)
            if not (math.isfinite(value) and value >= 0):
                raise SnellaValueError(f"{name} must be 0 or more, got {value!r}")
        if not (math.isfinite(self.lr) and self.lr > 0):
            raise SnellaValueError(f"lr must be above 0, got {self.lr!r}")
        if self.steps < 0:
            raise SnellaValueError(f"steps must be 0 or more, got {self.steps!r}")


def block_names(model: nn.Module) -> list[str]:
    """Paths of the blocks whose outputs are compared: the innermost that hold any Linear or conv.

    Found by their classes' names: ...TransformerBlock, ResnetBlock2D, ViTLayer, SwinLayer and the
    like.

    Raises:
        SnellaKeyError: There are none; then name them yourself.
    """
    found = [p for p, m in model.named_modules() if p and _BLOCK.search(type(m).__name__)]
    found = [p for p in found if any(True for _ in model.get_submodule(p).children())]
    inner = [p for p in found if not any(other.startswith(f"{p}.") for other in found)]
    if not inner:
        children = shown((f"{n} ({type(m).__name__})" for n, m in model.named_children()), 6)
        raise SnellaKeyError(
            f"no transformer or ResNet block was found in {type(model).__name__}: give the paths "
            f"of the modules whose outputs shall be compared; it has {children}"
        )
    return inner


@contextmanager
def caught_features(model: nn.Module, names: Sequence[str]) -> Iterator[Features]:
    """Within it, a call of the model fills a table: the output tensors of each module named.

    Raises:
        SnellaKeyError: A name is no module of the model.
    """
    seen: Features = {}
    handles = []
    modules = dict(model.named_modules())
    unknown = [name for name in names if name not in modules]
    if unknown:
        raise SnellaKeyError(f"{type(model).__name__} has no modules {shown(unknown)}")

    def keep(name: str) -> Callable[..., None]:
        def hook(module: nn.Module, args: Any, output: Any) -> None:
            seen[name] = _tensors(output)

        return hook

    try:
        handles += [modules[name].register_forward_hook(keep(name)) for name in names]
        yield seen
    finally:
        for handle in handles:
            handle.remove()


def feature_loss(student: Features, teacher: Features) -> Tensor:
    """Mean over blocks of the mean squared error of their outputs, in float32.

    A block with several outputs (text and picture of a joint block) counts once, by their mean.

    Raises:
        SnellaValueError: The tables differ in blocks, outputs or shapes.
    """
    if student.keys() != teacher.keys() or not student:
        raise SnellaValueError(
            f"student and teacher must give features of the same blocks, got {shown(student)} and "
            f"{shown(teacher)}"
        )
    terms = []
    for name, theirs in teacher.items():
        ours = student[name]
        if [t.shape for t in ours] != [t.shape for t in theirs] or not theirs:
            raise SnellaValueError(
                f"block {name} gives {[tuple(t.shape) for t in ours]} in the student and "
                f"{[tuple(t.shape) for t in theirs]} in the teacher"
            )
        errors = [F.mse_loss(a.float(), b.float()) for a, b in zip(ours, theirs, strict=True)]
        terms.append(torch.stack(errors).mean())
    return torch.stack(terms).mean()


@dataclass
class Distiller:
    """A student, its frozen teacher, and how a batch goes through either.

    Attributes:
        student: The compressed model; all its parameters are trained.
        teacher: The original. It is switched to eval mode and its gradients off.
        call: (model, batch) -> output tensor, called for both models alike.
        task: (student's output, batch) -> loss against labels or targets; None without.
        settings: Weights of the loss and length.
        blocks: Paths of the blocks compared; empty: `block_names` of the teacher.
    """

    student: nn.Module
    teacher: nn.Module
    call: Callable[[nn.Module, Any], Tensor]
    task: Callable[[Tensor, Any], Tensor] | None = None
    settings: DistillSettings = field(default_factory=DistillSettings)
    blocks: Sequence[str] = ()

    def __post_init__(self) -> None:
        self.teacher.eval().requires_grad_(False)
        self.blocks = list(self.blocks) or block_names(self.teacher)
        teacher_layers = dict(self.teacher.named_modules())
        self._pairs: list[tuple[LowRankLinear, Tensor]] = []
        for path, layer in low_rank_layers(self.student):
            original = teacher_layers.get(path)
            if not isinstance(original, nn.Linear):
                raise SnellaKeyError(
                    f"the teacher must have the Linear {path} that the student compressed; is it "
                    "a copy of the model before compression?"
                )
            self._pairs.append((layer, original.weight))
        settings = self.settings
        if self.task is None and settings.kd_alpha == 0 and settings.kd_beta == 0:
            raise SnellaValueError(
                "nothing to train on: without labels, kd_alpha or kd_beta must be above 0"
            )

    def loss(self, batch: Any) -> tuple[Tensor, dict[str, float]]:
        """The loss of a batch and its parts, unweighted: task, features, output, penalty.

        Parts whose factor is 0 are measured too, without a gradient.
        """
        s = self.settings
        with torch.no_grad(), caught_features(self.teacher, self.blocks) as theirs:
            target = self.call(self.teacher, batch)
        with caught_features(self.student, self.blocks) as ours:
            output = self.call(self.student, batch)
        parts = {
            "features": (s.kd_alpha, feature_loss(ours, theirs)),
            "output": (s.kd_beta, F.mse_loss(output.float(), target.float())),
        }
        if s.weight > 0:
            parts["penalty"] = (s.weight, penalty(self._pairs, s.eps, s.hinge))
        if self.task is not None:
            parts["task"] = (1.0, self.task(output, batch))
        total = sum((factor * part for factor, part in parts.values() if factor), torch.zeros(()))
        return total, {name: float(part.detach()) for name, (_, part) in parts.items()}

    @torch.no_grad()
    def measure(self, batches: Sequence[Any]) -> dict[str, float]:
        """Mean parts of the loss over batches of equal weight, the student in eval mode."""
        if not batches:
            raise SnellaValueError("to measure, at least one held-out batch is needed, got none")
        was, _ = self.student.training, self.student.eval()
        totals: dict[str, float] = {}
        for batch in batches:
            for name, value in self.loss(batch)[1].items():
                totals[name] = totals.get(name, 0.0) + value / len(batches)
        self.student.train(was)
        return totals

    def train(
        self,
        batch_at: Callable[[int], Any],
        say: Callable[[str], None] | None = None,
        every: int = 50,
    ) -> list[dict[str, float]]:
        """Train the student for `settings.steps` steps.

        Args:
            batch_at: Step, from 0, to its batch.
            say: Takes a line of progress with the time left, every so many steps.
            every: How many.

        Returns:
            The parts of the loss of every step.

        Raises:
            SnellaValueError: The loss is not finite; nothing was changed by that step.
        """
        s = self.settings
        self.student.train().requires_grad_(True)
        optimizer = torch.optim.AdamW(_groups(self.student, s.weight_decay), lr=s.lr)
        schedule = torch.optim.lr_scheduler.LambdaLR(optimizer, lambda k: _rate(k, s.steps))
        history: list[dict[str, float]] = []
        started = time.monotonic()
        for step in range(s.steps):
            total, parts = self.loss(batch_at(step))
            if not bool(total.isfinite()):
                raise SnellaValueError(
                    f"the loss of step {step} is {float(total.detach())}: lower lr (now {s.lr:g})"
                )
            optimizer.zero_grad(set_to_none=True)
            total.backward()
            if s.max_grad_norm:
                nn.utils.clip_grad_norm_(self.student.parameters(), s.max_grad_norm)
            optimizer.step()
            schedule.step()
            history.append(parts)
            if say is not None and ((step + 1) % every == 0 or step + 1 == s.steps):
                left = (time.monotonic() - started) / (step + 1) * (s.steps - step - 1)
                values = ", ".join(f"{name} {value:.3g}" for name, value in parts.items())
                say(f"step {step + 1} of {s.steps}: {values}; {left:.0f} s left")
        self.student.eval()
        return history


def _groups(model: nn.Module, decay: float) -> list[dict[str, Any]]:
    parameters = list(model.parameters())
    return [
        {"params": [p for p in parameters if p.ndim > 1], "weight_decay": decay},
        {"params": [p for p in parameters if p.ndim <= 1], "weight_decay": 0.0},
    ]


def _rate(step: int, steps: int) -> float:
    """Warm-up over a twentieth of the steps, then a cosine to 0."""
    warmup = max(1, steps // 20)
    if step < warmup:
        return (step + 1) / warmup
    return 0.5 * (1 + math.cos(math.pi * (step - warmup) / max(1, steps - warmup)))


def _tensors(output: Any) -> list[Tensor]:
    """Tensors of floats in a module's output, in order."""
    if isinstance(output, Tensor):
        return [output] if output.is_floating_point() else []
    values = output.values() if isinstance(output, dict) else output
    if isinstance(output, (dict, tuple, list)):
        return [tensor for value in values for tensor in _tensors(value)]
    return []
