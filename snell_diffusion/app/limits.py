"""Every number that bounds what a visitor may ask for, in one place."""

from dataclasses import dataclass


@dataclass(frozen=True)
class Limits:
    """Bounds of the page, the same for every visitor.

    Attributes:
        photos: Photos of one subject.
        upload_bytes: Size of one uploaded file.
        train_steps: Optimizer steps of one run.
        prompt: Characters of a prompt.
        seed: Largest seed.
        queue: Requests that may wait; more are refused at once.
    """

    photos: int = 30
    upload_bytes: int = 10 * 2**20
    train_steps: int = 2000
    prompt: int = 300
    seed: int = 2**31 - 1
    queue: int = 8


LIMITS = Limits()
