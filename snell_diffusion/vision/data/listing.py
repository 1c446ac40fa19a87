"""Lists of image files and labels -> splits.

One message names all missing lists, with a missing folder of images; a later one all missing and
all bad images, as which images there should be is only known once every list was read.
"""

from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path, PurePosixPath

import torch

from snell_diffusion.errors import SnellaConfigError, shown
from snell_diffusion.vision.data.pictures import Files, PictureError, check_picture
from snell_diffusion.vision.data.splits import Split

Entry = tuple[str, int]
"""(path below the root, label)."""


@dataclass(frozen=True)
class Source:
    """A data set's folder, for messages.

    Attributes:
        title: The data set, such as "VTAB-1k task cifar".
        folder: Where it should be.
        wanted: What belongs there, a sentence without its first capital.
        remedy: How to get it, a sentence without its first capital.
    """

    title: str
    folder: Path
    wanted: str
    remedy: str

    def error(self, fault: str) -> SnellaConfigError:
        """What is wrong, what is expected and how to get it."""
        return SnellaConfigError(
            f"{self.title}: {fault}. Expected: {self.wanted}. To get it: {self.remedy}"
        )

    def require_folder(self, folder: Path | None = None) -> None:
        """Refuse a missing folder; None = the data set's own."""
        fault = _folder_fault(self.folder if folder is None else folder)
        if fault:
            raise self.error(fault)

    def require_lists(self, names: Iterable[str], images: Path | None = None) -> None:
        """Refuse missing files of the folder, all in one message; nothing is read.

        Args:
            names: The lists.
            images: Folder of the images, refused along with them; None = the data set's own.

        Raises:
            SnellaConfigError: Names every list that is missing, and the folder of images if it is.
        """
        paths = [self.folder / name for name in names]
        faults = [f"file '{path}' is missing" for path in paths if _is_absent(path)]
        fault = _folder_fault(self.folder if images is None else images)
        if fault:
            faults.append(fault)
        if faults:
            raise self.error("; ".join(faults))

    def read_text(self, name: str) -> str:
        """The text of a file of the folder."""
        path = self.folder / name
        try:
            return path.read_text("utf-8")
        except FileNotFoundError as error:
            raise self.error(f"file '{path}' is missing") from error
        except OSError as error:
            raise self.error(f"file '{path}' cannot be read: {error.strerror}") from error
        except UnicodeDecodeError as error:
            raise self.error(f"file '{path}' is not UTF-8 text") from error


def file_splits(
    source: Source,
    root: Path,
    lists: Mapping[str, Sequence[Entry]],
    check_images: str,
) -> list[Split]:
    """One split for each list of files below `root`.

    Args:
        source: The data set, for messages.
        root: Folder that the paths start from.
        lists: Entries by the name of the split.
        check_images: "files", "headers" or "pixels", see `Data.check_images`.

    Raises:
        SnellaConfigError: Paths that lead out of the folder, missing or damaged files, all named.
    """
    leaving = {key for entries in lists.values() for key, _ in entries if _leaves(key)}
    if leaving:
        raise source.error(f"these paths lead out of '{root}': {shown(leaving)}")
    files = dict.fromkeys(key for entries in lists.values() for key, _ in entries)
    faults = _faults(files, lambda key: check_picture(root / key, check_images))
    if faults:
        missing = [key for key, fault in faults.items() if fault == "is missing"]
        broken = [f"{key} {fault}" for key, fault in faults.items() if fault != "is missing"]
        parts = []
        if missing:
            parts.append(
                f"{len(missing)} of {len(files)} listed image(s) are missing below '{root}': "
                f"{shown(missing)}"
            )
        if broken:
            parts.append(f"{len(broken)} bad image(s) below '{root}': {shown(broken)}")
        raise source.error("; ".join(parts))
    return [
        Split(
            name,
            torch.tensor([label for _, label in entries], dtype=torch.int64),
            [key for key, _ in entries],
            Files([root / key for key, _ in entries]),
        )
        for name, entries in lists.items()
    ]


def _folder_fault(path: Path) -> str | None:
    if path.is_dir():
        return None
    return f"'{path}' is no folder" if path.exists() else f"'{path}' does not exist"


def _is_absent(path: Path) -> bool:
    """Whether nothing is there; of a file that cannot be reached, reading it says why."""
    try:
        path.stat()
    except FileNotFoundError:
        return True
    except OSError:
        return False
    return False


def _leaves(key: str) -> bool:
    path = PurePosixPath(key.replace("\\", "/"))
    return path.is_absolute() or ".." in path.parts


def _faults(files: Mapping[str, None], check: Callable[[str], None]) -> dict[str, str]:
    faults = {}
    for key in files:
        try:
            check(key)
        except PictureError as error:
            faults[key] = str(error)
    return faults
