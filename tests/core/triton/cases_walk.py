"""Updates of one layer in blocks, through the functions that training calls.

`test_passes.py` runs this file.
"""

import pytest
import torch

from snell_diffusion.core import (
    RULES,
    KernelUpdate,
    ScaledSum,
    dense,
    merged_linear,
    threshold,
    update,
)
from snell_diffusion.core import blocks as blocks_module
from snell_diffusion.core.scratch import Scratch
from snell_diffusion.core.triton import fused, ops, walk
from snell_diffusion.core.triton.walk import FusedWalk
from tests.core.triton.layers import DEVICE, KERNELS, layers

I, O = 70, 40
BLOCKS = [[slice(None)], [slice(0, 32), slice(32, 64), slice(64, 70)]]


class Walked:
    """One layer, its plain walk, and the fused one over the same statistics."""

    def __init__(self, kernel, rule="squared", sparsity=0.7003):
        self.kernel, self.rule = kernel, rule
        A, B, signs, *mixers = layers(1, 2, I, O, 16, kernel).one(0, torch.float32)
        self.params, self.signs = [A, B, *(m.view(1) for m in mixers)], signs
        self.whole = walk.prepare(self.params, signs)
        level = 0.0 if rule == "none" else sparsity
        self.statistics = walk.measure(self.whole, level)
        self.plain_update = KernelUpdate(signs, level, kernel, rule=rule, limit=self.statistics[0])

    def plain(self):
        wanted = [True] * len(self.params)
        scratch = Scratch(pooled=False)
        return self.plain_update._walk(self.params, self.statistics, wanted, scratch, None)

    def fused(self, wanted=None, whole=None):
        wanted = wanted or [True] * len(self.params)
        return FusedWalk(
            self.params, self.signs, self.rule, self.statistics, wanted, self.plain, whole
        )

    def exact(self, gdelta):
        """Delta and gradients by the plain formula in float64."""
        leaves = [p.double().requires_grad_() for p in self.params]
        A, B, *mixers = leaves
        limit = {} if self.rule == "none" else {"threshold": self.statistics[0].double()}
        delta = update(
            A, B, self.signs.double(), *mixers, kernel=self.kernel, rule=self.rule, **limit
        ).T
        return delta.detach(), torch.autograd.grad(delta, leaves, gdelta.double())


def gradient():
    return torch.randn(O, I, generator=torch.Generator().manual_seed(3)).to(DEVICE)


def passed(walk, blocks, gdelta):
    """A walk's blocks put together, and its gradients."""
    parts = []
    for columns in blocks:
        parts.append(walk.delta(columns).clone())
        walk.pull(gdelta[:, columns])
    return torch.cat(parts, 1), walk.gradients()


def assert_close(got, want):
    for a, b in zip(got, want, strict=True):
        assert a.shape == b.shape
        assert float((a.double() - b).norm()) <= 3e-5 * float(b.norm()) + 1e-9


@pytest.mark.parametrize(
    "rule, kernel, blocks",
    [
        *((rule, "mixed", BLOCKS[1]) for rule in RULES),
        ("squared", "distance", BLOCKS[1]),
        ("squared", "mixed", BLOCKS[0]),
    ],
)
def test_blocks_and_gradients(rule, kernel, blocks):
    it, gdelta = Walked(kernel, rule), gradient()
    delta, grads = passed(it.fused(), blocks, gdelta)
    exact, want = it.exact(gdelta)
    assert_close([delta, *grads], [exact, *want])


def test_what_was_measured_serves_the_whole_of_the_columns():
    it, gdelta = Walked("mixed"), gradient()
    first = passed(it.fused(), BLOCKS[0], gdelta)
    again = passed(it.fused(whole=it.whole), BLOCKS[0], gdelta)
    assert_close([first[0], *first[1]], [again[0].double(), *(g.double() for g in again[1])])


@pytest.mark.parametrize("kernel", KERNELS)
def test_statistics_are_those_of_the_plain_functions(kernel):
    it = Walked(kernel)
    t, is_zero = it.statistics
    A, B, *mixers = it.params
    want = threshold(dense(A, B, it.signs, *mixers, kernel=kernel), 0.7003)
    torch.testing.assert_close(t, want, rtol=1e-5, atol=0)
    assert (t.shape, is_zero.item()) == ((), 0.0)


