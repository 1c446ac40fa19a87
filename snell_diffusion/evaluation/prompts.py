"""The prompts of the DreamBooth protocol (arXiv:2208.12242): 25 for objects, 25 for live subjects.

`{0}` is the rare token, `{1}` the class word. The public data set has them, with the class of each
subject, in `prompts_and_classes.txt`; `read_prompts` reads that file, and `PROMPTS` has the same
sentences for those who do not have it.
"""

import re
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from snell_diffusion.errors import SnellaConfigError

_SHARED = (
    "in the jungle",
    "in the snow",
    "on the beach",
    "on a cobblestone street",
    "on top of pink fabric",
    "on top of a wooden floor",
    "with a city in the background",
    "with a mountain in the background",
    "with a blue house in the background",
    "on top of a purple rug in a forest",
)
_OBJECT = (
    "with a wheat field in the background",
    "with a tree and autumn leaves in the background",
    "with the Eiffel Tower in the background",
    "floating on top of water",
    "floating in an ocean of milk",
    "on top of green grass with sunflowers around it",
    "on top of a mirror",
    "on top of the sidewalk in a crowded street",
    "on top of a dirt road",
    "on top of a white rug",
)
_LIVE = (
    "wearing a red hat",
    "wearing a santa hat",
    "wearing a rainbow scarf",
    "wearing a black top hat and a monocle",
    "in a chef outfit",
    "in a firefighter outfit",
    "in a police outfit",
    "wearing pink glasses",
    "wearing a yellow shirt",
    "in a purple wizard outfit",
)
_LOOKS = ("red", "purple", "shiny", "wet", "cube shaped")

_CALL = re.compile(r"^\s*'(?P<text>[^']*)'\.format\(unique_token, class_token\),?\s*$")
_HEADINGS = {"classes": "classes", "object prompts": "object", "live subject prompts": "live"}


@dataclass(frozen=True)
class PromptSet:
    """Templates of the protocol, and the class words that a file gives.

    Attributes:
        objects: Templates for things.
        live: Templates for living beings.
        classes: Subject name -> class word; empty where no file was read.
    """

    objects: tuple[str, ...]
    live: tuple[str, ...]
    classes: dict[str, str]

    def of(self, live: bool, count: int) -> list[str]:
        """`count` templates, evenly spread over the list; all of them where it has no more."""
        found = self.live if live else self.objects
        if count >= len(found):
            return list(found)
        return [found[i * len(found) // count] for i in range(count)]


def _templates(places: Sequence[str]) -> tuple[str, ...]:
    sentences = [f"a {{0}} {{1}} {place}" for place in (*_SHARED, *places)]
    return (*sentences, *(f"a {look} {{0}} {{1}}" for look in _LOOKS))


PROMPTS = PromptSet(_templates(_OBJECT), _templates(_LIVE), {})


def filled(template: str, token: str, class_word: str) -> str:
    """The prompt of a template; an empty token leaves no gap."""
    return " ".join(template.format(token, class_word).split())


def read_prompts(path: Path) -> PromptSet:
    """Read `prompts_and_classes.txt` of the public DreamBooth data set; nothing in it is run.

    Raises:
        SnellaConfigError: The file cannot be read, or a part of it is missing.
    """
    try:
        lines = path.read_text("utf-8").splitlines()
    except (OSError, UnicodeDecodeError) as error:
        raise SnellaConfigError(f"prompt file {path} cannot be read: {error}") from error
    part, templates = "", {"object": list[str](), "live": list[str]()}
    classes: dict[str, str] = {}
    for line in lines:
        part = _HEADINGS.get(line.strip().lower(), part)
        call = _CALL.match(line)
        if call and part in templates:
            templates[part].append(_checked(call["text"], path))
        elif part == "classes" and line.count(",") == 1 and line != "subject_name,class":
            name, class_word = line.split(",")
            classes[name.strip()] = class_word.strip()
    missing = [name for name, found in templates.items() if not found]
    if missing:
        raise SnellaConfigError(
            f"prompt file {path} has no {' and no '.join(missing)} prompts; expected lines such as "
            f"'a {{0}} {{1}} in the snow'.format(unique_token, class_token) below 'Object Prompts' "
            f"and 'Live Subject Prompts'"
        )
    return PromptSet(tuple(templates["object"]), tuple(templates["live"]), classes)


def _checked(template: str, path: Path) -> str:
    """A template with nothing in braces but the token and the class word."""
    if set(re.findall(r"{[^}]*}?|}", template)) != {"{0}", "{1}"}:
        raise SnellaConfigError(
            f"prompt file {path}: expected {{0}} and {{1}} in a prompt, got '{template}'"
        )
    return template
