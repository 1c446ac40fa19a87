"""Pictures of the cookbook: what the embedded base draws, and rows of a run's sample sheets."""

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from PIL import Image, ImageDraw, ImageFont

from snell_diffusion.training.plots import sheet

STEPS = 20
GUIDANCE = 3.0
LABEL = 132  # width of the column with a row's words, pixels
FONT = 12
AFTER_PET = "a photo of a <chelsea> cat in the snow"
AFTER_BOTH = "a <chelsea> cat on a white background in <print> style"


@dataclass(frozen=True)
class SheetRow:
    """One row of the grid: a run's sample sheet of one step, and words beside it."""

    sheet: Path
    words: Sequence[str]


def open_base() -> Any:
    """The embedded base as a diffusers pipeline, silent."""
    from diffusers import StableDiffusionPipeline
    from diffusers.utils.logging import disable_progress_bar

    import snell_diffusion  # noqa: F401  adds load_snella_weights to the pipeline
    from snell_diffusion.models import embedded_path

    disable_progress_bar()
    pipe = StableDiffusionPipeline.from_pretrained(embedded_path())
    pipe.set_progress_bar_config(disable=True)
    return pipe


def draw(pipe: Any, prompts: Sequence[str]) -> list[Image.Image]:
    """One picture per prompt, 64 x 64 pixels; a prompt's place in the list is its seed."""
    import torch

    noise = [torch.Generator().manual_seed(seed) for seed in range(len(prompts))]
    pictures: list[Image.Image] = pipe(
        list(prompts), num_inference_steps=STEPS, guidance_scale=GUIDANCE, generator=noise
    ).images
    return pictures


def grid(rows: Sequence[SheetRow], cell: int) -> Image.Image:
    """Stack the pictures of several sheets under the first one's prompts, words on the left.

    Args:
        rows: Sheets with one row of pictures each, all with the same prompts.
        cell: Height of a row of pictures on the sheets, with its margin, pixels.

    Raises:
        ValueError: The sheets differ in size, so they show different prompts.
    """
    sheets = [Image.open(row.sheet).convert("RGB") for row in rows]
    sizes = {source.size for source in sheets}
    if len(sizes) != 1:
        raise ValueError(
            f"sheets of one grid must have one size, got {sorted(sizes)}: same prompts?"
        )
    ((width, height),) = sizes
    top = height - cell
    left = _label_width(sheets[0], cell)
    canvas = Image.new("RGB", (LABEL + width - left, top + len(rows) * cell), "white")
    canvas.paste(sheets[0].crop((left, 0, width, top)), (LABEL, 0))
    pen, font = ImageDraw.Draw(canvas), ImageFont.load_default(FONT)
    for number, (row, source) in enumerate(zip(rows, sheets, strict=True)):
        y = top + number * cell
        canvas.paste(source.crop((left, top, width, height)), (LABEL, y))
        middle = (FONT // 2, y + cell // 2)
        pen.multiline_text(middle, "\n".join(row.words), "black", font, anchor="lm", spacing=5)
    return canvas


def _label_width(sheet: Image.Image, cell: int) -> int:
    """Where a sheet's own column of step numbers ends: whole cells fill the rest."""
    return sheet.width % cell


def after_training(pet: Path, style: Path) -> Image.Image:
    """One trained adapter at several scales and sparsities, then with a second one.

    Args:
        pet: Run folder of the pet recipe.
        style: Run folder of the style recipe.
    """
    pipe = open_base()
    pipe.load_snella_weights(pet, adapter_name="pet")
    pipe.load_snella_weights(style, adapter_name="style")
    scales, levels = (0.0, 0.5, 1.0, 1.5), (None, 0.8, 0.95, 0.99)
    pairs = ((1.0, 0.0), (0.0, 1.0), (0.8, 0.8), (1.0, 1.0))
    scaled, sparser, mixed = [], [], []
    for scale in scales:
        pipe.set_snella_adapters("pet", scale)
        scaled += draw(pipe, [AFTER_PET])
    pipe.set_snella_adapters("pet")
    for level in levels:
        pipe.set_snella_sparsity(level, "pet")
        sparser += draw(pipe, [AFTER_PET])
    pipe.set_snella_sparsity(None, "pet")
    for pair in pairs:
        pipe.set_snella_adapters(["pet", "style"], pair)
        mixed += draw(pipe, [AFTER_BOTH])
    return _below(
        sheet([scaled], ["scale"], [str(scale) for scale in scales], 128),
        sheet([sparser], ["sparsity"], ["as trained", *map(str, levels[1:])], 128),
        sheet([mixed], ["pet, style"], [f"{a} and {b}" for a, b in pairs], 128),
    )


def _below(*parts: Image.Image) -> Image.Image:
    """Pictures below each other, aligned on the right."""
    width, height = max(part.width for part in parts), sum(part.height for part in parts)
    canvas = Image.new("RGB", (width, height), "white")
    y = 0
    for part in parts:
        canvas.paste(part, (width - part.width, y))
        y += part.height
    return canvas
