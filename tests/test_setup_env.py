"""The set-up script's decisions; the installing itself is what `make` does."""

import platform
import sys

import pytest

from scripts import setup_env


@pytest.fixture
def on(monkeypatch):
    """on(system, nvidia, offers): a machine whose plain index offers this build of torch."""

    def machine(system, nvidia, offers):
        monkeypatch.setattr(platform, "system", lambda: system)
        monkeypatch.setattr(setup_env.shutil, "which", lambda name: "/bin/x" if nvidia else None)
        monkeypatch.setattr(setup_env, "plain_choice", lambda pin: offers)

    return machine


CPU = ["--extra-index-url", setup_env.CPU_INDEX]


@pytest.mark.parametrize(
    "system, nvidia, offers, wish, arguments",
    [
        ("Linux", False, "2.13.0", "auto", CPU),
        ("Linux", False, "2.13.0+cpu", "auto", []),
        ("Linux", True, "2.13.0", "auto", []),
        ("Darwin", False, "2.13.0", "auto", []),
        ("Linux", False, "2.13.0", "plain", []),
        (
            "Linux",
            True,
            "2.13.0",
            "https://example.org/cu",
            ["--extra-index-url", "https://example.org/cu"],
        ),
    ],
)
def test_the_build_of_torch(on, system, nvidia, offers, wish, arguments):
    on(system, nvidia, offers)
    assert setup_env.torch_index_arguments("torch==2.13.0", wish) == arguments


def test_an_old_python_is_told_what_to_do(monkeypatch):
    monkeypatch.setattr(sys, "version_info", (3, 10, 4))
    with pytest.raises(SystemExit, match=r"needs Python 3\.11 or newer .* make PYTHON=python3\.12"):
        setup_env.check_interpreter()


def test_a_python_without_venv_is_told_the_package(monkeypatch):
    monkeypatch.setattr(setup_env.importlib.util, "find_spec", lambda name: None)
    with pytest.raises(SystemExit, match=r"apt-get install python3\.\d+-venv"):
        setup_env.check_interpreter()


def test_torch_is_pinned_once(tmp_path, monkeypatch):
    monkeypatch.setattr(setup_env, "CONSTRAINTS", tmp_path / "constraints.txt")
    setup_env.CONSTRAINTS.write_text("# pins\ntorch==2.13.0\nnumpy==2.4.6\n")
    assert setup_env.torch_pin() == "torch==2.13.0"
    setup_env.CONSTRAINTS.write_text("numpy==2.4.6\n")
    with pytest.raises(SystemExit, match="must pin torch exactly once, found no line"):
        setup_env.torch_pin()
