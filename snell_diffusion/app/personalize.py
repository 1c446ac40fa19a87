"""From a request to a run: what is asked for, the settings it makes, the command, the start."""

import re
import shlex
import shutil
from collections.abc import Mapping
from pathlib import Path
from typing import Annotated, Any, Literal

import yaml
from pydantic import AfterValidator, BaseModel, ConfigDict, Field, ValidationError

from snell_diffusion.app.bases import Base
from snell_diffusion.app.drafts import Photo
from snell_diffusion.app.estimates import Estimate, estimate
from snell_diffusion.app.fields import check_overrides
from snell_diffusion.app.ids import PATTERN
from snell_diffusion.app.jobs import launch_command
from snell_diffusion.app.limits import LIMITS
from snell_diffusion.app.presets import (
    EFFORTS,
    HELD_OUT_FROM,
    KINDS,
    preset_values,
    recipe_of,
    usual_word,
)
from snell_diffusion.app.workspace import App, Workspace
from snell_diffusion.diffusion.config_files import make_config
from snell_diffusion.errors import SnellaValueError

SETTINGS = "settings.yaml"
SUBJECT = r"^[A-Za-z][A-Za-z -]{0,29}$"
WORD = r"^([a-z][a-z0-9]{1,15}|<[a-z0-9][a-z0-9-]{0,39}>)$"
_SENTENCES = {
    "draft": "add photos first",
    "subject": "say in one or two English words what it is, for example cat or teapot",
    "word": "its name must be a short word of small letters and digits, such as mika, or such a "
    "word in brackets, such as <mika>",
    "preset": f"choose what it is: {', '.join(KINDS)}",
    "effort": "choose how thorough to be: quick, balanced or thorough",
    "base": "choose a base model from the list",
    "steps": f"the steps must be a whole number, 1 to {LIMITS.train_steps}",
    "seed": f"the seed must be a whole number, 0 to {LIMITS.seed}",
    "overrides": "changed settings must be given by name",
}


class TrainRequest(BaseModel):
    """What a visitor asks for; the one place where it is checked.

    Attributes:
        draft: Id of the photos.
        subject: Class word: what the base would call the subject, 1 to 30 letters.
        word: What comes to mean it: <mika> is a new word, sks a rare one; None: as fits the base.
        preset: Kind of subject.
        effort: How long.
        base: Id of the base model.
        steps: Optimizer steps in place of the effort's.
        seed: Of everything random.
        overrides: Other settings by name, see fields.FIELDS.
    """

    model_config = ConfigDict(strict=True, extra="forbid", frozen=True)

    draft: Annotated[str, Field(pattern=f"^{PATTERN}$")]
    subject: Annotated[str, Field(pattern=SUBJECT), AfterValidator(str.lower)]
    word: Annotated[str, Field(pattern=WORD)] | None = None
    preset: Literal["pet", "object", "style"] = "object"
    effort: Literal["quick", "balanced", "thorough"] = "balanced"
    base: Annotated[str, Field(max_length=80)] = "embedded"
    steps: Annotated[int, Field(ge=1, le=LIMITS.train_steps)] | None = None
    seed: Annotated[int, Field(ge=0, le=LIMITS.seed)] = 0
    overrides: dict[str, Any] = Field(default_factory=dict)


def make_request(**values: Any) -> TrainRequest:
    """A checked request.

    Raises:
        SnellaValueError: What to say instead, of everything that is wrong.
    """
    for name in ("subject", "word"):
        if isinstance(values.get(name), str):
            values[name] = values[name].strip()
    values["word"] = values.get("word") or None
    try:
        request = TrainRequest(**values)
    except ValidationError as error:
        names = dict.fromkeys(str(issue["loc"][0]) for issue in error.errors())
        lines = [_SENTENCES.get(name, f"{name[:40]} is not asked for") for name in names]
        raise SnellaValueError("; ".join(lines)) from error
    return request.model_copy(update={"overrides": check_overrides(request.overrides)})


def word_of(request: TrainRequest, base: Base) -> str:
    """The word that will mean the subject in prompts."""
    return request.word or usual_word(base, request.subject)


def prompt_of(request: TrainRequest, base: Base) -> str:
    """The sentence that asks for the subject as it is in the photos."""
    names = {"word": word_of(request, base), "subject": request.subject}
    return KINDS[request.preset].prompt.format(**names)


def settings_of(workspace: Workspace, request: TrainRequest, base: Base) -> dict[str, Any]:
    """The training settings, with `photos` and `output` as places.

    Raises:
        SnellaError: No such photos, or the settings do not go together.
    """
    photos = workspace.drafts.photos(request.draft)
    values = _values(request, base, photos)
    config = make_config(values, where="these settings")
    _require_sides(config.resolution, config.aspect_ratio_buckets, base)
    if config.num_validation_photos >= len(photos):
        raise SnellaValueError(
            f"{config.num_validation_photos} of {len(photos)} photos would be held out, so none "
            "would be left to learn from: add photos, or hold out fewer"
        )
    return values


def _values(request: TrainRequest, base: Base, photos: list[Photo]) -> dict[str, Any]:
    kind, word = KINDS[request.preset], word_of(request, base)
    names = {"word": word, "subject": request.subject}
    values: dict[str, Any] = {
        "pretrained_model_name_or_path": base.source,
        "instance_data_dir": "photos",
        "instance_prompt": prompt_of(request, base),
        "class_prompt": _class_prompt(request, photos),
        **_new_word(request, word, base),
        **preset_values(base, request.preset, request.effort, len(photos), request.steps),
        "sample_prompts": [text.format(**names) for text in kind.samples],
    }
    return {**values, **request.overrides, "seed": request.seed, "output_dir": "output"}


