"""Parity with numbers that the public reference code produced (tests/golden/README.md)."""

import math
from collections.abc import Callable
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from snell_diffusion.core import (
    Allocator,
    KernelUpdate,
    dense,
    distance_kernel,
    merged_linear,
    sparsify,
    threshold,
    update,
)
from snell_diffusion.core import blocks as blocks_module
from tests.golden.cases import Case, cases

SETTINGS: dict[str, dict[str, str]] = {
    "klora": {"kernel": "distance", "rule": "none"},
    "mixk": {"kernel": "mixed", "rule": "none"},
    "snell": {"kernel": "distance", "rule": "squared"},
    "snella": {"kernel": "mixed", "rule": "squared"},
}
SCALARS = ("alpha", "gamma", "beta")
PRECISIONS = pytest.mark.parametrize("precision", ["f64", "f32"])


def parameters(tensors: dict[str, Tensor], method: str, prefix: str = "", suffix: str = "") -> dict:
    """The trainable tensors of one layer, as leaves that require gradients."""
    names = ("A", "B", *SCALARS) if SETTINGS[method]["kernel"] == "mixed" else ("A", "B")
    return {n: tensors[f"{prefix}{n}{suffix}"].clone().requires_grad_() for n in names}


BLOCKS = pytest.mark.parametrize("blocks", [False, True], ids=["plain", "blocks"])


@pytest.fixture(autouse=True)
def small_blocks(monkeypatch: pytest.MonkeyPatch) -> None:
    """Several blocks even for the small matrices of the golden files."""
    monkeypatch.setattr(blocks_module, "ALIGNMENT", 1)
    monkeypatch.setitem(blocks_module.BLOCK_ENTRIES, "cpu", 64)


def delta_fn(
    method: str, names: list[str], signs: Tensor, sparsity: float, p: float = 2.0, *, blocks: bool
) -> Callable[..., Tensor]:
    """Params -> Delta [O, I] for merged_linear: the plain formula, or what trains in blocks."""
    if blocks:
        return KernelUpdate(signs, sparsity, p=p, **SETTINGS[method])

    def delta(*params: Tensor) -> Tensor:
        named = dict(zip(names, params, strict=True))
        return update(**named, signs=signs, sparsity=sparsity, p=p, **SETTINGS[method]).T

    return delta


@BLOCKS
@PRECISIONS
@pytest.mark.parametrize("case", cases("layer"), ids=str)
def test_layer(case: Case, precision: str, blocks: bool) -> None:
    t, config = case.tensors(precision), case.config
    check: dict[str, Tensor] = {}
    p, sparsity = config["p"], config["sparsity"] or 0.0
    params = parameters(t, case.method)
    setting = SETTINGS[case.method]

    check["kernel"] = distance_kernel(t["A"], t["B"], t["coeff"], p)
    w = dense(**params, signs=t["coeff"], kernel=setting["kernel"], p=p)
    if setting["kernel"] == "mixed":
        check["dense"] = w
    if setting["rule"] == "squared":
        check["threshold"] = threshold(w, sparsity)
        check["delta"] = sparsify(w, sparsity)
        assert int(check["delta"].count_nonzero()) == config[f"nonzero_{precision}"]
    x = t["x"].clone().requires_grad_()
    fn = delta_fn(case.method, list(params), t["coeff"], sparsity, p, blocks=blocks)
    weight = torch.zeros(config["out_features"], config["in_features"], dtype=x.dtype)
    check["y"] = merged_linear(x, weight, None, fn, list(params.values()))
    check["y"].backward(t["gy"])
    check["gx"] = x.grad
    check |= {f"g{name}": value.grad for name, value in params.items()}

    expected = {k.removesuffix(f".{precision}") for k in t if k.endswith(f".{precision}")}
    assert expected - {"dist"} == set(check)
    for name, got in check.items():
        case.assert_close(got, t[f"{name}.{precision}"], precision, name)


@pytest.mark.parametrize("case", cases("layer"), ids=str)
def test_distances(case: Case) -> None:
    t = case.tensors("f64")
    one = torch.ones(1, dtype=torch.float64)
    for h in range(case.config["heads"]):
        d = distance_kernel(t["A"][h : h + 1], t["B"][h : h + 1], one, case.config["p"])
        case.assert_close(d, t["dist.f64"][h], "f64", f"distances of head {h}")


