"""The kernels as the compiler sees them, for a Hopper GPU that need not be there.

The interpreter runs what the compiler may refuse. `test_passes.py` runs this file.
"""

import re
import subprocess
from pathlib import Path

import pytest
import torch
from triton import knobs
from triton.backends.compiler import GPUTarget
from triton.runtime import driver

from snell_diffusion.core import RULES
from snell_diffusion.core.triton import launch, ops, selection
from tests.core.triton.layers import KERNELS, layers, levels_of

SHARED_MEMORY = 227 * 1024  # bytes that a program may have on a Hopper GPU


class AbsentGPU:
    def get_current_target(self):
        return GPUTarget("cuda", 90, 32)

    def get_current_device(self):
        return 0

    def get_current_stream(self, device):
        return 0


@pytest.fixture
def compiled(monkeypatch, tmp_path):
    """Launches compile down to machine code, and nothing runs; the code is listed by name."""
    monkeypatch.setattr(driver, "_active", AbsentGPU())
    found, start = {}, launch.launch

    class Compiling:
        def __init__(self, kernel):
            self.kernel, self.__name__ = kernel, kernel.__name__

        def __getitem__(self, grid):
            return lambda *args, **meta: found.setdefault(self.__name__, []).append(
                self.kernel.warmup(*args, grid=grid, **meta)
            )

    for module in (ops, selection):
        monkeypatch.setattr(
            module, "launch", lambda kernel, *rest, **meta: start(Compiling(kernel), *rest, **meta)
        )
    return found


def compile_all(
    H: int, q: int, kernel: str, rule: str, dtype: torch.dtype, I: int = 300, O: int = 500
) -> None:
    group = layers(2, H, I, O, q, kernel).group()
    cut = ops.thresholds(group, levels_of(0.9, 0.9))
    W = list(torch.zeros(2, O, I, dtype=dtype))
    ops.write(group, None if rule == "none" else cut, 1.0, W, W, rule)
    ops.backward(group, None if rule == "none" else cut, 1.0, W, rule)


FORWARD = {"centre", "sample", "begin", "count", "select", "write"}
MIXED = {"row_statistics", "row_sums"}
BACKWARD = {"input_points", "output_points"}


def check(found: dict, kernel: str) -> None:
    assert set(found) == FORWARD | BACKWARD | (MIXED if kernel == "mixed" else set())
    for name, codes in found.items():
        for code in codes:
            assert "cubin" in code.asm, name
            assert code.metadata.shared <= SHARED_MEMORY, name
            assert not code.metadata.enable_fp_fusion, name
            assert "tf32" not in code.asm["ptx"], name


def test_kernels_compile(compiled, monkeypatch):
    smallest = {"BO": 16, "BI": 16, "num_warps": 1, "num_stages": 1}  # compiles fastest
    monkeypatch.setattr(ops, "blocks", lambda heads, columns: smallest)
    compile_all(2, 16, "mixed", "squared", torch.bfloat16)
    check(compiled, "mixed")


@pytest.mark.full
@pytest.mark.parametrize("rule", RULES)
def test_every_rule_compiles(compiled, rule):
    compile_all(2, 16, "mixed", rule, torch.float32)
    check(compiled, "mixed")


@pytest.mark.full
@pytest.mark.parametrize("kernel", KERNELS)
@pytest.mark.parametrize("H, q", [(1, 1), (2, 7), (2, 32), (4, 16), (2, 64), (8, 8)])
def test_every_width_fits(compiled, H, q, kernel):
    compile_all(H, q, kernel, "squared", torch.bfloat16)
    check(compiled, kernel)


def stack(code, folder: Path) -> int:
    """Bytes of memory that a thread needs for what its registers do not hold."""
    binary = folder / "kernel.cubin"
    binary.write_bytes(code.asm["cubin"])
    command = [knobs.nvidia.cuobjdump.path, "-res-usage", str(binary)]
    done = subprocess.run(command, capture_output=True, text=True, check=True)
    return int(re.search(r"STACK:(\d+)", done.stdout)[1])


@pytest.mark.full
def test_the_usual_width_stays_in_registers_and_moves_wide_pieces(compiled, tmp_path):
    """Tiles that spill to memory would cost what fusing saves."""
    assert launch.blocks(2, 16)["BO"] == 64
    compile_all(2, 16, "mixed", "squared", torch.bfloat16, 512, 512)
    used = {name: stack(code, tmp_path) for name, codes in compiled.items() for code in codes}
    assert max(used.values()) <= 32, used
    (written,) = compiled["write"]
    assert "st.global.v4.b32" in written.asm["ptx"]
    assert "st.global.b16" not in written.asm["ptx"]
