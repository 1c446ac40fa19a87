"""Sentences as a list in the page, with every sign of a file's name shown as itself."""

import html
from collections.abc import Sequence


def listed(title: str, lines: Sequence[str], *, alert: bool = False) -> str:
    """A titled list as HTML; empty without lines.

    Args:
        title: Stands above.
        lines: Plain text.
        alert: A screen reader is to say it at once.
    """
    if not lines:
        return ""
    colour = "var(--color-red-600, #dc2626)" if alert else "var(--color-accent)"
    style = f"border-left:4px solid {colour};padding:0.4em 0.8em;overflow-wrap:anywhere"
    items = "".join(f"<li>{html.escape(line)}</li>" for line in lines)
    role = "alert" if alert else "status"
    return (
        f'<div role="{role}" style="{style}"><strong>{html.escape(title)}</strong>'
        f'<ul style="margin:0.2em 0 0 1.2em;list-style:disc">{items}</ul></div>'
    )
