"""Photos and captions of trainings that have not started yet, on disk, so a reload loses nothing.

<root>/<id>/photos/photo-00.png  a checked photo
<root>/<id>/photos/photo-00.txt  what else it shows, where that was said
<root>/<id>/draft.json           what each upload was called, time of the last change
"""

import json
import re
import shutil
import threading
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from snell_diffusion.app.ids import is_id, new_id
from snell_diffusion.app.limits import LIMITS, Limits
from snell_diffusion.app.photos import decode, notes, shown_name
from snell_diffusion.diffusion.decoding import PhotoError
from snell_diffusion.errors import SnellaValueError
from snell_diffusion.training.files import write_json

_NUMBER = re.compile(r"photo-(\d+)\.png")


@dataclass(frozen=True)
class Photo:
    """One upload.

    Attributes:
        name: What the upload was called.
        file: The stored picture; None for one that is not taken.
        problem: Why it is not taken, a sentence; None for a stored one.
        caption: What it shows beside the subject; may be empty.
    """

    name: str
    file: Path | None
    problem: str | None = None
    caption: str = ""


@dataclass(frozen=True)
class Draft:
    """The photos of one draft.

    Attributes:
        id: 32 hex digits.
        photos: The stored ones in order, then those of this upload that are not taken.
        notes: What is worth a look, a sentence each.
    """

    id: str
    photos: list[Photo]
    notes: list[str]

    @property
    def stored(self) -> list[Photo]:
        """The photos that were taken."""
        return [photo for photo in self.photos if photo.problem is None]

    @property
    def problems(self) -> list[str]:
        """Why the others were not, a sentence each."""
        return [photo.problem for photo in self.photos if photo.problem is not None]


