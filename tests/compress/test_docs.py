"""The examples of docs/compression.md run as they stand."""

import re
from pathlib import Path

import pytest

from snell_diffusion.compress import low_rank_layers
from snell_diffusion.tuners import delta_layers

PAGE = Path(__file__).resolve().parents[2] / "docs" / "compression.md"


def test_examples(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    first, second = re.findall(r"^```python\n(.*?)^```", PAGE.read_text("utf-8"), re.M | re.S)
    names: dict = {}
    exec(first, names)
    assert len(list(low_rank_layers(names["student"]))) == 36
    ours, _, theirs = second.rpartition("model = load_compressed")
    exec(ours, names)
    assert len(names["targets"]) == len(list(delta_layers(names["model"]))) == 12
    exec(f"model = load_compressed{theirs}", names)
    assert len(names["targets"]) == 24
