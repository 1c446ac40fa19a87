"""What a finished run leaves: the adapter file; its model card is in card.py."""

import errno
from dataclasses import dataclass
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

from peft.utils import get_peft_model_state_dict
from safetensors import SafetensorError
from torch import nn

from snell_diffusion.adapters import save_adapter
from snell_diffusion.adapters.export_tokens import write_embeds
from snell_diffusion.adapters.tokens import TENSOR, describe_tokens
from snell_diffusion.diffusion.config import TrainConfig
from snell_diffusion.diffusion.restore import save_foreign
from snell_diffusion.diffusion.run_folder import kind_of
from snell_diffusion.diffusion.setup import ADAPTER, Sizes
from snell_diffusion.training.files import temporary_name, write_with
from snell_diffusion.tuners.tokens import Word


@dataclass(frozen=True)
class RunResult:
    """What `run` returns.

    Attributes:
        output_dir: The run folder.
        adapter_path: The adapter file; None after a dry run.
        validation_loss_before: Held-out loss of the base model; None without held-out photos.
        validation_loss_after: The same with the trained adapter.
        history: Every event of this process, as in log.jsonl.
        seconds: Wall time of this process's part of the run, loading included.
        peak_memory: Most memory in bytes: GPU tensors on CUDA, else resident memory of the process.
        sizes: Layers and parameters.
        step: The last optimizer step.
        kept_step: The step whose adapter was kept, where early stopping chose it.
        stopped_early: Whether early stopping ended the run.
    """

    output_dir: Path
    adapter_path: Path | None
    validation_loss_before: float | None
    validation_loss_after: float | None
    history: list[dict[str, Any]]
    seconds: float
    peak_memory: int
    sizes: Sizes
    step: int = 0
    kept_step: int | None = None
    stopped_early: bool = False


def save_result(
    config: TrainConfig, pipe: Any, components: dict[str, nn.Module], path: Path, step: int
) -> None:
    """Write the adapter file of the run, as it was after optimizer step `step`, atomically."""
    kind = kind_of(config.method)
    if kind != "ours":
        if kind == "lora":
            _save_lora(components, path, type(pipe))
        else:
            save_foreign(config.method, components, path)
        _save_words(components, path.parent)
        return
    metadata = {
        "instance_prompt": config.subjects[0].instance_prompt,
        "class_prompt": config.subjects[0].class_prompt or "",
        "steps": step,
        "learning_rate": config.learning_rate,
        "resolution": config.resolution,
        "seed": config.seed,
    }
    base = {
        "pipeline": type(pipe).__name__,
        "source": config.pretrained_model_name_or_path,
        "revision": config.revision,
    }
    save_adapter(path, components, ADAPTER, metadata=metadata, base=base)


def _save_lora(components: dict[str, nn.Module], path: Path, pipeline: type) -> None:
    from diffusers.utils import convert_state_dict_to_diffusers

    components = {n: model for n, model in components.items() if hasattr(model, "peft_config")}
    layers = {
        f"{name}_lora_layers": convert_state_dict_to_diffusers(
            get_peft_model_state_dict(model, adapter_name=ADAPTER)
        )
        for name, model in components.items()
    }
    metadata = {
        f"{name}_lora_adapter_metadata": model.peft_config[ADAPTER].to_dict()  # type: ignore[union-attr,index]
        for name, model in components.items()
    }

    def write(file: Path) -> None:
        # Through a folder of our own: safetensors has temporary names that nothing would sweep.
        with TemporaryDirectory(prefix=temporary_name("lora"), dir=file.parent) as folder:
            try:
                pipeline.save_lora_weights(  # type: ignore[attr-defined]
                    folder, weight_name=file.name, **layers, **metadata
                )
            except SafetensorError as error:
                raise OSError(errno.EIO, str(error)) from error
            (Path(folder) / file.name).replace(file)

    write_with(path, write)


def _save_words(components: dict[str, nn.Module], folder: Path) -> None:
    """New words beside a LoRA, whose file has no place for them."""
    tokens, tensors = describe_tokens(components, ADAPTER)
    if tokens is not None:
        words = [Word(**word) for word in tokens["words"]]
        classes = {name: row["class"] for name, row in tokens["encoders"].items()}
        rows = {name: tensors[f"{name}.{TENSOR}"] for name in classes}
        write_embeds(folder, words, rows, classes)
