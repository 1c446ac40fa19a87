"""The settings of the command line as plain descriptions of form fields.

Every field of the config classes is either described here or excluded by a rule with a reason, so a
setting that is added there appears in the form by itself.
"""

import dataclasses
import math
import types
from collections.abc import Mapping, Sequence
from typing import Annotated, Any, Literal, Union, get_args, get_origin

from pydantic.fields import FieldInfo

from snell_diffusion.diffusion.config_groups import GROUPS
from snell_diffusion.errors import SnellaValueError, quoted, shown

MAX_WHOLE = 10_000  # of whole numbers that the command line does not bound
MAX_TEXT = 300  # characters
MAX_ITEMS = 24  # entries of a list
# What a visitor's page asks for must not fill the memory or the disk: tighter than the config.
CAPS = {
    "rank": 256,
    "text_encoder_rank": 256,
    "resolution": 2048,
    "bucket_step": 256,
    "train_batch_size": 16,
    "gradient_accumulation_steps": 64,
    "class_batch_size": 16,
    "num_class_images": 300,
    "sample_batch_size": 16,
    "num_validation_photos": 8,
    "validation_timesteps": 64,
    "num_validation_images": 4,
    "num_inference_steps": 100,
}
_PAGE = "asked for elsewhere on the page"
_RUN = "the run list starts, continues and keeps runs"
_BASE = "the base is chosen from the list of bases"
_UPLOAD = "photos come from the upload"
_CODE = "names code to import"
EXCLUDED = {
    "pretrained_model_name_or_path": _BASE,
    "revision": _BASE,
    "variant": _BASE,
    "base_quantization": "needs packages that may be missing here",
    "torch_compile": "needs a compiler, and minutes before the first step",
    "torch_compile_backend": _CODE,
    "offload_encoders": "chosen by the device",
    "optimizer": _CODE,
    "optimizer_args": _CODE,
    "method_args": "settings of methods that this page does not offer",
    "instance_prompt": _PAGE,
    "class_prompt": _PAGE,
    "new_tokens": _PAGE,
    "concepts": "one subject per run",
    "recursive": _UPLOAD,
    "use_captions": _UPLOAD,
    "caption_column": _UPLOAD,
    "masked_loss": "masks are not uploaded",
    "unmasked_weight": "masks are not uploaded",
    "dataloader_num_workers": "processes belong to the machine",
    "max_train_steps": _PAGE,
    "seed": _PAGE,
    "validation_prompt": "sample_prompts holds all of them",
    "report_to": "needs an account elsewhere",
    "checkpointing_steps": _RUN,
    "checkpoints_total_limit": _RUN,
    "resume_from_checkpoint": _RUN,
    "overwrite": _RUN,
    "dry_run": _RUN,
}
# Of a setting with more choices than the page can work with.
CHOICES = {"method": ("snella", "snell", "klora", "mixk", "lora")}
_NAME_RULES = (
    (("_dir", "_path", "_file"), "names a path"),
    (("_hub", "hub_model_id", "hub_private_repo"), "uploads to a hub"),
)


@dataclasses.dataclass(frozen=True)
class Field:
    """One field of the form.

    Attributes:
        name: Of the setting.
        group: Sentence of its config class.
        kind: flag, choice, whole, number, text or list (of texts).
        default: Without the form.
        optional: May be left open.
        low, high: Range of numbers, ends included unless they are `open`.
        open: Which ends do not belong to the range.
        choices: Of a choice.
        help: What it is, with unit and range.
    """

    name: str
    group: str
    kind: Literal["flag", "choice", "whole", "number", "text", "list"]
    default: Any
    optional: bool
    help: str
    low: float = -math.inf
    high: float = math.inf
    open: tuple[str, ...] = ()
    choices: tuple[str, ...] = ()

    @property
    def label(self) -> str:
        """The name as words."""
        return self.name.replace("_", " ").capitalize()

    def check(self, value: Any) -> Any:
        """A value that came from a browser, in the type of the setting.

        Raises:
            SnellaValueError: Wrong type, or out of range.
        """
        if value is None and self.optional:
            return None
        return _CHECKS[self.kind](self, value)


def excluded(name: str) -> str | None:
    """Why a setting is not in the form; None if it is."""
    for endings, reason in _NAME_RULES:
        if name.endswith(endings):
            return reason
    return EXCLUDED.get(name)


def describe(groups: Sequence[type]) -> dict[str, Field]:
    """The fields of config classes by name, in their order, without the excluded ones.

    Raises:
        TypeError: A setting of a type that no form field fits: exclude it, with a reason.
    """
    found = {}
    for group in groups:
        title = (group.__doc__ or group.__name__).split("\n")[0].split(". ")[0].rstrip(".")
        for item in dataclasses.fields(group):
            if excluded(item.name) is None:
                found[item.name] = _field(item, title)
    return found


