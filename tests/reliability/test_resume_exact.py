"""A run stopped in the middle of an epoch and resumed gives the file of one never stopped."""

import itertools
import os
import signal
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from snell_diffusion.diffusion.config import TrainConfig
from snell_diffusion.training.tracking import Tracker
from tests.diffusion.training_runs import CLASS_PROMPT
from tests.reliability import harness
from tests.reliability.harness import require_same_result, resumed, small_run

pytestmark = pytest.mark.row("R5")

STEPS = 4  # with 4 photos and a batch of 1, an epoch ends at step 4 or, accumulating, 2
# Everything that has a memory besides weights and optimizer, and all that draws at random.
MEMORY: dict[str, Any] = {
    "ema_decay": 0.9,
    "dropout": 0.1,
    "lr_scheduler": "cosine",
    "lr_warmup_steps": 1,
    "alloc_init_warmup": 0,
    "alloc_final_warmup": 1,
    "alloc_interval": 1,
    "init_sparsity": 0.2,
    "target_sparsity": 0.7,
}


def stop_after(step: int) -> Callable[[], None]:
    """An installer: SIGTERM while the step is being recorded; the state is saved after it."""

    def install() -> None:
        record = Tracker.step

        def signalled(self: Tracker, at: int, **numbers: object) -> None:
            record(self, at, **numbers)
            if at == step:
                os.kill(os.getpid(), signal.SIGTERM)

        Tracker.step = signalled  # type: ignore[method-assign]

    return install


def stop(settings: TrainConfig, step: int) -> None:
    outcome = harness.run_script(settings, stop_after(step))
    assert outcome.code == 143, outcome.said[-3000:]
    assert harness.published(Path(settings.output_dir)) == [step]


def require_exact(base: Path, folder: Path, stops: list[int], **changes: Any) -> None:
    """Stop after each of these steps and resume; compare with a run that went through."""
    changes = {"checkpointing_steps": None, **MEMORY, **changes}
    whole = small_run(base, folder / "whole", **changes)
    parts = small_run(base, folder / "parts", **changes)
    harness.train_to_the_end(whole)
    stop(parts, stops[0])
    for step in stops[1:]:
        stop(resumed(parts), step)
    harness.train_to_the_end(resumed(parts))
    folders = [Path(settings.output_dir) for settings in (whole, parts)]
    require_same_result(parts, harness.adapter_digest(folders[0]))
    assert harness.losses(folders[1]) == harness.losses(folders[0])
    for name in ("adapter", "optimizer", "ema", "competition"):
        files = [
            f / f"checkpoints/step-{whole.max_train_steps:06d}/{name}.safetensors" for f in folders
        ]
        assert files[0].read_bytes() == files[1].read_bytes(), name


@pytest.mark.parametrize(
    "accumulation, workers, text_encoder, augmented",
    list(itertools.product((1, 2), (0, 2), (False, True), (False, True))),
)
def test_mid_epoch(
    tiny_base: Path,
    tmp_path: Path,
    accumulation: int,
    workers: int,
    text_encoder: bool,
    augmented: bool,
) -> None:
    require_exact(
        tiny_base,
        tmp_path,
        [3 if accumulation == 1 else 1],
        max_train_steps=STEPS,
        gradient_accumulation_steps=accumulation,
        dataloader_num_workers=workers,
        train_text_encoder=text_encoder,
        random_flip=augmented,
        center_crop=not augmented,
        cache_latents=False,  # workers decode photos, which a cache makes needless
    )


def test_chain_of_five_resumes(tiny_base: Path, tmp_path: Path) -> None:
    require_exact(
        tiny_base,
        tmp_path,
        [1, 2, 3, 5, 6],
        max_train_steps=7,
        gradient_accumulation_steps=2,
        train_text_encoder=True,
        random_flip=True,
        with_prior_preservation=True,
        class_prompt=CLASS_PROMPT,
        num_class_images=2,
    )
