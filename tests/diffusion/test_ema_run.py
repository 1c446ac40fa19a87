"""An average that is kept is measured, drawn and saved; training goes on with the live values."""

from pathlib import Path

import torch
from safetensors.torch import load_file

from snell_diffusion.diffusion.training import run
from snell_diffusion.training.checkpoints import CheckpointFolder
from tests.diffusion.training_runs import PROMPT, config


def test_the_file_holds_the_average(tiny_base: Path, tmp_path: Path) -> None:
    options = {"checkpointing_steps": 4, "validation_prompt": PROMPT, "learning_rate": 0.1}
    averaged = run(config(tiny_base, tmp_path / "a", ema_decay=0.9, **options))
    live = run(config(tiny_base, tmp_path / "b", **options))
    checkpoint = CheckpointFolder(averaged.output_dir / "checkpoints", None).latest(print)
    assert checkpoint is not None
    assert averaged.adapter_path is not None
    assert live.adapter_path is not None
    saved, plain = load_file(averaged.adapter_path), load_file(live.adapter_path)
    names = [name for name in checkpoint.tensors["ema"] if "snella_A" in name]
    shadow = {name: checkpoint.tensors["ema"][name] for name in names}
    trained = {name: checkpoint.tensors["adapter"][name] for name in names}
    assert names
    for name in names:
        assert any(torch.equal(shadow[name], tensor) for tensor in saved.values()), name
        assert not torch.equal(shadow[name], trained[name])
        # The average changes nothing that trains.
        assert any(torch.equal(trained[name], tensor) for tensor in plain.values()), name
    assert averaged.validation_loss_after != live.validation_loss_after
    samples = [(r.output_dir / "samples.png").read_bytes() for r in (averaged, live)]
    assert samples[0] != samples[1]
