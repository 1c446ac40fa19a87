"""Every method behind one interface: ours, PEFT's as they are, and training the whole model.

    recipe("hta").config({"rank": 8, "bottleneck": 2}, targets, seed=0)   # a PEFT config

Settings are those every method shares (`rank`, `update_scale`, `dropout`) and the fields of the
method's own config.
"""

import dataclasses
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import Any

import torch
from peft import AdaLoraConfig, HRAConfig, LoraConfig, OFTConfig, PeftConfig, ShiraConfig

from snell_diffusion.errors import SnellaConfigError, shown
from snell_diffusion.tuners.registry import METHODS
from snell_diffusion.tuners.roles import endings, in_words, role_of

__all__ = ["RECIPES", "Recipe", "list_methods", "quiet_sparse", "recipe"]

SHARED = {"rank": "r", "update_scale": "scale", "dropout": "dropout"}
"""Settings of every method by the field of our configs they set."""
_LORA_RANK = 16
# What PEFT's base class has for its own bookkeeping, and what a run sets otherwise.
_NOT_SETTINGS = {field.name for field in dataclasses.fields(PeftConfig)} | {
    *("target_modules", "exclude_modules", "modules_to_save", "seed"),
}


@dataclass(frozen=True)
class Recipe:
    """A method as a trainer asks for it.

    Attributes:
        name: In lower case, as in `--method`.
        summary: One line.
        ours: Whether adapter files of this package hold it.
        kind: Its PEFT config class; None trains the whole model.
        shared: Settings that every method shares, by the field they set; those it has.
        own: Further fields of its config that may be set.
        make: Field values, targets, seed, steps and domain to a config.
        maps: Whether it adapts a Linear that takes maps [B, H, W, C] as they are.
    """

    name: str
    summary: str
    ours: bool
    kind: type[PeftConfig] | None
    shared: Mapping[str, str]
    own: tuple[str, ...]
    make: Callable[[dict[str, Any], list[str], int, int | None, str], PeftConfig | None]
    maps: bool = True

    @property
    def trains_base(self) -> bool:
        """Whether the base's own weights are trained, all of them."""
        return self.kind is None

    @property
    def settings(self) -> list[str]:
        """What `config` takes: shared settings, then fields of the method's own config."""
        return [*self.shared, *self.own]

    def config(
        self,
        settings: Mapping[str, Any],
        targets: Sequence[str],
        seed: int,
        domain: str = "diffusion",
        *,
        chosen: bool = False,
        steps: int | None = None,
    ) -> PeftConfig | None:
        """The PEFT config; None for a method that trains the whole model.

        Args:
            settings: See `settings`; None values count as not given.
            targets: Names or name endings of the layers a family adapts.
            seed: Of the fresh adapter.
            domain: "diffusion" or "vision", for methods with a setting of their own for each.
            chosen: Whether the user named the targets, so that they stay as they are; else a method
                that its paper puts in certain layers takes those of them.
            steps: Optimizer steps of the run, for methods with a schedule (AdaLoRA).

        Raises:
            SnellaConfigError: The method has no such setting, or refuses its value.
        """
        given = {name: value for name, value in settings.items() if value is not None}
        unknown = sorted(given.keys() - set(self.settings))
        if unknown:
            raise SnellaConfigError(
                f"method {self.name} has no {', '.join(unknown)}; it takes "
                f"{', '.join(self.settings) or 'no settings'}"
            )
        values = {self.shared.get(name, name): value for name, value in given.items()}
        try:
            return self.make(values, self._places(targets, chosen), seed, steps, domain)
        except (TypeError, ValueError) as error:
            raise SnellaConfigError(f"method {self.name}: {error}") from error

    def lacks(self, paths: Iterable[str]) -> str | None:
        """What this method adapts by default, in words, if a model has none of it; else None.

        Args:
            paths: Of every layer of the model that could be adapted.
        """
        roles = self._roles
        if roles is None or any(role_of(path) in roles for path in paths):
            return None
        return in_words(roles)

    @property
    def _roles(self) -> tuple[str, ...] | None:
        return getattr(self.kind, "default_roles", None)

    def _places(self, targets: Sequence[str], chosen: bool) -> list[str]:
        roles = self._roles
        if chosen or roles is None:
            return list(targets)
        return [name for name in targets if role_of(name) in roles] or endings(roles)


def _ours(method: Any) -> Recipe:
    kind = method.config

    def make(
        values: dict[str, Any], targets: list[str], seed: int, steps: int | None, domain: str
    ) -> PeftConfig:
        # A preset of the method itself, not one that it inherits with its fields.
        start = kind if domain not in vars(kind) else getattr(kind, domain)
        config: PeftConfig = start(target_modules=targets, seed=seed, **values)
        return config

    taken = {*_NOT_SETTINGS, *SHARED.values(), *kind.fixed}
    own = tuple(item.name for item in dataclasses.fields(kind) if item.name not in taken)
    shared = {name: field for name, field in SHARED.items() if field not in kind.fixed}
    return Recipe(method.name.lower(), method.summary, True, kind, shared, own, make)


_Adjust = Callable[[dict[str, Any], int | None], dict[str, Any]]
"""Field values and the number of optimizer steps, if known, to the field values of a config."""


def _as_given(values: dict[str, Any], steps: int | None) -> dict[str, Any]:
    return values


