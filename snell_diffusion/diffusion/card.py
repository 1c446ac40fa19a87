"""The model card of a run, README.md: what the adapter is, how to use it, what was measured."""

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import yaml

from snell_diffusion.diffusion.config import TrainConfig
from snell_diffusion.diffusion.config_files import config_values
from snell_diffusion.diffusion.licence import Licence
from snell_diffusion.diffusion.results import RunResult
from snell_diffusion.diffusion.run_folder import kind_of
from snell_diffusion.models import SHIPPED_BASES
from snell_diffusion.training.files import write_text

_CAPTIONS = {
    "samples.png": "Samples during training; the first row is the base model, seeds are the same.",
    "loss.png": "Loss over the steps.",
    "allocation.png": "Share of the update's entries that each layer keeps, through the network.",
}
_NAMES = {"lora": "LoRA", "dora": "DoRA", "shira": "SHiRA", "adalora": "AdaLoRA"}
_PATHS = ("instance_data_dir", "class_data_dir", "validation_data_dir", "output_dir", "cache_dir")
# Where a run was and how it was watched: of no use to a reader of the card.
_LEFT_OUT = {"resume_from_checkpoint", "overwrite", "dry_run", "push_to_hub", "report_to"}

_CARD = """---
{metadata}---
# {prompt}

A {name} adapter for `{base}`, trained on {photos} with {prompts}.{words}

```python
{usage}
pipe({quoted}).images[0].save("picture.png")
```

| | |
|---|---|
| steps, batch, learning rate | {steps}, {batch}, {rate} |
| trainable parameters | {trainable:,} in {layers} layers (base: {base_size:,}) |
| loss on held-out photos, base model -> adapted | {before} -> {after} |{kept}
| time, peak memory | {seconds:.0f} s, {memory:.2f} GiB |
| seed | {seed} |

{pictures}

## Licence

{licence}

## Settings

```yaml
{settings}```
"""


@dataclass(frozen=True)
class Facts:
    """What a card says beyond config and result.

    Attributes:
        pipeline: Class of the base's pipeline.
        licence: Of the base.
        repository: Where the run will be on the hub; None if it is not uploaded.
        absent: Components that the base lacks and that its pipeline wants to be told of.
    """

    pipeline: str
    licence: Licence
    repository: str | None = None
    absent: tuple[str, ...] = ()


def write_card(
    config: TrainConfig, result: RunResult, pictures: Sequence[str], facts: Facts
) -> Path:
    """Write README.md with these pictures of the run folder; returns its path."""
    path = result.output_dir / "README.md"
    shown = "\n\n".join(f"![{_CAPTIONS[name]}]({name})\n\n{_CAPTIONS[name]}" for name in pictures)
    prompt = config.subjects[0].instance_prompt
    photos = next(e["photos"] for e in result.history if e["event"] == "start")
    text = _CARD.format(
        metadata=_metadata(config, pictures, facts),
        base=_base_name(config),
        name=_NAMES.get(config.method, config.method.upper()),
        prompt=prompt,
        prompts=" and ".join(f"`{concept.instance_prompt}`" for concept in config.subjects),
        quoted=repr(prompt),
        photos=f"{photos} photo{'s' if photos > 1 else ''}",
        words=_words(config),
        usage=_usage(config, facts),
        steps=result.step,
        batch=config.train_batch_size,
        rate=config.learning_rate,
        trainable=result.sizes.trainable,
        layers=result.sizes.layers,
        base_size=result.sizes.base,
        before=_number(result.validation_loss_before),
        after=_number(result.validation_loss_after),
        kept=_kept(result),
        seconds=result.seconds,
        memory=result.peak_memory / 2**30,
        seed=config.seed,
        pictures=shown,
        licence=_licence(config, facts.licence),
        settings=yaml.safe_dump(_settings(config), sort_keys=False, allow_unicode=True),
    )
    write_text(path, text)
    return path


