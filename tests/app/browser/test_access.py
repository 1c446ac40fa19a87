"""The page for everybody: keyboard, labels, contrast, a narrow screen, one machine."""

import pytest
from axe_playwright_python.sync_playwright import Axe
from playwright.sync_api import expect

from tests.app.browser.conftest import PHONE, WIDE

TABS = ("Personalize", "Generate", "Compare", "Inspect", "Runs")


# In gradio's own elements, which we cannot change: a description of an empty picture that has no
# role, a search box that has a title in place of a label, a table that scrolls by its cells only.
OF_GRADIO = {
    ("aria-prohibited-attr", ".empty"),
    ("label-title-only", ".search-input"),
    ("scrollable-region-focusable", ".virtual-table-viewport"),
}


def violations(visitor) -> list[str]:
    """What breaks a rule of WCAG on the page as it is, gradio's own elements left out."""
    return [
        f"{issue['id']} ({issue['impact']}): {place}"
        for issue in Axe().run(visitor.page).response["violations"]
        for node in issue["nodes"]
        for place in node["target"]
        if not any(issue["id"] == rule and of in place for rule, of in OF_GRADIO)
    ]


def tab_to(visitor, target, most: int = 80) -> None:
    """Press Tab until an element has the focus."""
    for _ in range(most):
        visitor.page.keyboard.press("Tab")
        if target.evaluate("element => element.contains(document.activeElement)"):
            return
    pytest.fail(f"{target} cannot be reached by Tab")


@pytest.mark.parametrize("size", [WIDE, PHONE], ids=["wide", "phone"])
def test_every_tab_fits_the_screen_and_passes_the_accessibility_rules(visit, size):
    visitor = visit(size)
    found = []
    for name in TABS:
        visitor.tab(name)
        width = visitor.page.evaluate("document.documentElement.scrollWidth")
        assert width <= size[0], f"{name} is {width} pixels wide on a screen of {size[0]}"
        visitor.snap(f"{name.lower()}-{size[0]}")
        found += [f"{name}: {issue}" for issue in violations(visitor)]
    assert not found, "\n".join(found)


def test_a_picture_is_drawn_with_the_keyboard_alone(visit):
    visitor = visit()
    tab_to(visitor, visitor.page.get_by_role("tab", name="Generate"))
    visitor.page.keyboard.press("Enter")
    draw = visitor.at("generate-draw")
    expect(draw).to_be_visible()
    tab_to(visitor, draw)
    visitor.page.keyboard.press("Enter")
    expect(visitor.at("generate-progress")).to_contain_text("Done")
    visitor.snap("keyboard")
