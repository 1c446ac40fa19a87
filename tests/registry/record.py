"""What the registry knows of a model family: sizes, one input, and which pipelines use it."""

import inspect
import math
import warnings
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from copy import deepcopy
from dataclasses import dataclass
from functools import cache
from typing import Any

import diffusers
import torch
from torch import Tensor, nn

Inputs = dict[str, Any]

# Sizes that most of the transformers take by these names.
HEADS: dict[str, Any] = {"num_attention_heads": 2, "attention_head_dim": 16}
ROPE = (4, 4, 8)


class Draw:
    """Seeded inputs of a denoiser; every call of `normal` continues the same stream."""

    def __init__(self, seed: int) -> None:
        self.generator = torch.Generator().manual_seed(seed)

    def normal(self, *shape: int) -> Tensor:
        """Standard normal float32."""
        return torch.randn(*shape, generator=self.generator)


@dataclass(frozen=True)
class TinyFamily:
    """One family of denoisers as a tiny seeded model from a config, with an input for it.

    Attributes:
        name: As used in test names and in docs/families.md.
        title: As written in docs/families.md.
        model: Its class in diffusers.
        config: Sizes: hidden 16 to 48, one or two blocks.
        inputs: Keyword arguments of one forward pass.
        pipelines: diffusers' pipeline classes it is in; the first is used in the tests.
        scale_kwarg: The argument of `forward` whose "scale" is a factor for one call; None where
            diffusers gives the family no such argument.
        component: Its name in the pipeline.
        bypassed: Projections that the family's blocks call past their attention processor.
        fuses_qkv: Whether diffusers lets the family fuse its QKV projections.
        graph_break: Why `torch.compile(fullgraph=True)` fails on the bare family, if it does.
        shell: Why the stock pipeline cannot be built of the denoiser alone, if it cannot; then a
            bare `DiffusionPipeline` takes its place.
    """

    name: str
    title: str
    model: str
    config: dict[str, Any]
    inputs: Callable[[Draw], Inputs]
    pipelines: tuple[str, ...]
    scale_kwarg: str | None = None
    component: str = "transformer"
    bypassed: tuple[str, ...] = ()
    fuses_qkv: bool = True
    graph_break: str = ""
    shell: str = ""

    def build(self, seed: int = 0) -> nn.Module:
        """A fresh model in eval mode; equal seeds give equal weights."""
        return deepcopy(_built(self.name, self.model, seed, _Config(self.config)))

    def example(self, seed: int = 7) -> Inputs:
        """Keyword arguments for one forward pass."""
        return self.inputs(Draw(seed))

    def pipe(self, model: nn.Module | None = None) -> Any:
        """The family's stock pipeline with the denoiser as its only model."""
        model = self.build() if model is None else model
        if self.shell:
            return Shell(model)
        kind = getattr(diffusers, self.pipelines[0])
        needed = {
            name: None
            for name, parameter in inspect.signature(kind.__init__).parameters.items()
            if name != "self" and parameter.default is inspect.Parameter.empty
        }
        if "requires_safety_checker" in inspect.signature(kind.__init__).parameters:
            needed["requires_safety_checker"] = False
        with quiet():
            return kind(**{**needed, self.component: model})


class Shell(diffusers.DiffusionPipeline):
    """A pipeline that is a transformer and nothing else."""

    def __init__(self, transformer: nn.Module) -> None:
        super().__init__()
        self.register_modules(transformer=transformer)


class _Config(dict):
    """A config that can be a cache's key; each family's is one object."""

    def __hash__(self) -> int:  # type: ignore[override]
        return hash(repr(sorted(self.items())))


@contextmanager
def quiet() -> Iterator[None]:
    """diffusers warns of its own deprecated imports, and Mochi of its autocast to float32."""
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", message=".*is deprecated", category=FutureWarning)
        warnings.filterwarnings("ignore", message="In CPU autocast", category=UserWarning)
        yield


@cache
def _built(name: str, model: str, seed: int, config: _Config) -> nn.Module:
    torch.manual_seed(seed)
    with quiet():
        built = getattr(diffusers, model)(**config).eval().requires_grad_(False)
    redraw(built, seed)
    return built


def redraw(model: nn.Module, seed: int) -> None:
    """Draw all parameters anew: families leave some uninitialised, and others at a zero that
    would hide every update before it."""
    draw = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            noise = torch.randn(parameter.shape, generator=draw)
            if parameter.ndim > 1:
                fan_in = parameter[0].numel()
                parameter.copy_(noise / math.sqrt(fan_in))
            else:
                parameter.copy_(0.1 * noise + (1.0 if name.endswith("weight") else 0.0))


@torch.no_grad()
def predict(family: TinyFamily, model: nn.Module, **more: Any) -> Tensor:
    """The denoiser's output on the family's example, as one tensor."""
    with quiet():
        output = model(**{**family.example(), **more}, return_dict=False)
    first = output[0] if isinstance(output, tuple) else output
    return torch.stack(list(first)) if isinstance(first, (list, tuple)) else first
