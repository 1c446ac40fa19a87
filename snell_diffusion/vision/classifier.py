"""A trained classifier for inference: base, adapter and head together."""

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import torch
from peft import PeftConfig
from PIL import Image
from safetensors import SafetensorError
from safetensors.torch import load_file
from torch import Tensor, nn

from snell_diffusion.adapters import WEIGHTS_NAME, load_adapter, read_adapter
from snell_diffusion.errors import SnellaBaseError, SnellaFileError, shown
from snell_diffusion.tuners.peft_state import fill_peft_adapter
from snell_diffusion.vision.data import Preprocess
from snell_diffusion.vision.loading import Base, base_digest, load_base
from snell_diffusion.vision.method import ADAPTER, COMPONENT, inject
from snell_diffusion.vision.models import HEAD, Family
from snell_diffusion.vision.saving import (
    HEAD_FILE,
    MODEL_FOLDER,
    PEFT_CONFIG,
    PEFT_PREFIX,
    PEFT_WEIGHTS,
    Facts,
)

__all__ = ["Classifier", "Prediction", "load_classifier"]


@dataclass(frozen=True)
class Prediction:
    """What a classifier says of one picture.

    Attributes:
        label: The likeliest class.
        probability: Its share, 0 to 1.
        ranked: All classes with their shares, likeliest first.
    """

    label: str
    probability: float
    ranked: list[tuple[str, float]]


class Classifier(nn.Module):
    """A model with what it needs to name what is on a picture.

    Args:
        family: How it is asked.
        model: The model of transformers, adapter and head in it.
        classes: Class names.
        preprocess: How pictures are shown to it.
    """

    def __init__(
        self, family: Family, model: nn.Module, classes: Sequence[str], preprocess: Preprocess
    ) -> None:
        super().__init__()
        self.family, self.model = family, model
        self.classes, self.preprocess = tuple(classes), preprocess

    def forward(self, pixels: Tensor) -> Tensor:
        """Scores [B, classes] of pixels [B, 3, S, S], as `preprocess.eval` makes them."""
        return self.family.logits(self.model, pixels)

    @torch.no_grad()
    def predict(self, images: Sequence[Image.Image], batch: int = 64) -> list[Prediction]:
        """Name what is on pictures.

        Args:
            images: RGB pictures of any size.
            batch: How many at once, at least 1.
        """
        was_training = self.training
        self.eval()
        device = next(self.model.parameters()).device
        found: list[Prediction] = []
        for start in range(0, len(images), batch):
            some = [self.preprocess.eval(image) for image in images[start : start + batch]]
            shares = self(torch.stack(some).to(device)).float().softmax(-1).cpu()
            found += [self._named(row) for row in shares]
        self.train(was_training)
        return found

    def _named(self, shares: Tensor) -> Prediction:
        order = shares.argsort(descending=True).tolist()
        ranked = [(self.classes[i], float(shares[i])) for i in order]
        return Prediction(*ranked[0], ranked)


def load_classifier(
    folder: str | Path, base: str | None = None, device: str | torch.device = "cpu"
) -> Classifier:
    """Put together what a finished run left.

    Args:
        folder: Its output_dir.
        base: Name, folder or hub id of the base, where it is not the one that the run names.
        device: Where the classifier shall compute.

    Returns:
        The classifier, in eval mode.

    Raises:
        SnellaFileError: The folder holds no trained classifier, or a part is damaged.
        SnellaKeyError, SnellaShapeError: Tensors of the adapter do not fit the base.
        SnellaBaseError: The base cannot be loaded or is another one.
    """
    folder = Path(folder)
    facts = Facts.read(folder)
    whole = (folder / MODEL_FOLDER).is_dir()
    name = str(folder / MODEL_FOLDER) if whole else base or facts.base
    loaded = load_base(
        name,
        len(facts.classes),
        revision=None if base or whole else facts.revision,
        precision="no" if whole else facts.precision,
    )
    if not whole and base_digest(loaded.model) != facts.base_digest:
        raise SnellaBaseError(
            f"'{name}' is not the base that '{folder}' was trained on ({facts.base}): its weights "
            f"differ; give the right one with base"
        )
    model = loaded.model.float()
    _put_head(model, folder / HEAD_FILE)
    _put_adapter(loaded, folder)
    model.requires_grad_(False).eval()
    classifier = Classifier(loaded.family, model, facts.classes, facts.preprocess)
    return classifier.to(device).eval()


def _tensors(path: Path) -> dict[str, Tensor]:
    try:
        return load_file(path)
    except (OSError, SafetensorError) as error:
        raise SnellaFileError(f"{path} cannot be read: {error}") from error


@torch.no_grad()
def _put_head(model: nn.Module, path: Path) -> None:
    live = dict(model.named_parameters())
    tensors = _tensors(path)
    missing = [n for n in live if n.startswith(f"{HEAD}.") and n not in tensors]
    if missing:
        raise SnellaFileError(f"{path}: expected the whole head, {shown(missing)} are missing")
    for name, value in tensors.items():
        if name not in live or live[name].shape != value.shape:
            expected = tuple(live[name].shape) if name in live else "no such tensor"
            raise SnellaFileError(
                f"{path}: {name}: expected {expected} as in the base, got {tuple(value.shape)}"
            )
        if not bool(torch.isfinite(value.float()).all()):
            raise SnellaFileError(f"{path}: tensor {name} holds NaN or infinite values")
        live[name].copy_(value)


def _put_adapter(base: Base, folder: Path) -> None:
    if (folder / WEIGHTS_NAME).is_file():
        load_adapter({COMPONENT: base.model}, read_adapter(folder / WEIGHTS_NAME), ADAPTER)
    elif (folder / PEFT_WEIGHTS).is_file():
        path = folder / PEFT_CONFIG
        try:
            settings = PeftConfig.from_pretrained(str(folder))
        except (OSError, ValueError, TypeError) as error:
            raise SnellaFileError(f"{path} cannot be read: {error}") from error
        inject(base.model, settings, seed=0)
        tensors = _tensors(folder / PEFT_WEIGHTS)
        named = {name.removeprefix(PEFT_PREFIX): value for name, value in tensors.items()}
        fill_peft_adapter(base.model, named, ADAPTER, str(folder / PEFT_WEIGHTS))
