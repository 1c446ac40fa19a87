"""Compiled denoisers: the same losses and names, and nothing is compiled anew as levels change."""

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
import torch._dynamo
from torch import Tensor, nn
from torch._dynamo.testing import CompileCounter

from snell_diffusion import SnellaConfig
from snell_diffusion.core import threshold
from snell_diffusion.diffusion import setup
from snell_diffusion.diffusion.compiling import compile_denoiser
from snell_diffusion.diffusion.training import run
from snell_diffusion.errors import SnellaConfigError
from snell_diffusion.tuners import delta_layers
from tests.diffusion.training_runs import PROMPT, config


@pytest.fixture(autouse=True)
def fresh_compiler() -> Iterator[None]:
    torch._dynamo.reset()
    yield
    torch._dynamo.reset()


class Net(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.first, self.second = nn.Linear(8, 12), nn.Linear(12, 8)

    def forward(self, x: Tensor) -> Tensor:
        return self.second(self.first(x).relu())


def adapted() -> nn.Module:
    from peft import inject_adapter_in_model

    model = Net().requires_grad_(False)
    settings = SnellaConfig.diffusion(target_modules=["first", "second"], r=4, seed=1, init_scale=9)
    return inject_adapter_in_model(settings, model).train()


def losses(model: nn.Module, levels: list[float]) -> list[float]:
    """Train at one level after the other."""
    optimizer = torch.optim.SGD([p for p in model.parameters() if p.requires_grad], lr=0.1)
    x, found = torch.linspace(-1, 1, 24).view(3, 8), []
    for level in levels:
        for _, layer in delta_layers(model):
            layer.set_sparsity("default", level)
        loss = model(x).square().mean()
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
        found.append(float(loss.detach()))
    return found


def test_levels_are_inputs_of_the_compiled_code() -> None:
    levels = [0.0, 0.25, 0.5, 0.7, 0.9, 0.95, 0.97, 0.98, 0.99]
    counter, model = CompileCounter(), adapted()
    names = list(model.state_dict())
    model.compile(backend=counter, fullgraph=True)
    compiled = losses(model, levels)
    assert counter.frame_count == 1
    assert list(model.state_dict()) == names
    assert compiled == pytest.approx(losses(adapted(), levels), rel=1e-5)
    assert len(set(compiled)) == len(levels)


@pytest.mark.parametrize("level", [0.0, 0.3, 0.5, 0.999, 1.0])
@pytest.mark.parametrize("shape", [(1, 1), (2, 3), (16, 24)])
def test_a_level_on_the_device_gives_the_same_threshold(
    shape: tuple[int, int], level: float
) -> None:
    w = torch.randn(shape, generator=torch.Generator().manual_seed(0))
    found = threshold(w, torch.tensor(level, dtype=torch.float64))
    torch.testing.assert_close(found, threshold(w, level), rtol=1e-6, atol=0)
    assert (w.abs() > found).sum() == (w.abs() > threshold(w, level)).sum()


def test_no_touches_nothing() -> None:
    model = Net()
    compile_denoiser(model, "no", "nonsense")
    assert model._compiled_call_impl is None


def test_unknown_backend_and_unknown_blocks_are_named() -> None:
    with pytest.raises(SnellaConfigError, match=r"'nonsense' is unknown; known: .*inductor"):
        compile_denoiser(Net(), "model", "nonsense")
    with pytest.raises(SnellaConfigError, match="no repeated blocks of Net; use torch_compile mod"):
        compile_denoiser(Net(), "blocks", "eager")


@pytest.mark.full
# torch's own compiler asks activations for their gradients, and traces diffusers' cached helpers
@pytest.mark.filterwarnings("ignore:The .grad attribute of a Tensor that is not a leaf")
@pytest.mark.filterwarnings("ignore:Dynamo detected a call to a `functools.lru_cache`")
@pytest.mark.parametrize("how", ["blocks", "model"])
def test_a_compiled_run_has_the_losses_of_a_plain_one(
    tiny_base: Path, tmp_path: Path, how: str
) -> None:
    options: dict[str, Any] = {
        "gradient_checkpointing": True,
        "validation_prompt": PROMPT,
        "target_sparsity": 0.9,
        "alloc_init_warmup": 1,
        "alloc_final_warmup": 1,
        "alloc_interval": 1,
        "max_train_steps": 6,
    }
    compiling = {"torch_compile": how, "torch_compile_backend": "aot_eager"}
    fast = run(config(tiny_base, tmp_path / "a", **options, **compiling))
    plain = run(config(tiny_base, tmp_path / "b", **options))
    found = [[e["loss"] for e in r.history if e["event"] == "step"] for r in (fast, plain)]
    assert found[0] == pytest.approx(found[1], rel=1e-4)
    assert not [e for e in fast.history if "failed" in str(e.get("message"))]


@pytest.mark.parametrize(("compiled", "shared"), [("no", True), ("blocks", False)])
def test_small_layers_share_their_work_unless_code_is_compiled(
    compiled: str, shared: bool, tiny_base: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(setup, "compile_denoiser", lambda *_: None)  # to look into the model
    settings = config(tiny_base, tmp_path, rank=16, torch_compile=compiled)
    unet = setup.build_model(settings, torch.device("cpu")).components["unet"]
    found: list[bool] = []

    def look(*_: Any) -> None:
        found.extend(layer.ready is not None for _, layer in delta_layers(unet))

    unet.conv_out.register_forward_pre_hook(look)
    unet(torch.zeros(1, 4, 8, 8), torch.zeros(1), torch.zeros(1, 4, 32))
    assert set(found) == {shared}
