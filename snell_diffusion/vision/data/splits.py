"""What every layout is read into: a task with three splits; few-shot choice; checks between splits.

Splits and choices are functions of labels and a seed alone, the same on every machine.
"""

import hashlib
from collections import Counter
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, replace

import torch
from PIL import Image
from torch import Tensor

from snell_diffusion.errors import SnellaConfigError, shown
from snell_diffusion.training.randomness import generator
from snell_diffusion.vision.data.pictures import Chosen, Pictures


@dataclass(frozen=True, eq=False)
class Split:
    """Labelled pictures.

    Attributes:
        name: "train", "validation" or "test".
        labels: Class numbers, int64 [N].
        keys: A name for each picture, such as its path below the data set's folder.
        pictures: The pictures, N.
    """

    name: str
    labels: Tensor
    keys: Sequence[str]
    pictures: Pictures

    def __post_init__(self) -> None:
        if not len(self.labels) == len(self.keys) == len(self.pictures):
            raise ValueError(
                f"split {self.name}: {len(self.labels)} labels, {len(self.keys)} keys and "
                f"{len(self.pictures)} pictures should be equally many"
            )

    def __len__(self) -> int:
        return len(self.labels)

    def image(self, index: int) -> Image.Image:
        """One picture, RGB; SnellaConfigError where its file cannot be read."""
        return self.pictures[index]

    def subset(self, indices: Sequence[int], name: str | None = None) -> "Split":
        """Some of its pictures, in the order given."""
        return Split(
            self.name if name is None else name,
            self.labels[torch.tensor(indices, dtype=torch.int64)],
            [self.keys[index] for index in indices],
            Chosen(self.pictures, list(indices)),
        )

    def counts(self, classes: int) -> list[int]:
        """Pictures of each class."""
        return torch.bincount(self.labels, minlength=classes).tolist()


@dataclass(frozen=True, eq=False)
class Task:
    """A classification task.

    Attributes:
        name: For people, such as "fgvc cub" or "digits, 4 shots".
        classes: Class names; the place is the label.
        train: What is trained on.
        validation: What choices are made on; the test split itself where `selects_on_test`.
        test: What the result is measured on.
        selects_on_test: Whether the published protocol is followed, which chooses on test.
        notes: What a reader of the result should know, one line each.
    """

    name: str
    classes: tuple[str, ...]
    train: Split
    validation: Split
    test: Split
    selects_on_test: bool = False
    notes: tuple[str, ...] = ()

    @property
    def splits(self) -> tuple[Split, ...]:
        """The different splits."""
        return tuple(dict.fromkeys((self.train, self.validation, self.test)))

    def noted(self, *notes: str) -> "Task":
        """The same task with more notes."""
        return replace(self, notes=(*self.notes, *notes))

    def digest(self) -> str:
        """SHA-256 in hex over names, labels and classes: what a resumed run must find again."""
        lines = [*self.classes]
        for split in (self.train, self.validation, self.test):
            lines.append(split.name)
            lines += [
                f"{key} {label}"
                for key, label in zip(split.keys, split.labels.tolist(), strict=True)
            ]
        return hashlib.sha256("\n".join(lines).encode()).hexdigest()

    def summary(self) -> list[str]:
        """Lines for the user: classes, sizes of the splits, notes."""
        sizes = f"{len(self.train)} to train on, {len(self.validation)} to choose on"
        sizes += f", {len(self.test)} to test on"
        return [f"{self.name}: {len(self.classes)} classes, images: {sizes}", *self.notes]


