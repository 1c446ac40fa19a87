"""What a finished run leaves: the adapter file and a model card."""

import errno
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

from peft.utils import get_peft_model_state_dict
from safetensors import SafetensorError
from torch import nn

from snell_diffusion.adapters import save_adapter
from snell_diffusion.diffusion.config import TrainConfig
from snell_diffusion.diffusion.setup import ADAPTER, Sizes
from snell_diffusion.training.files import temporary_name, write_text, write_with


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
    """

    output_dir: Path
    adapter_path: Path | None
    validation_loss_before: float | None
    validation_loss_after: float | None
    history: list[dict[str, Any]]
    seconds: float
    peak_memory: int
    sizes: Sizes


def save_result(
    config: TrainConfig, pipe: Any, components: dict[str, nn.Module], path: Path
) -> None:
    """Write the adapter file of the run to `path`, atomically."""
    if config.method == "lora":
        _save_lora(components, path, type(pipe))
        return
    metadata = {
        "instance_prompt": config.subjects[0].instance_prompt,
        "class_prompt": config.subjects[0].class_prompt or "",
        "steps": config.max_train_steps,
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


def write_card(config: TrainConfig, result: RunResult, pictures: Sequence[str]) -> Path:
    """Write README.md, the model card: what it is, how to use it, what was measured."""
    path = result.output_dir / "README.md"
    shown = "\n\n".join(f"![{_CAPTIONS[name]}]({name})\n\n{_CAPTIONS[name]}" for name in pictures)
    write_text(path, _CARD.format(**_card_values(config, result), pictures=shown))
    return path


_CAPTIONS = {
    "samples.png": "Samples during training; the first row is the start, seeds are the same.",
    "loss.png": "Loss over the steps.",
    "allocation.png": "Share of the update's entries that each layer keeps, through the network.",
}

_CARD = """---
base_model: {base}
library_name: diffusers
tags: [text-to-image, diffusers, dreambooth, {method}]
instance_prompt: "{prompt}"
---
# {prompt}

A {name} adapter for `{base}`, trained on {photos} with `{prompt}`.

```python
{usage}
pipe("{prompt}").images[0].save("picture.png")
```

| | |
|---|---|
| steps, batch, learning rate | {steps}, {batch}, {rate} |
| trainable parameters | {trainable:,} in {layers} layers (base: {base_size:,}) |
| loss on held-out photos, base model -> adapted | {before} -> {after} |
| time, peak memory | {seconds:.0f} s, {memory:.2f} GiB |
| seed | {seed} |

All settings: [config.yaml](config.yaml). Every step: [log.jsonl](log.jsonl).

{pictures}
"""

_USAGE = {
    "snella": """import snell_diffusion
from diffusers import StableDiffusionPipeline

pipe = StableDiffusionPipeline.from_pretrained({source})
pipe.load_snella_weights("{folder}")""",
    "lora": """from diffusers import StableDiffusionPipeline

pipe = StableDiffusionPipeline.from_pretrained({source})
pipe.load_lora_weights("{folder}")""",
}


def _card_values(config: TrainConfig, result: RunResult) -> dict[str, Any]:
    base = config.pretrained_model_name_or_path
    source = "snell_diffusion.models.embedded_path()" if base == "embedded" else f'"{base}"'
    photos = next(e["photos"] for e in result.history if e["event"] == "start")
    return {
        "base": base,
        "method": config.method,
        "name": {"snella": "SNELLA", "lora": "LoRA"}[config.method],
        "prompt": config.subjects[0].instance_prompt,
        "photos": f"{photos} photo{'s' if photos > 1 else ''}",
        "usage": _USAGE[config.method].format(source=source, folder=config.output_dir),
        "steps": config.max_train_steps,
        "batch": config.train_batch_size,
        "rate": config.learning_rate,
        "trainable": result.sizes.trainable,
        "layers": result.sizes.layers,
        "base_size": result.sizes.base,
        "before": _number(result.validation_loss_before),
        "after": _number(result.validation_loss_after),
        "seconds": result.seconds,
        "memory": result.peak_memory / 2**30,
        "seed": config.seed,
    }


def _number(value: float | None) -> str:
    return "not measured" if value is None else f"{value:.4f}"
