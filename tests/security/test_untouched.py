"""After a refused file the pipeline is what it was, bit for bit, and goes on working.

Every case runs in a fork of a process that holds the pipeline in one of three states: the refusal,
the comparison, and then a good load under the same name.
"""

import hashlib
import json
import random
from collections.abc import Callable
from functools import cache
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from diffusers import StableDiffusionPipeline
from peft import LoraConfig
from torch import nn

from snell_diffusion import SnellaError
from snell_diffusion.adapters import state_with_header
from tests.security.corpus import CASES, COUNTS, good_bytes
from tests.security.forked import run_forked
from tests.tiny_models import adapt, fingerprint, pipeline, sd15_unet

SECONDS = 20
HOOKS = (
    *("_forward_hooks", "_forward_pre_hooks", "_backward_hooks", "_backward_pre_hooks"),
    *("_state_dict_hooks", "_state_dict_pre_hooks", "_load_state_dict_pre_hooks"),
)


def empty(pipe: StableDiffusionPipeline) -> None:
    """No adapter at all."""


def other_active(pipe: StableDiffusionPipeline) -> None:
    """One SNELLA adapter acts, at a strength of its own."""
    donor = adapt(sd15_unet(), seed=7)
    pipe.load_snella_weights(state_with_header({"unet": donor}), adapter_name="there")
    pipe.set_snella_adapters("there", 0.7)


def two_adapters(pipe: StableDiffusionPipeline) -> None:
    """A LoRA and a SNELLA adapter act, in part on the same layers."""
    config = LoraConfig(r=2, target_modules=["to_q"], init_lora_weights=False)
    torch.manual_seed(5)
    pipe.unet.add_adapter(config, "lora")
    other_active(pipe)


STATES: dict[str, Callable[[StableDiffusionPipeline], None]] = {
    "empty": empty,
    "other active": other_active,
    "two adapters": two_adapters,
}


@cache
def in_state(state: str) -> StableDiffusionPipeline:
    """The pipeline of a state; only forks of this process may change it."""
    pipe = pipeline()
    STATES[state](pipe)
    return pipe


def whole_state(pipe: StableDiffusionPipeline) -> dict[str, Any]:
    """Everything a refusal must leave alone."""
    models = [model for model in pipe.components.values() if isinstance(model, nn.Module)]
    modules = [module for model in models for module in model.modules()]
    return {
        **fingerprint(pipe),
        "hooks": [[len(getattr(module, name)) for name in HOOKS] for module in modules],
        "configs": [repr(getattr(model, "peft_config", None)) for model in models],
        "modes": [module.training for module in modules],
        "active": pipe.get_active_snella_adapters(),
        "python random": random.getstate(),
        "numpy random": repr(np.random.get_state()),
    }


def digest(state: dict[str, Any]) -> dict[str, str]:
    """Short enough to print and to send through a pipe."""
    return {name: hashlib.sha256(repr(part).encode()).hexdigest() for name, part in state.items()}


def reseed() -> None:
    """One random state for every fork, whatever this process has drawn since."""
    random.seed(0)
    np.random.seed(0)
    torch.manual_seed(0)


def one_step(pipe: StableDiffusionPipeline) -> torch.Tensor:
    """A picture at a fixed seed, in half the time of `picture`."""
    generator = torch.Generator().manual_seed(3)
    drawn = pipe("a cat", num_inference_steps=1, generator=generator, output_type="np")
    return torch.from_numpy(drawn.images)


@cache
def expected(state: str) -> tuple[dict[str, str], str]:
    """The fingerprint of a state's pipeline, and its picture."""

    def look() -> list[Any]:
        reseed()
        pipe = in_state(state)
        return [digest(whole_state(pipe)), sha(one_step(pipe))]

    outcome = run_forked(look, SECONDS)
    assert outcome.value, outcome
    return outcome.value


def sha(tensor: torch.Tensor) -> str:
    return hashlib.sha256(tensor.numpy().tobytes()).hexdigest()


def weights(pipe: StableDiffusionPipeline) -> str:
    """All tensors of all models by name, without what tells one object from another."""
    state = fingerprint(pipe)
    kept = {name: state[name]["bytes"] for name in ("unet", "text_encoder", "vae")}
    return hashlib.sha256(json.dumps(kept, sort_keys=True).encode()).hexdigest()


