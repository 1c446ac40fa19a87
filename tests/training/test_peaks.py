"""The peak of a phase is its own: what an earlier one took does not count."""

import mmap
import os
from pathlib import Path

import pytest
import torch

from snell_diffusion.training import peaks
from snell_diffusion.training.peaks import PeakMeter

MIB = 2**20
SIZE = 64 * MIB


def resident_block() -> mmap.mmap:
    """Memory that is not resident yet, whatever freed pages the allocator keeps, then touched."""
    block = mmap.mmap(-1, SIZE)
    for start in range(0, SIZE, mmap.PAGESIZE):
        block[start] = 1
    return block


def grown_by_a_block(*, held: bool) -> int:
    """Bytes by which a phase with a block exceeds the ones before and after it."""
    meter = PeakMeter(torch.device("cpu"))
    meter("small")
    meter("large")
    block = resident_block()
    if not held:
        block.close()
    meter("rest")
    block.close()
    meter("small")
    meter.close()
    return meter.peaks["large"] - meter.peaks["small"]


@pytest.mark.skipif(
    not os.access("/proc/self/clear_refs", os.W_OK), reason="this system starts no new peak"
)
def test_every_phase_has_its_own_peak() -> None:
    assert 56 * MIB < grown_by_a_block(held=False) < 80 * MIB


@pytest.mark.parametrize("refusal", ["", "no/such"], ids=["cannot be written", "absent"])
def test_where_no_peak_restarts_the_end_of_a_phase_stands_in(
    refusal: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(peaks, "_RESET", tmp_path / refusal)
    assert 56 * MIB < grown_by_a_block(held=True) < 80 * MIB
    assert abs(grown_by_a_block(held=False)) < 8 * MIB


def test_the_largest_of_a_phase_that_comes_back_counts(monkeypatch: pytest.MonkeyPatch) -> None:
    meter, values = PeakMeter(torch.device("cpu")), iter([5, 9, 3])
    monkeypatch.setattr(meter, "_peak", lambda: next(values))
    for phase in ("a", "a", "b", "a"):
        meter(phase)
    meter.close()
    meter.close()
    assert meter.peaks == {"a": 5, "b": 9}
