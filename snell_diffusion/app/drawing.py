"""What may be asked to be drawn, and what comes back while and after it is."""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Annotated, Any, Literal

from PIL import Image
from pydantic import BaseModel, BeforeValidator, ConfigDict, Field, StringConstraints
from pydantic import ValidationError as Fault

from snell_diffusion.app.bases import Base
from snell_diffusion.app.limits import LIMITS, Limits
from snell_diffusion.errors import SnellaValueError, quoted


def _whole(value: Any) -> Any:
    """20.0, as a slider may send it, is 20."""
    return int(value) if isinstance(value, float) and value.is_integer() else value


def _tuples(value: Any) -> Any:
    """Lists, as JSON has them, are taken for tuples."""
    return tuple(map(_tuples, value)) if isinstance(value, (list, tuple)) else value


Whole = Annotated[int, BeforeValidator(_whole)]
Number = Annotated[float, Field(allow_inf_nan=False)]
Worn = Annotated[tuple[tuple[str, Number], ...], BeforeValidator(_tuples)]


class DrawRequest(BaseModel):
    """Pictures to draw; numbers are checked when it is made, the rest when it is drawn.

    Attributes:
        base: Id of the base model.
        prompt: What to draw.
        negative_prompt: What to keep out; may be empty.
        seed: Of the first picture; each further picture has the next one.
        steps: Denoising steps.
        guidance: Classifier-free guidance scale; 1 or less is off.
        width, height: In pixels.
        count: Pictures.
        adapters: (id, strength) of each; strength 1 is as trained, 0 is off.
        sparsity: Share of zeros in every layer's update, 0 to 1; None is as trained.
        compare_with_base: Draw every picture with the base alone too.
    """

    model_config = ConfigDict(strict=True, frozen=True, extra="forbid")

    base: Annotated[str, StringConstraints(max_length=64)]
    prompt: str
    negative_prompt: str = ""
    seed: Whole = 0
    steps: Whole
    guidance: Number
    width: Whole
    height: Whole
    count: Whole = 1
    adapters: Worn = ()
    sparsity: Number | None = None
    compare_with_base: bool = False

    @classmethod
    def of(cls, limits: Limits = LIMITS, **values: Any) -> "DrawRequest":
        """A request from what came out of a form or a call.

        Raises:
            SnellaValueError: The first value that is of a wrong kind or out of its range, with
                what it should be.
        """
        try:
            request = cls.model_validate(values)
        except Fault as fault:
            field = str(fault.errors(include_url=False)[0]["loc"][0])
            raise SnellaValueError(_expected(field, values.get(field), limits)) from None
        request.check(limits)
        return request

    def check(self, limits: Limits = LIMITS) -> None:
        """Refuse what is out of range for any base.

        Raises:
            SnellaValueError: The first value out of its range.
        """
        for field, (_, low, high, _) in _ranges(limits).items():
            value = getattr(self, field)
            if value is not None and not low <= value <= high:
                raise SnellaValueError(_expected(field, value, limits))
        if not self.prompt.strip():
            raise SnellaValueError("the prompt is empty: say what to draw")
        for name, text in (("prompt", self.prompt), ("negative prompt", self.negative_prompt)):
            if len(text) > limits.prompt:
                raise SnellaValueError(
                    f"the {name} has {len(text)} characters; up to {limits.prompt} are taken"
                )
        self._check_adapters(limits)

    def _check_adapters(self, limits: Limits) -> None:
        names = [name for name, _ in self.adapters]
        if len(names) > limits.together:
            raise SnellaValueError(
                f"{len(names)} adapters are chosen; up to {limits.together} work together"
            )
        if len(set(names)) < len(names):
            raise SnellaValueError("an adapter is chosen twice: choose it once, with one strength")
        for _, strength in self.adapters:
            if not 0 <= strength <= limits.strength:
                raise SnellaValueError(
                    f"the strength of an adapter must be 0 to {limits.strength:g}, got "
                    f"{quoted(strength)}"
                )

    def check_base(self, base: Base) -> None:
        """Refuse what this base cannot draw.

        Raises:
            SnellaValueError: A side out of range or no multiple, or a negative prompt it ignores.
        """
        for name, side in (("width", self.width), ("height", self.height)):
            if not base.min_side <= side <= base.max_side or side % base.multiple:
                raise SnellaValueError(
                    f"the {name} must be {base.min_side} to {base.max_side} pixels in steps of "
                    f"{base.multiple} for {base.id}, got {side}"
                )
        if self.negative_prompt.strip() and not base.takes_negative:
            raise SnellaValueError(
                f"{base.id} takes no negative prompt: leave it empty and say in the prompt what "
                "to draw"
            )

    def seeds(self, limits: Limits = LIMITS) -> list[int]:
        """The seed of each picture; after the largest comes 0."""
        return [(self.seed + index) % (limits.seed + 1) for index in range(self.count)]


