"""Made-up results of a comparison, for pages and their files."""

import io
from typing import Any

from PIL import Image

from snell_diffusion.evaluation.records import Record
from snell_diffusion.evaluation.results import Personalization

METHODS = ("lora", "ours", '<b>odd & "name"</b> | x')
ABOUT = {
    "command": "python -m snell_diffusion.evaluation personalization --config plan.yaml",
    "date": "2026-01-02 03:04 UTC",
    "machine": "a <i>processor</i>",
    "threads": 1,
    "torch": "2.13.0",
    "python": "3.11.9",
}
PLAN: dict[str, Any] = {
    "base": "embedded",
    "reference": "lora",
    "methods": {name: {} for name in METHODS},
    "seeds": [0, 1],
    "images": {"prompts": 3, "per_prompt": 2, "steps": 10, "guidance": 3.0, "sheet": 2},
    "tune": {"subjects": ["fox"], "seed": 7},
}


def record(method: str, subject: str, seed: int, after: float, drift: float, **more: Any) -> Record:
    """A run that went from loss 1 to `after`."""
    values: dict[str, Any] = {
        "digest": "d",
        "learning_rate": 1e-3,
        "loss_before": 1.0,
        "loss_after": after,
        "drift": drift,
        "trainable": 1000,
        "stored_bytes": 4096,
        "seconds": 5.0,
        "peak_bytes": 2**20,
        "curve": [[0, 1.0], [10, after]],
        "scores": {"diversity": {"value": 0.5 + after / 10, "space": "VAE latents"}},
    }
    return Record(method, subject, seed, **{**values, **more})


def picture(kind: str, color: str = "red") -> bytes:
    """A small picture as bytes."""
    data = io.BytesIO()
    Image.new("RGB", (40, 30), color).save(data, kind)
    return data.getvalue()


def results() -> Personalization:
    """Three methods on two subjects with two seeds; "ours" is best in loss in every run."""
    losses = {METHODS[0]: 0.8, METHODS[1]: 0.7, METHODS[2]: 0.9}
    records = [
        record(method, subject, seed, loss + seed / 100, 0.1 * (1.1 - loss), kept=[["l", 1, 4]])
        for method, loss in losses.items()
        for subject in ("cat", "dog")
        for seed in (0, 1)
    ]
    trials = [
        record(method, "fox", 7, loss * rate, 0.01, learning_rate=rate)
        for method, loss in losses.items()
        for rate in (0.5, 1.0, 2.0)
    ]
    return Personalization(
        about=dict(ABOUT),
        plan=PLAN,
        records=[*records, record("lora", "dog", 2, 0.0, 0.0, failed="the loss is nan")],
        trials=trials,
        base=[record("base", "cat", 0, 1.0, 0.0)],
        kept={"ours": [("unet.down_blocks.0.to_q", 0.25), ("unet.mid_block.to_q", 0.75)]},
        sheets={"cat": picture("WEBP"), "dog": picture("WEBP", "blue")},
        maps={"ours": picture("PNG")},
    )
