"""Which adapters compete in a run."""

from typing import Any

import pytest
from peft import AdaLoraConfig, LoraConfig, inject_adapter_in_model
from torch import nn

from snell_diffusion.errors import SnellaConfigError
from snell_diffusion.training.competition import build_competition
from snell_diffusion.tuners import Competition, SnellaConfig
from snell_diffusion.tuners.rank_budget import RankBudget
from tests.training.models import Net

TARGETS = ["first", "second"]
LEVELS = {"init_sparsity": 0.0, "target_sparsity": 0.5, "sparsify": "mask"}


class Described(Net):
    """A model that tells its adapters' settings, as those of transformers and diffusers do."""

    def __init__(self, settings: Any) -> None:
        super().__init__()
        inject_adapter_in_model(settings, self, "default")


def adalora() -> AdaLoraConfig:
    return AdaLoraConfig(target_modules=TARGETS, init_r=4, target_r=2, total_step=20)


def build(model: nn.Module, steps: int = 20, precision: Any = "no") -> Any:
    return build_competition({"net": model}, "default", steps, precision, "it does not fit")


def test_levels_and_ranks_compete() -> None:
    assert isinstance(
        build(Described(SnellaConfig(r=4, target_modules=TARGETS, **LEVELS))), Competition
    )
    assert isinstance(build(Described(adalora())), RankBudget)


@pytest.mark.parametrize(
    "settings",
    [
        LoraConfig(r=2, target_modules=TARGETS),
        SnellaConfig(r=4, target_modules=TARGETS, sparsify="none"),
    ],
)
def test_others_do_not(settings: Any) -> None:
    assert build(Described(settings)) is None
    assert build(Net()) is None


def test_a_schedule_that_does_not_fit_is_named() -> None:
    settings = SnellaConfig(
        r=4, target_modules=TARGETS, alloc_init_warmup=3, alloc_final_warmup=3, **LEVELS
    )
    with pytest.raises(SnellaConfigError, match=r"it does not fit: .*warmup"):
        build(Described(settings), steps=5)


def test_ranks_are_not_scored_with_scaled_gradients() -> None:
    with pytest.raises(SnellaConfigError, match="mixed_precision fp16 would not scale"):
        build(Described(adalora()), precision="fp16")
