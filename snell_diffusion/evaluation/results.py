"""All that a page needs of a finished comparison: from its folder, or from a file that is kept.

results/personalization.json   records, plan, command, date, machine
results/personalization/       sheets of pictures, one per subject, and maps of kept weights
"""

import io
import json
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path
from statistics import mean
from typing import Any

from PIL import Image

from snell_diffusion.errors import SnellaFileError
from snell_diffusion.evaluation import pictures
from snell_diffusion.evaluation.kept import KEPT
from snell_diffusion.evaluation.records import Record, read_records, record_of
from snell_diffusion.training.files import write_json, write_with
from snell_diffusion.training.plots import sheet

ABOUT = "about.json"
KIND = "personalization"
_CELL = 96  # pixels of a picture in a sheet of all methods
_MOST_BYTES = 32 * 2**20  # of a picture that a page takes in

Kept = dict[str, list[tuple[str, float]]]


@dataclass(frozen=True)
class Personalization:
    """A comparison of methods on subjects.

    Attributes:
        about: Command, date, machine and versions.
        plan: The plan as plain values.
        records: Reported runs.
        trials: Runs that chose learning rates.
        base: Scores of the bare base's pictures, one record per subject.
        kept: Per method whose update has zeros: (layer, mean kept share) through the network.
        sheets: Per subject a picture of all methods' samples, WebP.
        maps: Per method which entries of one layer are kept, PNG.
    """

    about: dict[str, Any]
    plan: dict[str, Any]
    records: list[Record]
    trials: list[Record] = field(default_factory=list)
    base: list[Record] = field(default_factory=list)
    kept: Kept = field(default_factory=dict)
    sheets: dict[str, bytes] = field(default_factory=dict)
    maps: dict[str, bytes] = field(default_factory=dict)

    @property
    def reference(self) -> str:
        """The method that differences are taken against."""
        return str(self.plan["reference"])


def from_folder(output: Path) -> Personalization:
    """What a comparison's folder holds; records of methods that left the plan are left out.

    Raises:
        SnellaFileError: There are no records, or something cannot be read.
    """
    about = read_table(output / ABOUT)
    plan = about.pop("plan", {})
    methods = list(plan.get("methods", {}))
    records = [r for r in read_records(output / "records") if r.method in methods]
    trials = output / "trials"
    base = output / "base"
    return Personalization(
        about=about,
        plan=plan,
        records=records,
        trials=read_records(trials) if trials.is_dir() else [],
        base=read_records(base) if any(base.glob("*.json")) else [],
        kept=mean_kept(records),
        sheets=_sheets(output, plan, records),
        maps=_maps(output, methods, records),
    )


def mean_kept(records: Sequence[Record]) -> Kept:
    """The share of each layer's entries that is kept, averaged over a method's runs."""
    shares: dict[str, dict[str, list[float]]] = {}
    for record in records:
        for layer, kept, size in record.kept:
            shares.setdefault(record.method, {}).setdefault(layer, []).append(kept / size)
    return {
        method: [(layer, mean(values)) for layer, values in layers.items()]
        for method, layers in shares.items()
    }


def _run_folder(output: Path, record: Record) -> Path:
    return output / "runs" / f"{record.method}--{record.subject}--{record.seed}"


def _sheets(output: Path, plan: Mapping[str, Any], records: Sequence[Record]) -> dict[str, bytes]:
    """Samples side by side: a row for the base and one per method, the first seed of each."""
    shown = int(plan.get("images", {}).get("sheet", 0))
    found = {}
    for subject in dict.fromkeys(record.subject for record in records):
        rows = {"base": output / "base" / subject}
        for record in records:
            if record.subject == subject and record.images and record.method not in rows:
                rows[record.method] = _run_folder(output, record)
        have = {name: folder for name, folder in rows.items() if pictures.has_any(folder)}
        if have and shown:
            found[subject] = _webp(_side_by_side(have, shown))
    return found


