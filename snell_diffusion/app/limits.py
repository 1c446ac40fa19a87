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
        request_bytes: Size of a request that is no upload.
        request_depth: How deep its lists and tables may be nested.
        quota_bytes: Disk space of all that one user has.
        runs, drafts, adapters: How many of each one user may have; adapters: uploaded ones.
        cache_bytes: Disk space of uploads and shown pictures of all users, which go after a day.
    """

    photos: int = 30
    upload_bytes: int = 10 * 2**20
    train_steps: int = 2000
    prompt: int = 300
    seed: int = 2**31 - 1
    queue: int = 8
    request_bytes: int = 2**20
    request_depth: int = 32
    quota_bytes: int = 5 * 2**30
    runs: int = 200
    drafts: int = 20
    adapters: int = 100
    cache_bytes: int = 4 * 2**30


LIMITS = Limits()
