"""Which layers of a model are compressed, and what that leaves."""

import copy

import pytest
import torch
from torch import nn
from transformers import ViTConfig, ViTModel

from snell_diffusion.compress import compress, low_rank_layers, rank_for, tuner_targets
from snell_diffusion.errors import SnellaKeyError, SnellaValueError
from tests.compress.models import FusedVit, small_swin, small_vit
from tests.tiny_models import DENOISERS, adapt, predict

ROLES = ("q_proj", "k_proj", "v_proj", "o_proj", "fc1", "fc2")


def linear_weights(model: nn.Module) -> int:
    return sum(m.weight.numel() for m in model.modules() if isinstance(m, nn.Linear))


@pytest.mark.parametrize(
    ("ratio", "total", "linears"),
    [(2, 43_312_896, 42_448_896), (1.5, 57_431_808, None), (3, 29_101_824, None)],
)
def test_published_counts_of_vit_b_16(ratio: float, total: int, linears: int | None) -> None:
    """The published model has fused qkv; its separate q, k and v come to the same numbers."""
    with torch.device("meta"):
        fused, separate = FusedVit(), ViTModel(ViTConfig(), add_pooling_layer=False)
    report = compress(fused, ratio)
    assert report.before == 85_798_656
    assert report.after == sum(p.numel() for p in fused.parameters()) == total
    assert linears is None or linear_weights(fused) == linears
    assert compress(separate, ratio).after == total
    # Not the same model: fused factors share one input side, separate ones have three.
    assert report.ranks["blocks.0.qkv"] == rank_for(768, 2304, ratio)
    ranks = {path: layer.rank for path, layer in low_rank_layers(separate)}
    assert ranks["layers.0.attention.q_proj"] == rank_for(768, 768, ratio)


def test_ranks_of_vit_b_16() -> None:
    with torch.device("meta"):
        model = FusedVit()
    ranks = compress(model, 2).ranks
    block = [ranks[f"blocks.3.{name}"] for name in ("qkv", "proj", "fc1", "fc2")]
    assert block == [288, 192, 307, 307]
    assert len(ranks) == 48


def test_vit_layers_and_what_is_kept() -> None:
    model = small_vit()
    report = compress(model, 2)
    assert {path.rpartition(".")[2] for path in report.ranks} == set(ROLES)
    assert len(report.ranks) == 12
    assert report.kept == {"classifier": "norm, embedding or head"}
    assert report.convolutions == 32 * 3 * 64 + 32
    assert report.after < report.before
    assert "12 layers compressed at ratio 2, 1 kept" in str(report)


def test_head_with_few_classes_and_small_layers_are_kept() -> None:
    model = nn.Sequential(nn.Linear(64, 9), nn.Linear(64, 10), nn.Linear(1, 64))
    report = compress(model, 2)
    assert report.ranks == {"1": rank_for(64, 10, 2)}
    assert report.kept == {"0": "fewer than 10 outputs", "2": "too small"}


def test_tied_weights_are_kept() -> None:
    model = nn.Sequential(nn.Linear(32, 32), nn.Linear(32, 32), nn.Linear(32, 32))
    model[1].weight = model[0].weight
    assert list(compress(model, 2).ranks) == ["2"]


def test_swin_keeps_its_attention_output_unless_asked() -> None:
    report = compress(small_swin(), 1.5)
    kept = [path for path, why in report.kept.items() if why == "attention output"]
    assert kept
    assert all(path.endswith("attention.o_proj") for path in kept)
    assert not any(path.endswith("o_proj") for path in report.ranks)
    asked = compress(small_swin(), 1.5, attention_output=True)
    assert set(asked.ranks) == {*report.ranks, *kept}


@pytest.mark.parametrize("family", DENOISERS)
def test_denoisers_run_compressed(family: str) -> None:
    model = DENOISERS[family]()
    before = predict(model, family)
    convs = [m for m in model.modules() if isinstance(m, nn.Conv2d)]
    report = compress(model, 2)
    after = predict(model, family)
    assert after.shape == before.shape
    assert not torch.equal(after, before)
    assert report.after < report.before
    assert [m for m in model.modules() if isinstance(m, nn.Conv2d)] == convs
    assert not any("norm" in path or "embed" in path or "time_" in path for path in report.ranks)
    assert any("attn" in path for path in report.ranks)
    assert "proj_out" not in report.ranks


def test_ratio_decides_how_near_the_weights_are() -> None:
    original = small_vit()
    weights = {path: m.weight for path, m in original.named_modules() if hasattr(m, "weight")}
    errors = []
    for ratio in (1, 2, 4):
        model = copy.deepcopy(original)
        compress(model, ratio)
        layers = low_rank_layers(model)
        errors.append(sum((x.product() - weights[p]).square().sum().item() for p, x in layers))
    assert errors[0] < errors[1] < errors[2]


def test_exclude() -> None:
    report = compress(small_vit(), 2, exclude=["fc2", "layers.0.attention.q_proj"])
    assert sum(why == "excluded" for why in report.kept.values()) == 3
    assert len(report.ranks) == 9
    with pytest.raises(SnellaKeyError, match=r"exclude names no Linear of \w+: fc3"):
        compress(small_vit(), 2, exclude=["fc3"])


def test_refusals() -> None:
    with pytest.raises(SnellaValueError, match=r"must be 1 or more, got 0\.5"):
        compress(small_vit(), 0.5)
    with pytest.raises(SnellaValueError, match="has no Linear to compress at ratio 10000"):
        compress(small_vit(), 10_000)
    model = small_vit()
    compress(model, 2)
    with pytest.raises(SnellaValueError, match="compressed already"):
        compress(model, 2)
    adapted = adapt(small_vit())
    with pytest.raises(SnellaValueError, match="must have no adapters"):
        compress(adapted, 2)


def test_tuner_targets() -> None:
    model = small_vit()
    compress(model, 2, exclude=["v_proj"])
    layer = "vit.layers.0.attention"
    ours = tuner_targets(model, ["q_proj", "v_proj"])
    assert ours[:2] == [f"{layer}.q_proj", "vit.layers.1.attention.q_proj"]
    theirs = tuner_targets(model, ["layers.0.attention.q_proj", "v_proj"], whole=False)
    assert theirs == [
        *(f"{layer}.q_proj.first", f"{layer}.q_proj.second"),
        *(f"{layer}.v_proj", "vit.layers.1.attention.v_proj"),
    ]
    with pytest.raises(SnellaKeyError, match="no Linear named query"):
        tuner_targets(model, ["query"])
