"""Pages of finished comparisons: one HTML file with everything in it, and one of Markdown."""

from collections.abc import Sequence
from pathlib import Path
from typing import Any

from snell_diffusion.errors import SnellaConfigError, SnellaFileError
from snell_diffusion.evaluation import report_personalization, results
from snell_diffusion.evaluation.content import Block, write

TITLE = "Methods against each other"


def report(
    output: Path,
    personalization: Path | None = None,
    classification: Path | None = None,
    saved: Sequence[Path] = (),
    keep: Path | None = None,
) -> list[Path]:
    """Write `index.html` and `index.md` of comparisons into a folder.

    Args:
        output: The folder.
        personalization: Folder of a comparison on subjects.
        classification: Folder of a comparison on classification tasks.
        saved: Files that were kept of earlier comparisons.
        keep: Folder to keep results in, as files that `saved` takes.

    Returns:
        The pages.

    Raises:
        SnellaError: There is nothing to report, or something cannot be read.
    """
    blocks: list[Block] = []
    found: list[Any] = [] if personalization is None else [results.from_folder(personalization)]
    found += [results.load(path) for path in saved if _kind(path) == results.KIND]
    for one in found:
        blocks += report_personalization.section(one)
        if keep is not None:
            results.save(one, keep / f"{results.KIND}.json")
    blocks += _classification(classification, saved, keep)
    if not blocks:
        raise SnellaConfigError(
            "nothing to report: give --personalization, --classification, --from"
        )
    return write(TITLE, blocks, output)


def _classification(folder: Path | None, saved: Sequence[Path], keep: Path | None) -> list[Block]:
    files = [path for path in saved if _kind(path) != results.KIND]
    if folder is None and not files:
        return []
    from snell_diffusion.evaluation import report_classification as classes

    blocks: list[Block] = []
    for one in [
        *([] if folder is None else [classes.from_folder(folder)]),
        *(classes.load(path) for path in files),
    ]:
        blocks += classes.section(one)
        if keep is not None:
            classes.save(one, keep / f"{classes.KIND}.json")
    return blocks


def _kind(path: Path) -> str:
    kind = results.read_table(path).get("kind")
    if kind not in (results.KIND, "classification"):
        raise SnellaFileError(f"{path}: expected kept results of a comparison, got kind {kind!r}")
    return str(kind)
