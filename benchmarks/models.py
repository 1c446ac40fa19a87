"""Whole training steps by every method: the trainer's own, and models of real sizes.

    python -m benchmarks.models              all
    python -m benchmarks.models vit-b        one

A step is forward pass, backward pass and fused AdamW; the trainer's step is what the training
script does. LoRA has rank 16 and SNELLA 32, as by default; in the entries of the trainer and of the
embedded denoisers both have 16, which are as many numbers.
"""

import sys
from functools import partial

import torch
from torch import nn

from benchmarks import trainer
from benchmarks.counting import Cost, allocated_peaks, count
from benchmarks.methods import USUAL, Ranks, adapt, path, trained_bytes, twin, unavailable
from benchmarks.results import Entry
from benchmarks.section import Measure, Run, main
from benchmarks.works import QUICK, WORKS, Inputs, Work, checkpoint_activations, loss_of

ALL = ("base", "full", "lora", "dora", "shira", "plain", "ours", "fused")
RIVALS = ("lora", "plain", "ours", "fused")
EQUAL = Ranks.equal(16)


class ModelStep:
    """The training step of a model that shares its frozen weights with other steps.

    Args:
        base: Holds the frozen weights.
        work: What it is.
        method: One of METHODS.
        inputs: One batch.
        ranks: Columns of the factors.
    """

    def __init__(
        self, base: nn.Module, work: Work, method: str, inputs: Inputs, ranks: Ranks = USUAL
    ) -> None:
        self.model = adapt(twin(base), method, work.paths(base), ranks)
        self.inputs, self.method = inputs, method
        trained = [p for p in self.model.parameters() if p.requires_grad]
        self.trains = bool(trained)
        if trained:
            # The rate is 0 because other steps use the same weights.
            self._optimizer = torch.optim.AdamW(trained, lr=0.0, fused=True)

    def __call__(self) -> None:
        """The timed step."""
        with path(self.method), torch.set_grad_enabled(self.trains):
            loss = loss_of(self.model(**self.inputs))
            if self.trains:
                loss.backward()
        if self.trains:
            self._optimizer.step()
            self._optimizer.zero_grad(set_to_none=True)

    def cost(self) -> Cost:
        """Count forward and backward pass; the optimizer then makes its state."""
        fixed = [*self.model.parameters(), *self.model.buffers()]
        inputs = [value for value in self.inputs.values() if isinstance(value, torch.Tensor)]
        with path(self.method):
            found = count(lambda: loss_of(self.model(**self.inputs)), fixed, inputs)
        self._optimizer.step()
        self._optimizer.zero_grad(set_to_none=True)
        return found


def compare(
    name: str,
    batch: int,
    methods: tuple[str, ...],
    run: Run,
    ranks: Ranks = USUAL,
    checkpointing: bool = False,
) -> Entry:
    """Every method on one model."""
    work = WORKS[QUICK.get(name, name) if run.quick else name]
    dtype = torch.bfloat16 if run.device.type == "cuda" else torch.float32
    possible = [m for m in methods if unavailable(m, run.device) is None]
    batch = 1 if run.quick else batch
    with run.device:
        base = work.model(dtype)
        if checkpointing:
            checkpoint_activations(base)
        inputs = work.inputs(batch, dtype)
    steps = {m: ModelStep(base, work, m, inputs, ranks) for m in possible}
    trained = {m: step for m, step in steps.items() if step.trains}
    return {
        "title": work.title,
        "batch": batch,
        "dtype": str(dtype).removeprefix("torch."),
        "checkpointing": checkpointing,
        "ranks": {"lora": ranks.lora, "snella": ranks.snella},
        "layers": len(work.paths(base)),
        "cost": {m: step.cost().values() for m, step in trained.items()},
        "trained_bytes": {m: trained_bytes(step.model) for m, step in trained.items()},
        # Counting was the warm-up: a round of a large model takes minutes.
        "seconds": run.time(steps, warmup=0),
        "allocated": allocated_peaks(trained, run.device),
    }


def trainer_step(config_file: str, run: Run) -> Entry:
    """The training script's step on an embedded base, at its config's batch and ranks."""
    with trainer.trainer_steps(config_file) as steps:
        cost = {m: step.cost().values() for m, step in steps.items()}
        seconds = run.time(steps, times=1 if run.quick else 4)
        trained = {
            m: sum(trained_bytes(part) for part in step.components.values())
            for m, step in steps.items()
        }
    return {
        "title": f"the training script with {config_file}",
        "cost": cost,
        "trained_bytes": trained,
        "seconds": seconds,
    }


ENTRIES: dict[str, Measure] = {
    "trainer": partial(trainer_step, "demo.yaml"),
    "trainer-dit": partial(trainer_step, "demo_dit.yaml"),
    "embedded-unet": partial(compare, "embedded-unet", 4, ALL, ranks=EQUAL),
    "embedded-dit": partial(compare, "embedded-dit", 4, ALL, ranks=EQUAL),
    "vit-b": partial(compare, "vit-b", 8, ALL),
    "sd15": partial(compare, "sd15", 1, RIVALS),
}

if __name__ == "__main__":
    sys.exit(main("models", ENTRIES))