def _metadata(config: TrainConfig, pictures: Sequence[str], facts: Facts) -> str:
    """The head of the card that the hub reads."""
    base = config.pretrained_model_name_or_path
    data: dict[str, Any] = {
        # A folder or a base of this package has no page on the hub to link to.
        **({} if base in SHIPPED_BASES or Path(base).exists() else {"base_model": base}),
        "library_name": "diffusers",
        "pipeline_tag": "text-to-image",
        **(facts.licence.entries or {"license": "unknown"}),
        "tags": ["text-to-image", "diffusers", "dreambooth", config.method],
        "instance_prompt": config.subjects[0].instance_prompt,
    }
    if "samples.png" in pictures:
        output = {"url": "samples.png"}
        data["widget"] = [{"text": prompt, "output": output.copy()} for prompt in config.prompts]
    return yaml.safe_dump(data, sort_keys=False, allow_unicode=True)


def _base_name(config: TrainConfig) -> str:
    """The base as others may read it: of a folder only its name."""
    return _last(config.pretrained_model_name_or_path)


def _last(path: str) -> str:
    return Path(path).resolve().name if Path(path).exists() else path


def _words(config: TrainConfig) -> str:
    words = [f"`{entry.partition('=')[0]}`" for entry in config.new_tokens]
    return f" It brings the new words {', '.join(words)}." if words else ""


def _usage(config: TrainConfig, facts: Facts) -> str:
    base = config.pretrained_model_name_or_path
    source = f"snell_diffusion.models.embedded_path({'' if base == 'embedded' else repr(base)})"
    source = source if base in SHIPPED_BASES else repr(_base_name(config))
    source = ", ".join([source, *(f"{name}=None" for name in facts.absent)])
    where = facts.repository or config.output_dir
    kind = kind_of(config.method)
    ours = kind != "lora" or base in SHIPPED_BASES
    load = {
        "ours": f'pipe.load_snella_weights("{where}")',
        "lora": f'pipe.load_lora_weights("{where}")',
    }.get(kind, f'attach(pipe, "{where}")')
    lines = [
        *(["import snell_diffusion"] if ours else []),
        f"from diffusers import {facts.pipeline}",
        *(["from snell_diffusion.diffusion.restore import attach"] if "attach" in load else []),
        "",
        f"pipe = {facts.pipeline}.from_pretrained({source})",
        load,
    ]
    return "\n".join(lines)


def _kept(result: RunResult) -> str:
    if result.kept_step is None:
        return ""
    end = f"{'stopped early' if result.stopped_early else 'ended'} at step {result.step}"
    return f"\n| kept | the best adapter measured, step {result.kept_step}; {end} |"


def _licence(config: TrainConfig, licence: Licence) -> str:
    base = f"`{_base_name(config)}`"
    if licence.name is None:
        return (
            f"The licence of the base {base} is unknown: {licence.reason}. Find out before you "
            f"share this adapter, which is made for that model."
        )
    link = licence.entries.get("license_link")
    return (
        f"The base {base} is under `{licence.name}`{f' ({link})' if link else ''}, by its model "
        f"card. This adapter is made for that model, so the same terms apply."
    )


def _settings(config: TrainConfig) -> dict[str, Any]:
    """All settings that are set, folders of this machine by their names alone."""
    found = {}
    for key, value in config_values(config).items():
        if key in _LEFT_OUT or value is None or value == []:
            continue
        if key == "concepts":
            value = [{k: _told(k, v) for k, v in concept.items()} for concept in value]
        found[key] = _told(key, value)
    return found


def _told(key: str, value: Any) -> Any:
    if isinstance(value, str) and (key in _PATHS or key == "pretrained_model_name_or_path"):
        return _last(value) if key not in _PATHS else Path(value).resolve().name
    return value


def _number(value: float | None) -> str:
    return "not measured" if value is None else f"{value:.4f}"