@pytest.mark.parametrize("case", cases("sparsify"), ids=str)
def test_sparsify(case: Case) -> None:
    t = case.tensors("f64")
    derived = {"printed": "derived_paper5", "mask": "derived_hard", "soft": "derived_soft"}
    for entry in case.config["cases"]:
        name, level = entry["matrix"], entry["q"]
        key = f"{name}.q{level:g}"
        W = t[f"{name}.W"].clone().requires_grad_()
        S = sparsify(W, level)
        (gW,) = torch.autograd.grad(S, W, t[f"{name}.G"])
        assert int(S.count_nonzero()) == entry["nonzero"], key
        case.assert_close(threshold(W, level), t[f"{key}.t"], "f64", f"{key}.t")
        case.assert_close(S, t[f"{key}.S"], "f64", f"{key}.S")
        case.assert_close(gW, t[f"{key}.gW"], "f64", f"{key}.gW")
        for rule, suffix in derived.items():
            got = sparsify(W, level, rule)
            case.assert_close(got, t[f"{key}.{suffix}"], "f64", f"{key} {rule}")


def allocator(config: dict[str, Any], **kwargs: Any) -> Allocator:
    sizes = {f"layer{i}": a * b for i, (a, b) in enumerate(config["layer_shapes"])}
    names = ("init_sparsity", "target_sparsity", "init_warmup", "final_warmup", "interval", "total")
    return Allocator(sizes, **{n: config[n] for n in names}, **kwargs)


@pytest.mark.parametrize("case", cases("schedule"), ids=str)
def test_schedule(case: Case) -> None:
    t = case.tensors()
    for i, config in enumerate(case.config["confs"]):
        alloc = allocator(config)
        for name in alloc.sizes:
            alloc.observe(name, *[torch.ones(2, 2)] * 4)
        for step, volume, apply in zip(
            t[f"c{i}.step"], t[f"c{i}.volume"], t[f"c{i}.apply"], strict=True
        ):
            budget = torch.tensor(alloc.budget(int(step)), dtype=torch.float64)
            case.assert_close(budget, volume, "f64", f"c{i} step {step}")
            assert (alloc.update(int(step)) is not None) == bool(apply), f"c{i} step {step}"


@pytest.mark.parametrize("case", cases("trajectory"), ids=str)
def test_allocator_trajectory(case: Case) -> None:
    t, config = case.tensors("f32"), case.config
    alloc = allocator(
        config, beta1=config["beta1"], beta2=config["beta2"], metric=config["metric"], strict=True
    )
    rtol = case.entry["tolerance"]["others"]["rtol"]
    levels = dict.fromkeys(alloc.sizes, config["init_sparsity"])
    step = 0
    for epoch in range(config["epochs"]):
        new = alloc.update(epoch)
        assert (new is not None) == bool(t["apply"][epoch])
        assert alloc.budget(epoch) == pytest.approx(float(t["volume"][epoch]), rel=rtol)
        if new is not None:
            levels = new
            assert sum(alloc.keep().values()) == math.floor(alloc.budget(epoch))
            scores = torch.tensor(list(alloc.scores().values()), dtype=torch.float64)
            torch.testing.assert_close(scores, t["scores"][epoch], rtol=rtol, atol=0)
        for i, (name, size) in enumerate(alloc.sizes.items()):
            assert abs(levels[name] - float(t["thresholds"][epoch, i])) <= 2 / size
        for _ in range(config["steps_per_epoch"]):
            for i, name in enumerate(alloc.sizes):
                alloc.observe(name, *(t[f"{k}{i}"][step] for k in ("A", "gA", "B", "gB")))
            step += 1
    state = alloc.state_dict()
    for i, name in enumerate(alloc.sizes):
        for ours, theirs in (("I", "sens"), ("U", "unc")):
            for side in "AB":
                got, want = state[f"{ours}.{side}.{name}"], t[f"{theirs}{side}{i}"]
                torch.testing.assert_close(got, want, rtol=rtol, atol=0)


