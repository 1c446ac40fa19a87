"""What only a GPU can show. `test_passes.py` runs this file."""

import torch

from snell_diffusion.core.triton import ops
from tests.core.triton.layers import DEVICE, KERNELS, layers, levels_of, quantile, values

G, I, O = 6, 1280, 1280
MB = 2**20


def step(given, levels, W0, out, dW, rule="squared"):
    group = given.group()
    cut = ops.thresholds(group, levels)
    ops.write(group, cut, 1.0, W0, out, rule)
    return cut, ops.backward(given.group(group.lse), cut, 1.0, dW, rule)


def setting(kernel):
    given = layers(G, 2, I, O, 16, kernel)
    levels = levels_of(*[0.9] * G)
    W0, out, dW = (
        list(torch.randn(G, O, I, device=DEVICE, dtype=torch.bfloat16).unbind()) for _ in range(3)
    )
    return given, levels, W0, out, dW


def test_nothing_synchronises():
    for kernel in KERNELS:
        given = setting(kernel)
        step(*given)  # compiles
        fresh = [*given[:3], [torch.empty_like(w) for w in given[3]], given[4]]  # other addresses
        torch.cuda.synchronize()
        torch.cuda.set_sync_debug_mode("error")
        try:
            step(*fresh)
        finally:
            torch.cuda.set_sync_debug_mode("default")


def test_thresholds_of_real_sizes_are_exact():
    for kernel in KERNELS:
        given, levels, *_ = setting(kernel)
        group = given.group()
        t, _ = ops.thresholds(group, levels)
        w = values(group)
        for g in range(G):
            assert t[g] == quantile(w[g], 0.9)


def test_results_repeat_bit_for_bit():
    given = setting("mixed")
    _, first = step(*given)
    written = [w.clone() for w in given[3]]
    for _ in range(5):
        _, again = step(*given)
        assert all(torch.equal(a, b) for a, b in zip(first, again, strict=True))
        assert all(torch.equal(a, b) for a, b in zip(written, given[3], strict=True))


def test_memory_does_not_grow_with_the_weights():
    given = setting("mixed")
    step(*given)
    torch.cuda.synchronize()
    before = torch.cuda.memory_allocated()
    torch.cuda.reset_peak_memory_stats()
    step(*given)
    torch.cuda.synchronize()
    points = 3 * 4 * sum(t.numel() for t in (given[0].A, given[0].B))  # centred, twice; gradients
    assert torch.cuda.max_memory_allocated() - before < points + 4 * MB
