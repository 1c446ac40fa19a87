"""A6: adapter names, and 200 random orders of every verb against a model of what they should do."""

import copy
import random
from dataclasses import dataclass, field
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from diffusers import UNet2DConditionModel
from torch import Tensor

from snell_diffusion.adapters import save_adapter
from snell_diffusion.diffusion import pipeline as verbs
from snell_diffusion.errors import SnellaError, SnellaKeyError, SnellaValueError
from snell_diffusion.tuners import DeltaLayer, delta_layers
from tests.rows import RowRecord
from tests.tiny_models import adapt, hash_bytes, sd15_unet, text_encoder

pytestmark = pytest.mark.row("A6")

BLOCKS, ORDERS, STEPS = 20, 10, 8
NAMES = ("a", "b-2", "weight")
WEIGHTS = (0.0, 0.3, 1.0, -1.5, 1.7)
FILES = {
    "both": ("unet", "text_encoder"),
    "unet": ("unet",),
    "text": ("text_encoder",),
}
COMPONENTS = FILES["both"]
TARGETS = {"unet": ["to_q", "to_v"], "text_encoder": ["q_proj"]}


def small_unet() -> UNet2DConditionModel:
    """One level instead of two, because it runs after each of 1,600 steps."""
    return sd15_unet(
        block_out_channels=(16,),
        down_block_types=("CrossAttnDownBlock2D",),
        up_block_types=("CrossAttnUpBlock2D",),
    )


MAKERS = {"unet": small_unet, "text_encoder": text_encoder}


