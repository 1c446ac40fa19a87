"""A trained classifier on disk: adapter, head and what they belong to.

pytorch_snella_weights.safetensors     adapter of one of our methods (docs/adapter_format.md)
adapter_model.safetensors, adapter_config.json     adapter of PEFT's methods, in PEFT's format
model/                                 the whole model (method full), a transformers folder
head.safetensors                       the head, and the class token where it was trained
classifier.json                        base, classes, preprocessing: written last
"""

import dataclasses
import json
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

from PIL import Image
from safetensors.torch import save as save_tensors
from torch import Tensor

from snell_diffusion.adapters import WEIGHTS_NAME, adapter_file_bytes
from snell_diffusion.errors import SnellaFileError
from snell_diffusion.training.files import remove, temporary_name, write_json, write_with
from snell_diffusion.vision.config import VisionConfig
from snell_diffusion.vision.data import Preprocess
from snell_diffusion.vision.loading import Base
from snell_diffusion.vision.method import (
    ADAPTER,
    COMPONENT,
    LINEAR_PROBE,
    find_recipe,
    kept_beside,
)

HEAD_FILE, FACTS_FILE, MODEL_FOLDER = "head.safetensors", "classifier.json", "model"
PEFT_WEIGHTS, PEFT_CONFIG = "adapter_model.safetensors", "adapter_config.json"
FILES = (WEIGHTS_NAME, PEFT_WEIGHTS, PEFT_CONFIG, HEAD_FILE, FACTS_FILE)
_FORMAT = 1
PEFT_PREFIX = "base_model.model."


@dataclass(frozen=True)
class Facts:
    """What a saved classifier says about itself.

    Attributes:
        base: Name, folder or hub id of the base.
        revision: Of a hub model.
        base_digest: What `base_digest` says of it, in `precision`.
        precision: What its weights were kept in: no (float32), bf16 or fp16.
        method: The method.
        classes: Class names, in the head's order.
        preprocess: How pictures are shown to it.
    """

    base: str
    revision: str | None
    base_digest: str
    precision: str
    method: str
    classes: tuple[str, ...]
    preprocess: Preprocess

    def to_json(self) -> dict[str, Any]:
        """As plain values."""
        shown = dataclasses.asdict(self.preprocess)
        shown["resample"] = self.preprocess.resample.name.lower()
        return {"format": _FORMAT, **dataclasses.asdict(self), "preprocess": shown}

    @classmethod
    def read(cls, folder: Path) -> "Facts":
        """Read classifier.json of a folder.

        Raises:
            SnellaFileError: It is missing or damaged, or of a newer version.
        """
        path = folder / FACTS_FILE
        try:
            values = json.loads(path.read_text("utf-8"))
            if values.pop("format") != _FORMAT:
                raise SnellaFileError(f"{path} is of a newer version: update snell_diffusion")
            shown = values.pop("preprocess")
            resample = Image.Resampling[shown.pop("resample").upper()]
            three = {name: tuple(shown.pop(name)) for name in ("mean", "std")}
            preprocess = Preprocess(**shown, **three, resample=resample)
            classes = tuple(map(str, values.pop("classes")))
            return cls(**values, classes=classes, preprocess=preprocess)
        except OSError as error:
            raise SnellaFileError(
                f"'{folder}' holds no trained classifier: {FACTS_FILE} cannot be read "
                f"({error.strerror}); give the output_dir of a finished run"
            ) from error
        except (ValueError, KeyError, TypeError, AttributeError) as error:
            if isinstance(error, SnellaFileError):
                raise
            raise SnellaFileError(f"{path} is damaged: {error}") from error


def head_bytes(base: Base, extras: list[str]) -> bytes:
    """The head file."""
    return _packed(kept_beside(base.model, extras))


def _packed(tensors: Mapping[str, Tensor]) -> bytes:
    plain = {name: t.detach().cpu().contiguous().clone() for name, t in tensors.items()}
    return save_tensors(plain, {"format": "pt"})


def adapter_bytes(config: VisionConfig, base: Base, step: int) -> bytes | None:
    """The adapter file as it would be written; None for methods without an adapter."""
    found = find_recipe(config.method)
    if found is None or found.trains_base:
        return None
    if found.ours:
        metadata = {
            "task": "classification",
            "steps": step,
            "learning_rate": config.learning_rate,
            "seed": config.seed,
        }
        origin = {"pipeline": type(base.model).__name__, "source": config.base}
        origin["revision"] = config.revision
        return adapter_file_bytes({COMPONENT: base.model}, ADAPTER, metadata, origin)
    from peft.utils import get_peft_model_state_dict

    tensors = get_peft_model_state_dict(base.model, adapter_name=ADAPTER)
    return _packed({f"{PEFT_PREFIX}{name}": tensor for name, tensor in tensors.items()})


def save_classifier(
    folder: Path, config: VisionConfig, base: Base, facts: Facts, extras: list[str], step: int
) -> Path:
    """Write everything that `load_classifier` reads; each file atomically, classifier.json last.

    Returns:
        The adapter file; for methods without one the folder or file that holds what was trained.
    """
    remove(folder / FACTS_FILE)
    write_with(folder / HEAD_FILE, lambda path: path.write_bytes(head_bytes(base, extras)))
    data, written = adapter_bytes(config, base, step), folder / HEAD_FILE
    found = find_recipe(config.method)
    if data is not None and found is not None:
        written = folder / (WEIGHTS_NAME if found.ours else PEFT_WEIGHTS)
        content = data
        write_with(written, lambda path: path.write_bytes(content))
        if not found.ours:
            write_json(folder / PEFT_CONFIG, _peft_settings(base, config))
    elif config.method != LINEAR_PROBE:
        written = folder / MODEL_FOLDER
        _save_model(written, base)
    write_json(folder / FACTS_FILE, facts.to_json())
    return written


def _peft_settings(base: Base, config: VisionConfig) -> dict[str, Any]:
    """adapter_config.json, as PEFT's own `save_pretrained` writes it."""
    settings = base.model.peft_config[ADAPTER]  # type: ignore[union-attr,index]
    values = settings.to_dict()
    values |= {"base_model_name_or_path": config.base, "inference_mode": True}
    return json.loads(json.dumps(values, default=_plain))


def _plain(value: Any) -> Any:
    return sorted(value) if isinstance(value, (set, frozenset)) else str(value)


def _save_model(target: Path, base: Base) -> None:
    with TemporaryDirectory(prefix=temporary_name("model"), dir=target.parent) as folder:
        base.model.save_pretrained(folder)  # type: ignore[operator]
        remove(target)
        Path(folder).rename(target)
        Path(folder).mkdir()  # for its context to remove
