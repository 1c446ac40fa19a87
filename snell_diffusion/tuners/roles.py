"""What a Linear is for, read off the end of its path: query, key, value, output, MLP in or out.

Papers say where a method goes in these words; models spell them in several ways.
"""

__all__ = ["ROLES", "block_of", "endings", "in_words", "role_of"]

ROLES: dict[str, tuple[str, ...]] = {
    "q": ("to_q", "add_q_proj", "q_proj", "attention.query", "self.query"),
    "k": ("to_k", "add_k_proj", "k_proj", "attention.key", "self.key"),
    "v": ("to_v", "add_v_proj", "v_proj", "attention.value", "self.value"),
    "proj": ("to_out.0", "to_add_out", "o_proj", "out_proj", "attention.output.dense"),
    "fc1": ("fc1", "ff.net.0.proj", "ff_context.net.0.proj", "intermediate.dense", "pwconv1"),
    "fc2": ("fc2", "ff.net.2", "ff_context.net.2", "output.dense", "pwconv2"),
}
"""Path endings by role: diffusers, transformers 5 and before, ConvNeXt."""

_PARTS = {
    ("attention's", "projection"): {"q": "q", "k": "k", "v": "v", "proj": "output"},
    ("the MLP's", "layer"): {"fc1": "first", "fc2": "second"},
}
_CONTEXT = ("add_q_proj", "add_k_proj", "add_v_proj", "to_add_out")


def role_of(path: str) -> str | None:
    """The role of the Linear at a path, None if its name tells none."""
    found = _match(path)
    return found[0] if found else None


def block_of(path: str) -> str | None:
    """Which attention or MLP a Linear belongs to: equal for the q, k and v of one.

    Projections of a second stream (SD 3's text, for one) are a block of their own, ending in
    ":context".
    """
    found = _match(path)
    if found is None:
        return None
    ending = found[1]
    block = path.removesuffix(ending).removesuffix(".")
    return f"{block}:context" if ending in _CONTEXT else block


def endings(roles: tuple[str, ...]) -> list[str]:
    """Every ending of some roles, as names for `target_modules`."""
    return sorted(ending for role in roles for ending in ROLES[role])


def in_words(roles: tuple[str, ...]) -> str:
    """Some roles for people, such as "attention's q, k, v and output projections"."""
    parts = []
    for (whose, what), names in _PARTS.items():
        *most, last = [names[role] for role in names if role in roles] or [""]
        if most:
            parts.append(f"{whose} {', '.join(most)} and {last} {what}s")
        elif last:
            parts.append(f"{whose} {last} {what}")
    return " and ".join(parts)


def _match(path: str) -> tuple[str, str] | None:
    """Role and ending; of several the longest, as "attention.output.dense" is no MLP's."""
    fits = [
        (role, ending)
        for role, names in ROLES.items()
        for ending in names
        if f".{path}".endswith(f".{ending}")
    ]
    return max(fits, key=lambda pair: len(pair[1]), default=None)