def load_good(pipe: StableDiffusionPipeline, path: Path) -> list[Any]:
    layers = pipe.load_snella_weights(path, adapter_name="mine").layers
    return [layers, pipe.get_active_snella_adapters(), weights(pipe)]


def refused_then_loaded(pipe: StableDiffusionPipeline, bad: Path, good: Path) -> list[Any]:
    reseed()
    try:
        pipe.load_snella_weights(bad, adapter_name="mine")
        refused = "accepted"
    except SnellaError:
        refused = "refused"
    after = digest(whole_state(pipe))
    return [refused, after, sha(one_step(pipe)), load_good(pipe, good)]


@pytest.fixture(scope="module")
def good_path(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("good") / "good.safetensors"
    path.write_bytes(good_bytes())
    return path


# Every file of the row meets every state; the further ones the fullest.
PAIRS = [
    (name, state)
    for name, case in CASES.items()
    for state in (STATES if case.group in COUNTS else ["two adapters"])
]


@pytest.mark.row("A3")
@pytest.mark.parametrize("name, state", PAIRS)
def test_a_refused_file_leaves_the_pipeline_as_it_was(
    name: str, state: str, good_path: Path, tmp_path: Path
) -> None:
    pipe = in_state(state)
    bad = tmp_path / "bad.safetensors"
    bad.write_bytes(CASES[name].build())
    outcome = run_forked(lambda: refused_then_loaded(pipe, bad, good_path), SECONDS)
    assert outcome.value is not None, outcome
    refused, after, drawn, loaded = outcome.value
    assert refused == "refused"
    was, picture_was = expected(state)
    assert [part for part in was if after[part] != was[part]] == []
    assert drawn == picture_was
    assert loaded == good_load(state, good_path)


@cache
def good_load(state: str, path: Path) -> list[Any]:
    """What a good load gives in a pipeline that has never met a bad file."""
    outcome = run_forked(lambda: load_good(in_state(state), path), SECONDS)
    assert outcome.value, outcome
    return outcome.value


@pytest.mark.parametrize("state", STATES)
def test_after_all_refusals_the_saved_pipeline_reloads(state: str, tmp_path: Path) -> None:
    """Once per state: that each file alone leaves the same state is tested above."""
    pipe = pipeline()
    STATES[state](pipe)
    for index, case in enumerate(CASES.values()):
        bad = tmp_path / f"{index}.safetensors"
        bad.write_bytes(case.build())
        with pytest.raises(SnellaError):
            pipe.load_snella_weights(bad, adapter_name="mine")
    assert sha(one_step(pipe)) == expected(state)[1]
    if pipe.get_list_snella_adapters():
        pipe.unload_snella_weights()
    if state == "two adapters":
        pipe.unload_lora_weights()
    pipe.save_pretrained(tmp_path / "saved")
    again = StableDiffusionPipeline.from_pretrained(tmp_path / "saved", local_files_only=True)
    again.set_progress_bar_config(disable=True)
    assert sha(one_step(again)) == expected("empty")[1]


def test_the_fingerprint_sees_what_it_should() -> None:
    pipe = pipeline()
    seen = digest(whole_state(pipe))
    unet = pipe.unet
    changes: dict[str, tuple[Callable[[], Any], str]] = {
        "a weight": (lambda: unet.conv_in.weight.data.add_(1e-7), "unet"),
        "a hook": (lambda: unet.register_forward_hook(lambda *_: None), "hooks"),
        "a mode": (lambda: unet.train(), "modes"),
        "torch's random state": (lambda: torch.rand(1), "rng"),
        "Python's random state": (lambda: random.random(), "python random"),
        "numpy's random state": (lambda: np.random.rand(), "numpy random"),
        "a LoRA": (lambda: unet.add_adapter(LoraConfig(target_modules=["to_q"]), "x"), "configs"),
        "a SNELLA adapter": (lambda: other_active(pipe), "active"),
    }
    for change, part in changes.values():
        change()
        now = digest(whole_state(pipe))
        assert now[part] != seen[part]
        seen = now
