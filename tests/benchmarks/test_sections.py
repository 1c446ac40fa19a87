"""Every section runs at small sizes and leaves what the page reads."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

from benchmarks import (
    __main__,
    gpu,
    inference,
    layers,
    loading,
    memory,
    models,
    page,
    profile,
    scaling,
    trainer,
)
from benchmarks.methods import Ranks
from benchmarks.results import Results
from benchmarks.section import Run, main
from benchmarks.shapes import MODELS, Linear, linears
from benchmarks.works import WORKS

ROOT = Path(__file__).resolve().parents[2]
TIMED = {"base", "full", "lora", "dora", "shira", "plain", "plain_kept", "ours"}


def quick(tmp_path, section, entries, *names):
    path = tmp_path / "cpu.json"
    assert main(section, entries, [*names, "--quick", "--results", str(path)]) == 0
    return Results(path).sections[section]


def test_a_linear_is_timed_and_counted_by_every_method(tmp_path):
    found = quick(tmp_path, "layers", layers.ENTRIES, "768x768@1576")["768x768@1576"]
    assert set(found["seconds"]) == TIMED
    assert set(found["cost"]) == set(found["trained_bytes"]) == TIMED - {"base"}
    assert all(len(values) == 2 for values in found["seconds"].values())
    assert found["used_by"] == ["ViT-B/16"]
    assert found["allocated"] == {}


def test_a_linear_too_large_to_time_is_counted(tmp_path, monkeypatch):
    monkeypatch.setattr(layers, "MOST_MULTIPLY_ADDS", 0)
    found = quick(tmp_path, "layers", layers.ENTRIES, "3072x12288@4096")["3072x12288@4096"]
    assert "seconds" not in found
    assert set(found["cost"]) == TIMED - {"base", "shira"}


def test_every_shape_of_the_models_is_there_once():
    shapes = linears()
    assert {Linear(320, 320, 4096), Linear(768, 1280, 77), Linear(3072, 12288, 4096)} <= set(shapes)
    assert shapes[Linear(1280, 1280, 256)] == ["SD 1.5", "SDXL"]
    assert len(set(layers.ENTRIES)) == len(shapes)
    assert set().union(*shapes.values()) == set(MODELS)


def test_the_sweeps_leave_points(tmp_path):
    found = quick(tmp_path, "scaling", scaling.ENTRIES)
    for entry in found.values():
        assert all(set(point["seconds"]) == {"full", "ours", "plain"} for point in entry["points"])
    assert scaling.WEIGHTS[0] == (128, 128, 256)
    assert scaling.WEIGHTS[-1] == (3072, 3072, 256)
    assert (scaling.TOKENS[0].tokens, scaling.TOKENS[-1].tokens) == (16, 4096)


def test_operations_of_the_kernel_part_do_not_depend_on_tokens():
    beyond = {
        layers.fake_cost(Linear(64, 96, tokens), "ours").flops
        - layers.fake_cost(Linear(64, 96, tokens), "full").flops
        for tokens in (16, 64, 1024)
    }
    assert len(beyond) == 1


def test_a_model_is_timed_and_counted():
    methods = ("base", "lora", "ours", "fused")
    found = models.compare("embedded-dit", 2, methods, Run(rounds=1), Ranks.equal(16))
    assert set(found["seconds"]) == {"base", "lora", "ours"}
    assert set(found["cost"]) == {"lora", "ours"}
    assert found["ranks"] == {"lora": 16, "snella": 16}
    assert found["trained_bytes"]["ours"] - found["trained_bytes"]["lora"] == 12 * found["layers"]


@pytest.mark.full
def test_every_model_at_small_size(tmp_path):
    names = [name for name in models.ENTRIES if not name.startswith("trainer")]
    found = quick(tmp_path, "models", models.ENTRIES, *names)
    assert set(found["vit-b"]["seconds"]) == TIMED - {"plain_kept"}


def test_inference_and_profile(tmp_path):
    found = quick(tmp_path, "inference", inference.ENTRIES, "768x320@77", "embedded-dit")
    assert all(set(entry["seconds"]) == {"base", "cached", "fused"} for entry in found.values())
    found = quick(tmp_path, "profile", profile.ENTRIES, "768x320@77")["768x320@77"]
    assert 0 < sum(row["share"] for row in found["operators"]) <= 1
    assert found["calls"] > 0


def test_cached_and_fused_calls_give_what_the_adapted_model_gives():
    import torch

    from benchmarks.methods import adapt, twin
    from snell_diffusion.tuners import delta_layers

    base = layers.LinearModel(24, 32)
    x = torch.randn(5, 24)
    expected = adapt(twin(base), "ours", layers.TARGETS)(x)
    fused = adapt(twin(base), "ours", layers.TARGETS)
    for _, layer in delta_layers(fused):
        layer.merge()
    torch.testing.assert_close(inference.Call(fused, {"x": x})(), expected)


def test_memory_of_a_model(tmp_path, monkeypatch):
    monkeypatch.setattr(memory, "COMPARED", ("lora", "lora_fp32"))
    found = quick(tmp_path, "memory", memory.ENTRIES, "sd35-checkpointed")["sd35-checkpointed"]
    assert found["cost"]["lora_fp32"]["peak"] > found["cost"]["lora"]["peak"]
    assert (found["dtype"], found["checkpointing"]) == ("bfloat16", True)


@pytest.mark.full
def test_memory_of_every_method(tmp_path):
    found = quick(tmp_path, "memory", memory.ENTRIES, "vit-b", "sdxl")
    assert set(found["vit-b"]["cost"]) == {"lora", "ours", "plain", "full"}
    assert set(found["sdxl"]["cost"]) == {"lora", "lora_fp32", "ours", "plain", "full"}


def test_real_sizes_are_those_of_the_models():
    """Linears to adapt, weights in millions; from the model cards and the papers' tables."""
    import torch

    expected = {"vit-b": (72, 85.8), "vit-l": (144, 303.3), "vit-h": (192, 630.8)}
    expected |= {"sd15": (128, 859.5)}
    for name, (count, millions) in expected.items():
        with torch.device("meta"):
            model = WORKS[name].model()
        assert len(WORKS[name].paths(model)) == count
        size = sum(p.numel() for p in model.parameters()) / 1e6
        assert size == pytest.approx(millions, abs=0.06)


