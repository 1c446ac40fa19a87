"""Adapter files for tests: of the tiny base's UNet, untrained but with an update that shows."""

import json
import secrets
import time
from pathlib import Path
from typing import Any

import torch

from snell_diffusion.adapters import save_adapter
from snell_diffusion.adapters.tokens import attach_words
from snell_diffusion.tuners.tokens import Word
from tests import tiny_models

PROMPT = "a photo of a sks cat"


def adapter_file(path: Path, seed: int = 1, word: str | None = None, **changes: Any) -> Path:
    """Write an adapter for `tiny_models.pipeline()`.

    Args:
        path: A `.safetensors` file.
        seed: Of its factors.
        word: A new word that comes with it.
        changes: To the UNet's configuration; with any it fits no tiny base.
    """
    parts: dict[str, Any] = {"unet": tiny_models.adapt(tiny_models.sd15_unet(**changes), seed=seed)}
    if word is not None:
        pipe = tiny_models.pipeline()
        rows = torch.randn(1, 32, generator=torch.Generator().manual_seed(seed)) * 0.5
        words = [Word(word, 1)]
        attach_words(pipe.text_encoder, pipe.tokenizer, "default", words, rows, limit=100.0)
        parts["text_encoder"] = pipe.text_encoder
    path.parent.mkdir(parents=True, exist_ok=True)
    return save_adapter(path, parts, metadata={"instance_prompt": PROMPT, "steps": 2})


def finished_run(root: Path, adapter: Path, label: str = "cat, 3 photos") -> str:
    """A run's folder below `root` as a finished training leaves it; returns its id."""
    job = secrets.token_hex(16)
    folder = root / job / "run"
    folder.mkdir(parents=True)
    (folder / "pytorch_snella_weights.safetensors").write_bytes(adapter.read_bytes())
    (folder / "status.json").write_text(json.dumps({"state": "finished", "step": 2, "total": 2}))
    record = {"label": label, "started": time.time(), "pid": 0, "created": 0.0, "began": 0.0}
    (root / job / "job.json").write_text(json.dumps(record))
    return job
