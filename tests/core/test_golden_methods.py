"""Parity of the methods beside SNELLA with recorded numbers (tests/golden/README.md).

Nothing here depends on a case's size, rank or bits: cases of these kinds that are added later are
checked as they are.
"""

import pytest
import torch
from torch import Tensor

from snell_diffusion.core.bottleneck import bottleneck
from snell_diffusion.core.householder import (
    REFLECTIONS,
    householder_product,
    householder_update,
)
from snell_diffusion.core.quantize import decode, encode, levels, quantize
from snell_diffusion.core.recompose import recompose, recomposed_bias, recomposed_weight
from snell_diffusion.core.sensitivity import (
    Choice,
    accumulate,
    adapter_size,
    choose,
    lora_size,
    scatter,
)
from tests.golden.cases import Case, cases


def runs(kind: str) -> pytest.MarkDecorator:
    """The cases of a kind, each in the precisions it was recorded in."""
    known = [(c, p) for c in cases(kind) for p in ("f64", "f32") if p in c.entry["tolerance"]]
    return pytest.mark.parametrize(("case", "precision"), known, ids=str)


def leaves(tensors: dict[str, Tensor], names: list[str]) -> dict[str, Tensor]:
    return {name: tensors[name].clone().requires_grad_() for name in names}


def check(case: Case, tensors: dict[str, Tensor], precision: str, got: dict[str, Tensor]) -> None:
    """Every recorded result of this precision, and no other."""
    expected = {k.removesuffix(f".{precision}") for k in tensors if k.endswith(f".{precision}")}
    assert expected == set(got)
    for name, value in got.items():
        case.assert_close(value, tensors[f"{name}.{precision}"], precision, name)


@runs("binary_quant")
def test_binary_quant(case: Case, precision: str) -> None:
    t, bits = case.tensors(precision), case.config["bits"]
    given = leaves(t, ["W", "x"])
    Wq = quantize(given["W"], bits)
    y = given["x"] @ Wq.T
    y.backward(t["gy"])
    mu, sigma = t["W"].mean(), t["W"].std()
    got = {"mean": mu, "std": sigma, "zq": (Wq - mu) / sigma, "Wq": Wq, "y": y}
    got |= {"gx": given["x"].grad, "gW": given["W"].grad}
    check(case, t, precision, got)


@pytest.mark.parametrize("case", cases("binary_quant"), ids=str)
def test_packed_bytes(case: Case) -> None:
    t, bits = case.tensors("f32"), case.config["bits"]
    torch.testing.assert_close(levels(bits), t["levels"].double(), rtol=1e-6, atol=1e-7)
    codes, stats = encode(t["W"], bits)
    assert torch.equal(codes, t["bytes"])
    used = decode(codes, torch.tensor([0.0, 1.0]), bits, (t["W"].numel(),))
    index = (used.unsqueeze(1) - t["levels"]).abs().argmin(1)
    assert torch.equal(index, t["index"].long().flatten())
    case.assert_close(decode(codes, stats, bits, t["W"].shape), t["reloaded"], "f32", "reloaded")


@runs("update")
def test_hta(case: Case, precision: str) -> None:
    t = case.tensors(precision)
    names = {"vl": "v_l", "vr": "v_r", "d": "d", "down": "down", "up": "up"}
    got: dict[str, Tensor] = {}
    for reflection in REFLECTIONS:
        given = leaves(t, [*(name for name in names if name in t), "x"])
        arguments = {names[name]: value for name, value in given.items() if name != "x"}
        delta = householder_update(**arguments, reflection=reflection)
        y = householder_product(given["x"], **arguments, reflection=reflection)
        y.backward(t["gy"])
        results = {"update": delta, "y": y} | {f"g{n}": value.grad for n, value in given.items()}
        got |= {f"{reflection}.{name}": value for name, value in results.items()}
        through_dense = leaves(t, list(given))
        arguments = {names[name]: v for name, v in through_dense.items() if name != "x"}
        delta = householder_update(**arguments, reflection=reflection)
        (through_dense["x"] @ delta).backward(t["gy"])
        for name, value in through_dense.items():
            want = t[f"{reflection}.g{name}.{precision}"]
            case.assert_close(value.grad, want, precision, f"{reflection}.g{name} by the matrix")
    check(case, t, precision, got)


@runs("adapter")
def test_arc(case: Case, precision: str) -> None:
    t, layers = case.tensors(precision), range(case.config["layers"])
    own = [f"{name}{layer}" for layer in layers for name in ("s", "b")]
    given = leaves(t, ["x", "U", *own])
    h, got = given["x"], {}
    for layer in layers:
        h = h + recompose(h, given["U"], given[f"s{layer}"], given[f"b{layer}"])
        got[f"h{layer}"] = h
    h.backward(t["gy"])
    check(case, t, precision, got | {f"g{name}": value.grad for name, value in given.items()})


