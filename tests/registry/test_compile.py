"""One graph for a whole adapted model, and what a change of strength or adapter costs."""

from collections.abc import Callable

import pytest
import torch
from torch._dynamo.testing import CompileCounter

from snell_diffusion import SnellaAttnProcessor
from tests.registry.families import REGISTRY
from tests.registry.made import Made
from tests.registry.record import predict
from tests.tiny_models import adapt

QUICK = ["sd3", "flux", "longcat", "ovis_image", "cogvideox"]
WHOLE = [name for name, family in REGISTRY.items() if not family.graph_break]


@pytest.fixture(autouse=True)
def fresh_dynamo() -> None:
    torch._dynamo.reset()


def compiles_to_one_graph(name: str, processors: bool) -> None:
    family = REGISTRY[name]
    model = adapt(family.build())
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
    compiles_to_one_graph(name, processors=False)


@pytest.mark.full
@pytest.mark.parametrize("name", [name for name in WHOLE if name not in QUICK])
def test_all_others_in_one_graph(name: str) -> None:
    compiles_to_one_graph(name, processors=False)


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


def test_what_a_change_costs(made_for: Callable[[str], Made]) -> None:
    """One compilation for each new combination of adapters and strengths; none for an old one."""
    made = made_for("ovis_image")
    family = made.family
    pipe = family.pipe()
    model = pipe.transformer
    for name in ("a", "b"):
        pipe.load_snella_weights(made.files[name], name)
    counter = CompileCounter()
    compiled = torch.compile(model, backend=counter, fullgraph=True)
    costs = []
    for weights in ({"b": 1.0}, {"a": 1.0}, {"a": 0.5}, {"b": 1.0}, {"a": 0.5}):
        pipe.set_snella_adapters(list(weights), list(weights.values()))
        before = counter.frame_count
        assert torch.equal(predict(family, compiled), made.merged(weights))
        costs.append(counter.frame_count - before)
    assert costs == [1, 1, 1, 0, 0]