@pytest.mark.full
def test_loading_and_the_page_of_a_quick_run(tmp_path):
    found = quick(tmp_path, "loading", loading.ENTRIES)["sdxl"]
    assert set(found["seconds"]) == {"ours", "lora"}
    assert found["memory"]["ours"]["kept"] >= 0.9 * found["file_bytes"]["ours"] > 0
    quick(tmp_path, "layers", layers.ENTRIES, "768x*")
    text = page.page(page.PAGE.read_text("utf-8"), Results(tmp_path / "cpu.json"), [])
    assert "| ours | 3 |" in text


def test_the_trainers_step_trains_by_every_method():
    with trainer.trainer_steps("demo.yaml", ("lora", "ours"), train_batch_size=1) as steps:
        before = {name: snapshot(step) for name, step in steps.items()}
        for name, step in steps.items():
            step()
            assert any((a != b).any() for a, b in zip(before[name], snapshot(step), strict=True))


@pytest.mark.full
def test_the_trainers_step_by_the_other_methods(tmp_path):
    found = quick(tmp_path, "models", models.ENTRIES, "trainer")["trainer"]
    assert set(found["seconds"]) == set(trainer.METHODS)
    assert found["trained_bytes"]["plain"] == found["trained_bytes"]["ours"]
    assert found["trained_bytes"]["full"] > 10 * found["trained_bytes"]["ours"]
    assert found["cost"]["plain"]["flops"] > found["cost"]["ours"]["flops"]


def snapshot(step):
    trained = (p for part in step.components.values() for p in part.parameters() if p.requires_grad)
    return [p.detach().clone() for p in trained]


def test_the_gpus_code_runs_on_a_cpu(tmp_path):
    path = tmp_path / "cpu.json"
    arguments = ["models", "flux", "--device", "cpu", "--quick", "--results", str(path)]
    assert gpu.run(arguments) == 0
    found = Results(path).sections["models"]["flux"]
    assert set(found["seconds"]) == {"lora", "lora_fp32", "plain", "ours"}
    assert found["stamp"]["command"] == "python -m benchmarks.gpu models flux"


def test_without_a_gpu_it_says_what_to_do(monkeypatch, capsys):
    monkeypatch.setattr("torch.cuda.is_available", lambda: False)
    assert gpu.run([]) == 2
    assert "no NVIDIA GPU here" in capsys.readouterr().out


def test_without_diffusers_vits_and_linears_are_left(monkeypatch):
    monkeypatch.setattr("importlib.util.find_spec", lambda name: None)
    assert set(gpu.possible(gpu.SECTIONS["models"])) == {"vit-b", "vit-l", "vit-h"}
    assert gpu.possible(gpu.SECTIONS["layers"]) == gpu.SECTIONS["layers"]


def test_the_gpus_linears_need_no_diffusers(tmp_path):
    path = tmp_path / "cpu.json"
    code = (
        "import sys; sys.modules['diffusers'] = None; from benchmarks import gpu; "
        "sys.exit(gpu.run([*sys.argv[1:], '--device', 'cpu', '--quick']))"
    )
    command = [sys.executable, "-c", code, "layers", "768x320@77", "--results", str(path)]
    environment = {**os.environ, "OMP_NUM_THREADS": "1"}
    subprocess.run(command, cwd=ROOT, check=True, env=environment, capture_output=True)
    assert list(json.loads(path.read_text())["layers"]) == ["768x320@77"]


def test_a_section_that_dies_loses_no_other(monkeypatch, capsys):
    started = []

    def start(command, check):
        started.append(command[2])
        status = -9 if command[2] == "benchmarks.models" else 0
        return subprocess.CompletedProcess(command, status)

    monkeypatch.setattr(subprocess, "run", start)
    assert __main__.run([]) == 1
    assert started == [f"benchmarks.{name}" for name in (*__main__.SECTIONS, "page")]
    assert "not in full: models" in capsys.readouterr().out


def test_quick_runs_write_no_page(monkeypatch):
    started = []

    def start(command, check):
        started.append(command[2:])
        return subprocess.CompletedProcess(command, 0)

    monkeypatch.setattr(subprocess, "run", start)
    assert __main__.run(["--quick"], ("layers",)) == 0
    assert started == [["benchmarks.layers", "--quick"]]
