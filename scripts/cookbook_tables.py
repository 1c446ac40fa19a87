"""Write the generated tables of docs/cookbook.md: what the shown runs measured, what families need.

    python -m scripts.cookbook_tables

The tables stand between `<!-- seen: NAME -->` or `<!-- families -->` and `<!-- end -->`. Numbers of
a recipe are those of docs/cookbook/figures.json (`python -m scripts.cookbook --publish`), memory of
a family is that of docs/memory.json (`python -m scripts.compute_memory`), steps are the configs'.
"""

import json
import re
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from scripts.compute_memory import CONFIGS, names
from scripts.compute_memory import FIGURES as MEMORY
from snell_diffusion.diffusion.config import TrainConfig
from snell_diffusion.diffusion.config_files import make_config, read_config

ROOT = Path(__file__).resolve().parents[1]
PAGE = ROOT / "docs" / "cookbook.md"
FIGURES = ROOT / "docs" / "cookbook" / "figures.json"
SEEN = re.compile(r"(<!-- seen: (\w+) -->\n).*?(<!-- end -->)", re.DOTALL)
FAMILIES = re.compile(r"(<!-- families -->\n).*?(<!-- end -->)", re.DOTALL)
RUNS = {"good": "the recipe", "too_far": "too far"}


def seen(numbers: dict[str, Any]) -> str:
    """Rows of a recipe's picture in numbers, and what its two runs cost, as Markdown."""
    lines = ["| row | run | step | held-out loss | drift |", "|---|---|---|---|---|"]
    for row in numbers["rows"]:
        lines.append(
            f"| {row['verdict']} | {RUNS[row['run']]} | {row['step']} | "
            f"{row['held_out_loss']:.3f} | {row['drift']:.3f} |"
        )
    costs = [
        f"{RUNS[run]} {cost['core_seconds']} core-seconds and {cost['peak_gib']:.2f} GiB"
        for run, cost in numbers["runs"].items()
    ]
    return "\n".join([*lines, "", f"Loading and sample pictures included: {', '.join(costs)}."])


def families() -> Iterator[str]:
    """One line per config of a real base: what it trains, and its computed memory."""
    known = json.loads(MEMORY.read_text("utf-8"))
    yield "| config | family | side | steps | photos per step | rank | GPU memory, computed |"
    yield "|---|---|---|---|---|---|---|"
    for name in names():
        config = make_config(read_config(CONFIGS / f"{name}.yaml"), where=name)
        found = known[name]
        yield (
            f"| [{name}](../configs/dreambooth/{name}.yaml) | `{found['family']}` | "
            f"{config.resolution} | {config.max_train_steps} | {_photos(config)} | {config.rank} | "
            f"{max(found['peaks'].values())} GiB |"
        )


def _photos(config: TrainConfig) -> str:
    """Pictures that one optimizer step of one process learns from, as a sum."""
    own, micros = config.train_batch_size, config.gradient_accumulation_steps
    if not config.with_prior_preservation:
        return str(own * micros)
    prior = (config.class_batch_size or own) if config.uses_class_images else own
    return f"{own * micros} + {prior * micros} for the prior"


def rewrite(text: str) -> str:
    """The page with current tables.

    Raises:
        KeyError: The page names a recipe, or there is a config, of which there are no figures.
    """
    figures = json.loads(FIGURES.read_text("utf-8"))
    text = SEEN.sub(lambda found: f"{found[1]}{seen(figures[found[2]])}\n{found[3]}", text)
    lines = "\n".join(families())
    return FAMILIES.sub(lambda found: f"{found[1]}{lines}\n{found[2]}", text)


if __name__ == "__main__":
    PAGE.write_text(rewrite(PAGE.read_text("utf-8")), "utf-8")
