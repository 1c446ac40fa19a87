"""The form is generated: every setting of the command line is in it, or left out by a rule."""

import dataclasses
from dataclasses import field
from typing import Annotated, Literal

import pytest
from pydantic import Field as Limits

from snell_diffusion.app.fields import CAPS, EXCLUDED, FIELDS, check_overrides, describe, excluded
from snell_diffusion.diffusion.config import TrainConfig
from snell_diffusion.errors import SnellaValueError
from snell_diffusion.training.config_types import Decay


@dataclasses.dataclass
class NewGroup:
    """Settings of tomorrow. And more about them."""

    brightness: Annotated[float, Limits(ge=0, lt=2)] = field(default=1.0, metadata={"help": "B."})
    tiles: Annotated[int, Limits(ge=1)] | None = field(default=None, metadata={"help": "Tiles."})
    shape: Literal["round", "square"] = field(default="round", metadata={"help": "Shape."})
    words: list[str] = field(default_factory=list, metadata={"help": "Words."})
    glow: bool | None = field(default=None, metadata={"help": "Glow."})
    note: str | None = field(default=None, metadata={"help": "Note."})
    share: Decay = field(default=0.5, metadata={"help": "Share."})
    extra_dir: str | None = field(default=None, metadata={"help": "Folder."})
    push_to_hub: bool = field(default=False, metadata={"help": "Upload."})


def test_every_setting_is_in_the_form_or_left_out_by_a_rule():
    names = {item.name for item in dataclasses.fields(TrainConfig)}
    assert names == FIELDS.keys() | {name for name in names if excluded(name)}
    assert not FIELDS.keys() & EXCLUDED.keys()
    assert EXCLUDED.keys() | CAPS.keys() <= names  # no rule for a setting that is gone


def test_a_new_setting_appears_by_itself_with_its_limits():
    fields = describe([NewGroup])
    shown = {
        name: (f.kind, f.low, f.high, f.open, f.choices, f.optional) for name, f in fields.items()
    }
    inf = float("inf")
    assert shown == {
        "brightness": ("number", 0, 2, ("high",), (), False),
        "tiles": ("whole", 1, 10_000, (), (), True),
        "shape": ("choice", -inf, inf, (), ("round", "square"), False),
        "words": ("list", -inf, inf, (), (), False),
        "glow": ("flag", -inf, inf, (), (), True),
        "note": ("text", -inf, inf, (), (), True),
        "share": ("number", 0, 1, ("high",), (), False),
    }
    assert fields["tiles"].group == "Settings of tomorrow"
    assert fields["tiles"].help == "Tiles."
    assert fields["words"].default == []


def test_a_setting_of_another_type_must_be_left_out_by_name():
    @dataclasses.dataclass
    class Odd:
        """Odd."""

        table: dict[str, int] = field(default=None, metadata={"help": "A table."})

    with pytest.raises(TypeError, match=r"setting table has type .*: exclude it"):
        describe([Odd])


@pytest.mark.parametrize(
    "name",
    ["instance_data_dir", "cache_dir", "output_dir", "class_data_dir", "validation_data_dir"],
)
def test_no_path_can_be_given(name):
    assert excluded(name) == "names a path"
    with pytest.raises(SnellaValueError, match=f"cannot be changed here: '{name}'"):
        check_overrides({name: "/etc"})


@pytest.mark.parametrize(
    "name",
    [
        *("push_to_hub", "hub_model_id", "hub_private_repo", "optimizer", "optimizer_args"),
        *("pretrained_model_name_or_path", "base", "concepts", "seed", "max_train_steps"),
        *("report_to", "resume_from_checkpoint", "overwrite", "dry_run", "dataloader_num_workers"),
        *("no_such", "../x"),
    ],
)
def test_nothing_that_belongs_to_the_server_can_be_given(name):
    with pytest.raises(SnellaValueError, match="cannot be changed here"):
        check_overrides({name: 1})


@pytest.mark.parametrize(
    "name, value, message",
    [
        ("rank", 0, "rank must be at least 1 and at most 256, got 0"),
        ("rank", 10**9, "at most 256"),
        ("rank", 2.5, "a whole number"),
        ("rank", "8", "a number"),
        ("rank", True, "a number"),
        ("learning_rate", 0.0, "above 0"),
        ("learning_rate", float("nan"), "a number"),
        ("learning_rate", None, "a number"),
        ("target_sparsity", 1.0, "below 1"),
        ("train_batch_size", 17, "at most 16"),
        ("lr_scheduler", "sudden", "one of linear"),
        ("lr_scheduler", ["linear"], "one of linear"),
        ("random_flip", "yes", "on or off"),
        ("sample_prompts", "a cat", "a list"),
        ("sample_prompts", ["a cat\nseed: 3"], "one line"),
        ("sample_prompts", ["x"] * 25, "at most 24"),
        ("initializer_token", "x" * 301, "at most 300 characters"),
    ],
)
def test_a_bad_value_is_refused_with_a_sentence(name, value, message):
    with pytest.raises(SnellaValueError, match=message):
        check_overrides({name: value})


def test_good_values_pass():
    values = {"rank": 8, "learning_rate": 1e-3, "target_sparsity": None, "sample_prompts": ["a"]}
    assert check_overrides(values) == values
    assert check_overrides({"rank": 8.0}) == {"rank": 8}
