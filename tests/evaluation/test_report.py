"""Pages: made from runs and from kept results alike; one file that fetches and runs nothing."""

import json
import re
import shutil
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from playwright.sync_api import sync_playwright

from scripts.setup_browser import find_browser
from snell_diffusion.errors import SnellaFileError
from snell_diffusion.evaluation.__main__ import main
from snell_diffusion.evaluation.results import load, save
from tests.evaluation.made_up import METHODS, results
from tests.evaluation.plans import TUNE, command, write_plan


@pytest.fixture(scope="module")
def kept(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Made-up results as a file."""
    path = tmp_path_factory.mktemp("kept") / "personalization.json"
    save(results(), path)
    return path


@pytest.fixture(scope="module")
def page(kept: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The page of made-up results."""
    folder = tmp_path_factory.mktemp("page")
    assert main(["report", "--from", str(kept), "--output", str(folder)]) == 0
    return folder / "index.html"


def test_results_are_read_back_as_they_were(kept: Path) -> None:
    found, made = load(kept), results()
    assert found.records[0].loss_after == made.records[0].loss_after
    assert found.records[0].kept == []
    for name in ("about", "trials", "base", "kept", "sheets", "maps"):
        assert getattr(found, name) == getattr(made, name)
    assert json.loads(kept.read_text())["seeds"] == [0, 1]


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda v: v.update(kind="other"), "expected results of kind|got kind 'other'"),
        (lambda v: v["records"][0].update(surprise=1), "found surprise"),
        (lambda v: v["records"][0].pop("digest"), "missing 1 required.*digest"),
        (lambda v: v.pop("trials"), "not complete: KeyError 'trials'"),
        (lambda v: v["plan"].pop("reference"), "not complete: KeyError 'reference'"),
        (lambda v: v["sheets"].update(cat="../../secret.webp"), "the name of a picture beside it"),
        (lambda v: v["sheets"].update(cat="gone.webp"), "cannot be read as a picture"),
        (lambda v: v.update(kept=3), "not complete: AttributeError"),
    ],
)
def test_a_wrong_file_is_refused(kept: Path, change: Any, message: str, tmp_path: Path) -> None:
    shutil.copytree(kept.parent, tmp_path / "copy")
    path = tmp_path / "copy" / kept.name
    values = json.loads(path.read_text())
    change(values)
    path.write_text(json.dumps(values))
    with pytest.raises(SnellaFileError, match=message):
        load(path)


def test_a_page_takes_in_pictures_only(kept: Path, tmp_path: Path) -> None:
    shutil.copytree(kept.parent, tmp_path / "copy")
    (tmp_path / "copy" / "personalization" / "sheets-00.webp").write_text("<svg onload=alert(1)>")
    with pytest.raises(SnellaFileError, match="cannot be read as a picture"):
        load(tmp_path / "copy" / kept.name)


def test_the_page_says_who_wins_and_how_it_was_measured(page: Path) -> None:
    text = re.sub(r"<[^>]+>", " ", page.read_text())
    assert "Lowest held-out loss, after / before: ours (0.705" in text
    assert "all others are worse" in text
    assert "python -m snell_diffusion.evaluation personalization --config plan.yaml" in text
    assert "2026-01-02 03:04 UTC" in text
    assert "1 diverged" in text
    assert "At the edge of what was tried" in text
    assert "diversity in VAE latents" in text
    assert "25 prompts, 2 pictures each, in 10 steps with guidance 3.0" in text


def test_nothing_in_a_file_becomes_markup(page: Path) -> None:
    text = page.read_text()
    assert METHODS[2] not in text
    assert "&lt;b&gt;odd &amp; &quot;name&quot;&lt;/b&gt; | x" in text
    assert "&lt;i&gt;processor&lt;/i&gt;" in text


def test_both_pages_have_the_same_pictures(page: Path) -> None:
    markdown = page.with_suffix(".md").read_text()
    links = re.findall(r"\]\((index_pictures/[^)]+)\)", markdown)
    assert len(links) == page.read_text().count("<img ") == 7
    assert all((page.parent / link).is_file() for link in links)
    assert len(list((page.parent / "index_pictures").iterdir())) == 7


def test_the_page_of_runs_and_of_kept_results_are_equal(tiny_base: Path, tmp_path: Path) -> None:
    plan = write_plan(tmp_path, tiny_base, tune=TUNE)
    assert main(command(plan)) == 0
    keep = ["--keep", str(tmp_path / "kept")]
    first = ["report", "--personalization", str(tmp_path / "out"), "--output"]
    assert main([*first, str(tmp_path / "a"), *keep]) == 0
    again = ["report", "--from", str(tmp_path / "kept" / "personalization.json"), "--output"]
    assert main([*again, str(tmp_path / "b")]) == 0
    one, two = ((tmp_path / name / "index.html").read_text() for name in ("a", "b"))
    assert one == two
    assert one.count("data:image/webp") == 1
    assert str(tmp_path) not in one


def test_nothing_to_report_is_an_error(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["report", "--output", str(tmp_path)]) == 2
    assert "nothing to report" in capsys.readouterr().err
    assert main(["report", "--personalization", str(tmp_path), "--output", str(tmp_path)]) == 2
    assert "about.json: cannot be read" in capsys.readouterr().err


@pytest.fixture(scope="module")
def browser() -> Iterator[Any]:
    """A real browser, where there is one."""
    found = find_browser()
    if found is None:
        pytest.skip("no Chromium is installed: make browser")
    with sync_playwright() as playwright:
        opened = playwright.chromium.launch(executable_path=found, args=["--no-sandbox"])
        yield opened
        opened.close()


def test_a_browser_fetches_nothing_and_shows_every_picture(browser: Any, page: Path) -> None:
    requests, problems = [], []
    tab = browser.new_page(viewport={"width": 1280, "height": 800})
    tab.on("request", lambda request: requests.append(request.url))
    tab.on("console", lambda message: problems.append(message.text))
    tab.on("pageerror", lambda error: problems.append(str(error)))
    tab.goto(page.as_uri())
    assert [url for url in requests if not url.startswith("data:")] == [page.as_uri()]
    assert problems == []
    assert tab.evaluate("[...document.images].every(i => i.complete && i.naturalWidth > 20)")
    assert tab.evaluate("document.images.length") == 7
    assert tab.evaluate("[...document.images].every(i => i.alt)")
    assert tab.evaluate("document.scripts.length") == 0
    tab.close()


@pytest.mark.parametrize("width", [400, 1280])
def test_the_page_fits_screens_of_any_width(browser: Any, page: Path, width: int) -> None:
    tab = browser.new_page(viewport={"width": width, "height": 800})
    tab.goto(page.as_uri())
    assert tab.evaluate("document.documentElement.scrollWidth") <= width
    tab.close()