@BLOCKS
@PRECISIONS
@pytest.mark.parametrize("case", cases("trace"), ids=str)
def test_training_trace(case: Case, precision: str, blocks: bool) -> None:
    t, config = case.tensors(precision), case.config
    layers = {i: parameters(t, case.method, "init.", str(i)) for i in (1, 2)}
    levels = dict.fromkeys(layers, config["sparsity"] or 0.0)
    optimizer = torch.optim.AdamW(
        [
            {"params": [p for q in layers.values() for p in q.values() if p.ndim == 3]},
            {
                "params": [p for q in layers.values() for p in q.values() if p.ndim == 1],
                "weight_decay": 0.0,
            },
        ],
        lr=config["lr"],
        weight_decay=config["weight_decay"],
    )
    schedule = config["allocator"]
    sizes = {str(i): q["A"].shape[1] * q["B"].shape[1] for i, q in layers.items()}
    truncating, exact = (
        [trace_allocator(sizes, config, exact) for exact in (False, True)]
        if schedule
        else (None,) * 2
    )

    def linear(i: int, x: Tensor) -> Tensor:
        fn = delta_fn(case.method, list(layers[i]), t["coeff"], levels[i], blocks=blocks)
        return merged_linear(x, t[f"W{i}"], t[f"b{i}"], fn, list(layers[i].values()))

    for step in range(config["steps"]):
        if truncating is not None and step % schedule["K"] == 0:
            levels = follow(truncating, exact, step // schedule["K"], levels)
        loss = F.mse_loss(linear(2, F.gelu(linear(1, t["X"]))), t["Y"])
        case.assert_close(loss, t[f"loss.{precision}"][step], precision, f"loss {step}")
        assert list(levels.values()) == pytest.approx(t[f"thresholds.{precision}"][step].tolist())
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        for i, params in layers.items():
            for name, value in params.items():
                want = t[f"hist.{name}{i}.{precision}"][step]
                case.assert_close(value, want, precision, f"{name}{i} after step {step}")
            if schedule:
                A, B = params["A"], params["B"]
                truncating.observe(str(i), A, A.grad, B, B.grad)
                exact.observe(str(i), A, A.grad, B, B.grad)


def trace_allocator(sizes: dict[str, int], config: dict[str, Any], exact: bool) -> Allocator:
    schedule = config["allocator"]
    numbers = [schedule[k] for k in ("target", "iw", "fw", "mi", "total")]
    return Allocator(sizes, config["sparsity"], *numbers, exact=exact, strict=True)


def follow(
    truncating: Allocator, exact: Allocator, epoch: int, levels: dict[int, float]
) -> dict[int, float]:
    """Levels of the truncating allocator; the exact one must stay near and spend all its budget."""
    new, near = truncating.update(epoch), exact.update(epoch)
    if new is None or near is None:
        assert new is near
        return levels
    assert sum(exact.keep().values()) == math.floor(exact.budget(epoch))
    for name, size in exact.sizes.items():
        assert abs(new[name] - near[name]) <= 2 / size
    return {i: new[str(i)] for i in levels}


@BLOCKS
@pytest.mark.parametrize("case", cases("vit_block"), ids=str)
def test_vit_block(case: Case, blocks: bool) -> None:
    t, config = case.tensors("f64"), case.config
    linears = ("q", "k", "v", "proj", "fc1", "fc2")
    params = {n: parameters(t, case.method, f"{n}.") for n in linears}
    x = t["x"].clone().requires_grad_()

    def linear(name: str, h: Tensor) -> Tensor:
        fn = delta_fn(
            case.method, list(params[name]), t["coeff"], config["sparsity"], blocks=blocks
        )
        weight, bias = t[f"base.{name}.weight"], t[f"base.{name}.bias"]
        return merged_linear(h, weight, bias, fn, list(params[name].values()))

    def norm(i: int, h: Tensor) -> Tensor:
        weight, bias = t[f"base.norm{i}.weight"], t[f"base.norm{i}.bias"]
        return F.layer_norm(h, (config["dim"],), weight, bias, config["layer_norm_eps"])

    def heads(h: Tensor) -> Tensor:
        return h.unflatten(-1, (config["num_heads"], -1)).transpose(1, 2)

    h = norm(1, x)
    attended = F.scaled_dot_product_attention(*(heads(linear(n, h)) for n in ("q", "k", "v")))
    y = x + linear("proj", attended.transpose(1, 2).flatten(-2))
    y = y + linear("fc2", F.gelu(linear("fc1", norm(2, y))))
    y.backward(t["gy"])

    case.assert_close(y, t["y.f64"], "f64", "y")
    case.assert_close(x.grad, t["gx.f64"], "f64", "gx")
    for name, named in params.items():
        for p, value in named.items():
            case.assert_close(value.grad, t[f"g.{name}.{p}.f64"], "f64", f"gradient of {name}.{p}")
