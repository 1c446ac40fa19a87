"""Files of other programs: told apart by their names, printed without what a terminal obeys."""

import json
from pathlib import Path

import pytest
import torch
from safetensors.torch import save_file

from snell_diffusion.adapters.foreign import describe_foreign
from snell_diffusion.adapters.signatures import looks_like
from snell_diffusion.errors import SnellaError

FILES = {
    "our checkpoint": ("unet.down_blocks.0.to_q.snella_A.default", "a training", "_checkpoint"),
    "our tensors": ("unet.snella_method", "without its header", "load_snella_weights(saf"),
    "kohya": ("lora_unet_mid_block_to_q.lora_down.weight", "kohya", "load_lora_weights"),
    "kohya text": ("lora_te_text_model_q.alpha", "kohya", "load_lora_weights"),
    "diffusers": ("unet.mid_block.to_q.lora_A.weight", "diffusers and PEFT", "load_lora_weights"),
    "peft": ("base_model.model.to_q.lora_A.weight", "adapter of PEFT", "PeftModel"),
    "early": ("unet.to_q.lora.down.weight", "early diffusers", "load_lora_weights"),
    "lokr": ("lora_unet_mid_block.lokr_w1", "LoKr", "LyCORIS"),
    "loha": ("lora_unet_mid_block.hada_w1_a", "LoHa", "LyCORIS"),
    "checkpoint": ("model.diffusion_model.out.weight", "whole Stable", "from_single_file"),
    "unet": ("down_blocks.0.resnets.0.weight", "diffusers model", "from_pretrained"),
    "inversion": ("emb_params", "textual inversion", "load_textual_inversion"),
    "other": ("weight", "unknown purpose", "ask where it came from"),
}


@pytest.mark.parametrize("name, kind, use", FILES.values(), ids=FILES)
def test_each_kind_says_how_it_is_loaded(name: str, kind: str, use: str, tmp_path: Path) -> None:
    path = tmp_path / "x.safetensors"
    save_file({name: torch.zeros(2, 2, dtype=torch.int64)}, path)
    text = describe_foreign(path)
    assert text is not None
    assert f"file      {path}" in text
    assert kind in text.splitlines()[1]
    assert use in text.splitlines()[2]
    assert name in text.splitlines()[3]


def test_our_own_files_are_not_foreign(adapter_path: Path) -> None:
    assert describe_foreign(adapter_path) is None


def test_names_from_files_cannot_steer_a_terminal(tmp_path: Path) -> None:
    path = tmp_path / "x.safetensors"
    note = json.dumps(
        {"relative_error": 0.5, "energy_kept": 1, "adapter_digest": "\x1b]0;x\x07", "rank": 3}
    )
    save_file({"\x1b[2J\nnext      \u202efdp": torch.zeros(1)}, path, {"snella.export": note})
    text = describe_foreign(path)
    assert text is not None
    assert len(text.splitlines()) == 5
    assert all(line.isprintable() for line in text.splitlines())
    assert "\\x1b[2J\\nnext" in text
    assert "\\x1b]0;x\\x07, rank 3: relative error 0.5" in text


@pytest.mark.parametrize("note", ["{}", "[" * 100_000, '{"relative_error": "x"}', "nope"])
def test_an_unreadable_note_says_so(note: str, tmp_path: Path) -> None:
    path = tmp_path / "x.safetensors"
    save_file({"a": torch.zeros(1)}, path, {"snella.export": note})
    assert "its export note is not readable" in str(describe_foreign(path))


@pytest.mark.parametrize(
    "start, what",
    [
        (b"PK\x03\x04rest", "zip archive"),
        (b"\x80\x04\x95rest", "pickle"),
        (b"<!DOCTYPE html>", "HTML"),
        (b"version https://git-lfs.github.com/spec/v1", "Git LFS"),
        (b"\x89PNG\r\n", "PNG"),
        (b"plain words", ""),
        (b"", ""),
    ],
)
def test_what_is_no_safetensors_file_is_told_by_its_start(
    start: bytes, what: str, tmp_path: Path
) -> None:
    path = tmp_path / "x.safetensors"
    path.write_bytes(start)
    assert what in looks_like(start)
    assert bool(looks_like(start)) == bool(what)
    with pytest.raises(SnellaError):
        describe_foreign(path)
