"""One graph for a whole adapted model, and what a change of strength or adapter costs."""

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch._dynamo.testing import CompileCounter

from snell_diffusion import SnellaAttnProcessor
from tests.registry.families import REGISTRY
from tests.registry.made import Made
from tests.registry.record import predict
from tests.tiny_models import adapt, hash_bytes

QUICK = ["sd3", "flux", "longcat", "ovis_image", "cogvideox"]
WHOLE = [name for name, family in REGISTRY.items() if not family.graph_break]


@pytest.fixture(autouse=True)
def fresh_dynamo() -> None:
    torch._dynamo.reset()


def compiles_to_one_graph(name: str, processors: bool = False, **config: Any) -> None:
    family = REGISTRY[name]
    model = adapt(family.build(), **config)
    expected = predict(family, model)  # some families fill tables at their first call
    assert not torch.equal(expected, predict(family, family.build()))
    if processors:
        SnellaAttnProcessor.install(model)
    counter = CompileCounter()
    compiled = torch.compile(model, backend=counter, fullgraph=True)
    assert torch.equal(predict(family, compiled), expected)
    assert torch.equal(predict(family, compiled), expected)
    assert counter.frame_count == 1


@pytest.mark.parametrize("name", QUICK)
def test_five_families_in_one_graph(name: str) -> None:
    compiles_to_one_graph(name, target_modules=["to_q", "to_v"])


@pytest.mark.full
@pytest.mark.parametrize("name", WHOLE)
def test_all_in_one_graph(name: str) -> None:
    compiles_to_one_graph(name)


@pytest.mark.full
@pytest.mark.parametrize("name", ["sd3", "pixart", "wan", "z_image", "lumina_next"])
def test_processors_in_one_graph(name: str) -> None:
    compiles_to_one_graph(name, processors=True)


@pytest.mark.full
@pytest.mark.parametrize("name", [name for name in REGISTRY if REGISTRY[name].graph_break])
def test_where_it_fails_the_bare_family_fails(name: str) -> None:
    from torch._dynamo.exc import Unsupported, UserError

    family = REGISTRY[name]
    model = family.build()
    predict(family, model)
    with pytest.raises((Unsupported, UserError)):
        predict(family, torch.compile(model, backend="eager", fullgraph=True))


@pytest.fixture
def pipe() -> Any:
    """A pipeline with adapters "a" on two layers and "b" on one of them."""
    family = REGISTRY["ovis_image"]
    model = family.build()
    targets = ["transformer_blocks.0.attn.to_q", "transformer_blocks.0.attn.to_k"]
    adapt(model, "a", target_modules=targets)
    adapt(model, "b", seed=5, target_modules=targets[:1])
    return family.pipe(model)


@pytest.mark.filterwarnings("ignore:Already found a `peft_config`:UserWarning")
def test_what_a_change_costs(pipe: Any) -> None:
    """Once torch has seen a strength change, strengths and levels are inputs of the graph."""
    family, model = REGISTRY["ovis_image"], pipe.transformer
    counter = CompileCounter()
    compiled = torch.compile(model, backend=counter, fullgraph=True)
    expected = {}

    def cost(name: str, strength: float, level: float | None = None) -> int:
        pipe.set_snella_adapters(name, strength)
        pipe.set_snella_sparsity(level, name)
        before = counter.frame_count
        plain = expected[name, strength, level] = predict(family, model)
        assert torch.equal(predict(family, compiled), plain)
        return counter.frame_count - before

    assert [cost("b", 1.0), cost("a", 1.0), cost("a", 0.5), cost("b", 1.0)] == [1, 1, 1, 0]
    assert [cost("a", 0.5), cost("a", 1.0), cost("a", 0.7), cost("b", 1.0)] == [0, 0, 0, 0]
    assert [cost("a", 1.0, 0.9), cost("a", 1.0), cost("a", 1.0, 0.8)] == [0, 0, 0]
    hashes = {hash_bytes(prediction) for prediction in expected.values()}
    assert len(hashes) == len(expected) == 6


def test_a_file_loaded_just_before_compiling(made_for: Callable[[str], Made]) -> None:
    """No plain call in between: what compiled code cannot read must be there already."""
    made = made_for("longcat")
    pipe = made.family.pipe()
    pipe.load_snella_weights(made.files["b"])
    compiled = torch.compile(pipe.transformer, backend="eager", fullgraph=True)
    assert torch.equal(predict(made.family, compiled), made.merged({"b": 1.0}))
