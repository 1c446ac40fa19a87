"""Peak memory of a piece of work: counted beyond what was there, and anew for each."""

import pytest
import torch

from snell_diffusion.evaluation import memory
from snell_diffusion.evaluation.memory import peak_memory

MIB = 2**20


@pytest.mark.skipif(not memory._CLEAR.exists(), reason="no /proc here, so nothing is measured")
def test_the_peak_is_that_of_the_work_alone() -> None:
    there = torch.ones(64 * MIB // 4)
    with peak_memory() as first:
        torch.ones(128 * MIB // 4).add_(1)
    with peak_memory() as second:
        torch.ones(32 * MIB // 4).add_(1)
    assert first.kind == second.kind == "resident memory"
    assert 120 * MIB < (first.bytes or 0) < 160 * MIB
    assert 25 * MIB < (second.bytes or 0) < 60 * MIB
    assert there.sum() == len(there)


def test_where_the_mark_cannot_be_set_back_nothing_is_claimed(
    monkeypatch: pytest.MonkeyPatch, tmp_path_factory: pytest.TempPathFactory
) -> None:
    monkeypatch.setattr(memory, "_CLEAR", tmp_path_factory.mktemp("proc") / "no" / "clear_refs")
    monkeypatch.setattr(memory, "_STATUS", tmp_path_factory.mktemp("proc") / "status")
    with peak_memory() as peak:
        torch.ones(10)
    assert (peak.bytes, peak.kind) == (None, "not measured")
