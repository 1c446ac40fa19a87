"""docs/vision.md: its commands parse, its table of protocols is so, its example runs."""

import re
import shlex
from pathlib import Path

import pytest

from snell_diffusion.vision.config import PROTOCOLS, parse_config
from snell_diffusion.vision.schedule import rate_at
from tests.vision import runs


@pytest.fixture
def page(repo_root: Path) -> str:
    return (repo_root / "docs" / "vision.md").read_text("utf-8")


def fenced(page: str, language: str) -> str:
    return "\n".join(re.findall(rf"^```{language}\n(.*?)^```", page, re.MULTILINE | re.DOTALL))


def test_commands_parse(page: str, repo_root: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(repo_root)
    lines = fenced(page, "bash").replace("\\\n", " ").splitlines()
    commands = [shlex.split(line) for line in lines if line]
    assert len(commands) >= 7
    for words in commands:
        arguments = words[words.index("snell_diffusion.vision") + 1 :]
        assert words[: words.index("-m")] in (["python"], ["accelerate", "launch"])
        if arguments[0] not in ("predict", "--list-methods", "--help"):
            assert parse_config(arguments).method == "snella"


def test_example_runs(
    page: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    pytest.importorskip("sklearn", reason="the digits come with scikit-learn")
    monkeypatch.chdir(tmp_path)
    exec(compile(fenced(page, "python"), "docs/vision.md", "exec"), {})
    said = capsys.readouterr().out
    assert re.search(r"test accuracy \d+\.\d%, 1,930 numbers trained", said)


def test_numbers_of_the_paper_protocol(page: str) -> None:
    """What the page says of rates and defaults."""
    config = runs.config("b", Path("p"), None, protocol="paper", learning_rate=1e-3)
    full = parse_config(["--protocol", "paper", "--learning_rate", "1e-3"])
    assert (full.num_train_epochs, full.warmup_epochs, full.min_lr) == (100, 10.0, 1e-5)
    assert config.warmup_lr == 1e-6
    rates = [rate_at(full, 1e-3, epoch, 1, 100) for epoch in range(100)]
    assert rates[0] == rates[1] == pytest.approx(1e-6)
    assert f"epoch 2 at {rates[2]:.2e}".replace("e-04", "e-4") in page
    assert max(rates) == rates[11]
    assert f"{rates[11] * 1e3:.3f}e-3 in epoch 11" in page
    for name in PROTOCOLS["paper"]:
        if name != "adam_epsilon":
            assert f"`{name}`" in page, name
