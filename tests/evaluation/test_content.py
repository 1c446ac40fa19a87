"""Both forms of a page: everything is escaped, nothing is fetched."""

import re
from html.parser import HTMLParser
from pathlib import Path

import pytest

from snell_diffusion.evaluation.content import (
    Code,
    Figure,
    Heading,
    Paragraph,
    Table,
    plain,
    to_html,
    to_markdown,
    write,
)

EVIL = """<script>alert(1)</script>"'`|[x](javascript:alert(1))&amp; **b** <img src=x onerror=y>"""
PNG = b"\x89PNG\r\n"
BLOCKS = [
    *(Heading(EVIL), Paragraph(EVIL), Code(EVIL)),
    Table([EVIL, EVIL], [[EVIL, EVIL], ["b", "2"]], EVIL, strong="b"),
    Figure(EVIL, PNG, EVIL, EVIL),
]


def test_text_never_becomes_markup() -> None:
    found = Tags()
    found.feed(to_html(EVIL, BLOCKS))
    names = [name for name, _ in found.tags]
    assert "script" not in names
    assert names.count("img") == 1
    attributes = {key for _, some in found.tags for key in some}
    assert attributes == {
        *("lang", "charset", "http-equiv", "content", "name", "rel", "href", "tabindex", "scope"),
        *("class", "src", "alt"),
    }
    (alt,) = (some["alt"] for name, some in found.tags if name == "img")
    assert alt == EVIL
    assert ("tr", {"class": "strong"}) in found.tags


class Tags(HTMLParser):
    """Every tag of a page with its attributes."""

    def __init__(self) -> None:
        super().__init__()
        self.tags: list[tuple[str, dict[str, str | None]]] = []

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.tags.append((tag, dict(attrs)))


def test_markdown_shows_text_as_it_is() -> None:
    text = to_markdown(EVIL, BLOCKS, "pictures")
    outside = "\n".join(line for line in text.splitlines() if not line.startswith("    "))
    assert not re.search(r"(?<!\\)<|(?<!\\)`", outside)
    assert "](javascript" not in outside.replace("\\]", "").replace("\\[", "")
    rows = [line for line in text.splitlines() if line.startswith("| ")]
    assert all(len(re.findall(r"(?<!\\)\|", row)) == 3 for row in rows)
    assert "| **b** | **2** |" in rows


def test_plain_keeps_what_means_nothing() -> None:
    assert plain("SNELLA (ours), 80 %: 0.85 [0.8, 0.9]") == (
        "SNELLA (ours), 80 %: 0.85 \\[0.8, 0.9\\]"
    )
    assert plain("a\nb") == "a b"


def test_a_page_is_written_with_its_pictures(tmp_path: Path) -> None:
    pages = write("T", [Figure("Loss & drift", PNG, "a plot")], tmp_path)
    assert [page.name for page in pages] == ["index.html", "index.md"]
    assert (tmp_path / "index_pictures" / "loss-drift.png").read_bytes() == PNG
    assert "![a plot](index_pictures/loss-drift.png)" in pages[1].read_text()
    assert "data:image/png;base64," in pages[0].read_text()


def test_what_is_no_picture_is_refused() -> None:
    with pytest.raises(ValueError, match="figure x: expected PNG or WebP"):
        to_html("T", [Figure("x", b"<svg onload=alert(1)>", "")])
