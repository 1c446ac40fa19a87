"""`python -m snell_diffusion`: info on any file, and export in its three formats."""

import os
import shutil
from pathlib import Path

import pytest
from safetensors.torch import load_file

from snell_diffusion.__main__ import main
from snell_diffusion.adapters import save_adapter
from snell_diffusion.adapters.foreign import PEFT_FILES
from snell_diffusion.diffusion.run_folder import ADAPTER_FILES
from snell_diffusion.vision.saving import PEFT_WEIGHTS
from tests import tiny_models
from tests.tiny_models import adapt, sd15_unet


@pytest.fixture(scope="module")
def adapter(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("adapter")
    notes = {"instance_prompt": "a \x1b[31mred\x1b[0m cat\nformat    9.9"}
    return save_adapter(folder, {"unet": adapt(sd15_unet())}, "default", notes, {"source": "tiny"})


def test_info_shows_text_of_a_file_without_obeying_it(
    adapter: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main(["info", str(adapter.parent), "--no-layers"]) == 0
    shown = capsys.readouterr().out
    assert "instance_prompt: a \\x1b[31mred\\x1b[0m cat\\nformat    9.9" in shown
    assert all(line.isprintable() for line in shown.splitlines())


def test_a_lora_is_written_and_its_error_shown(
    adapter: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    out = tmp_path / "cat.safetensors"
    ask = ["export", str(adapter), "--format", "kohya", "--rank", "2", "--output", str(out)]
    assert main([*ask, "--dtype", "float16"]) == 0
    shown = capsys.readouterr().out
    assert "all 32 layers as kohya, rank 2, float16: relative error 0." in shown
    assert shown.rstrip().endswith(f"written to {out}")
    assert len(load_file(out)) == 3 * 32
    assert main(ask) == 1
    assert "exists already" in capsys.readouterr().err
    assert main(["info", str(out)]) == 0
    assert "a LoRA with kohya's names" in capsys.readouterr().out


def test_full_rank_and_numbers_only(
    adapter: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    ask = ["export", str(adapter), "--format", "lora", "--output", str(tmp_path / "x.safetensors")]
    assert main([*ask, "--rank", "many"]) == 1
    assert "--rank 'many': expected a number from 1 on, or 'full'" in capsys.readouterr().err
    assert main([*ask, "--rank", "full"]) == 0
    assert "rank 32, float32" in capsys.readouterr().out


def test_merging_needs_a_base(
    adapter: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    ask = ["export", str(adapter), "--format", "merged", "--output", str(tmp_path / "out")]
    assert main(ask) == 1
    assert "pass --base (it was trained on 'tiny')" in capsys.readouterr().err
    tiny_models.pipeline().save_pretrained(tmp_path / "base")
    assert main([*ask, "--base", str(tmp_path / "base")]) == 0
    assert "all 32 layers as merged, full rank, float32" in capsys.readouterr().out
    assert (tmp_path / "out" / "model_index.json").is_file()


def test_what_is_no_adapter_says_what_it_looks_like(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    page = tmp_path / "x.safetensors"
    page.write_bytes(b"<html>404</html>")
    assert main(["info", str(page)]) == 1
    shown = capsys.readouterr().err
    assert shown.startswith(f"error: {page}: ")
    assert "it looks like HTML or XML" in shown


@pytest.mark.parametrize("name", PEFT_FILES)
def test_quantize_says_that_files_of_pefts_methods_stay_as_they_are(
    name: str, adapter: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    run, out = tmp_path / "run", tmp_path / "x.safetensors"
    run.mkdir()
    (run / name).touch()
    (run / "head.safetensors").touch()
    ask = ["quantize", str(run), "--bits", "2", "--output", str(out)]
    assert main(ask) == 1
    shown = capsys.readouterr().err
    assert shown.startswith(f"error: {run}: holds {name}, the file of one of PEFT's methods")
    assert "does not store in few bits" in shown
    assert "weight_name" not in shown
    assert not out.exists()
    shutil.copy(adapter, run)
    assert main(ask) == 0


def test_quantize_says_what_a_folder_without_any_adapter_lacks(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    ask = ["quantize", str(tmp_path), "--bits", "2", "--output", str(tmp_path / "x.safetensors")]
    assert main(ask) == 1
    assert "pytorch_snella_weights.safetensors: no such file" in capsys.readouterr().err


def test_files_of_pefts_methods_are_those_that_runs_leave() -> None:
    of_pipelines = {ADAPTER_FILES["lora"], ADAPTER_FILES["peft"]}
    assert set(PEFT_FILES) == {PEFT_WEIGHTS, *of_pipelines}


def test_warnings_are_one_line_for_people(
    adapter: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    import warnings

    import snell_diffusion.adapters as adapters

    def warn(path: Path) -> None:
        with warnings.catch_warnings():
            warnings.simplefilter("always")
            warnings.warn("save \x1b[2J it again", stacklevel=1)
        raise SystemExit

    monkeypatch.setattr(adapters, "read_adapter", warn)
    with pytest.raises(SystemExit):
        main(["info", str(adapter)])
    assert capsys.readouterr().err == "warning: save \\x1b[2J it again\n"


def test_a_reader_that_has_seen_enough_is_no_error(
    adapter: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """`info FILE | head` closes the pipe."""
    reading, writing = os.pipe()
    os.close(reading)
    with os.fdopen(writing, "w") as closed:
        monkeypatch.setattr("sys.stdout", closed)
        assert main(["info", str(adapter)]) == 1
    assert "Traceback" not in capsys.readouterr().err
