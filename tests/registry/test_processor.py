"""SnellaAttnProcessor on every family: the tuner layers' own bits, from stock projections."""

import copy

import pytest
import torch
from torch import nn

from snell_diffusion import SnellaAttnProcessor
from snell_diffusion.diffusion.reach import reaches
from snell_diffusion.errors import SnellaKeyError, SnellaValueError
from snell_diffusion.tuners import DeltaLayer
from tests.registry.families import REGISTRY
from tests.registry.made import Made
from tests.registry.record import predict


def projections(model: nn.Module) -> set[str]:
    """Places of the tuner layers that attention blocks hold, e.g. `to_q`."""
    return {
        place
        for attn in model.modules()
        if callable(getattr(attn, "processor", None))
        for place, module in attn.named_modules()
        if isinstance(module, DeltaLayer)
    }


def test_both_forms_predict_the_same_bits(made: Made) -> None:
    family = made.family
    pipe = family.pipe()
    pipe.load_snella_weights(made.files["a"], "a")
    pipe.load_snella_weights(made.files["b"], "b")
    pipe.set_snella_adapters(["a", "b"], [1.0, 0.5])
    model = getattr(pipe, family.component)
    expected = made.merged({"a": 1.0, "b": 0.5})
    assert len(projections(model)) > len(family.bypassed)
    assert SnellaAttnProcessor.install(model) > 0
    assert projections(model) == set(family.bypassed)
    assert torch.equal(predict(family, model), expected)
    assert torch.equal(predict(family, copy.deepcopy(model)), expected)
    pipe.set_snella_adapters("b")
    assert torch.equal(predict(family, model), made.merged({"b": 1.0}))
    assert projections(model) == set(family.bypassed)
    SnellaAttnProcessor.remove(model)
    assert torch.equal(predict(family, model), made.merged({"b": 1.0}))


def test_a_processor_that_leaves_a_projection_out_is_refused() -> None:
    class Forgetful:
        def __call__(self, attn, hidden_states, **kwargs):
            return attn.to_out[0](attn.to_v(hidden_states))

    family = REGISTRY["pixart"]
    from tests.tiny_models import adapt

    model = adapt(family.build())
    expected = predict(family, model)
    SnellaAttnProcessor.install(model)
    for name in ("attn1", "attn2"):
        getattr(model.transformer_blocks[0], name).set_processor(Forgetful())
    message = r"Forgetful does not use to_k, to_q of Attention, .*remove\(model\) before"
    with pytest.raises(SnellaValueError, match=message):
        predict(family, model)
    SnellaAttnProcessor.remove(model)
    for attn in (model.transformer_blocks[0].attn1, model.transformer_blocks[0].attn2):
        attn.set_processor(type(model.transformer_blocks[1].attn1.processor)())
    assert torch.equal(predict(family, model), expected)


def test_projections_that_no_processor_calls_are_not_taken() -> None:
    from tests.tiny_models import adapt

    family = REGISTRY["lumina_next"]
    model = adapt(family.build(), target_modules=["to_out.0"])
    with pytest.raises(SnellaKeyError, match="no attention projection of LuminaNextDiT2DModel has"):
        SnellaAttnProcessor.install(model)


def test_reach_is_read_through_helpers_and_methods() -> None:
    flux = REGISTRY["flux"].build()
    attn = flux.transformer_blocks[0].attn
    for place in ("to_q", "to_k", "to_v", "to_out.0", "add_q_proj", "to_add_out"):
        assert reaches(attn.processor, attn, place)
    assert not reaches(attn.processor, attn, "to_gate")