def _side_by_side(rows: Mapping[str, Path], shown: int) -> Image.Image:
    prompts = pictures.prompts_of(next(iter(rows.values())))
    places = pictures.spread(len(prompts), shown)
    cells = [[pictures.one(folder, place) for place in places] for folder in rows.values()]
    return sheet(cells, list(rows), [prompts[place] for place in places], _CELL)


def _webp(picture: Image.Image) -> bytes:
    data = io.BytesIO()
    picture.save(data, "WEBP", quality=88, method=6)
    return data.getvalue()


def _maps(output: Path, methods: Sequence[str], records: Sequence[Record]) -> dict[str, bytes]:
    found = {}
    for method in methods:
        for record in records:
            path = _run_folder(output, record) / KEPT
            if record.method == method and method not in found and path.is_file():
                found[method] = path.read_bytes()
    return found


def save(results: Personalization, path: Path) -> None:
    """Write results and, into a folder of the same name, their pictures.

    Layer by layer counts of single runs are left out; `kept` has their means.
    """
    folder = path.with_suffix("")
    files: dict[str, dict[str, str]] = {"sheets": {}, "maps": {}}
    for kind, suffix in (("sheets", "webp"), ("maps", "png")):
        for number, (name, data) in enumerate(getattr(results, kind).items()):
            file = folder / f"{kind}-{number:02d}.{suffix}"
            write_with(file, lambda temporary, data=data: temporary.write_bytes(data))
            files[kind][name] = file.name
    values = {
        "kind": KIND,
        **results.about,
        "seeds": results.plan.get("seeds", []),
        "plan": results.plan,
        **{
            name: [asdict(replace(record, kept=[])) for record in getattr(results, name)]
            for name in ("records", "trials", "base")
        },
        "kept": results.kept,
        **files,
    }
    write_json(path, values)


def load(path: Path) -> Personalization:
    """Read what `save` wrote.

    Raises:
        SnellaFileError: It cannot be read, or is something else.
    """
    values = read_table(path)
    if values.pop("kind", None) != KIND:
        raise SnellaFileError(f"{path}: expected results of kind '{KIND}'")
    values.pop("seeds", None)
    try:
        records = {
            name: [record_of(row, path) for row in values.pop(name)]
            for name in ("records", "trials", "base")
        }
        kept = {
            str(method): [(str(layer), float(share)) for layer, share in layers]
            for method, layers in values.pop("kept").items()
        }
        pictures_of = {
            kind: {
                str(name): _picture(path.with_suffix("") / _plain_name(file, path))
                for name, file in values.pop(kind).items()
            }
            for kind in ("sheets", "maps")
        }
        plan = dict(values.pop("plan"))
        plan["reference"]
    except (AttributeError, KeyError, TypeError, ValueError) as error:
        if isinstance(error, SnellaFileError):
            raise
        raise SnellaFileError(f"{path}: not complete: {type(error).__name__} {error}") from error
    return Personalization(about=values, plan=plan, kept=kept, **records, **pictures_of)


def _plain_name(file: Any, path: Path) -> str:
    if not isinstance(file, str) or Path(file).name != file:
        raise SnellaFileError(f"{path}: expected the name of a picture beside it, got {file!r}")
    return file


def _picture(path: Path) -> bytes:
    """The bytes of a picture, decoded once so that a page gets nothing else."""
    try:
        if path.stat().st_size > _MOST_BYTES:
            raise SnellaFileError(f"{path}: larger than {_MOST_BYTES} bytes")
        with Image.open(path) as picture:
            if picture.format not in ("PNG", "WEBP"):
                raise SnellaFileError(f"{path}: expected PNG or WebP, got {picture.format}")
            picture.load()
        return path.read_bytes()
    except OSError as error:
        raise SnellaFileError(f"{path}: cannot be read as a picture: {error}") from error


def read_table(path: Path) -> dict[str, Any]:
    """A JSON object from a file.

    Raises:
        SnellaFileError: It cannot be read, or holds something else.
    """
    try:
        values = json.loads(path.read_text("utf-8"))
    except (OSError, ValueError) as error:
        raise SnellaFileError(f"{path}: cannot be read: {error}") from error
    if not isinstance(values, dict):
        raise SnellaFileError(f"{path}: expected a table of values")
    return values
