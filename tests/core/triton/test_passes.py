"""Runs the cases of this folder in processes of their own.

Triton reads TRITON_INTERPRET where it is first imported, and remembers it. In a process that runs
other tests too, some would see an interpreter that they did not ask for.
"""

import importlib.util
import os
import re
import subprocess
import sys
from pathlib import Path

import pytest
import torch

HERE = Path(__file__).parent
ROOT = HERE.parents[2]

needs_triton = pytest.mark.skipif(
    importlib.util.find_spec("triton") is None,
    reason="triton is not installed: pip install 'snell-diffusion[triton]'",
)
needs_gpu = pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA device")


def run(file: str, cache: Path, *options: str, **variables: str) -> None:
    """Every case of a file passes, and none is skipped."""
    kept = {k: v for k, v in os.environ.items() if not k.startswith(("PYTEST_", "TRITON_"))}
    command = [sys.executable, "-m", "pytest", "-q", "-p", "no:cacheprovider", *options]
    done = subprocess.run(
        [*command, str(HERE / file)],
        cwd=ROOT,
        env={**kept, "TRITON_CACHE_DIR": str(cache), **variables},
        capture_output=True,
        text=True,
    )
    summary = done.stdout.strip().splitlines()[-1:]
    assert done.returncode == 0, f"{done.stdout}\n{done.stderr}"
    assert re.match(r"^\d+ passed(, \d+ deselected)? in ", *summary), summary


@needs_triton
@pytest.mark.parametrize("case", ["forward", "backward", "walk", "grouped"])
def test_on_the_cpu_through_the_interpreter(case, tmp_path):
    run(f"cases_{case}.py", tmp_path, TRITON_INTERPRET="1")


@needs_triton
def test_compiling_for_a_gpu(tmp_path):
    run("cases_compile.py", tmp_path)


@needs_triton
@pytest.mark.full
@pytest.mark.timeout(3000)
def test_compiling_every_variant_for_a_gpu(tmp_path):
    run("cases_compile.py", tmp_path, "-m", "full", "--timeout", "1000")


@needs_triton
@needs_gpu
@pytest.mark.gpu
@pytest.mark.parametrize("case", ["forward", "backward", "walk", "grouped", "gpu"])
def test_on_a_gpu(case, tmp_path):
    run(f"cases_{case}.py", tmp_path)
