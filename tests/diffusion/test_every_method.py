"""The DreamBooth trainer with every method: trains, resumes, and fills a pipeline."""

import json
import os
import signal
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from diffusers import StableDiffusionPipeline
from safetensors import safe_open
from safetensors.torch import save_file

from snell_diffusion.diffusion.restore import attach
from snell_diffusion.diffusion.run_folder import ADAPTER_FILES, kind_of
from snell_diffusion.diffusion.training import Trainer, run
from snell_diffusion.errors import SnellaConfigError, SnellaError
from snell_diffusion.training.errors import Interrupted
from snell_diffusion.tuners.recipes import RECIPES
from tests.diffusion.training_runs import config

RATES = {"full": 1e-3, "shira": 1e-2}
SETTINGS: dict[str, dict[str, Any]] = {
    "hta": {"rank": None},
    "full": {"rank": None, "target_modules": []},
    "oft": {"rank": 4},
    "spt_lora": {"method_args": ["budget=800", "batches=2"]},
    "spt_adapter": {"method_args": ["budget=800", "batches=2"]},
    "binary_adapter": {"target_modules": ["ff.net.2"]},
}


def settings(base: Path, folder: Path, name: str, **changes: Any) -> Any:
    values = {"method": name, "learning_rate": RATES.get(name, 1e-2), **SETTINGS.get(name, {})}
    return config(base, folder, **{"max_train_steps": 4, **values, **changes})


def answers(pipe: Any) -> torch.Tensor:
    generator = torch.Generator().manual_seed(3)
    x = torch.randn(2, pipe.unet.config.in_channels, 8, 8, generator=generator)
    states = torch.randn(2, 5, pipe.unet.config.cross_attention_dim, generator=generator)
    with torch.no_grad():
        return pipe.unet(x, 300, encoder_hidden_states=states).sample


