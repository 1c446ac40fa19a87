"""The peak of a phase is its own: what an earlier one took does not count."""

import sys

import pytest
import torch

from snell_diffusion.training.peaks import PeakMeter

MIB = 2**20


@pytest.mark.skipif(
    sys.platform != "linux", reason="peaks of resident memory restart on Linux only"
)
def test_every_phase_has_its_own_peak() -> None:
    meter = PeakMeter(torch.device("cpu"))
    meter("small")
    meter("large")
    block = torch.ones(64 * MIB // 4)
    del block
    meter("small")
    meter.close()
    assert meter.peaks.keys() == {"small", "large"}
    grown = meter.peaks["large"] - meter.peaks["small"]
    assert 56 * MIB < grown < 80 * MIB


def test_the_largest_of_a_phase_that_comes_back_counts(monkeypatch: pytest.MonkeyPatch) -> None:
    meter, values = PeakMeter(torch.device("cpu")), iter([5, 9, 3])
    monkeypatch.setattr(meter, "_peak", lambda: next(values))
    for phase in ("a", "a", "b", "a"):
        meter(phase)
    meter.close()
    meter.close()
    assert meter.peaks == {"a": 5, "b": 9}