def test_a_weight_is_folded_without_holding_the_update():
    it = Walked("mixed")
    weight = torch.randn(O, I, generator=torch.Generator().manual_seed(4)).to(DEVICE)
    out = torch.full_like(weight, torch.nan)
    walk = it.fused()
    for columns in BLOCKS[1]:
        walk.fold_into(out[:, columns], columns, weight[:, columns], 0.5)
    assert_close([out - weight], [0.5 * it.exact(weight)[0]])


def test_only_wanted_gradients_are_given():
    it = Walked("mixed")
    _, grads = passed(it.fused([False, True, False, True, False]), BLOCKS[0], gradient())
    assert [g is not None for g in grads] == [False, True, False, True, False]
    _, grads = passed(it.fused([False] * 5), BLOCKS[0], gradient())
    assert grads == [None] * 5


def test_a_gradient_in_columns_or_in_16_bit():
    it, gdelta = Walked("mixed"), gradient().bfloat16()
    _, want = passed(it.fused(), BLOCKS[0], gdelta.float())
    for given in (gdelta, gdelta.T.contiguous().T, gdelta.double()):
        _, got = passed(it.fused(), BLOCKS[0], given)
        assert_close(got, [g.double() for g in want])


@pytest.mark.parametrize("blocks", [None, 32])
@pytest.mark.parametrize("scale", [1.0, 0.25])
@pytest.mark.parametrize("rule", ["squared", "mask", "none"])
@pytest.mark.parametrize("kernel", KERNELS)
def test_training_goes_through_the_fused_kernels(kernel, rule, scale, blocks, monkeypatch):
    """`merged_linear` as it stands: on and off differ by rounding alone."""
    if blocks:
        monkeypatch.setattr(blocks_module, "ALIGNMENT", 1)
        monkeypatch.setitem(blocks_module.BLOCK_ENTRIES, DEVICE.type, blocks * O)
    it = Walked(kernel, rule)
    update = KernelUpdate(it.signs, 0.0 if rule == "none" else 0.6, kernel, rule=rule)
    leaves = [p.requires_grad_() for p in it.params]
    update = update if scale == 1.0 else ScaledSum([(update, len(leaves), scale)])
    rng = torch.Generator().manual_seed(5)
    x, weight = (torch.randn(*shape, generator=rng).to(DEVICE) for shape in ((9, I), (O, I)))
    x.requires_grad_()

    def step():
        y = merged_linear(x, weight, None, update, leaves)
        return [y, *torch.autograd.grad(y.square().sum(), [x, *leaves])]

    written = []
    works = ops.write
    monkeypatch.setattr(ops, "write", lambda *a: written.append(1) or works(*a))
    got = step()
    assert len(written) == 2 * (1 if blocks is None else 3)
    with fused.switched_off():
        want = step()
    assert len(written) == 2 * (1 if blocks is None else 3)
    for a, b in zip(got, want, strict=True):
        largest = float(b.detach().abs().max())
        assert float((a - b).detach().abs().max()) <= 2e-4 * max(largest, 1e-20)


@pytest.mark.parametrize("failing", ["write", "backward"])
@pytest.mark.parametrize("after", [0, 2])
def test_a_failure_in_the_middle_of_a_pass_is_made_good(failing, after, monkeypatch):
    monkeypatch.setattr(fused, "_failures", [])
    it, gdelta = Walked("mixed"), gradient()
    calls, works = [], getattr(ops, failing)

    def fails_later(*args):
        calls.append(1)
        if len(calls) > after:
            raise fused.failed("out of resources")
        return works(*args)

    monkeypatch.setattr(ops, failing, fails_later)
    delta, grads = passed(it.fused(), BLOCKS[1], gdelta)
    exact, want = it.exact(gdelta)
    assert_close([delta, *grads], [exact, *want])
    assert len(calls) == after + 1


def test_a_fold_that_fails_is_made_good(monkeypatch):
    monkeypatch.setattr(fused, "_failures", [])
    it = Walked("mixed")

    def fails(*args):
        raise fused.failed("out of resources")

    monkeypatch.setattr(ops, "write", fails)
    weight, out = gradient()[:, :32], torch.empty(O, 32, device=DEVICE)
    it.fused().fold_into(out, slice(0, 32), weight, 2.0)
    assert_close([out - weight], [2 * it.exact(gradient())[0][:, :32]])