def _new_word(request: TrainRequest, word: str, base: Base) -> dict[str, Any]:
    if not word.startswith("<"):
        return {}
    start_as = recipe_of(base).from_class and request.preset != "style"
    return {"new_tokens": [word], **({"initializer_token": request.subject} if start_as else {})}


def _class_prompt(request: TrainRequest, photos: list[Photo]) -> str:
    """The prompt of the class: it must differ from those of the photos by the word alone.

    Otherwise the model tells class and subject apart by the place (docs/cookbook.md, prior).
    """
    kind = KINDS[request.preset]
    places = {photo.caption for photo in photos}
    prompt = kind.class_prompt.format(subject=request.subject)
    if kind.prior_loss_weight and len(places) == 1 and (place := places.pop()):
        return f"{prompt} {place}"
    return prompt


def _require_sides(resolution: int, shapes: str | None, base: Base) -> None:
    sides = [resolution, *(int(side) for side in re.findall(r"\d+", shapes or ""))]
    if max(sides) > base.max_side or resolution % base.multiple:
        raise SnellaValueError(
            f"this base model takes sides of at most {base.max_side} pixels, in multiples of "
            f"{base.multiple}; resolution and shapes ask for {max(sides)}"
        )


def captions_of(workspace: Workspace, request: TrainRequest, base: Base) -> list[str | None]:
    """The whole caption of every photo; None where nothing was said beside the subject.

    A caption that has the word in it already is left as it was written.
    """
    word = word_of(request, base)
    captions: list[str | None] = []
    for photo in workspace.drafts.photos(request.draft):
        text: str | None = photo.caption or None
        if text and word not in text.split():
            text = KINDS[request.preset].captioned.format(
                word=word, subject=request.subject, caption=text
            )
        captions.append(text)
    return captions


def yaml_of(
    workspace: Workspace, request: TrainRequest, base: Base, *, exposed: bool = False
) -> str:
    """The settings as the file that the command line reads.

    Args:
        workspace: Whose photos.
        request: What is asked for.
        base: Of the request.
        exposed: Name a base by its id rather than by its folder on this machine.

    Raises:
        SnellaError: See settings_of.
    """
    values = settings_of(workspace, request, base)
    if exposed and Path(base.source).is_absolute():
        values["pretrained_model_name_or_path"] = base.id
    lines = [command_of(), "The photos are in the folder photos, beside this file."]
    captions = captions_of(workspace, request, base)
    lines += [
        f"photo-{index:02d}.txt beside photo-{index:02d}.png: {caption}"
        for index, caption in enumerate(captions)
        if caption is not None
    ]
    head = "".join(f"# {line}\n" for line in lines)
    return head + yaml.safe_dump(values, sort_keys=False, allow_unicode=True)


def estimates_of(
    app: App, workspace: Workspace, base: Base, kind: str, overrides: Mapping[str, Any]
) -> dict[str, Estimate]:
    """Time and memory of every effort on this machine.

    Args:
        app: Whose machine.
        workspace: Whose earlier runs tell.
        base: What is trained.
        kind: Of KINDS.
        overrides: Settings that differ from the preset's.
    """
    machine = app.workspaces.root / "machine.json"
    found = {}
    for effort in EFFORTS:
        values = {"pretrained_model_name_or_path": base.source, **overrides}
        values = {**preset_values(base, kind, effort, HELD_OUT_FROM), **values}
        found[effort] = estimate(workspace.jobs, base, values, machine)
    return found


def command_of() -> str:
    """The command that a run is, with its files by name."""
    words = launch_command(Path("train_dreambooth_snella.py"), Path(SETTINGS))
    module = words.index("accelerate.commands.launch")
    return shlex.join(["accelerate", "launch", *words[module + 1 :]])


def start(app: App, workspace: Workspace, request: TrainRequest) -> str:
    """Check everything, copy the photos and start a run; an error leaves nothing behind.

    Returns:
        Id of the run.

    Raises:
        SnellaError: A bad setting, no photos, no room, or a run is going.
    """
    base = app.bases.get(request.base)
    settings = settings_of(workspace, request, base)
    captions = captions_of(workspace, request, base)
    photos = workspace.drafts.photos(request.draft)
    workspace.quota.require_run()
    if app.workspaces.training() is not None:  # before the photos are copied; start looks again
        raise SnellaValueError("a run is going already: wait for it or stop it first")
    job = workspace.jobs.new()
    folder = workspace.jobs.folder(job)
    try:
        _copy(photos, captions, folder / "photos")
        settings["instance_data_dir"] = str(folder / "photos")
        label = f"{request.subject}, {len(photos)} photos, {settings['max_train_steps']} steps"
        workspace.jobs.start(job, settings, label, facts_of(request, base, len(photos)))
    except BaseException:  # also a full disk, or an interruption
        shutil.rmtree(folder, ignore_errors=True)
        raise
    return job


def facts_of(request: TrainRequest, base: Base, photos: int) -> dict[str, Any]:
    """What the list of runs tells of a run."""
    return {
        "subject": request.subject,
        "word": word_of(request, base),
        "prompt": prompt_of(request, base),
        "preset": request.preset,
        "effort": request.effort,
        "base": base.id,
        "photos": photos,
    }


def _copy(photos: list[Photo], captions: list[str | None], folder: Path) -> None:
    folder.mkdir()
    for index, (photo, caption) in enumerate(zip(photos, captions, strict=True)):
        assert photo.file is not None  # stored ones have one
        target = folder / f"photo-{index:02d}.png"
        shutil.copyfile(photo.file, target)
        if caption is not None:
            target.with_suffix(".txt").write_text(caption, "utf-8")
