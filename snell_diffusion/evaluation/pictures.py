"""Pictures of a run: one PNG per prompt and number, and a sheet of them.

Start noise is a function of the prompt's place and the picture's number alone, so that pictures of
different methods and seeds of training can be compared one by one.
"""

import json
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from PIL import Image

from snell_diffusion.evaluation.base import Base
from snell_diffusion.evaluation.plan import Images, Subject
from snell_diffusion.evaluation.prompts import PromptSet, filled
from snell_diffusion.evaluation.records import digest_of
from snell_diffusion.training.files import remove, write_json, write_with
from snell_diffusion.training.plots import sheet
from snell_diffusion.training.randomness import generator

FOLDER, SHEET, PROMPTS = "pictures", "sheet.png", "prompts.json"
_CELL = 128
_NOISE = 0  # seed of the start noise


@dataclass(frozen=True)
class Task:
    """What is drawn for a subject.

    Attributes:
        prompts: With the rare token, as the model is asked.
        plain: The same without it, as CLIP is asked.
        images: How they are drawn.
    """

    prompts: tuple[str, ...]
    plain: tuple[str, ...]
    images: Images

    @classmethod
    def of(cls, subject: Subject, token: str, images: Images, prompts: PromptSet) -> "Task":
        """The subject's prompts: those of things or of living beings, as many as wanted."""
        templates = prompts.of(subject.live, images.prompts)
        return cls(
            tuple(filled(template, token, subject.class_word) for template in templates),
            tuple(filled(template, "", subject.class_word) for template in templates),
            images,
        )

    @property
    def places(self) -> list[tuple[int, int]]:
        """(prompt, number) of every picture, in the order they are drawn."""
        count = self.images.per_prompt
        return [(p, n) for p in range(len(self.prompts)) for n in range(count)]

    def digest(self, trained: str) -> str:
        """Of everything the pictures depend on; `trained` is the digest of the run."""
        drawn = (self.images.per_prompt, self.images.steps, self.images.guidance)
        return digest_of({"run": trained, "prompts": self.prompts, "drawn": drawn})


def draw(base: Base, task: Task, folder: Path) -> None:
    """Draw every picture of a task into `folder/pictures`, and the sheet of some of them."""
    images = task.images
    latents = base.latents(
        [task.prompts[p] for p, _ in task.places],
        [generator(_NOISE, "evaluation", p, n) for p, n in task.places],
        steps=images.steps,
        guidance=images.guidance,
    )
    remove(folder / FOLDER)
    pictures = base.pictures(latents)
    for (p, n), picture in zip(task.places, pictures, strict=True):
        write_with(_file(folder, p, n), picture.save, durable=False)
    write_with(folder / SHEET, _sheet(pictures, task, base.size).save, durable=False)
    write_json(folder / FOLDER / PROMPTS, list(task.prompts), durable=False)


def _file(folder: Path, prompt: int, number: int) -> Path:
    return folder / FOLDER / f"{prompt:02d}-{number:02d}.png"


def read(task: Task, folder: Path) -> list[Image.Image]:
    """The pictures that `draw` wrote, in the order of `task.places`."""
    found = []
    for place in task.places:
        with Image.open(_file(folder, *place)) as picture:
            found.append(picture.convert("RGB"))
    return found


def complete(task: Task, folder: Path) -> bool:
    """Whether every picture of a task is in a folder."""
    return all(_file(folder, *place).is_file() for place in task.places)


def has_any(folder: Path) -> bool:
    """Whether `draw` wrote pictures into a folder."""
    return (folder / FOLDER / PROMPTS).is_file()


def prompts_of(folder: Path) -> list[str]:
    """The prompts of the pictures that `draw` wrote into a folder."""
    return list(json.loads((folder / FOLDER / PROMPTS).read_text("utf-8")))


def one(folder: Path, prompt: int) -> Image.Image:
    """The first picture of a prompt."""
    with Image.open(_file(folder, prompt, 0)) as picture:
        return picture.convert("RGB")


def spread(length: int, count: int) -> list[int]:
    """`count` places, evenly spread over `length`; all of them where there are no more."""
    count = min(count, length)
    return [i * length // count for i in range(count)]


def _sheet(pictures: Sequence[Image.Image], task: Task, size: int) -> Image.Image:
    count = task.images.per_prompt
    columns = spread(len(task.prompts), task.images.sheet)
    rows = [[pictures[p * count + n] for p in columns] for n in range(count)]
    labels = [task.prompts[p] for p in columns]
    return sheet(rows, [""] * count, labels, max(_CELL, min(size, 256)))
