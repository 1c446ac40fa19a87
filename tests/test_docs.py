"""The documents tell the truth: links lead somewhere, examples run, generated pages are current."""

import re
from pathlib import Path

import pytest
import torch

ROOT = Path(__file__).resolve().parents[1]
SKIPPED = {".venv", "runs", ".git", "node_modules", ".pytest_cache"}
PAGES = sorted(
    path.relative_to(ROOT).as_posix()
    for path in ROOT.rglob("*.md")
    if not SKIPPED & set(path.relative_to(ROOT).parts)
)
LINK = re.compile(r"\[[^\]]*\]\(([^)\s]+)\)")
FENCED = re.compile(r"^```.*?^```", re.MULTILINE | re.DOTALL)


def anchors(text):
    """The anchors that a Markdown page's headings make."""
    titles = re.findall(r"^#+ (.+)$", FENCED.sub("", text), re.MULTILINE)
    return {re.sub(r"[^\w\- ]", "", title.lower()).strip().replace(" ", "-") for title in titles}


def broken_links(page):
    text = FENCED.sub("", page.read_text("utf-8"))
    broken = []
    for link in LINK.findall(text):
        target, _, anchor = link.partition("#")
        if re.match(r"[a-z]+:", link):
            continue
        path = (page.parent / target) if target else page
        if not path.exists() or (anchor and anchor not in anchors(path.read_text("utf-8"))):
            broken.append(link)
    return broken


@pytest.mark.parametrize("page", PAGES)
def test_links_inside_the_project_lead_somewhere(page):
    assert broken_links(ROOT / page) == []


def test_a_broken_link_is_seen(tmp_path):
    page = tmp_path / "page.md"
    page.write_text("# One Title\n[a](#one-title) [b](gone.md) [c](page.md#no) [d](https://x.y)\n")
    assert broken_links(page) == ["gone.md", "page.md#no"]


def python_examples(page):
    return re.findall(r"^```python\n(.*?)^```", page.read_text("utf-8"), re.MULTILINE | re.DOTALL)


@pytest.fixture
def trained(tmp_path, monkeypatch):
    """A working folder with runs/demo/output, as make demo leaves it; the update is random."""
    from diffusers import StableDiffusionPipeline

    import snell_diffusion
    from snell_diffusion.models import embedded_path

    monkeypatch.chdir(tmp_path)
    pipe = StableDiffusionPipeline.from_pretrained(embedded_path())
    pipe.unet.add_adapter(snell_diffusion.SnellaConfig.paper(r=4, seed=0))
    pipe.save_snella_weights("runs/demo/output")


def test_readme_shows_a_short_example_that_runs(trained, tmp_path):
    example = python_examples(ROOT / "README.md")[0]
    lines = [line for line in example.splitlines() if line.strip()]
    assert len(lines) <= 10
    exec(compile(example, "README.md", "exec"), {})
    assert (tmp_path / "bowl.png").stat().st_size > 1000


def test_readme_peft_example_runs(capsys):
    example = python_examples(ROOT / "README.md")[1]
    names: dict[str, object] = {}
    exec(compile(example, "README.md", "exec"), names)
    assert "trainable params: 1,6" in capsys.readouterr().out
    assert names["model"](torch.zeros(2, 64)).shape == (2, 10)


def test_the_configuration_reference_is_current():
    from scripts.write_config_reference import TARGET, reference

    assert TARGET.read_text("utf-8") == reference(), "run: make docs"


def test_the_readme_commands_exist():
    text = (ROOT / "README.md").read_text("utf-8")
    targets = set(re.findall(r"^([\w-]+):", (ROOT / "Makefile").read_text(), re.MULTILINE))
    assert set(re.findall(r"\bmake ([a-z][\w-]*)", text)) <= targets | {"demo"}
