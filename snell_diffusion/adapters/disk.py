"""What an error says about the disk that refused a write."""

import os
import shutil
from pathlib import Path


def disk_of(path: Path) -> str:
    """The disk that holds `path` (which need not exist): its mount point and its free space."""
    place = path.absolute()
    while not os.path.exists(place):
        place = place.parent
    mount = place
    while not mount.is_mount():
        mount = mount.parent
    usage = shutil.disk_usage(place)
    free, total = usage.free / 2**20, usage.total / 2**20
    return f"the disk at {mount} has {free:,.1f} of {total:,.1f} MiB free"
