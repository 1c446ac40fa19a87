"""`python -m snell_diffusion info` and the functions behind it."""

import json
from pathlib import Path
from typing import Any

import pytest

from snell_diffusion.__main__ import main
from snell_diffusion.adapters import AdapterFile, inspect_adapter, read_adapter, summary
from tests.adapters.files import rebuilt


def test_summary_tells_origin_training_and_layers(adapter_file: AdapterFile) -> None:
    text = summary(adapter_file)
    assert "format    1.0, written by snell_diffusion" in text
    assert "source    tiny" in text
    assert "instance_prompt: a photo of sks cat" in text
    assert "unet: snella on UNet2DConditionModel" in text
    assert "text_encoder: snella on CLIPTextModel" in text
    assert text.count("[32, 32]") >= 32
    assert "attn1.to_q" not in summary(adapter_file, layers=False)


def test_summary_counts_what_the_table_says(adapter_file: AdapterFile) -> None:
    rows = adapter_file.header.components["unet"].layers.values()
    kept, size = sum(row.kept for row in rows), 32 * 32 * 32
    assert f"{kept:,} of {size:,} weights changed ({kept / size:.1%})" in summary(adapter_file)


def test_inspect_is_plain_data(adapter_path: Path) -> None:
    data = inspect_adapter(adapter_path)
    assert data["components"]["unet"]["base"]["class"] == "UNet2DConditionModel"
    assert json.loads(json.dumps(data)) == data


def test_info_command(adapter_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["info", str(adapter_path), "--no-layers"]) == 0
    assert "sha256:" in capsys.readouterr().out
    assert main(["info", str(adapter_path), "--json"]) == 0
    assert json.loads(capsys.readouterr().out)["format"] == "1.0"


def test_info_refuses_with_a_reason(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    bad = tmp_path / "bad.safetensors"
    bad.write_bytes(b"not a tensor file at all")
    assert main(["info", str(bad)]) == 1
    assert capsys.readouterr().err.startswith(f"error: {bad}: expected a safetensors header")


def test_summary_escapes_what_a_terminal_would_obey(adapter_bytes: bytes) -> None:
    def change(header: dict[str, Any]) -> None:
        header["writer"] = "snell\x1b[2J"
        header["metadata"]["instance_prompt"] = "a\x1b]0;owned\x07\nfile      fake\u202e\ud800"
        header["components"]["unet"]["base"]["class"] = "UNet\r\x9b"

    text = summary(read_adapter(rebuilt(adapter_bytes, change)))
    assert all(line.isprintable() for line in text.split("\n"))
    assert r"instance_prompt: a\x1b]0;owned\x07\nfile      fake\u202e\ud800" in text
    assert not any(line.startswith("file      fake") for line in text.split("\n"))
    text.encode("utf-8")
