"""Scores of the exported ViT: fresh scenes, and its frozen features on digits it never saw."""

import json
from pathlib import Path

import numpy as np
import torch
from embedded_base.data import NATURAL
from PIL import Image
from torch import Tensor
from transformers import ViTForImageClassification

from .painter import Batch, ScenePainter, paint_batch
from .training import CLASSIFIED, SceneNet, to_input
from .world import COLOR_NAMES, IGNORED, OBJECTS

SHOTS = (1, 2, 4, 8, 16)  # labelled pictures per class


@torch.no_grad()
def _answers(net: SceneNet, x: Tensor) -> list[dict[str, Tensor]]:
    return [net(part) for part in x.split(100)]


def scene_scores(
    net: SceneNet, painter: ScenePainter, seed: int, pictures: int, held_out: bool
) -> dict[str, float]:
    """Share right per question, and mean absolute errors of the geometry, on new scenes.

    Args:
        held_out: Only combinations of object, colour and place that training never saw.
    """
    rng = np.random.default_rng([seed, 2, held_out])
    batch = paint_batch(painter, rng, pictures, held_out)
    parts = _answers(net, to_input(batch.images))
    scores: dict[str, float] = {"pictures": pictures}
    for k, name in enumerate(CLASSIFIED):
        guess = torch.cat([p[name] for p in parts]).argmax(1).numpy()
        asked = batch.labels[:, k] != IGNORED
        scores[name] = round(float((guess == batch.labels[:, k])[asked].mean()), 4)
    right = torch.cat([p["object"] for p in parts]).argmax(1).numpy() == batch.labels[:, 0]
    color = batch.labels[:, 1]
    natural = color == COLOR_NAMES.index(NATURAL)
    kinds = {"own colours": natural, "colour word": ~natural & (color != IGNORED)}
    kinds["two-tone"] = color == IGNORED
    for name, rows in kinds.items():
        if rows.any():
            scores[f"object, {name}"] = round(float(right[rows].mean()), 4)
    error = np.abs(torch.cat([p["geometry"] for p in parts]).numpy() - batch.geometry)
    scores["centre error in pixels"] = round(float(error[:, :2].mean() * 32), 2)
    scores["size error in pixels"] = round(float(error[:, 2].mean() * 64), 2)
    return scores


@torch.no_grad()
def features(model: ViTForImageClassification, x: Tensor) -> np.ndarray:
    """The class token that the head reads, (B, 192)."""
    tokens = [model.vit(pixel_values=part).last_hidden_state[:, 0] for part in x.split(100)]
    return torch.cat(tokens).numpy()


def digits_input() -> tuple[Tensor, np.ndarray]:
    """scikit-learn's 1797 digits, 8x8 in [0, 16], enlarged to 64x64 in [-1, 1], and labels."""
    from sklearn.datasets import load_digits

    data = load_digits()
    x = torch.from_numpy(data.images).float()[:, None] / 8 - 1
    x = torch.nn.functional.interpolate(x, size=64, mode="bilinear", antialias=False)
    return x.expand(-1, 3, -1, -1).contiguous(), data.target


def digits_scores(model: ViTForImageClassification, seed: int) -> dict[str, object]:
    """Linear probe and 5 nearest neighbours on frozen features, half train, half test.

    The probe is a logistic regression (C 1 on standardised features). The 64 raw pixels and the
    same network with random weights stand beside it. Few-shot: n labelled digits per class, the
    mean of five draws, the same test half.
    """
    from sklearn.linear_model import LogisticRegression
    from sklearn.model_selection import train_test_split
    from sklearn.neighbors import KNeighborsClassifier
    from sklearn.pipeline import make_pipeline
    from sklearn.preprocessing import StandardScaler

    x, y = digits_input()
    pixels = torch.nn.functional.avg_pool2d(x[:, :1], 8).flatten(1).numpy()
    parts = train_test_split(np.arange(len(y)), test_size=0.5, random_state=seed, stratify=y)
    train, test = parts

    def probe(z: np.ndarray, rows: np.ndarray) -> float:
        model = make_pipeline(StandardScaler(), LogisticRegression(max_iter=2000))
        return float(model.fit(z[rows], y[rows]).score(z[test], y[test]))

    def neighbours(z: np.ndarray) -> float:
        scaler = StandardScaler().fit(z[train])
        knn = KNeighborsClassifier(5, metric="cosine").fit(scaler.transform(z[train]), y[train])
        return float(knn.score(scaler.transform(z[test]), y[test]))

    def few_shot(z: np.ndarray, shots: int) -> float:
        draws = []
        for k in range(5):
            rng = np.random.default_rng([seed, 3, shots, k])
            rows = [rng.choice(train[y[train] == c], shots, replace=False) for c in range(10)]
            draws.append(probe(z, np.concatenate(rows)))
        return float(np.mean(draws))

    result: dict[str, object] = {"train": len(train), "test": len(test)}
    torch.manual_seed(seed)
    untrained = ViTForImageClassification(model.config).eval()
    inputs = {
        "features": features(model, x),
        "features of random weights": features(untrained, x),
        "pixels": pixels,
    }
    for name, z in inputs.items():
        result[name] = {
            "linear probe": round(probe(z, train), 4),
            "5 nearest neighbours": round(neighbours(z), 4),
            "linear probe by shots": {n: round(few_shot(z, n), 4) for n in SHOTS},
        }
    return result


def draw_scenes(painter: ScenePainter, rng: np.random.Generator, folder: Path) -> Batch:
    """Write 80 held-out scenes as `scenes.png`, 16 in a row, and their objects as `scenes.json`."""
    batch = paint_batch(painter, rng, 80, held_out=True)
    rows = batch.images.reshape(5, 16, 64, 64, 3).transpose(0, 2, 1, 3, 4).reshape(320, 1024, 3)
    Image.fromarray(rows).save(folder / "scenes.png", optimize=True)
    names = [OBJECTS[k] for k in batch.labels[:, 0]]
    (folder / "scenes.json").write_text(json.dumps(names, indent=1) + "\n")
    return batch


@torch.no_grad()
def sheet_scores(model: ViTForImageClassification, sheet: Batch) -> dict[str, float]:
    """Share of right objects of the exported model on the scenes of `draw_scenes`."""
    guess = model(to_input(sheet.images)).logits.argmax(1).numpy()
    return {"pictures": len(guess), "object": float((guess == sheet.labels[:, 0]).mean())}