def _field(item: dataclasses.Field[Any], group: str) -> Field:
    inner, optional = _without_none(item.type)
    inner, limits = _without_limits(inner)
    default = item.default_factory() if callable(item.default_factory) else item.default
    kind, choices = _kind(item.name, inner)
    if kind == "whole":
        limits["high"] = min(limits.get("high", MAX_WHOLE), CAPS.get(item.name, MAX_WHOLE))
    return Field(
        name=item.name,
        group=group,
        kind=kind,  # type: ignore[arg-type]
        default=default,
        optional=optional,
        help=item.metadata["help"],
        choices=choices,
        **limits,
    )


def _without_none(kind: Any) -> tuple[Any, bool]:
    if get_origin(kind) in (Union, types.UnionType):
        parts = [part for part in get_args(kind) if part is not type(None)]
        if len(parts) == 1 and len(get_args(kind)) == 2:
            return parts[0], True
    return kind, False


def _without_limits(kind: Any) -> tuple[Any, dict[str, Any]]:
    """The bare type and the range of Annotated[int, Field(ge=1)]."""
    if get_origin(kind) is not Annotated:
        return kind, {}
    bare, *notes = get_args(kind)
    limits: dict[str, Any] = {"open": ()}
    for note in (m for info in notes if isinstance(info, FieldInfo) for m in info.metadata):
        for key, end, is_open in _BOUNDS:
            if (bound := getattr(note, key, None)) is not None:
                limits[end] = bound
                limits["open"] += (end,) if is_open else ()
    return bare, limits


_BOUNDS = (("ge", "low", False), ("gt", "low", True), ("le", "high", False), ("lt", "high", True))
_KINDS = {bool: "flag", int: "whole", float: "number", str: "text"}


def _kind(name: str, kind: Any) -> tuple[str, tuple[str, ...]]:
    if get_origin(kind) is Literal:
        return "choice", CHOICES.get(name, get_args(kind))
    if get_origin(kind) is list and _without_limits(get_args(kind)[0])[0] is str:
        return "list", ()
    if kind not in _KINDS:
        raise TypeError(f"setting {name} has type {kind}, which no form field fits: exclude it")
    return _KINDS[kind], ()


def _flag(field: Field, value: Any) -> bool:
    if not isinstance(value, bool):
        raise _wrong(field, "on or off", value)
    return value


def _choice(field: Field, value: Any) -> str:
    if value not in field.choices:
        raise _wrong(field, f"one of {', '.join(field.choices)}", value)
    return str(value)


def _number(field: Field, value: Any) -> float:
    if isinstance(value, bool) or not isinstance(value, (int, float)) or not math.isfinite(value):
        raise _wrong(field, "a number", value)
    low = field.low < value or (value == field.low and "low" not in field.open)
    high = value < field.high or (value == field.high and "high" not in field.open)
    if not (low and high):
        raise _wrong(field, _range(field), value)
    return value


def _whole(field: Field, value: Any) -> int:
    number = _number(field, value)
    if number != int(number):
        raise _wrong(field, "a whole number", value)
    return int(number)


def _text(field: Field, value: Any) -> str:
    if not isinstance(value, str) or not value.isprintable() or len(value) > MAX_TEXT:
        raise _wrong(field, f"one line of at most {MAX_TEXT} characters", value)
    return value


def _list(field: Field, value: Any) -> list[str]:
    if not isinstance(value, list) or len(value) > MAX_ITEMS:
        raise _wrong(field, f"a list of at most {MAX_ITEMS} lines", value)
    return [_text(field, entry) for entry in value]


_CHECKS = {
    "flag": _flag,
    "choice": _choice,
    "whole": _whole,
    "number": _number,
    "text": _text,
    "list": _list,
}


def _range(field: Field) -> str:
    low = "above " if "low" in field.open else "at least "
    high = "below " if "high" in field.open else "at most "
    ends = [f"{low}{field.low:g}"] if field.low > -math.inf else []
    return " and ".join(ends + ([f"{high}{field.high:g}"] if field.high < math.inf else []))


def _wrong(field: Field, wanted: str, value: Any) -> SnellaValueError:
    return SnellaValueError(f"{field.name} must be {wanted}, got {quoted(value)}")


FIELDS = describe(GROUPS)


def check_overrides(values: Mapping[str, Any]) -> dict[str, Any]:
    """Settings that a visitor changed, checked one by one.

    Raises:
        SnellaValueError: A name that is not in the form, or a bad value.
    """
    unknown = [name for name in values if name not in FIELDS]
    if unknown:
        raise SnellaValueError(
            f"these settings cannot be changed here: {shown(quoted(name) for name in unknown)}"
        )
    return {name: FIELDS[name].check(value) for name, value in values.items()}
