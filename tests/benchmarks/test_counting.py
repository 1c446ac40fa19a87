"""Counted bytes and operations of small graphs whose figures follow from their shapes."""

import pytest
import torch
from torch import nn
from torch.utils.checkpoint import checkpoint
from torch.utils.flop_counter import FlopCounterMode

from benchmarks.counting import DenseAndSparse, Operations, SavedBytes, count
from benchmarks.layers import LinearModel, LinearStep, fake_cost
from benchmarks.shapes import Linear
from snell_diffusion.diffusion.memory.live import FakeDevice

T, I, O = 32, 16, 24
X, Y, W = 4 * T * I, 4 * T * O, 4 * I * O  # bytes in float32


def trained_linear():
    linear = nn.Linear(I, O, bias=False)
    x, gy = torch.randn(T, I, requires_grad=True), torch.randn(T, O)
    return linear, x, gy


def test_a_trained_linear_costs_what_its_shapes_say():
    linear, x, gy = trained_linear()
    cost = count(lambda: linear(x), linear.parameters(), (x, gy), gradient=gy)
    assert cost.saved == X
    assert cost.flops == 3 * 2 * T * I * O
    assert cost.backward_peak == X + W  # the two gradients
    assert cost.peak == X + 2 * Y + X + W  # x, y and gy, and the gradients


def test_a_frozen_linear_saves_nothing_and_has_no_gradient_of_its_weight():
    linear, x, gy = trained_linear()
    linear.requires_grad_(False)
    cost = count(lambda: linear(x), linear.parameters(), (x, gy), gradient=gy)
    assert (cost.saved, cost.flops, cost.backward_peak) == (0, 2 * 2 * T * I * O, X)


def test_a_loss_of_one_element_needs_no_gradient():
    linear, x, _ = trained_linear()
    cost = count(lambda: linear(x).sum(), linear.parameters(), (x,))
    assert cost.flops == 3 * 2 * T * I * O
    assert linear.weight.grad is not None


def test_what_two_nodes_save_counts_once():
    x = torch.randn(T, I, requires_grad=True)
    saved = SavedBytes([])
    with saved.counting():
        y = x.sin() + x.cos() + x[:, 1:].sin().sum()
    assert saved.total == X
    assert y.requires_grad


def test_a_graph_that_is_dropped_keeps_nothing():
    x = torch.randn(T, I)
    w = torch.randn(T, I, requires_grad=True)
    saved = SavedBytes([w])
    with saved.counting():
        kept = x.sin() * w
        dropped = ((x + 1) * w).detach()
    assert saved.total == X
    assert kept.shape == dropped.shape


def test_sparse_tensors_count_indices_and_values():
    with DenseAndSparse() as live:
        sparse = torch.sparse_coo_tensor(
            [[0, 1], [1, 0]], [1.0, 2.0], (9, 9), check_invariants=True
        )
        assert live.live == 4 * 8 + 2 * 4
        del sparse
        assert live.live == 0


def model():
    return nn.Sequential(nn.Conv2d(3, 4, 3), nn.Flatten(), nn.Linear(4 * 36, 7), nn.Linear(7, 2))


def test_operations_are_those_of_torchs_own_counter():
    net, x = model(), torch.randn(2, 3, 8, 8)
    with Operations() as mine:
        net(x).sum().backward()
    with FlopCounterMode(display=False) as torchs:
        net(x).sum().backward()
    assert mine.total == torchs.get_total_flops() > 0


def test_distances_count_as_a_product():
    A, B = torch.randn(2, 40, 8, requires_grad=True), torch.randn(2, 50, 8)
    with Operations() as operations:
        torch.cdist(A, B).sum().backward()
    product = 2 * 2 * 40 * 50 * 8
    assert operations.total == 3 * product  # torch computes both gradients, wanted or not


def blocks(checkpointed):
    layers = nn.ModuleList(
        nn.Sequential(nn.Linear(64, 256), nn.GELU(), nn.Linear(256, 64)) for _ in range(8)
    )
    layers.requires_grad_(False)

    def forward(x):
        for layer in layers:
            x = checkpoint(layer, x, use_reentrant=False) if checkpointed else layer(x)
        return x.sum()

    return layers, forward


def test_counting_does_not_hold_what_checkpointing_frees():
    costs = {}
    for checkpointed in (False, True):
        layers, forward = blocks(checkpointed)
        x = torch.randn(128, 64, requires_grad=True)
        costs[checkpointed] = count(
            lambda forward=forward, x=x: forward(x), layers.parameters(), [x]
        )
    assert costs[False].saved >= 8 * 128 * 256 * 4
    assert costs[True].saved <= 8 * 128 * 64 * 4  # the inputs of the blocks
    assert costs[True].peak < 0.6 * costs[False].peak
    assert costs[True].flops > costs[False].flops


@pytest.mark.parametrize("method", ["full", "lora", "dora", "plain", "plain_kept", "ours"])
def test_shapes_alone_give_the_operations_and_saved_bytes_of_real_tensors(method):
    shape = Linear(40, 48, 64)
    x, gy = torch.randn(64, 40, requires_grad=True), torch.randn(64, 48)
    real = LinearStep(LinearModel(40, 48), method, x, gy).cost()
    fake = fake_cost(shape, method)
    assert fake.flops == real.flops
    assert fake.saved == real.saved
    if method != "ours":  # real tensors find the threshold in numpy's memory
        assert (fake.peak, fake.backward_peak) == (real.peak, real.backward_peak)


def test_fake_devices_count_like_real_ones():
    linear, x, gy = trained_linear()
    device = FakeDevice(cuda=False)
    twin = nn.Linear(I, O, bias=False, device="meta")
    device.take(twin)
    with device.counting():
        fx, fgy = torch.empty(T, I, requires_grad=True), torch.empty(T, O)
    counting = device.counting()
    fake = count(lambda: twin(fx), twin.parameters(), (fx, fgy), gradient=fgy, counting=counting)
    assert fake == count(lambda: linear(x), linear.parameters(), (x, gy), gradient=gy)


def test_the_backward_peak_is_not_the_forward_passes():
    x = torch.randn(T, I, requires_grad=True)
    cost = count(lambda: (torch.randn(100 * T, I).sum() + x).sum(), [], [x])
    assert cost.peak >= 100 * X
    assert cost.backward_peak <= 2 * X