class Drafts:
    """All drafts of one user.

    Args:
        root: Holds one folder per draft.
        limits: How many photos and drafts there may be.
        require_room: Called with a number of bytes before they are written; raises without room.
    """

    def __init__(
        self,
        root: Path,
        limits: Limits = LIMITS,
        require_room: Callable[[int], None] = lambda size: None,
    ) -> None:
        self.root = root
        self._limits = limits
        self._require_room = require_room
        self._lock = threading.RLock()

    def folder(self, draft: Any) -> Path:
        """Folder of a draft; ids are 32 hex digits and nothing else reaches the disk.

        Raises:
            SnellaValueError: No such draft.
        """
        if not is_id(draft):
            raise SnellaValueError("add photos first: this is not the id of a set of photos")
        if not (self.root / draft / "draft.json").is_file():
            raise SnellaValueError("these photos are no longer there: add them again")
        return self.root / draft

    def add(self, uploads: Sequence[str | Path], draft: str | None = None) -> Draft:
        """Store the good ones of some uploads, in a new draft or after the photos of an old one.

        Args:
            uploads: Where the server stored them.
            draft: To add to; None begins a new one.

        Returns:
            The draft with the problems of the bad ones; with bad ones only, a new draft is empty.

        Raises:
            SnellaValueError: No uploads, too many photos, no such draft, or no room on the disk.
        """
        if not uploads:
            raise SnellaValueError("no photos given: add 3 to 10 photos of the subject")
        with self._lock:
            there = 0 if draft is None else len(self.photos(draft))
            if there + len(uploads) > self._limits.photos:
                raise SnellaValueError(
                    f"{there + len(uploads)} photos are too many: at most {self._limits.photos} "
                    "are taken, so keep the best ones"
                )
            self._require_room(sum(Path(upload).stat().st_size for upload in uploads))
            draft = draft or self._new()
            bad = [problem for upload in uploads if (problem := self._store(upload, draft))]
            found = self.get(draft)
            return Draft(draft, found.photos + bad, found.notes)

    def _new(self) -> str:
        for old in self._all()[self._limits.drafts - 1 :]:
            shutil.rmtree(self.root / old)
        draft = new_id()
        (self.root / draft / "photos").mkdir(parents=True)
        self._write(draft, {})
        return draft

    def _store(self, upload: str | Path, draft: str) -> Photo | None:
        """None for a good one, and what is wrong with a bad one."""
        name = shown_name(upload)
        try:
            picture = decode(Path(upload))
        except PhotoError as error:
            return Photo(name, None, f"{name} {error}.")
        names = self._names(draft)
        number = 1 + max((_number(file) for file in names), default=-1)
        picture.save(self.root / draft / "photos" / f"photo-{number:02d}.png")
        self._write(draft, {**names, f"photo-{number:02d}.png": name})
        return None

    def get(self, draft: str, side: int | None = None) -> Draft:
        """A draft as it is now.

        Args:
            draft: Its id.
            side: Pixels a side of the base, for the notes about small photos.

        Raises:
            SnellaValueError: No such draft.
        """
        with self._lock:
            photos = self.photos(draft)
            return Draft(draft, photos, notes(self._folder_of(draft), self._names(draft), side))

    def photos(self, draft: str) -> list[Photo]:
        """The stored photos in order, without looking into them.

        Raises:
            SnellaValueError: No such draft.
        """
        folder = self._folder_of(draft)
        return [
            Photo(name, folder / file, caption=_read(folder / file))
            for file, name in self._names(draft).items()
        ]

    def _folder_of(self, draft: str) -> Path:
        return self.folder(draft) / "photos"

    def caption(self, draft: str, index: int, text: str) -> None:
        """Say what a photo shows beside the subject; an empty text takes it back.

        Raises:
            SnellaValueError: No such draft or photo, or not one line of bearable length.
        """
        text = text.strip() if isinstance(text, str) else ""
        if not text.isprintable() or len(text) > self._limits.prompt:
            raise SnellaValueError(
                f"a caption is one line of at most {self._limits.prompt} characters, "
                "for example: on a wooden floor"
            )
        with self._lock:
            sidecar = self._file(draft, index).with_suffix(".txt")
            if text:
                sidecar.write_text(text, "utf-8")
            else:
                sidecar.unlink(missing_ok=True)

    def remove(self, draft: str, index: int) -> None:
        """Take a photo out.

        Raises:
            SnellaValueError: No such draft or photo.
        """
        with self._lock:
            file = self._file(draft, index)
            names = self._names(draft)
            del names[file.name]
            self._write(draft, names)
            file.with_suffix(".txt").unlink(missing_ok=True)
            file.unlink()

    def delete(self, draft: str) -> None:
        """Remove a draft with all its photos.

        Raises:
            SnellaValueError: No such draft.
        """
        with self._lock:
            shutil.rmtree(self.folder(draft))

    def latest(self) -> str | None:
        """The draft that was changed last."""
        return next(iter(self._all()), None)

    def _all(self) -> list[str]:
        """Ids, the one that was changed last first."""
        found = [path for path in self.root.glob("*/draft.json") if is_id(path.parent.name)]
        found.sort(key=lambda path: json.loads(path.read_text("utf-8"))["changed"], reverse=True)
        return [path.parent.name for path in found]

    def _file(self, draft: str, index: Any) -> Path:
        names = list(self._names(draft))
        if isinstance(index, bool) or not isinstance(index, int) or not 0 <= index < len(names):
            raise SnellaValueError(
                f"there is no photo {index!r:.20}: the photos are numbered 0 to {len(names) - 1}"
            )
        return self._folder_of(draft) / names[index]

    def _names(self, draft: str) -> dict[str, str]:
        """What each stored file was called, in order."""
        return json.loads((self.folder(draft) / "draft.json").read_text("utf-8"))["names"]

    def _write(self, draft: str, names: dict[str, str]) -> None:
        record = {"names": names, "changed": time.time()}
        write_json(self.root / draft / "draft.json", record, durable=False)


def _number(file: str) -> int:
    match = _NUMBER.fullmatch(file)
    assert match is not None  # we wrote the name
    return int(match[1])


def _read(photo: Path) -> str:
    sidecar = photo.with_suffix(".txt")
    return sidecar.read_text("utf-8") if sidecar.is_file() else ""
