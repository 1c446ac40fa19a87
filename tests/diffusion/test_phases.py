"""Each phase has on the device what it needs and no more, and the result does not depend on it."""

import dataclasses
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn

from snell_diffusion.diffusion import phases as placement
from snell_diffusion.diffusion import setup
from snell_diffusion.diffusion.phases import Phases, needs_of
from snell_diffusion.diffusion.training import run
from snell_diffusion.errors import SnellaConfigError, SnellaError
from tests.diffusion.training_runs import CLASS_PROMPT, PROMPT, config

NAMES = ("unet", "vae", "text_encoder", "text_encoder_2")
TEXT = {"text_encoder", "text_encoder_2"}
GPU = torch.device("meta")  # stands for a device that is not the CPU


def make(
    offload: bool = True, pinned: tuple[str, ...] = (), **cached: bool
) -> tuple[Phases, list[tuple[str, str]]]:
    """Phases over empty models, and the list of their moves as they happen."""
    models = {name: nn.Linear(2, 2) for name in NAMES}
    names = {id(model): name for name, model in models.items()}
    moves: list[tuple[str, str]] = []
    needs = needs_of(NAMES, "unet", **{"cached_text": True, "cached_latents": True, **cached})
    phases = Phases(
        models,
        needs,
        GPU,
        offload=offload,
        pinned=pinned,
        move=lambda model, device: moves.append((names[id(model)], device.type)),
    )
    return phases, moves


def test_a_phase_has_what_it_needs_and_no_more() -> None:
    phases, moves = make()
    assert phases.present == set()
    expected = {
        "text": TEXT,
        "latents": {"vae"},
        "train": {"unet"},
        "sample": {"unet"},
        "decode": {"vae"},
    }
    for phase, names in [*expected.items(), *expected.items()]:
        phases.enter(phase)
        assert phases.present == names, phase
    # What goes leaves before what comes arrives.
    assert moves[:5] == [
        ("text_encoder", "meta"),
        ("text_encoder_2", "meta"),
        ("text_encoder", "cpu"),
        ("text_encoder_2", "cpu"),
        ("vae", "meta"),
    ]


def test_without_offloading_nothing_moves() -> None:
    phases, moves = make(offload=False)
    for phase in ("text", "latents", "train", "sample", "decode"):
        phases.enter(phase)
        assert phases.present == set(NAMES)
    assert phases.free("text") == []
    assert moves == []


def test_a_step_that_encodes_its_prompts_keeps_the_denoiser() -> None:
    phases, moves = make(cached_text=False, cached_latents=False)
    phases.enter("train")
    assert phases.present == set(NAMES)
    before = list(moves)
    for phase in ("text", "latents", "train"):
        phases.enter(phase)
    assert moves == before


def test_pinned_models_never_move() -> None:
    phases, moves = make(pinned=("unet",))
    for phase in ("text", "train", "decode"):
        phases.enter(phase)
        assert "unet" in phases.present
    assert "unet" not in dict(moves)


def test_listeners_hear_every_piece_of_work() -> None:
    phases, _ = make(offload=False)
    heard: list[str] = []
    phases.listen(heard.append)
    for phase in ("text", "train", "train"):
        phases.enter(phase)
    assert heard == ["text", "train", "train"]


def test_freed_models_take_no_memory_and_are_refused() -> None:
    phases, _ = make()
    assert phases.free("text") == sorted(TEXT)
    encoder = phases._models["text_encoder"]
    assert sum(p.numel() for p in encoder.parameters()) == 0
    assert next(encoder.parameters()).dtype == torch.float32
    assert phases.free("text") == []
    with pytest.raises(SnellaError, match=r"text_encoder, text_encoder_2 of the base was freed, b"):
        phases.enter("text")
    phases.enter("train")


def test_what_another_phase_needs_is_not_freed() -> None:
    phases, _ = make(cached_text=False)
    assert phases.free("text") == []
    assert make()[0].free("latents") == []  # the VAE also decodes
    assert make()[0].free("latents", "decode") == ["vae"]


def test_shards_of_a_quantized_base_are_refused(tiny_base: Path, tmp_path: Path) -> None:
    class Sharding:
        shares_forward, name = True, "FSDP"

    settings = config(tiny_base, tmp_path, base_quantization="torchao_int8")
    models = {"unet": nn.Linear(2, 2)}
    with pytest.raises(SnellaConfigError, match="torchao_int8 cannot be sharded by FSDP"):
        placement.place(settings, models, models, torch.device("cpu"), Sharding())  # type: ignore[arg-type]


OPTIONS: dict[str, Any] = {
    "with_prior_preservation": True,
    "class_prompt": CLASS_PROMPT,
    "num_class_images": 2,
    "validation_prompt": PROMPT,
    "sample_prompts": ["a cat on grass"],
    "sample_steps": 2,
    "validation_steps": 2,
    "checkpointing_steps": 2,
    "ema_decay": 0.9,
}
# Which models each of a family's functions may find on the device.
USES = {
    "encode_text": {"text_encoder"},
    "encode_images": {"vae"},
    "denoise": {"unet"},
    "sample": {"unet"},
    "decode_latents": {"vae"},
}


@pytest.fixture
def watched(monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """Fail where a family's function finds other models on the device; the calls, in order."""
    calls: list[str] = []
    made: list[Phases] = []
    place, family_of = setup.place, setup.family_of

    def remember(*arguments: Any) -> Phases:
        made.append(place(*arguments))
        return made[-1]

    def guard(name: str, function: Callable[..., Any]) -> Callable[..., Any]:
        def guarded(*arguments: Any) -> Any:
            calls.append(name)
            assert made[-1].present == USES[name], name
            return function(*arguments)

        return guarded

    def guarded_family(*arguments: Any) -> Any:
        family = family_of(*arguments)
        return dataclasses.replace(family, **{n: guard(n, getattr(family, n)) for n in USES})

    monkeypatch.setattr(setup, "place", remember)
    monkeypatch.setattr(setup, "family_of", guarded_family)
    return calls


def written(folder: Path) -> dict[str, bytes]:
    names = ("pytorch_snella_weights.safetensors", "samples.png")
    return {name: (folder / name).read_bytes() for name in names}


def test_a_run_is_the_same_with_and_without_offloading(
    tiny_base: Path, tmp_path: Path, watched: list[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    moved = run(config(tiny_base, tmp_path / "a", offload_encoders=True, **OPTIONS))
    assert set(watched) == set(USES)
    notes = [e["message"] for e in moved.history if e["event"] == "note"]
    assert "freed for the rest of the run: text_encoder" in notes
    assert not [note for note in notes if "failed" in note]
    monkeypatch.undo()
    still = run(config(tiny_base, tmp_path / "b", **OPTIONS))
    assert written(moved.output_dir) == written(still.output_dir)
    measured = [
        [e for e in result.history if e["event"] == "validation"] for result in (moved, still)
    ]
    assert measured[0] == measured[1]
