"""Merged folders: what stock diffusers loads from them, and what is never written over."""

import json
import os
from pathlib import Path

import pytest
import torch
from diffusers import StableDiffusion3Pipeline, StableDiffusionPipeline
from safetensors import safe_open
from torch import Tensor

from snell_diffusion.adapters import AdapterFile, read_adapter, save_adapter
from snell_diffusion.diffusion.export import REPORT_NAME, export_merged
from snell_diffusion.errors import SnellaBaseError, SnellaFileError, SnellaValueError
from snell_diffusion.models import embedded_dit_path
from tests.tiny_models import adapt, picture, pipeline, sd15_unet, text_encoder


@pytest.fixture(scope="module")
def file(tmp_path_factory: pytest.TempPathFactory) -> AdapterFile:
    live = {"unet": adapt(sd15_unet()), "text_encoder": adapt(text_encoder())}
    return read_adapter(save_adapter(tmp_path_factory.mktemp("file"), live))


def stock(folder: Path, **options: object) -> StableDiffusionPipeline:
    pipe = StableDiffusionPipeline.from_pretrained(folder, use_safetensors=True, **options)
    pipe.set_progress_bar_config(disable=True)
    return pipe


def test_stock_diffusers_draws_the_adapted_picture(
    tiny_base: Path, file: AdapterFile, tmp_path: Path
) -> None:
    report = export_merged(file, tiny_base, tmp_path / "merged")
    adapted = pipeline()
    adapted.load_snella_weights({**file.tensors, "snella.header": file.header.to_json()})
    assert torch.equal(picture(stock(tmp_path / "merged")), picture(adapted))
    assert not torch.equal(picture(adapted), picture(pipeline()))
    assert report.relative < 1e-6
    assert [item.name for item in tmp_path.iterdir()] == ["merged"]


def test_a_base_that_lacks_a_text_encoder_is_merged(tmp_path: Path) -> None:
    """The index of the transformer that ships says that it has no T5."""
    absent = {"text_encoder_3": None, "tokenizer_3": None}
    pipe = StableDiffusion3Pipeline.from_pretrained(embedded_dit_path(), **absent)
    base = answer(pipe)
    adapter = read_adapter(save_adapter(tmp_path, {"transformer": adapt(pipe.transformer)}))
    export_merged(adapter, "embedded-dit", tmp_path / "merged")
    merged = StableDiffusion3Pipeline.from_pretrained(tmp_path / "merged", **absent)
    torch.testing.assert_close(answer(merged), answer(pipe))
    assert (answer(merged) - base).abs().max() > 1e-2


def answer(pipe: StableDiffusion3Pipeline) -> Tensor:
    """The transformer's velocity for one random input, (1, 8, 16, 16)."""
    rng = torch.Generator().manual_seed(0)
    with torch.no_grad():
        return pipe.transformer(
            hidden_states=torch.randn(1, 8, 16, 16, generator=rng),
            encoder_hidden_states=torch.randn(1, 32, 256, generator=rng),
            pooled_projections=torch.randn(1, 256, generator=rng),
            timestep=torch.tensor([500.0]),
        ).sample


def test_the_folder_states_its_error_and_hides_local_paths(
    tiny_base: Path, file: AdapterFile, tmp_path: Path
) -> None:
    folder = tmp_path / "merged"
    report = export_merged(file, tiny_base, folder, "float16")
    noted = json.loads((folder / REPORT_NAME).read_text())
    assert noted["relative_error"] == report.relative
    assert 1e-5 < report.relative < 0.01
    assert noted["adapter_digest"] == file.digest
    assert len(noted["layers"]) == 44
    weights = folder / "unet" / "diffusion_pytorch_model.safetensors"
    with safe_open(weights, "pt") as opened:
        assert {opened.get_tensor(name).dtype for name in opened.keys()} == {torch.float16}  # noqa: SIM118
    texts = [path.read_text("utf-8") for path in folder.rglob("*.json")]
    assert not any(str(tiny_base.parent) in text for text in texts)
    assert folder.stat().st_mode & 0o777 == 0o777 & ~_umask()


def _umask() -> int:
    mask = os.umask(0)
    os.umask(mask)
    return mask


def test_nothing_but_an_earlier_export_is_replaced(
    tiny_base: Path, file: AdapterFile, tmp_path: Path
) -> None:
    mine = tmp_path / "mine"
    mine.mkdir()
    (mine / "thesis.txt").write_text("years of work")
    with pytest.raises(SnellaFileError, match="exists already; choose another name or pass"):
        export_merged(file, tiny_base, mine)
    with pytest.raises(SnellaFileError, match="replaces only a folder that an export made"):
        export_merged(file, tiny_base, mine, overwrite=True)
    assert [item.name for item in mine.iterdir()] == ["thesis.txt"]
    export_merged(file, tiny_base, tmp_path / "ours")
    export_merged(file, tiny_base, tmp_path / "ours", "bfloat16", overwrite=True)
    assert json.loads((tmp_path / "ours" / REPORT_NAME).read_text())["dtype"] == "bfloat16"
    assert {item.name for item in tmp_path.iterdir()} == {"mine", "ours"}


def test_an_export_that_fails_leaves_the_old_one(
    tiny_base: Path, file: AdapterFile, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    folder = tmp_path / "ours"
    export_merged(file, tiny_base, folder)
    before = (folder / REPORT_NAME).read_bytes()
    rename = Path.rename

    def full(self: Path, target: Path) -> Path:
        if self.name == "new":
            raise OSError(28, "No space left on device")
        return rename(self, target)

    monkeypatch.setattr(Path, "rename", full)
    with pytest.raises(SnellaFileError, match=r"ours: could not be written \(No space left"):
        export_merged(file, tiny_base, folder, "float16", overwrite=True)
    assert (folder / REPORT_NAME).read_bytes() == before
    assert [item.name for item in tmp_path.iterdir()] == ["ours"]


def test_bases_that_cannot_be_used(tiny_base: Path, file: AdapterFile, tmp_path: Path) -> None:
    with pytest.raises(SnellaBaseError, match=r"cannot be loaded .* give 'embedded', a diffusers"):
        export_merged(file, tmp_path / "nowhere", tmp_path / "out")
    with pytest.raises(SnellaBaseError, match="unet"):
        export_merged(file, "embedded", tmp_path / "out")
    with pytest.raises(SnellaValueError, match="dtype 'int8'"):
        export_merged(file, tiny_base, tmp_path / "out", "int8")
    assert [*tmp_path.iterdir()] == []