@pytest.fixture(scope="module")
def files(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    folder = tmp_path_factory.mktemp("files")
    return {
        kind: save_adapter(
            folder / f"{kind}.safetensors",
            {
                name: adapt(MAKERS[name](), seed=seed, target_modules=TARGETS[name])
                for name in components
            },
        )
        for seed, (kind, components) in enumerate(FILES.items())
    }


@pytest.fixture(scope="module")
def base() -> SimpleNamespace:
    """A pipeline as far as the verbs look at one; tests take a copy."""
    return SimpleNamespace(components={name: MAKERS[name]() for name in COMPONENTS})


@torch.no_grad()
def output(pipe: Any) -> Tensor:
    """The noise prediction for one prompt, through both models."""
    words = torch.arange(6).reshape(1, 6) + 10
    text = pipe.components["text_encoder"](words).last_hidden_state
    draw = torch.Generator().manual_seed(4)
    sample = torch.randn(1, 4, 8, 8, generator=draw)
    return pipe.components["unet"](sample, 500, text, return_dict=False)[0]


def contents(pipe: Any) -> list[tuple[str, str, str]]:
    """Modules and bytes of both models."""
    return [
        (component, path, type(module).__name__)
        for component, model in pipe.components.items()
        for path, module in model.named_modules()
    ] + [
        (component, key, hash_bytes(tensor))
        for component, model in pipe.components.items()
        for key, tensor in model.state_dict().items()
    ]


BAD = ["a.b", "../x", "", "x" * 65, "a b", "caf\u00e9", "a\n", "forward"]
GOOD = ["weight", "lora_A", "Cat-2_x"]


@pytest.mark.parametrize("name", BAD)
def test_bad_names_are_refused(name: str, base: SimpleNamespace, files: dict[str, Path]) -> None:
    pipe = copy.deepcopy(base)
    before = contents(pipe)
    with pytest.raises(SnellaValueError, match=r"^adapter_name: expected "):
        verbs.load_snella_weights(pipe, files["both"], name)
    assert contents(pipe) == before


@pytest.mark.parametrize("name", GOOD)
def test_good_names_work(name: str, base: SimpleNamespace, files: dict[str, Path]) -> None:
    pipe = copy.deepcopy(base)
    plain = output(pipe)
    verbs.load_snella_weights(pipe, files["both"], name)
    verbs.set_snella_adapters(pipe, name, 0.5)
    assert verbs.get_list_snella_adapters(pipe) == {part: [name] for part in COMPONENTS}
    assert not torch.equal(output(pipe), plain)
    verbs.unload_snella_weights(pipe, name)
    assert torch.equal(output(pipe), plain)


def test_a_name_that_is_taken_is_refused(base: SimpleNamespace, files: dict[str, Path]) -> None:
    pipe = copy.deepcopy(base)
    verbs.load_snella_weights(pipe, files["unet"], "cat")
    before = contents(pipe)
    for kind in ("unet", "both", "text"):
        with pytest.raises(SnellaKeyError, match="adapter name 'cat' is already in use"):
            verbs.load_snella_weights(pipe, files[kind], "cat")
    assert contents(pipe) == before


@dataclass
class Expected:
    """What should be loaded, active and fused; `apply` returns False for what must be refused."""

    kinds: dict[str, str] = field(default_factory=dict)  # name -> which file, in load order
    active: list[str] = field(default_factory=list)
    weights: dict[str, dict[str, float]] = field(default_factory=dict)
    fused: dict[str, tuple[tuple[str, float], ...]] = field(default_factory=dict)
    on: bool = True

    def apply(self, verb: str, *given: Any) -> bool:
        return bool(getattr(self, verb)(*given))

    def load(self, name: str, kind: str) -> bool:
        if name in self.kinds or set(FILES[kind]) & set(self.fused):
            return False
        self.kinds[name] = kind
        self.weights[name] = dict.fromkeys(COMPONENTS, 1.0)
        self.active, self.on = [name], True
        return True

    def set(self, names: list[str], weights: list[Any]) -> bool:
        if self.fused or not set(names) <= set(self.kinds):
            return False
        self.active = names
        for name, weight in zip(names, weights, strict=True):
            given = weight if isinstance(weight, dict) else dict.fromkeys(COMPONENTS, weight)
            self.weights[name] = {part: given.get(part, 1.0) for part in COMPONENTS}
        return True

    def unload(self) -> bool:
        self.__init__()  # type: ignore[misc]
        return True

    def delete(self, names: list[str]) -> bool:
        if self.fused or not set(names) <= set(self.kinds):
            return False
        for name in names:
            del self.kinds[name], self.weights[name]
        self.active = [name for name in self.active if name in self.kinds]
        self.on = self.on or not self.kinds
        return True

    def enable(self) -> bool:
        self.on = self.on or bool(self.kinds)
        return bool(self.kinds)

    def disable(self) -> bool:
        allowed = bool(self.kinds) and not self.fused
        self.on = self.on and not allowed
        return allowed

    def fuse(self, scale: float) -> bool:
        if self.fused or not self.on or not self.active:
            return False
        self.fused = {
            part: tuple((kind, weight * scale) for kind, weight in self.acting(part))
            for part in COMPONENTS
            if self.acting(part)
        }
        return True

    def unfuse(self) -> bool:
        fused, self.fused = self.fused, {}
        return bool(fused)

    def acting(self, component: str) -> list[tuple[str, float]]:
        """(file, strength) of the active adapters that have the component."""
        return [
            (self.kinds[name], self.weights[name][component])
            for name in self.active
            if component in FILES[self.kinds[name]]
        ]

    def state(self) -> tuple[Any, ...]:
        """What the output depends on, by component."""
        return tuple(
            (True, self.fused[part])
            if part in self.fused
            else (False, tuple(item for item in self.acting(part) if item[1] and self.on))
            for part in COMPONENTS
        )


def choose(draw: random.Random, expected: Expected) -> tuple[str, tuple[Any, ...]]:
    """A verb and its arguments; most of the time such that it can work."""
    verb = draw.choice(
        ("load", "load", "set", "set", "delete", "enable", "disable", "fuse", "unfuse", "unload")
    )
    there = list(expected.kinds) if expected.kinds and draw.random() < 0.9 else list(NAMES)
    names = draw.sample(there, draw.randint(1, len(there)))
    if verb == "load":
        free = [name for name in NAMES if name not in expected.kinds] or list(NAMES)
        return verb, (draw.choice(free), draw.choice(list(FILES)))
    if verb == "set":
        weights = [
            {"unet": draw.choice(WEIGHTS)} if draw.random() < 0.3 else draw.choice(WEIGHTS)
            for _ in names
        ]
        return verb, (names, weights)
    if verb == "delete":
        return verb, (names,)
    return verb, ((draw.choice(WEIGHTS[1:]),) if verb == "fuse" else ())


def perform(pipe: Any, verb: str, given: tuple[Any, ...], files: dict[str, Path]) -> None:
    """The verb on the real models."""
    if verb == "load":
        verbs.load_snella_weights(pipe, files[given[1]], given[0])
    elif verb == "set":
        verbs.set_snella_adapters(pipe, *given)
    elif verb == "delete":
        verbs.delete_snella_adapters(pipe, *given)
    elif verb == "unload":
        verbs.unload_snella_weights(pipe)
    else:
        getattr(verbs, f"{verb}_snella")(pipe, *given)


def check(pipe: Any, expected: Expected, outputs: dict[Any, Tensor], log: list[Any]) -> None:
    """Names, scales and output are those of the model of the verbs, whichever way it got here."""
    loaded = {
        part: {name for name, kind in expected.kinds.items() if part in FILES[kind]}
        for part in COMPONENTS
    }
    listed = verbs.get_list_snella_adapters(pipe)
    assert {part: set(listed.get(part, ())) for part in COMPONENTS} == loaded, log
    assert set(verbs.get_active_snella_adapters(pipe)) == set(expected.active), log
    for part, model in pipe.components.items():
        for path, layer in delta_layers(model):
            assert layer.scaling == {name: expected.weights[name][part] for name in loaded[part]}, (
                path,
                log,
            )
    now = output(pipe)
    assert torch.equal(now, outputs.setdefault(expected.state(), now)), log


@pytest.mark.parametrize("block", range(BLOCKS))
def test_any_order_of_the_verbs(
    block: int, base: SimpleNamespace, files: dict[str, Path], row: RowRecord
) -> None:
    pipe = copy.deepcopy(base)
    before, plain = contents(pipe), output(pipe)
    outputs = {Expected().state(): plain}
    for order in range(ORDERS):
        draw = random.Random(1000 * block + order)
        expected, log = Expected(), []
        for _ in range(STEPS):
            verb, given = choose(draw, expected)
            log.append((verb, *given))
            if expected.apply(verb, *copy.deepcopy(given)):
                perform(pipe, verb, given, files)
            else:
                with pytest.raises(SnellaError):
                    perform(pipe, verb, given, files)
            check(pipe, expected, outputs, log)
        verbs.unload_snella_weights(pipe)
        assert torch.equal(output(pipe), plain), log
        assert contents(pipe) == before, log
        assert not any(
            isinstance(m, DeltaLayer) for c in pipe.components.values() for m in c.modules()
        )
    row.cases(ORDERS)
