"""The base models that the page offers: a closed list made by whoever starts the server."""

import json
import re
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from functools import cache
from importlib import import_module
from pathlib import Path
from typing import Any

from snell_diffusion.app.limits import LIMITS, Limits
from snell_diffusion.errors import SnellaError, SnellaValueError, quoted, shown
from snell_diffusion.models import SHIPPED_BASES, embedded_path

NAME = re.compile(r"[A-Za-z0-9][A-Za-z0-9._-]{0,39}")
HUB_ID = re.compile(r"[A-Za-z0-9][A-Za-z0-9._-]{0,95}/[A-Za-z0-9][A-Za-z0-9._-]{0,95}")
SHIPPED_LABELS = {
    "embedded": "Embedded: small toy objects, draws in seconds",
    "embedded-dit": "Embedded DiT: the same toy world by a small transformer",
}
# Side in pixels, denoising steps and guidance that each family's authors recommend.
USUAL = {
    "sd": (512, 30, 7.5),
    "sdxl": (1024, 30, 5.0),
    "sd3": (1024, 28, 4.5),
    "flux": (1024, 28, 3.5),
    "flux2": (1024, 28, 4.0),
    "lumina2": (1024, 30, 4.0),
    "pixart_sigma": (1024, 20, 4.5),
    "qwen_image": (1024, 30, 4.0),
    "sana": (1024, 20, 4.5),
    "z_image": (1024, 30, 4.0),
}
SHIPPED_USUAL = (64, 20, 3.0)
LIBRARIES = ("diffusers", "transformers")  # whose models an adapter may belong to
NO_NEGATIVE = frozenset({"flux", "flux2"})  # distilled guidance: one pass, nothing to push from

Parts = Mapping[str, tuple[str, str] | None]
"""(class, config hash) by component of a pipeline; None where it is not known."""


