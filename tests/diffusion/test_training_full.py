"""Slow tier: the embedded base on real photos."""

from collections.abc import Callable
from pathlib import Path

import pytest

from snell_diffusion.diffusion.config import TrainConfig
from snell_diffusion.diffusion.training import run

pytestmark = pytest.mark.full


@pytest.mark.parametrize("method, rate", [("snella", 1e-3), ("lora", 3e-4)])
def test_a_real_subject_is_learnt_on_the_embedded_base(
    dreambooth: Callable[[str], Path], tmp_path: Path, method: str, rate: float
) -> None:
    settings = TrainConfig(
        pretrained_model_name_or_path="embedded",
        instance_data_dir=str(dreambooth("dog6")),
        instance_prompt="a photo of a sks dog",
        num_validation_photos=1,
        resolution=64,
        max_train_steps=60,
        learning_rate=rate,
        method=method,
        rank=8,
        output_dir=str(tmp_path / "run"),
    )
    result = run(settings)
    assert result.validation_loss_after < 0.97 * result.validation_loss_before
