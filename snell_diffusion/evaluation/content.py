"""A page as a list of blocks, and its two forms: one HTML file with everything in it, and Markdown.

All text is data: both forms escape it, so that nothing in a file can become markup or a script.
"""

import base64
import html
import re
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from snell_diffusion.training.files import write_text, write_with

_MIME = {b"\x89PNG": ("image/png", "png"), b"RIFF": ("image/webp", "webp")}


@dataclass(frozen=True)
class Heading:
    """A heading of level 2 or 3."""

    text: str
    level: int = 2


@dataclass(frozen=True)
class Paragraph:
    """Plain text."""

    text: str


@dataclass(frozen=True)
class Code:
    """A command line."""

    text: str


@dataclass(frozen=True)
class Table:
    """A table: the first column names rows, the others hold numbers; `strong` names one row."""

    head: Sequence[str]
    rows: Sequence[Sequence[str]]
    caption: str = ""
    strong: str = ""


@dataclass(frozen=True)
class Figure:
    """A picture: PNG or WebP bytes, a name for its file, what it shows in words, a caption."""

    name: str
    data: bytes
    alt: str
    caption: str = ""

    @property
    def mime(self) -> str:
        """Its media type.

        Raises:
            ValueError: Neither PNG nor WebP.
        """
        return self._kind()[0]

    @property
    def file(self) -> str:
        """Its file name in a Markdown page's folder."""
        return f"{re.sub(r'[^a-z0-9]+', '-', self.name.lower()).strip('-')}.{self._kind()[1]}"

    def _kind(self) -> tuple[str, str]:
        if self.data[:4] not in _MIME:
            raise ValueError(f"figure {self.name}: expected PNG or WebP")
        return _MIME[self.data[:4]]


Block = Heading | Paragraph | Code | Table | Figure

_STYLE = """
:root { color-scheme: light; }
body { font: 16px/1.5 system-ui, sans-serif; margin: 0; color: #1b1f24; background: #fff; }
main { max-width: 76rem; margin: 0 auto; padding: 1.5rem 1rem 4rem; }
h1 { font-size: 1.7rem; } h2 { font-size: 1.3rem; margin-top: 2.5rem; }
h1, h2, h3 { line-height: 1.25; }
p { max-width: 48rem; }
.wide { overflow-x: auto; }
table { border-collapse: collapse; font-size: .875rem; }
th, td { padding: .3rem .6rem; border-bottom: 1px solid #d0d7de; text-align: right;
  white-space: nowrap; font-variant-numeric: tabular-nums; }
th:first-child, td:first-child { text-align: left; }
thead th { border-bottom: 2px solid #57606a; vertical-align: bottom; white-space: normal; }
tbody th { font-weight: 400; } tr.strong > * { font-weight: 700; }
figure { margin: 1.25rem 0; } figure img { max-width: 100%; height: auto; }
figcaption { color: #424a53; font-size: .9rem; max-width: 48rem; }
pre { background: #f6f8fa; padding: .75rem; overflow-x: auto; font-size: .85rem; }
"""
# Nothing is fetched and nothing runs, whatever the blocks hold.
_POLICY = "default-src 'none'; img-src data:; style-src 'unsafe-inline'"


def to_html(title: str, blocks: Sequence[Block]) -> str:
    """The page as one file: pictures are data URIs, nothing is fetched, there are no scripts."""
    body = "\n".join(_html(block) for block in blocks)
    return (
        f'<!doctype html>\n<html lang="en">\n<head>\n<meta charset="utf-8">\n'
        f'<meta http-equiv="Content-Security-Policy" content="{_POLICY}">\n'
        f'<meta name="viewport" content="width=device-width, initial-scale=1">\n'
        f'<link rel="icon" href="data:,">\n'
        f"<title>{html.escape(title)}</title>\n<style>{_STYLE}</style>\n</head>\n<body>\n<main>\n"
        f"<h1>{html.escape(title)}</h1>\n{body}\n</main>\n</body>\n</html>\n"
    )


def _html(block: Block) -> str:
    e = html.escape
    match block:
        case Heading(text, level):
            return f"<h{level}>{e(text)}</h{level}>"
        case Paragraph(text):
            return f"<p>{e(text)}</p>"
        case Code(text):
            return f'<pre tabindex="0"><code>{e(text)}</code></pre>'
        case Table():
            return _html_table(block)
        case Figure():
            data = base64.b64encode(block.data).decode()
            return (
                f'<figure><img src="data:{block.mime};base64,{data}" '
                f'alt="{e(block.alt)}"><figcaption>{e(block.caption)}</figcaption></figure>'
            )


def _html_table(table: Table) -> str:
    e = html.escape
    head = "".join(f'<th scope="col">{e(cell)}</th>' for cell in table.head)
    lines = []
    for first, *rest in table.rows:
        kind = ' class="strong"' if first == table.strong else ""
        cells = "".join(f"<td>{e(cell)}</td>" for cell in rest)
        lines.append(f'<tr{kind}><th scope="row">{e(first)}</th>{cells}</tr>')
    caption = f"<figcaption>{e(table.caption)}</figcaption>" if table.caption else ""
    return (
        f'<figure>{caption}<div class="wide" tabindex="0"><table><thead><tr>{head}</tr></thead>\n'
        f"<tbody>" + "\n".join(lines) + "</tbody></table></div></figure>"
    )


def to_markdown(title: str, blocks: Sequence[Block], pictures: str) -> str:
    """The page as Markdown; its figures are files in the folder `pictures` beside it."""
    return "\n\n".join([f"# {plain(title)}", *(_markdown(b, pictures) for b in blocks)]) + "\n"


def _markdown(block: Block, pictures: str) -> str:
    match block:
        case Heading(text, level):
            return f"{'#' * level} {plain(text)}"
        case Paragraph(text):
            return plain(text)
        case Code(text):
            return "\n".join(f"    {line}" for line in text.splitlines())
        case Table():
            return _markdown_table(block)
        case Figure():
            picture = f"![{plain(block.alt)}]({pictures}/{block.file})"
            return f"{picture}\n\n{plain(block.caption)}" if block.caption else picture


def _markdown_table(table: Table) -> str:
    lines = [_row(table.head), "|" + "|".join(["---", *["---:"] * (len(table.head) - 1)]) + "|"]
    for row in table.rows:
        bold = row[0] == table.strong
        lines.append(
            _row([f"**{plain(c)}**" if c else "" for c in row] if bold else row, done=bold)
        )
    return "\n".join([*([plain(table.caption), ""] if table.caption else []), *lines])


def _row(cells: Sequence[str], done: bool = False) -> str:
    return f"| {' | '.join(cells if done else [plain(cell) for cell in cells])} |"


def plain(text: str) -> str:
    """Text that Markdown shows as it is: one line, with everything that means something escaped."""
    escaped = re.sub(r"([\\`*_\[\]<>|#~$&])", r"\\\1", " ".join(text.split()))
    return escaped.replace("\\<", "&lt;").replace("\\>", "&gt;").replace("\\&", "&amp;")


def write(title: str, blocks: Sequence[Block], output: Path, name: str = "index") -> list[Path]:
    """Write `name.html`, `name.md` and the Markdown page's pictures into a folder."""
    pictures = f"{name}_pictures"
    page, text = output / f"{name}.html", output / f"{name}.md"
    write_text(page, to_html(title, blocks))
    write_text(text, to_markdown(title, blocks, pictures))
    for block in blocks:
        if isinstance(block, Figure):
            data = block.data
            write_with(
                output / pictures / block.file, lambda file, data=data: file.write_bytes(data)
            )
    return [page, text]