def _ranges(limits: Limits) -> dict[str, tuple[str, float, float, str]]:
    """Name, least, largest and kind of every number of a request."""
    whole, number = "a whole number", "a number"
    return {
        "seed": ("the seed", 0, limits.seed, whole),
        "steps": ("the number of steps", 1, limits.draw_steps, whole),
        "guidance": ("the guidance", 0, limits.guidance, number),
        "width": ("the width", 8, limits.side, whole),
        "height": ("the height", 8, limits.side, whole),
        "count": ("the number of pictures", 1, limits.pictures, whole),
        "sparsity": ("the sparsity", 0, 1, number),
    }


_KINDS = {
    "base": "the id of one of the base models",
    "prompt": "a text",
    "negative_prompt": "a text",
    "adapters": "a list of pairs of an adapter's id and its strength, a number",
    "compare_with_base": "true or false",
}


def _expected(field: str, value: object, limits: Limits) -> str:
    if field in _ranges(limits):
        name, low, high, kind = _ranges(limits)[field]
        return f"{name} must be {kind} from {low:g} to {high:.10g}, got {_came(value)}"
    if field in _KINDS:
        return f"{field} must be {_KINDS[field]}, got {_came(value)}"
    return f"a request to draw has no field {quoted(field, 40)}"


def _came(value: object) -> str:
    """A value for an error text; Python refuses to print integers of very many digits."""
    if isinstance(value, int) and abs(value) > 10**30:
        return "a number of more than 30 digits"
    return quoted(value, 40)


@dataclass(frozen=True)
class Step:
    """How far a request is.

    Attributes:
        phase: "waiting" for the requests before it, "loading" a model, or "drawing".
        done: Denoising steps done.
        total: Denoising steps in all.
        left_s: Seconds left, None while unknown.
    """

    phase: Literal["waiting", "loading", "drawing"]
    done: int
    total: int
    left_s: float | None = None


@dataclass(frozen=True)
class Result:
    """What a request drew.

    Attributes:
        pictures: RGB, one per seed.
        base_pictures: The base's own at the same seeds; empty if not asked for.
        seeds: Of the pictures.
        kept: Entries of the adapters' updates that survive at this sparsity, over all layers.
        size: Entries of those updates in all; 0 without adapters.
        seconds: From the start of the work on it.
    """

    pictures: tuple[Image.Image, ...]
    base_pictures: tuple[Image.Image, ...]
    seeds: tuple[int, ...]
    kept: int
    size: int
    seconds: float

    @property
    def kept_share(self) -> float | None:
        """Share of the updates' entries that survive; None without adapters."""
        return self.kept / self.size if self.size else None


def values_of(request: DrawRequest, labels: Mapping[str, str]) -> dict[str, Any]:
    """A request as plain values for people: adapters by their labels, nothing that is not asked."""
    values = request.model_dump(exclude={"adapters", "compare_with_base", "count"})
    adapters = [{"name": labels[name], "strength": strength} for name, strength in request.adapters]
    return {**values, "sparsity": request.sparsity, "adapters": adapters}
