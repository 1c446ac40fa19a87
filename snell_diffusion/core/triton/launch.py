"""Starting kernels: addresses of grouped tensors, block sizes, failures."""

import contextlib
import functools
from collections.abc import Sequence
from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor

from ..kernels import PRODUCT_MIN_COLUMNS
from .fused import failed

DTYPES = {torch.float32: tl.float32, torch.bfloat16: tl.bfloat16, torch.float16: tl.float16}
PROGRAMS_A_PROCESSOR = 2
MIN_COLUMNS = 16  # tl.dot needs 16 along each axis


def launch(
    kernel: Any, grid: tuple[int, ...], device: torch.device, *args: Any, **meta: Any
) -> None:
    """Start a kernel on `device`.

    Multiplications and additions are not contracted: the sum of heads must cancel exactly, and
    passes that compute the same value must agree bit for bit.

    Raises:
        LaunchError: It cannot be compiled or started; the fused path is then switched off.
    """
    here = torch.cuda.device(device) if device.type == "cuda" else contextlib.nullcontext()
    try:
        with here:
            kernel[grid](*args, enable_fp_fusion=False, **meta)
    except Exception as problem:  # compilers and drivers raise what they like
        raise failed(f"{kernel.__name__}: {type(problem).__name__}: {problem}") from problem


def blocks(heads: int, columns: int) -> dict[str, int]:
    """Edges of a tile, in outputs and inputs, and how the compiler is to spread it.

    A backward pass holds about five tiles, and the points and sums of every head, in registers: at
    64 x 64 and 8 warps each tile takes 16 of a thread's 255. Wide or many heads leave room for
    smaller tiles only, and for one set of points at a time in shared memory; so do few columns,
    whose distances are taken coordinate by coordinate.
    """
    width = heads * padded(columns)
    if width <= 32 and columns >= PRODUCT_MIN_COLUMNS:
        edge, warps, stages = 64, 8, 2
    else:
        edge, warps, stages = (32, 4, 2) if width <= 128 else (16, 2, 1)
    return {"BO": edge, "BI": edge, "num_warps": warps, "num_stages": stages}


def spread(programs: int, tiles: int, device: torch.device) -> int:
    """Tiles that one program goes over, so that a GPU has work for all of it.

    Args:
        programs: How many there are if each takes all the tiles.
        tiles: In a row or column of the matrix.
    """
    wanted = max(1, PROGRAMS_A_PROCESSOR * _processors(device) // programs)
    return triton.cdiv(tiles, min(tiles, wanted))


@functools.cache
def _processors(device: torch.device) -> int:
    if device.type == "cpu":
        return 1
    return torch.cuda.get_device_properties(device).multi_processor_count


def padded(columns: int) -> int:
    """Columns a kernel works with: the power of two from `columns` on, at least 16."""
    return max(MIN_COLUMNS, triton.next_power_of_2(columns))


def addresses(tensors: Sequence[Tensor]) -> Tensor:
    """Where each tensor's data begins, int64 [G] on their device.

    Cached: in a training loop the same tensors come back, and the copy to the device is spared.
    """
    device = tensors[0].device
    stream = torch.cuda.current_stream(device).cuda_stream if device.type == "cuda" else 0
    return _addresses(device, stream, tuple(t.data_ptr() for t in tensors))


def aligned(tensors: Sequence[Tensor]) -> bool:
    """Whether each tensor's data begins at a multiple of 16 bytes."""
    return all(t.data_ptr() % 16 == 0 for t in tensors)


@functools.lru_cache(maxsize=1024)
def _addresses(device: torch.device, stream: int, values: tuple[int, ...]) -> Tensor:
    on_host = torch.tensor(values, dtype=torch.int64)
    if device.type == "cpu":
        return on_host
    return on_host.pin_memory().to(device, non_blocking=True)  # pageable memory would synchronise
