"""The licence of a base model, as its own model card tells it: an adapter is bound by it too."""

from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import yaml

__all__ = ["Licence", "base_licence"]

_KEYS = ("license", "license_name", "license_link")


@dataclass(frozen=True)
class Licence:
    """What a model card says.

    Attributes:
        entries: Its `license`, `license_name` and `license_link`, as far as they are there.
        reason: Why there is no `license`, empty if there is one.
    """

    entries: dict[str, str] = field(default_factory=dict)
    reason: str = ""

    @property
    def name(self) -> str | None:
        """For example apache-2.0; of `other` the card's own name for it."""
        given = self.entries.get("license")
        return self.entries.get("license_name", given) if given == "other" else given


def base_licence(source: str, revision: str | None, online: bool) -> Licence:
    """The licence in the model card (README.md) of a base.

    Args:
        source: A folder, or an id on the hub.
        revision: Of a base on the hub.
        online: Fetch the card if it is not in the cache.
    """
    path = Path(source) / "README.md"
    if not Path(source).is_dir():
        found = _fetched(source, revision, online)
        if found is None:
            return Licence(reason="its model card could not be read")
        path = found
    elif not path.is_file():
        return Licence(reason="its folder has no model card")
    return read_licence(path.read_text("utf-8", errors="replace"))


def read_licence(card: str) -> Licence:
    """The licence in the text of a model card."""
    head, *rest = card.lstrip("\ufeff").split("\n---", 1)
    if not head.startswith("---") or not rest:
        return Licence(reason="its model card has no metadata")
    try:
        data: Any = yaml.safe_load(head[3:])
    except yaml.YAMLError:
        return Licence(reason="its model card's metadata cannot be read")
    given = data if isinstance(data, dict) else {}
    entries = {key: str(given[key]) for key in _KEYS if isinstance(given.get(key), (str, int))}
    if "license" not in entries:
        return Licence(reason="its model card does not state one")
    return Licence(entries)


def _fetched(source: str, revision: str | None, online: bool) -> Path | None:
    """The card of a base on the hub; None where it has none, or none can be had."""
    from huggingface_hub import hf_hub_download
    from huggingface_hub.errors import HfHubHTTPError, HFValidationError, LocalEntryNotFoundError

    try:
        found = hf_hub_download(source, "README.md", revision=revision, local_files_only=not online)
    except (HfHubHTTPError, HFValidationError, LocalEntryNotFoundError, OSError):
        return None
    return Path(found)
