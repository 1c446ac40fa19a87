"""When the fused kernels are used. What they compute: `test_passes.py`."""

import importlib
import logging
from types import SimpleNamespace

import pytest
import torch

from snell_diffusion.core.triton import fused

CPU, CUDA = torch.device("cpu"), torch.device("cuda")


@pytest.fixture
def installed(monkeypatch):
    """installed(works): as if triton were there, and its kernels could (not) be imported."""
    monkeypatch.setattr(fused, "_failures", [])
    monkeypatch.delenv("TRITON_INTERPRET", raising=False)

    def pretend(works: bool = True) -> None:
        def load(name, package):
            if not works:
                raise ImportError("libtriton.so: wrong version")

        fused._loads.cache_clear()
        monkeypatch.setattr(importlib.util, "find_spec", lambda name: object())
        monkeypatch.setattr(
            fused, "importlib", SimpleNamespace(import_module=load, util=importlib.util)
        )

    yield pretend
    fused._loads.cache_clear()


def test_a_gpu_and_triton_are_needed(installed, monkeypatch):
    installed()
    assert fused.available(CUDA)
    assert not fused.available(CPU)
    assert not fused.available(torch.device("meta"))
    fused._loads.cache_clear()
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None)
    assert not fused.available(CUDA)


def test_the_cpu_serves_under_the_interpreter(installed, monkeypatch):
    installed()
    monkeypatch.setenv("TRITON_INTERPRET", "1")
    assert fused.available(CPU)


def test_compiled_code_takes_the_plain_formulas(installed, monkeypatch):
    installed()
    monkeypatch.setattr(torch.compiler, "is_compiling", lambda: True)
    assert not fused.available(CUDA)


def test_a_broken_installation_is_said_once(installed, caplog):
    installed(works=False)
    assert not fused.available(CUDA)
    assert not fused.available(CUDA)
    assert [record.levelno for record in caplog.records] == [logging.WARNING]
    assert "triton cannot be imported: libtriton.so: wrong version" in caplog.text


def test_a_failed_launch_falls_back_for_good_and_says_so_once(installed, caplog):
    installed()
    calls = []

    def fast():
        calls.append("fast")
        raise fused.failed("write: OutOfResources: shared memory")

    for _ in range(3):
        assert fused.attempt(CUDA, fast, lambda: "plain") == "plain"
    assert calls == ["fast"]
    assert len(caplog.records) == 1
    assert "fused GPU kernels are off" in caplog.text
    assert "write: OutOfResources: shared memory" in caplog.text


def test_what_works_is_used_and_wrong_arguments_are_raised(installed):
    installed()
    assert fused.attempt(CUDA, lambda: "fast", lambda: "plain") == "fast"
    assert fused.attempt(CPU, lambda: "fast", lambda: "plain") == "plain"

    def wrong():
        raise ValueError("shapes")

    with pytest.raises(ValueError, match="shapes"):
        fused.attempt(CUDA, wrong, lambda: "plain")
    assert fused.available(CUDA)


@pytest.mark.parametrize(
    "A, kernel, p, served",
    [
        (torch.empty(8, 5, 64), "mixed", 2, True),
        (torch.empty(1, 5, 1), "distance", 2.0, True),
        (torch.empty(2, 5, 8), "linear", 2.0, False),
        (torch.empty(2, 5, 8), "distance", 1.5, False),
        (torch.empty(9, 5, 8), "mixed", 2.0, False),
        (torch.empty(2, 5, 65), "mixed", 2.0, False),
        (torch.empty(2, 5, 8, dtype=torch.float64), "mixed", 2.0, False),
    ],
)
def test_updates_that_are_served(installed, monkeypatch, A, kernel, p, served):
    installed()
    assert not fused.serves(A, kernel, p)  # on the CPU
    monkeypatch.setenv("TRITON_INTERPRET", "1")
    assert fused.serves(A, kernel, p) == served


def test_what_is_switched_off_comes_back(installed):
    installed()
    with fused.switched_off():
        assert not fused.available(CUDA)
    assert fused.available(CUDA)
