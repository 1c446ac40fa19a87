"""Layers competing for a budget in a live training loop."""

import pytest
import torch
from peft import inject_adapter_in_model
from torch import nn

from snell_diffusion.errors import SnellaConfigError
from snell_diffusion.tuners import Competition, SnellaConfig, delta_layers, param_groups

TOTAL = 30


def task(**changes):
    """Three layers of different size, of which the target needs the first and the last."""
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(12, 16), nn.Tanh(), nn.Linear(16, 20), nn.Linear(20, 6))
    config = SnellaConfig.paper(
        **{
            "r": 4,
            "seed": 0,
            "sparsify": "mask",
            "target_modules": ["0", "2", "3"],
            "init_sparsity": 0.0,
            "target_sparsity": 0.7,
            "alloc_init_warmup": 3,
            "alloc_final_warmup": 5,
            "alloc_interval": 2,
            **changes,
        }
    )
    inject_adapter_in_model(config, model)
    x, y = torch.randn(32, 12), torch.randn(32, 6)
    return model, config, x, y


def train(model, competition, x, y, steps=range(TOTAL), spoil=None):
    """Plain training; yields the step and whether its levels were allocated anew."""
    optimizer = torch.optim.AdamW(param_groups(model, lr=1e-2, weight_decay=0.01))
    for step in steps:
        changed = competition.update(step)
        loss = (model(x) - y).square().mean()
        optimizer.zero_grad()
        loss.backward()
        if spoil is not None:
            spoil(step, model)
        optimizer.step()
        competition.observe()
        yield step, changed


def test_levels_follow_the_schedule_and_counts_add_up_to_the_budget():
    model, config, x, y = task()
    competition = Competition(model, "default", config, TOTAL)
    levels_seen, allocations = set(), []
    for step, changed in train(model, competition, x, y):
        rows = competition.report()
        assert [row["name"] for row in rows] == ["0", "2", "3"]
        if changed:
            allocations.append(step)
            assert sum(row["budget"] for row in rows) == int(competition.allocator.budget(step))
            assert sum(row["score"] for row in rows) == pytest.approx(1.0)
            levels_seen.add(tuple(row["level"] for row in rows))
        for row in rows:
            assert row["kept"] == row["budget"] - (row["level"] == 0.0)
    assert allocations == [*range(4, 26, 2), *range(26, TOTAL)]
    assert len(levels_seen) > 5
    assert len(set(levels_seen.pop())) > 1  # layers differ
    kept = sum(row["budget"] for row in rows)
    assert kept == int(0.3 * (12 * 16 + 16 * 20 + 20 * 6) + 1e-9)
    torch.testing.assert_close(
        torch.tensor([row["threshold"] for row in rows]),
        torch.tensor([layer.current_threshold("default") for _, layer in delta_layers(model)]),
    )


def test_levels_reach_the_update_that_trains():
    model, config, x, y = task()
    competition = Competition(model, "default", config, TOTAL)
    for _ in train(model, competition, x, y):
        pass
    for (_, layer), row in zip(delta_layers(model), competition.report(), strict=True):
        assert int((layer.get_delta_weight("default") != 0).sum()) == row["kept"]


@pytest.mark.parametrize("poison", [float("nan"), float("inf"), None])
def test_broken_gradients_prune_nothing_for_ever(poison):
    model, config, x, y = task()
    competition = Competition(model, "default", config, TOTAL)

    def spoil(step, model):
        for _, layer in delta_layers(model):
            for p in layer.delta_params("default"):
                if poison is None or step % 3 == 1:
                    p.grad = None if poison is None else torch.full_like(p, poison)
                    if poison is not None:
                        competition.observe()
                        p.grad = None

    for _ in train(model, competition, x, y, spoil=spoil):
        pass
    rows = competition.report()
    if poison is None:
        assert all(row["level"] == 0.0 for row in rows)  # nothing was seen, so nothing changes
    else:
        assert all(row["kept"] > 0 for row in rows)
        assert sum(row["budget"] for row in rows) == int(competition.allocator.budget(TOTAL - 1))


def test_one_layer_competes_with_itself():
    model, config, x, y = task(target_modules=["2"])
    competition = Competition(model, "default", config, TOTAL)
    for _ in train(model, competition, x, y):
        pass
    (row,) = competition.report()
    assert row["budget"] == int(competition.allocator.budget(TOTAL - 1))
    assert row["score"] == 1.0


@pytest.mark.parametrize("metric", ["ipt", "mag", "w_mag"])
def test_resume_continues_bit_for_bit(metric):
    straight, config, x, y = task(alloc_metric=metric)
    competition = Competition(straight, "default", config, TOTAL)
    saved = None
    for step, _ in train(straight, competition, x, y):
        if step == 13:
            saved = competition.state_dict()
            weights = {name: tensor.clone() for name, tensor in straight.state_dict().items()}
            states = [dict(row) for row in competition.report()]
    resumed, _, _, _ = task(alloc_metric=metric)
    again = Competition(resumed, "default", config, TOTAL)
    resumed.load_state_dict(weights)
    again.load_state_dict(saved)
    assert again.report() == states
    assert again.update(14) == (14 % 2 == 0)
    fresh, _, _, _ = task(alloc_metric=metric)
    fresh.load_state_dict(weights)
    once_more = Competition(fresh, "default", config, TOTAL)
    once_more.load_state_dict(saved)
    once_more.update(14)
    assert once_more.report() == again.report()


def test_several_models_share_one_budget():
    (left, config, x, y), (right, _, _, _) = task(), task()
    competition = Competition({"unet": left, "text_encoder": right}, "default", config, TOTAL)
    names = [f"{part}.{layer}" for part in ("unet", "text_encoder") for layer in ("0", "2", "3")]
    assert [row["name"] for row in competition.report()] == names
    both = nn.ModuleList([left, right])
    optimizer = torch.optim.Adam([p for p in both.parameters() if p.requires_grad], lr=1e-2)
    for step in range(8):
        competition.update(step)
        loss = (left(x) - y).square().mean() + 1e-4 * (right(x) - y).square().mean()
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        competition.observe()
    rows = competition.report()
    assert sum(row["budget"] for row in rows) == int(competition.allocator.budget(6))
    kept = {part: sum(r["kept"] for r in rows if r["name"].startswith(part)) for part in ("u", "t")}
    assert kept["u"] > kept["t"]  # the model that matters less gives way


def test_competitions_that_cannot_be():
    model, config, _, _ = task()
    dense = SnellaConfig.paper(sparsify="none")
    with pytest.raises(SnellaConfigError, match="'none' keeps every entry, so there is nothing to"):
        Competition(model, "default", dense, TOTAL)
    with pytest.raises(SnellaConfigError, match="no layer has a SNELLA adapter 'other'"):
        Competition(model, "other", config, TOTAL)
    with pytest.raises(ValueError, match="total must exceed init_warmup"):
        Competition(model, "default", config, total_steps=8)
