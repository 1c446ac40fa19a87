"""docs/families.md says what the tests of this folder show."""

from tests.registry.families import REGISTRY
from tests.registry.table import END, PAGE, START, page, table


def test_the_page_is_what_the_registry_says() -> None:
    text = PAGE.read_text("utf-8")
    assert START in text
    assert END in text
    assert page(text) == text, "run: python -m tests.registry.table"


def test_every_family_has_a_row() -> None:
    rows = table().splitlines()[2:]
    assert [row.split(" | ")[0].removeprefix("| ") for row in rows] == [
        family.title for family in REGISTRY.values()
    ]


def test_a_changed_record_changes_the_page() -> None:
    text = PAGE.read_text("utf-8")
    assert page(text.replace("| one graph |", "| two graphs |")) == text
