"""The prompts of the protocol: our own list, the public file's, and files that are wrong."""

from pathlib import Path

import pytest

from snell_diffusion.errors import SnellaConfigError
from snell_diffusion.evaluation.prompts import PROMPTS, filled, read_prompts

OFFICIAL = Path(__file__).resolve().parents[3] / "shared" / "dreambooth" / "prompts_and_classes.txt"
LINE = "'a {0} {1} in the snow'.format(unique_token, class_token),"
TEXT = f"""Classes

subject_name,class
cat,cat
bear_plushie,stuffed animal

Object Prompts
prompt_list = [
{LINE}
]
Live Subject Prompts
prompt_list = [
{LINE}
'a red {{0}} {{1}}'.format(unique_token, class_token)
]
"""


def test_there_are_25_prompts_of_each_kind_all_different() -> None:
    for templates in (PROMPTS.objects, PROMPTS.live):
        assert len(set(templates)) == 25
        assert all(template.count("{0} {1}") == 1 for template in templates)
    assert len(set(PROMPTS.objects) & set(PROMPTS.live)) == 15


@pytest.mark.skipif(
    not OFFICIAL.is_file(), reason="no ../shared/dreambooth/prompts_and_classes.txt beside this"
)
def test_our_list_is_that_of_the_public_file() -> None:
    found = read_prompts(OFFICIAL)
    assert found.objects == PROMPTS.objects
    assert found.live == PROMPTS.live
    assert len(found.classes) == 30
    assert found.classes["duck_toy"] == "toy"
    assert found.classes["wolf_plushie"] == "stuffed animal"


def test_a_file_is_read_and_never_run(tmp_path: Path) -> None:
    (tmp_path / "prompts.txt").write_text(TEXT)
    found = read_prompts(tmp_path / "prompts.txt")
    assert found.objects == ("a {0} {1} in the snow",)
    assert found.live == ("a {0} {1} in the snow", "a red {0} {1}")
    assert found.classes == {"cat": "cat", "bear_plushie": "stuffed animal"}


@pytest.mark.parametrize(
    ("text", "message"),
    [
        (TEXT.replace("Object Prompts", "Things"), "has no object prompts"),
        ("", "has no object and no live prompts"),
        (TEXT.replace("a red {0} {1}", "a red {0}"), r"expected \{0\} and \{1\}.*'a red \{0\}'"),
        (TEXT.replace("a red {0}", "a red {0.__class__} {0}"), r"got 'a red \{0.__class__\}"),
        (TEXT.replace("a red {0}", "a red } {0}"), "got 'a red } "),
    ],
)
def test_a_wrong_file_is_refused(text: str, message: str, tmp_path: Path) -> None:
    (tmp_path / "prompts.txt").write_text(text)
    with pytest.raises(SnellaConfigError, match=message):
        read_prompts(tmp_path / "prompts.txt")


def test_a_missing_file_is_named(tmp_path: Path) -> None:
    with pytest.raises(SnellaConfigError, match=r"gone.txt cannot be read"):
        read_prompts(tmp_path / "gone.txt")


def test_fewer_prompts_are_spread_over_the_list() -> None:
    assert PROMPTS.of(live=False, count=25) == list(PROMPTS.objects)
    assert PROMPTS.of(live=True, count=99) == list(PROMPTS.live)
    five = PROMPTS.of(live=True, count=5)
    assert five == [PROMPTS.live[i] for i in (0, 5, 10, 15, 20)]


def test_an_empty_token_leaves_no_gap() -> None:
    assert filled("a red {0} {1}", "sks", "dog") == "a red sks dog"
    assert filled("a red {0} {1}", "", "dog") == "a red dog"