@dataclass(frozen=True)
class Base:
    """A base model and the settings it draws best with.

    Attributes:
        id: Its name in lists, requests and the command line.
        label: What the page shows.
        source: Folder, hub id or name of a shipped model, as configurations take it.
        family: Which family of models it is of.
        resolution: Side in pixels of the pictures it was made for.
        steps: Denoising steps.
        guidance: Classifier-free guidance scale.
        max_side: Longest side in pixels that may be asked for.
        multiple: Sides are multiples of this many pixels.
    """

    id: str
    label: str
    source: str
    family: str
    resolution: int
    steps: int
    guidance: float
    max_side: int
    multiple: int

    @property
    def location(self) -> str:
        """Folder or hub id for `from_pretrained`."""
        return str(embedded_path(self.source)) if self.shipped else self.source

    @property
    def shipped(self) -> bool:
        """Whether it is one of the package's own."""
        return self.source in SHIPPED_BASES

    @property
    def min_side(self) -> int:
        """Shortest side in pixels that may be asked for: half the native one."""
        return max(self.multiple, self.resolution // 2 // self.multiple * self.multiple)

    @property
    def takes_negative(self) -> bool:
        """Whether its pipeline has a use for a negative prompt."""
        return self.family not in NO_NEGATIVE

    def identity(self, component: str) -> tuple[str, str] | None:
        """(class, config hash) of a component, as adapter files name their base; None: no such.

        Reads configurations only, no weights.
        """
        return _identity(self.location, component)


class Bases:
    """A closed list of bases, looked up by id; the first one is the page's default."""

    def __init__(self, bases: Iterable[Base]) -> None:
        self._bases = {base.id: base for base in bases}

    @classmethod
    def of(cls, given: Sequence[tuple[str, str]] = (), limits: Limits = LIMITS) -> "Bases":
        """The given bases, then the shipped ones.

        Args:
            given: Name, and diffusers folder or hub id, of each.
            limits: Bounds the sides of pictures.

        Raises:
            SnellaError: A name that cannot be used or is taken, or a base that is not there or that
                this package does not know.
        """
        bases = [described(name, _located(name, source), limits) for name, source in given]
        bases += [described(name, name, limits) for name in SHIPPED_BASES]
        names = [base.id for base in bases]
        twice = {name for name in names if names.count(name) > 1}
        if twice:
            raise SnellaValueError(
                f"the base name {shown(twice)} is given twice or is a shipped model's: choose "
                "another NAME for --base NAME=FOLDER_OR_HUB_ID"
            )
        return cls(bases)

    def all(self) -> list[Base]:
        """Every base, the default first."""
        return list(self._bases.values())

    def get(self, name: Any) -> Base:
        """A base by its id.

        Raises:
            SnellaValueError: There is none of that id; the message lists those there are.
        """
        if not isinstance(name, str) or name not in self._bases:
            raise SnellaValueError(
                f"there is no base model {quoted(name, 40)}: choose one of {shown(self._bases)}"
            )
        return self._bases[name]


def described(name: str, source: str, limits: Limits = LIMITS) -> Base:
    """The record of one base; its configurations are read, its weights are not.

    Args:
        name: Its id in the page.
        source: diffusers folder, hub id, or name of a shipped model.
        limits: Bounds the sides of pictures.

    Raises:
        SnellaError: No such folder or hub id, or a pipeline that this package does not know.
    """
    from snell_diffusion.diffusion.families import family_of

    location = str(embedded_path(source)) if source in SHIPPED_BASES else source
    family = family_of(location)
    usual, steps, guidance = USUAL.get(family.name, (1024, 30, 4.0))
    if source in SHIPPED_BASES:
        usual, steps, guidance = SHIPPED_USUAL
    resolution = _native_side(location, family.denoiser) or usual
    largest = _largest_side(location, family.denoiser) or 2 * resolution
    label = SHIPPED_LABELS.get(name, f"{name} ({resolution} pixels)")
    return Base(
        id=name,
        label=label,
        source=source,
        family=family.name,
        resolution=resolution,
        steps=steps,
        guidance=guidance,
        max_side=max(resolution, min(largest, 2 * resolution, limits.side)),
        multiple=family.multiple,
    )


def _located(name: str, source: str) -> str:
    """A folder made absolute, or a hub id that may exist."""
    if not NAME.fullmatch(name):
        raise SnellaValueError(
            "the name of a base has up to 40 letters, digits, '.', '_' and '-'; got "
            f"{quoted(name)}: give --base NAME=FOLDER_OR_HUB_ID"
        )
    folder = Path(source).expanduser()
    if folder.is_dir():
        if not (folder / "model_index.json").is_file():
            raise SnellaValueError(
                f"base {name}: {quoted(source)} has no model_index.json, so it is no diffusers "
                "model folder; give the folder that save_pretrained wrote"
            )
        return str(folder.resolve())
    if not HUB_ID.fullmatch(source):
        raise SnellaValueError(
            f"base {name}: {quoted(source)} is neither a folder here nor a hub id of the form "
            "owner/name: check the spelling"
        )
    return source


def _config(location: str, component: str) -> dict[str, Any]:
    """A component's config.json in a folder; empty for what is not on this disk."""
    path = Path(location) / component / "config.json"
    return json.loads(path.read_text("utf-8")) if path.is_file() else {}


def _pixels_per_latent(location: str) -> int | None:
    vae = _config(location, "vae")
    if vae.get("_class_name") != "AutoencoderKL":
        return None
    return int(2 ** (len(vae["block_out_channels"]) - 1))


def _native_side(location: str, denoiser: str) -> int | None:
    """Side in pixels that a folder's denoiser was made for; None where it does not say."""
    size, factor = _config(location, denoiser).get("sample_size"), _pixels_per_latent(location)
    return size * factor if isinstance(size, int) and factor else None


def _largest_side(location: str, denoiser: str) -> int | None:
    """Side in pixels where a denoiser's table of positions ends; None where there is none."""
    config, factor = _config(location, denoiser), _pixels_per_latent(location)
    size = config.get("pos_embed_max_size")
    return size * config.get("patch_size", 1) * factor if isinstance(size, int) and factor else None


@cache
def _identity(location: str, component: str) -> tuple[str, str] | None:
    import torch
    from diffusers import DiffusionPipeline

    from snell_diffusion.adapters.identity import config_hash

    part = DiffusionPipeline.load_config(location).get(component)
    library, name = part if isinstance(part, list) else ("", "")
    kind = getattr(import_module(library), name) if library in LIBRARIES else None
    if kind is None or not issubclass(kind, torch.nn.Module):
        return None
    with torch.device("meta"):
        if library == "diffusers":
            model = kind.from_config(kind.load_config(location, subfolder=component))
        else:
            settings = kind.config_class
            values, _ = settings.get_config_dict(location, subfolder=component)
            model = kind(settings.from_dict(values))
    return name, config_hash(model)


def fitting(bases: Bases, parts: Parts, source: str | None) -> list[Base]:
    """The bases that an adapter file was trained on or on one of the same build.

    Args:
        bases: To choose from.
        parts: What the file says that its components were trained on.
        source: The name of its base in the file; a base of that source comes first.
    """
    found = [base for base in bases.all() if _fits(base, parts)]
    return sorted(found, key=lambda base: base.source != source)


def _fits(base: Base, parts: Parts) -> bool:
    try:
        return all(known is None or base.identity(name) == known for name, known in parts.items())
    except (OSError, SnellaError):  # a hub's configurations that cannot be reached now
        return False
