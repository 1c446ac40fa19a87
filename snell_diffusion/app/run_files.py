"""What may be read and taken home of a run: texts without the places of the server, file names."""

import re
from pathlib import Path
from typing import Any

import yaml

from snell_diffusion.app.jobs import Jobs
from snell_diffusion.app.reasons import without_places

_IMAGE = re.compile(r"!\[[^\]]*\]\([^)]*\)")
_HEAD = re.compile(r"\A---\n.*?\n---\n", re.DOTALL)
_LOG = 200_000  # characters of a log that are handed out: its end
NO_CARD = "The model card is written when the run is finished."


def file_name(label: str, kind: str) -> str:
    """A name for a file of a run that any system takes: 'my-cat-settings.yaml'."""
    words = re.sub(r"[^a-z0-9]+", "-", label.lower()).strip("-")[:40].strip("-")
    return f"{words or 'run'}-{kind}"


def model_card(jobs: Jobs, job: str) -> str:
    """The run's README.md as Markdown for the page.

    Without its head for the hub, its pictures (the page shows them itself) and the server's
    folders. What visitors wrote is in it, so it must be shown with HTML taken out.
    """
    path = jobs.folder(job) / "run" / "README.md"
    if not path.is_file():
        return NO_CARD
    body = _IMAGE.sub("", _HEAD.sub("", path.read_text("utf-8")))
    return without_places(re.sub(r"\n{3,}", "\n\n", body))


def settings_text(jobs: Jobs, job: str) -> str:
    """The run's settings as YAML; folders are named as in the run's own folder."""
    settings, folder = jobs.settings(job), jobs.folder(job)
    return yaml.safe_dump(_placed(settings, folder), sort_keys=False, allow_unicode=True)


def _placed(value: Any, folder: Path) -> Any:
    if isinstance(value, dict):
        return {key: _placed(item, folder) for key, item in value.items()}
    if isinstance(value, list):
        return [_placed(item, folder) for item in value]
    if isinstance(value, str) and Path(value).is_absolute():
        path = Path(value)
        return str(path.relative_to(folder)) if path.is_relative_to(folder) else path.name
    return value


def log_text(jobs: Jobs, job: str) -> str:
    """What the run printed, without the server's folders."""
    path = jobs.folder(job) / "train.log"
    printed = path.read_bytes().decode("utf-8", "replace") if path.is_file() else ""
    lines = (line.rpartition("\r")[2] for line in printed[-_LOG:].split("\n"))  # of bars the end
    return without_places("\n".join(lines))