def few_shot(split: Split, classes: Sequence[str], shots: int, seed: int) -> Split:
    """`shots` pictures of each class, chosen by seed.

    Fewer shots are a part of more: the choice is the start of one shuffled list per class.

    Raises:
        SnellaConfigError: A class has fewer pictures.
    """
    labels = split.labels.tolist()
    of_class: list[list[int]] = [[] for _ in classes]
    for index, label in enumerate(labels):
        of_class[label].append(index)
    few = [f"{name} ({len(of_class[i])})" for i, name in enumerate(classes)]
    few = [text for text, mine in zip(few, of_class, strict=True) if len(mine) < shots]
    if few:
        raise SnellaConfigError(
            f"{shots} images per class are asked for, but in split {split.name} these classes "
            f"have fewer: {shown(few)}"
        )
    chosen: list[int] = []
    for label, mine in enumerate(of_class):
        order = torch.randperm(len(mine), generator=generator(seed, f"shots-{split.name}", label))
        chosen += [mine[place] for place in order[:shots].tolist()]
    return split.subset(sorted(chosen))


def parted(labels: Tensor, shares: Sequence[float], seed: int) -> list[list[int]]:
    """Part pictures by class: every part has about its share of each class.

    Args:
        labels: Class numbers, int64 [N].
        shares: Share of each part but the last, which gets what is left; their sum is below 1.
        seed: Decides who goes where.

    Returns:
        Indices of each part, ascending; one more part than shares. A class of n >= 2 pictures gives
        at least one of them to a part of share > 0, and keeps one for the last part, first come
        first served.
    """
    parts: list[list[int]] = [[] for _ in range(len(shares) + 1)]
    for label in labels.unique().tolist():
        mine = (labels == label).nonzero().flatten()
        order = mine[torch.randperm(len(mine), generator=generator(seed, "split", label))].tolist()
        for part, share in zip(parts, shares, strict=False):
            take = min(max(1, round(share * len(mine))), len(order) - 1)
            part += order[:take]
            order = order[take:]
        parts[-1] += order
    return [sorted(part) for part in parts]


def check_labels(split: Split, classes: int) -> None:
    """Refuse labels out of range and an empty split.

    Raises:
        SnellaConfigError: Names the pictures.
    """
    if not len(split):
        raise SnellaConfigError(f"split {split.name} holds no image")
    wrong = [
        f"{key} ({label})"
        for key, label in zip(split.keys, split.labels.tolist(), strict=True)
        if not 0 <= label < classes
    ]
    if wrong:
        raise SnellaConfigError(
            f"split {split.name}: labels should be 0 to {classes - 1}, for there are {classes} "
            f"classes; these are not: {shown(wrong)}"
        )


def absent(split: Split, classes: Sequence[str]) -> list[str]:
    """Classes without a picture in a split."""
    counts = split.counts(len(classes))
    return [name for name, count in zip(classes, counts, strict=True) if not count]


def check_overlap(splits: Sequence[Split]) -> list[str]:
    """Refuse pictures that stand in two splits; warn of equal files under different names.

    Returns:
        Lines of warning.

    Raises:
        SnellaConfigError: The same path is in two splits.
    """
    notes = []
    for place, first in enumerate(splits):
        for second in splits[place + 1 :]:
            common = set(first.keys) & set(second.keys)
            if common:
                raise SnellaConfigError(
                    f"{len(common)} image(s) are in split {first.name} and in split {second.name}: "
                    f"{shown(common)}; a result on them would say nothing, so correct the lists"
                )
            twins = _twins(first, second)
            if twins:
                notes.append(
                    f"warning: {len(twins)} image(s) of {second.name} equal one of {first.name} "
                    f"under another name: {shown(twins, 4)}"
                )
    return notes


def _twins(first: Split, second: Split) -> list[str]:
    known = dict(zip(_identities(first), first.keys, strict=True))
    return [
        f"{key} (= {known[identity]})"
        for key, identity in zip(second.keys, _identities(second), strict=True)
        if identity in known
    ]


def _identities(split: Split) -> Iterable[str]:
    return (split.pictures.identity(index) for index in range(len(split)))


def check_repeats(split: Split) -> list[str]:
    """Warn of pictures that a split lists more than once."""
    again = [key for key, times in Counter(split.keys).items() if times > 1]
    if not again:
        return []
    return [f"warning: split {split.name} lists {len(again)} image(s) twice: {shown(again, 4)}"]