@pytest.mark.parametrize("name", RECIPES)
def test_what_a_run_leaves_is_what_it_trained(
    name: str, tiny_base: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    kept: list[torch.Tensor] = []
    finish = Trainer._finish

    def watch(self: Trainer) -> Any:
        denoiser = self._model.denoiser
        training = denoiser.training
        kept.append(answers(type("Pipe", (), {"unet": denoiser.eval()})))
        denoiser.train(training)
        return finish(self)

    monkeypatch.setattr(Trainer, "_finish", watch)
    result = run(settings(tiny_base, tmp_path, name))
    assert result.adapter_path is not None
    assert result.adapter_path.name == ADAPTER_FILES[kind_of(name)]
    pipe = StableDiffusionPipeline.from_pretrained(tiny_base)
    before = answers(pipe)
    detach = attach(pipe, result.output_dir)
    torch.testing.assert_close(answers(pipe), kept[0], rtol=1e-4, atol=1e-5)
    assert not torch.equal(answers(pipe), before)
    detach()
    assert torch.equal(answers(pipe), before)
    card = (result.output_dir / "README.md").read_text()
    ways = {"ours": "load_snella_weights(", "lora": "load_lora_weights("}
    assert ways.get(kind_of(name), "attach(pipe, ") in card


@pytest.mark.parametrize("name", ["full", "adalora", "spt_lora"])
def test_stopped_and_resumed_is_identical(name: str, tiny_base: Path, tmp_path: Path) -> None:
    whole = run(settings(tiny_base, tmp_path / "whole", name, max_train_steps=6))
    parts = settings(tiny_base, tmp_path / "parts", name, max_train_steps=6)

    def stop_after_three(event: dict[str, Any]) -> None:
        if event["event"] == "step" and event["step"] == 3:
            os.kill(os.getpid(), signal.SIGTERM)

    with pytest.raises(Interrupted):
        run(parts, stop_after_three)
    resumed = run(replace(parts, resume_from_checkpoint="latest"))
    assert whole.adapter_path is not None
    assert resumed.adapter_path is not None
    assert resumed.adapter_path.read_bytes() == whole.adapter_path.read_bytes()


def test_method_args_are_settings_of_the_method(tiny_base: Path, tmp_path: Path) -> None:
    result = run(
        settings(tiny_base, tmp_path, "snella", method_args=["bits=2", "p=1.5"], rank=None)
    )
    from snell_diffusion.adapters import read_adapter

    assert result.adapter_path is not None
    header = read_adapter(result.adapter_path).header
    part = header.components["unet"]
    assert (part.bits, part.config["bits"], part.config["p"]) == (2, 2, 1.5)


@pytest.mark.parametrize(
    "changes, message",
    [
        ({"method_args": ["colour=1"]}, "method snella has no colour; it takes rank"),
        ({"method_args": ["rank=2"]}, "rank stands both there and as a setting of its own"),
        ({"method": "hta", "rank": 4}, "method hta has no rank"),
        ({"method": "lora", "heads": 2}, "method lora has no heads"),
        (
            {
                "method": "spt_lora",
                "method_args": ["budget=500"],
                "train_text_encoder": True,
            },
            "leave train_text_encoder out",
        ),
    ],
)
def test_settings_that_are_refused(
    changes: dict[str, Any], message: str, tiny_base: Path, tmp_path: Path
) -> None:
    with pytest.raises(SnellaError, match=message):
        run(config(tiny_base, tmp_path, **changes))
    assert not (tmp_path / "run").exists()


def test_an_unknown_method_is_refused_with_the_list(tiny_base: Path, tmp_path: Path) -> None:
    from snell_diffusion.diffusion.config_files import make_config

    with pytest.raises(SnellaConfigError, match=r"method should be .*'snella'.* got 'lokr'"):
        make_config({"method": "lokr", "instance_data_dir": ".", "instance_prompt": "x"})


@pytest.fixture(scope="module")
def hra(tiny_base: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The file of a run with a method of PEFT's."""
    path = run(settings(tiny_base, tmp_path_factory.mktemp("hra"), "hra")).adapter_path
    assert path is not None
    return path


def rewritten(path: Path, folder: Path, change: Any) -> Path:
    with safe_open(path, "pt") as file:
        metadata = dict(file.metadata())
        tensors = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118
    change(metadata, tensors)
    save_file(tensors, folder / path.name, metadata)
    return folder / path.name


def about(metadata: dict[str, str], **changes: Any) -> None:
    found = json.loads(metadata["snell_diffusion.run"])
    found.update(changes)
    metadata["snell_diffusion.run"] = json.dumps(found)


def settings_of(metadata: dict[str, str], **changes: Any) -> None:
    configs = json.loads(metadata["snell_diffusion.run"])["configs"]
    about(metadata, configs={"unet": {**configs["unet"], **changes}})


@pytest.mark.parametrize(
    "change, message",
    [
        (lambda m, t: m.pop("snell_diffusion.run"), "expected the weights of a run"),
        (lambda m, t: about(m, method="os"), "expected the weights of a run"),
        (lambda m, t: about(m, method="snella"), "expected the weights of a run"),
        (lambda m, t: m.update({"snell_diffusion.run": "{"}), "is no JSON"),
        (lambda m, t: about(m, configs=[]), "settings by component"),
        (lambda m, t: settings_of(m, colour="red"), "expected those of method hra, got colour"),
        (lambda m, t: settings_of(m, r=-1), "does not take it"),
        (lambda m, t: t.update({"vae2.x": torch.zeros(1)}), "is for 'vae2'"),
        (lambda m, t: t.update({"unet.x": torch.zeros(1)}), "unknown tensors x"),
        (lambda m, t: next(iter(t.values())).fill_(torch.nan), "NaN or infinite"),
        (lambda m, t: t.popitem(), "1 are missing"),
        (lambda m, t: t.update({n: v[:1] for n, v in t.items()}), "expected shape"),
    ],
)
def test_files_that_do_not_fit_leave_the_pipeline_as_it_was(
    change: Any, message: str, hra: Path, tiny_base: Path, tmp_path: Path
) -> None:
    pipe = StableDiffusionPipeline.from_pretrained(tiny_base)
    before = answers(pipe)
    modules = [name for name, _ in pipe.unet.named_modules()]
    with pytest.raises(SnellaError, match=message):
        attach(pipe, rewritten(hra, tmp_path, change))
    assert torch.equal(answers(pipe), before)
    assert [name for name, _ in pipe.unet.named_modules()] == modules
    assert not hasattr(pipe.unet, "peft_config")


def test_a_folder_without_a_result_is_told(tiny_base: Path, tmp_path: Path) -> None:
    pipe = StableDiffusionPipeline.from_pretrained(tiny_base)
    with pytest.raises(SnellaError, match=r"expected one of .*got none of them"):
        attach(pipe, tmp_path)
