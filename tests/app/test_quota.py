"""What one user may keep, counted from the disk."""

from dataclasses import replace

import pytest
from PIL import Image

from snell_diffusion.app import quota as module
from snell_diffusion.app.limits import LIMITS
from snell_diffusion.app.quota import RUN, Quota, Usage
from snell_diffusion.app.workspace import Workspace
from snell_diffusion.errors import SnellaValueError


def quota(root, **limits):
    return Quota(root, replace(LIMITS, **limits))


@pytest.fixture
def used(tmp_path):
    """A workspace of 3000 bytes: two runs and a draft."""
    for name in ("runs/a", "runs/b", "drafts/c"):
        (tmp_path / name).mkdir(parents=True)
        (tmp_path / name / "x").write_bytes(bytes(1000))
    (tmp_path / "runs" / "litter").touch()
    return tmp_path


def test_what_is_there_is_counted(used):
    found = quota(used).usage()
    assert (found.runs, found.drafts) == (2, 1)
    folders = found.bytes - 3000
    assert 0 <= folders <= 8 * 4096
    assert quota(used / "nothing").usage() == Usage(0, 0, 0)


def test_nothing_is_stored_beyond_the_quota(used):
    bytes_used = quota(used).usage().bytes
    quota(used, quota_bytes=bytes_used + 10).require_room(10)
    with pytest.raises(SnellaValueError, match=r"^there is no room: .*delete runs in the Runs tab"):
        quota(used, quota_bytes=bytes_used + 10).require_room(11)


def test_a_full_disk_is_said(used, monkeypatch):
    free = type("Disk", (), {"free": module.SPARE + 5})
    monkeypatch.setattr(module.shutil, "disk_usage", lambda folder: free)
    quota(used).require_room(5)
    with pytest.raises(SnellaValueError, match="disk is full") as error:
        quota(used / "not" / "there").require_room(6)
    assert str(used) not in str(error.value)


def test_runs_are_bounded_in_number_and_size(used):
    quota(used, runs=3).require_run()
    with pytest.raises(SnellaValueError, match="2 runs already, and 2 may be kept"):
        quota(used, runs=2).require_run()
    with pytest.raises(SnellaValueError, match="there is no room"):
        quota(used, quota_bytes=RUN).require_run()


def test_photos_and_adapters_are_stored_only_where_there_is_room(tmp_path):
    photo = tmp_path / "photo.png"
    Image.radial_gradient("L").save(photo)
    full = Workspace(tmp_path / "own", limits=replace(LIMITS, quota_bytes=100))
    with pytest.raises(SnellaValueError, match="there is no room"):
        full.drafts.add([photo])
    with pytest.raises(SnellaValueError, match="there is no room"):
        full.require_room(101)
    assert full.drafts.latest() is None
