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
        side: Longest side of a drawn picture in pixels, whatever the base can do.
        draw_steps: Denoising steps of one picture.
        guidance: Largest guidance scale.
        strength: Largest factor of an adapter's update.
        together: Adapters that are drawn with at the same time.
        pictures: Pictures of one request.
        cells: Pictures of one comparison.
        draw_seconds: Seconds that one request may keep the worker.
        adapter_bytes: Size of one uploaded adapter file.
        uploaded_adapters: Adapter files that one workspace keeps.
        request_bytes: Size of a request that is no upload.
        request_depth: How deep its lists and tables may be nested.
        quota_bytes: Disk space of all that one user has.
        runs, drafts: How many of each one user may have.
        cache_bytes: Disk space of uploads and shown pictures of all users, which go after a day.
    """

    photos: int = 30
    upload_bytes: int = 10 * 2**20
    train_steps: int = 2000
    prompt: int = 300
    seed: int = 2**31 - 1
    queue: int = 8
    side: int = 2048
    draw_steps: int = 100
    guidance: float = 30.0
    strength: float = 2.0
    together: int = 4
    pictures: int = 8
    cells: int = 36
    draw_seconds: float = 900.0
    adapter_bytes: int = 256 * 2**20
    uploaded_adapters: int = 100
    request_bytes: int = 2**20
    request_depth: int = 32
    quota_bytes: int = 5 * 2**30
    runs: int = 200
    drafts: int = 20
    cache_bytes: int = 4 * 2**30


LIMITS = Limits()
