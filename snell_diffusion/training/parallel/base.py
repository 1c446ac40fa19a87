"""What the training loop asks of a parallel strategy; the strategies are the files beside this one.

One rule holds for all of them: **adapters are whole on every process**. A strategy may shard the
frozen base and the optimizer's state, but trainable parameters and, from `average_gradients` until
the next `zero_grad`, their gradients are complete matrices with the same bits everywhere. Scores,
thresholds, clipping, averages and checkpoints are then the code of one process.
"""

import hashlib
import json
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import Any, ClassVar

import torch
from accelerate import Accelerator
from torch import Tensor, nn

from snell_diffusion.training.errors import DivergedError


def digest_of(*values: Any) -> str:
    """SHA-256 in hex of plain JSON values, for `Parallel.require_equal`."""
    return hashlib.sha256(json.dumps(values, sort_keys=True).encode()).hexdigest()


class Parallel:
    """One way to share a run between processes.

    A run calls `divide` once, when the adapters are in the base, if `shares_forward`; `prepare`
    once, with the optimizer; then in each step `backward` per micro-batch, `average_gradients` and
    `step`. Every process makes the same calls in the same order.

    Args:
        accelerator: Devices and process group, already running.

    Attributes:
        name: What users read: none, DDP, FSDP, DeepSpeed.
        shares_forward: A forward pass needs every process (parts of the base lie elsewhere), so
            pictures are drawn by all of them and kept by the main one.
    """

    name: ClassVar[str]
    shares_forward: ClassVar[bool] = False

    def __init__(self, accelerator: Accelerator) -> None:
        self.accelerator = accelerator

    @property
    def world(self) -> int:
        """Processes in all, at least 1."""
        return self.accelerator.num_processes

    @property
    def rank(self) -> int:
        """Which of them this is, from 0."""
        return self.accelerator.process_index

    @property
    def main(self) -> bool:
        """Whether this process writes files."""
        return self.accelerator.is_main_process

    @property
    def device(self) -> torch.device:
        """Where this process computes."""
        return self.accelerator.device

    # Once

    def divide(self, components: Mapping[str, nn.Module]) -> None:
        """Keep this process's part of the frozen base, adapters whole, both on `device`.

        They come on the CPU, with equal weights on every process, and stay the same objects.
        Whole models (not `shares_forward`) do not come here: they move when a phase needs them.
        """

    def prepare(
        self, components: Mapping[str, nn.Module], optimizer: torch.optim.Optimizer
    ) -> torch.optim.Optimizer:
        """The optimizer to use in place of `optimizer`, over the same parameters.

        Its `state_dict` and `load_state_dict` are about whole matrices; every process calls them.
        """
        return optimizer

    # In each step

    def backward(self, loss: Tensor) -> None:
        """Add the gradients of one micro-batch to the parameters'; `loss` is already scaled."""
        loss.backward()

    def average_gradients(self, parameters: Sequence[nn.Parameter]) -> None:
        """Give every parameter the mean of its whole gradient over all processes.

        In one exchange: adapters are small. A parameter without gradient on this process counts as
        zero here, since another process may have one.
        """
        if self.world == 1:
            return
        grads = [torch.zeros_like(p) if p.grad is None else p.grad for p in parameters]
        flat = self.mean(torch.cat([g.flatten() for g in grads]))
        for parameter, part in zip(parameters, flat.split([g.numel() for g in grads]), strict=True):
            parameter.grad = part.view_as(parameter)

    def step(self, optimizer: torch.optim.Optimizer, scaler: torch.amp.GradScaler) -> None:
        """Update the parameters from their (unscaled) gradients."""
        scaler.step(optimizer)
        scaler.update()

    # Exchanges

    def mean(self, tensor: Tensor) -> Tensor:
        """The mean of a tensor over all processes, the same bits on each of them."""
        if self.world == 1:
            return tensor
        mean: Tensor = self.accelerator.reduce(tensor, reduction="mean")
        return mean

    def wait(self) -> None:
        """Wait until every process is here."""
        self.accelerator.wait_for_everyone()

    def require_equal(self, digest: str, what: str) -> None:
        """Refuse to go on, on every process, if a SHA-256 in hex is not the same on all of them.

        Raises:
            DivergedError: Names `what` and who has which digest.
        """
        if self.world == 1:
            return
        mine = torch.tensor(list(bytes.fromhex(digest)), dtype=torch.uint8, device=self.device)
        rows = self.accelerator.gather(mine).view(self.world, -1).cpu()
        if bool((rows == rows[0]).all()):
            return
        found = ", ".join(
            f"{rank}: {bytes(row.tolist()).hex()[:12]}" for rank, row in enumerate(rows)
        )
        raise DivergedError(
            f"the processes disagree about {what} (process: digest {found}); they would train "
            f"different models. Give all of them the same files, settings, package versions and "
            f"kind of device, then continue with --resume_from_checkpoint latest"
        )

    # Saving

    @contextmanager
    def as_loaded(self, components: Mapping[str, nn.Module]) -> Iterator[None]:
        """Inside, models report the classes they were loaded with, for files that name them."""
        yield
