"""Quantized bases: an adapter from a file works on any Linear-like layer, and merging is refused.

bitsandbytes, torchao and gguf are optional; where one is absent its cases are skipped, and the
case of a layer that is no `nn.Linear` stands for all of them.
"""

from collections.abc import Callable
from dataclasses import replace
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from snell_diffusion import SnellaAttnProcessor
from snell_diffusion.errors import SnellaValueError
from snell_diffusion.tuners import delta_layers
from tests.registry.families import REGISTRY
from tests.registry.joint import flux
from tests.registry.made import Made, make
from tests.registry.record import predict

pytestmark = [
    # What the optional packages say of each other and of torch while they are imported and used.
    pytest.mark.filterwarnings("ignore::DeprecationWarning"),
    pytest.mark.filterwarnings("ignore::FutureWarning"),
    pytest.mark.filterwarnings("ignore::UserWarning"),
]

# bitsandbytes packs 32 rows of 64 weights, GGUF blocks of 32.
FAMILY = replace(
    REGISTRY["flux"],
    name="flux_64",
    config={
        **REGISTRY["flux"].config,
        "attention_head_dim": 32,
        "axes_dims_rope": (8, 8, 16),
        "joint_attention_dim": 64,
    },
    inputs=lambda draw: {**flux(draw), "encoder_hidden_states": draw.normal(1, 5, 64)},
)


class Rounded(nn.Module):
    """A Linear-like layer that is no `nn.Linear`: eight bits, under another name."""

    def __init__(self, linear: nn.Linear) -> None:
        super().__init__()
        self.in_features, self.out_features = linear.in_features, linear.out_features
        self.step = float(linear.weight.abs().max()) / 127
        self.register_buffer("qweight", (linear.weight / self.step).round().to(torch.int8))
        self.bias = linear.bias

    def forward(self, x: Tensor) -> Tensor:
        return nn.functional.linear(x, self.qweight.float() * self.step, self.bias)


def rounded(linear: nn.Linear) -> nn.Module:
    return Rounded(linear)


def int8(linear: nn.Linear) -> nn.Module:
    from bitsandbytes.nn import Linear8bitLt

    sizes = linear.in_features, linear.out_features, linear.bias is not None
    return filled(Linear8bitLt(*sizes, has_fp16_weights=False), linear)


def nf4(linear: nn.Linear) -> nn.Module:
    from bitsandbytes.nn import Linear4bit

    sizes = linear.in_features, linear.out_features, linear.bias is not None
    return filled(Linear4bit(*sizes, compute_dtype=torch.float32, quant_type="nf4"), linear)


def filled(quantized: nn.Module, linear: nn.Linear) -> nn.Module:
    quantized.load_state_dict(linear.state_dict())
    return quantized.to("cpu").requires_grad_(False)  # moving it is what quantizes it


def torchao(config: str) -> Callable[[nn.Linear], nn.Module]:
    def convert(linear: nn.Linear) -> nn.Module:
        import torchao.quantization as quantization

        holder = nn.Sequential(linear)
        quantization.quantize_(holder, getattr(quantization, config)())
        return holder[0]

    return convert


def gguf(linear: nn.Linear) -> nn.Module:
    from diffusers.quantizers.gguf.utils import GGUFLinear, GGUFParameter
    from gguf import GGMLQuantizationType, quants

    kind = GGMLQuantizationType.Q8_0
    packed = torch.from_numpy(quants.quantize(linear.weight.detach().numpy(), kind))
    sizes = linear.in_features, linear.out_features, linear.bias is not None
    layer = GGUFLinear(*sizes, compute_dtype=torch.float32)
    layer.weight = GGUFParameter(packed, quant_type=kind)
    layer.bias = linear.bias
    return layer.requires_grad_(False)


KINDS: dict[str, tuple[str, Callable[[nn.Linear], nn.Module], str]] = {
    "no Linear": ("torch", rounded, "Rounded with no weight of floats"),
    "bitsandbytes int8": ("bitsandbytes", int8, "Linear8bitLt with weights of type Int8Params"),
    "bitsandbytes nf4": ("bitsandbytes", nf4, "Linear4bit with weights of type Params4bit"),
    "torchao int8": (
        "torchao",
        torchao("Int8WeightOnlyConfig"),
        "Linear with weights of type Int8Tensor",
    ),
    "torchao int8 dynamic": (
        "torchao",
        torchao("Int8DynamicActivationInt8WeightConfig"),
        "Linear with weights of type Int8Tensor",
    ),
    "torchao float8": (
        "torchao",
        torchao("Float8WeightOnlyConfig"),
        "Linear with weights of type Float8Tensor",
    ),
    "gguf": ("gguf", gguf, "GGUFLinear with weights of type GGUFParameter"),
}


class Added(nn.Module):
    """A layer plus an update, spelled out: what ours must equal on any base."""

    def __init__(self, layer: nn.Module, delta: Tensor) -> None:
        super().__init__()
        self.layer, self.delta = layer, delta

    def forward(self, x: Tensor) -> Tensor:
        return self.layer(x) + nn.functional.linear(x, self.delta)


def quantized(made: Made, convert: Callable[[nn.Linear], nn.Module]) -> nn.Module:
    """The denoiser with every layer quantized that an adapter is on and that has whole blocks."""
    model = made.family.build()
    sizes = {path: model.get_submodule(path).weight.shape for path in made.deltas["b"]}
    paths = [path for path, (rows, columns) in sizes.items() if not (rows % 32 or columns % 64)]
    assert len(paths) > 5
    for path in paths:
        swap(model, path, convert)
    return model.eval()


def swap(model: nn.Module, path: str, change: Callable[[Any], nn.Module]) -> None:
    owner, _, name = path.rpartition(".")
    setattr(model.get_submodule(owner), name, change(model.get_submodule(path)))


@pytest.fixture(scope="module")
def made(tmp_path_factory: pytest.TempPathFactory) -> Made:
    return make(FAMILY, tmp_path_factory.mktemp("quantized"))


@pytest.mark.parametrize("kind", KINDS)
def test_forward_works_and_merging_is_refused(kind: str, made: Made) -> None:
    package, convert, refused = KINDS[kind]
    pytest.importorskip(package, reason=f"{package} is not installed (it is optional)")
    family = made.family
    pipe = family.pipe(quantized(made, convert))
    base = predict(family, pipe.transformer)
    assert not torch.equal(base, made.base)  # it is quantized
    report = pipe.load_snella_weights(made.files["b"], "b")
    assert report.layers == {"transformer": len(made.deltas["b"])}

    reference = quantized(made, convert)
    for path, delta in made.deltas["b"].items():
        swap(reference, path, lambda layer, delta=delta: Added(layer, delta.contiguous()))
    expected = predict(family, reference.eval())
    assert not torch.allclose(expected, base, rtol=1e-2, atol=1e-2)
    assert_close(predict(family, pipe.transformer), expected)

    with pytest.raises(SnellaValueError, match=rf"cannot merge adapter\(s\) b into {refused}"):
        pipe.fuse_snella()
    assert not any(layer.merged for _, layer in delta_layers(pipe.transformer))
    assert_close(predict(family, pipe.transformer), expected)
    SnellaAttnProcessor.install(pipe.transformer)
    assert_close(predict(family, pipe.transformer), expected)
    pipe.set_snella_adapters("b", 0.0)
    assert_close(predict(family, pipe.transformer), base)
    pipe.unload_snella_weights()
    assert torch.equal(predict(family, pipe.transformer), base)


def assert_close(left: Tensor, right: Tensor) -> None:
    torch.testing.assert_close(left, right, rtol=1e-4, atol=1e-4)