def _peft(
    name: str,
    summary: str,
    kind: type[PeftConfig],
    shared: Mapping[str, str],
    *own: str,
    adjust: _Adjust = _as_given,
    maps: bool = True,
    **fixed: Any,
) -> Recipe:
    """One of PEFT's methods.

    Args:
        adjust: What its config needs beyond the settings and `fixed`, from both of them.
        maps: See `Recipe`.
        fixed: Field values other than PEFT's defaults; settings win over them.
    """
    known = {item.name for item in dataclasses.fields(kind)}

    def make(
        values: dict[str, Any], targets: list[str], seed: int, steps: int | None, domain: str
    ) -> PeftConfig:
        values = {**fixed, **values}
        if "random_seed" in known:
            values["random_seed"] = seed
        return kind(target_modules=targets, **adjust(values, steps))

    return Recipe(name, summary, False, kind, shared, own, make, maps)


def quiet_sparse() -> None:
    """SHiRA's sparse tensors stay unchecked, torch's default: it warns unless one says so."""
    torch.sparse.check_sparse_tensor_invariants.disable()


def _unchecked(values: dict[str, Any], steps: int | None) -> dict[str, Any]:
    quiet_sparse()
    return values


def _with_alpha(values: dict[str, Any], steps: int | None) -> dict[str, Any]:
    """LoRA's alpha, by which PEFT scales an update together with the rank."""
    rank = values.get("r", _LORA_RANK)
    rest = {name: value for name, value in values.items() if name != "scale"}
    return {**rest, "r": rank, "lora_alpha": rank * values.get("scale", 1.0)}


def _scheduled(values: dict[str, Any], steps: int | None) -> dict[str, Any]:
    """The budget's schedule, in the proportions of the paper's experiments (arXiv:2303.10512)."""
    if not steps:
        raise ValueError("the number of optimizer steps must be known, for its budget's schedule")
    final = values.get("tfinal", steps // 3)
    if steps - final < 2:  # ranks are chosen at this step, by scores of the steps before it
        raise ValueError(
            f"its ranks are chosen by scores of earlier steps, so it takes 2 optimizer steps or "
            f"more before the last tfinal; got {steps} in all and tfinal {final}"
        )
    target = values.get("target_r", _LORA_RANK // 2)
    return {
        "init_r": round(1.5 * target),
        "target_r": target,
        "lora_alpha": round(1.5 * target),
        "tinit": steps // 10,
        "tfinal": final,
        "deltaT": max(1, steps // 100),
        "total_step": steps,
        **values,
    }


_LORA_SHARED = {"rank": "r", "update_scale": "scale", "dropout": "lora_dropout"}
_LORA_OWN = ("use_rslora", "init_lora_weights")
_FOREIGN = (
    _peft(
        *("lora", "PEFT's LoRA: a product of two low-rank factors", LoraConfig, _LORA_SHARED),
        *_LORA_OWN,
        adjust=_with_alpha,
        init_lora_weights="gaussian",
    ),
    _peft(
        *("dora", "PEFT's DoRA: LoRA of directions, and magnitudes", LoraConfig, _LORA_SHARED),
        *_LORA_OWN,
        adjust=_with_alpha,
        init_lora_weights="gaussian",
        use_dora=True,
    ),
    _peft(
        *("adalora", "PEFT's AdaLoRA: ranks compete for a budget", AdaLoraConfig),
        {"rank": "target_r", "dropout": "lora_dropout"},
        *("init_r", "tinit", "tfinal", "deltaT", "beta1", "beta2", "orth_reg_weight"),
        adjust=_scheduled,
    ),
    _peft(
        *("oft", "PEFT's OFT: block-diagonal rotations of the inputs", OFTConfig),
        {"rank": "r", "dropout": "module_dropout"},
        *("oft_block_size", "coft", "eps", "block_share"),
        maps=False,  # PEFT takes every input of four axes for a convolution's, and unfolds it
        r=8,
        oft_block_size=0,
    ),
    _peft(
        *("hra", "PEFT's HRA: a chain of Householder reflections", HRAConfig, {"rank": "r"}),
        "apply_GS",
    ),
    _peft(
        *("shira", "PEFT's SHiRA: random single entries", ShiraConfig, {"rank": "r"}),
        adjust=_unchecked,
    ),
)
_FULL = Recipe(
    name="full",
    summary="every weight of the model, no adapter",
    ours=False,
    kind=None,
    shared={},
    own=(),
    make=lambda values, targets, seed, steps, domain: None,
)


class _Recipes(Mapping[str, Recipe]):
    """Built at the first look: the folder's methods are found after this file is imported."""

    @cached_property
    def _all(self) -> dict[str, Recipe]:
        found = [_ours(method) for method in METHODS.values()]
        return {recipe.name: recipe for recipe in (*found, *_FOREIGN, _FULL)}

    def __getitem__(self, name: str) -> Recipe:
        return self._all[name]

    def __iter__(self) -> Iterator[str]:
        return iter(self._all)

    def __len__(self) -> int:
        return len(self._all)


RECIPES: Mapping[str, Recipe] = _Recipes()
"""Methods by name: those of this folder first, in alphabetical order of their files."""


def recipe(name: str) -> Recipe:
    """The method of a name.

    Raises:
        SnellaConfigError: There is none; lists them.
    """
    if name not in RECIPES:
        raise SnellaConfigError(f"method {name!r} is unknown; known: {shown(RECIPES, 40)}")
    return RECIPES[name]


def list_methods() -> str:
    """A table for people: names, what the methods do, and the settings they take."""
    width = max(map(len, RECIPES))
    lines = []
    for found in RECIPES.values():
        lines.append(f"{found.name:<{width}}  {found.summary}")
        if found.settings:
            lines.append(f"{'':<{width}}    {', '.join(found.settings)}")
    return "\n".join(lines)