@pytest.mark.parametrize("case", cases("adapter"), ids=str)
def test_arc_merged_into_a_linear(case: Case) -> None:
    t = case.tensors("f64")
    W = torch.randn(7, case.config["dim"], dtype=torch.float64)
    merged = W + recomposed_weight(W, t["U"], t["s0"])
    y = t["x"] @ merged.T + recomposed_bias(W, t["b0"])
    case.assert_close(y, t["h0.f64"] @ W.T, "f64", "a linear on h0")


SKIPPED = ("head", "cls_token", "patch_embed", "pos_embed")


def choices(case: Case) -> tuple[dict[str, Tensor], dict[float, Choice]]:
    t, config = case.tensors("f32"), case.config
    names = config.get("parameter_order") or [n[5:] for n in t if n.startswith("grad.")]
    names = [name for name in names if not any(part in name for part in SKIPPED)]
    batches = [{n: t[f"grad.{n}"][b] for n in names} for b in range(config["batches"])]
    sensitivity = accumulate(batches)
    size = lora_size if "lora" in case.method else adapter_size
    structured = {
        name: size(config["rank"], *score.shape)
        if size is lora_size
        else size(config["rank"], score.shape[0], score.shape[0])
        for name, score in sensitivity.items()
        if score.dim() == 2
    }
    return sensitivity, choose(
        sensitivity,
        structured,
        config["budgets"],
        unit=config["parameter_unit"],
        extra=config["class_token_params"],
        alpha=config["alpha"],
        beta=config["beta"],
        structured_only=config["structured_only"],
        structured_vectors=config["structured_vectors"],
    )


@pytest.mark.parametrize("case", cases("sensitivity"), ids=str)
def test_sensitivity(case: Case) -> None:
    t, config = case.tensors("f32"), case.config
    sensitivity, found = choices(case)
    assert [str(budget) for budget in found] == [
        str(b) for b in config["budgets"] if str(b) in config["expected"]
    ]
    matrices = [name for name, score in sensitivity.items() if score.dim() == 2]
    columns = config["matrix_columns"]
    for budget, choice in found.items():
        expected = config["expected"][str(budget)]
        assert choice.structured == expected["structured_params"]
        assert choice.single == expected["unstructured_params"]
        tolerance = case.entry["tolerance"]["params"]["atol"]
        total = choice.total / config["parameter_unit"]
        assert total == pytest.approx(expected["params"], abs=tolerance)
        table = [[0] * len(columns) for _ in range(config["blocks"])]
        for name in matrices:
            _, block, *_, column, _ = name.split(".")
            table[int(block)][columns.index(column)] = int(name in choice.matrices)
        assert table == expected["tuned_matrices"]
        assert list(choice.vectors) == expected["tuned_vectors"]
        if config["structured_only"]:
            assert not any(map(len, choice.entries.values()))
            continue
        assert list(choice.entries) == expected["unstructured_tensors"]
        starts, together = 0, []
        for name, positions in choice.entries.items():
            together.append(positions + starts)
            starts += sensitivity[name].numel()
        want = t[f"budget{budget}.unstructured_index"]
        assert torch.equal(torch.cat(together), want.flatten())


@runs("sparse_linear")
def test_sparse_linear(case: Case, precision: str) -> None:
    t = case.tensors(precision)
    given = leaves(t, [name for name in ("x", "sw", "sb") if name in t])
    O, I = t["W"].shape
    rows, columns = t["weight_index"].long()
    y = given["x"] @ (t["W"] + scatter(given["sw"], rows * I + columns, (O, I))).T
    if "b" in t:
        y = y + t["b"]
    if "sb" in t:
        y = y + scatter(given["sb"], t["bias_index"].long().flatten(), (O,))
    y.backward(t["gy"])
    check(case, t, precision, {"y": y} | {f"g{n}": value.grad for n, value in given.items()})


@runs("structured_module")
def test_structured_module(case: Case, precision: str) -> None:
    t = case.tensors(precision)
    given = leaves(t, [n for n in ("x", "down", "down_bias", "up", "up_bias") if n in t])
    activation = {"adapter": "gelu", "lora": None}[case.config["type"]]
    y = bottleneck(**given, activation=activation)
    y.backward(t["gy"])
    check(case, t, precision, {"y": y} | {f"g{n}": value.grad for n, value in given.items()})
