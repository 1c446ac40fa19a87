"""Compute the memory of every config for a real base; write its header line and docs/memory.md.

    python -m scripts.compute_memory            all configs
    python -m scripts.compute_memory sdxl       this one; the page keeps the others' figures
    python -m scripts.compute_memory --plain    without the table of options

Computed with fake tensors from published sizes: nothing is downloaded, loaded or measured.
"""

import json
import re
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from snell_diffusion.diffusion.config_files import make_config, read_config
from snell_diffusion.diffusion.memory import compute
from snell_diffusion.diffusion.memory.bases import BASES

ROOT = Path(__file__).resolve().parents[1]
CONFIGS = ROOT / "configs" / "dreambooth"
PAGE = ROOT / "docs" / "memory.md"
FIGURES = ROOT / "docs" / "memory.json"
PHASES = {
    "text": "prompts",
    "latents": "photos",
    "train": "step",
    "sample": "denoise",
    "decode": "decode",
}
HEADER = re.compile(r"^# Memory: .*\n(?:#   .*\n)*", re.MULTILINE)

# What each option changes, one at a time, from the config as it stands.
VARIANTS: dict[str, dict[str, Any]] = {
    "as in the file": {},
    "no gradient checkpointing": {"gradient_checkpointing": False},
    "everything stays on the GPU": {"offload_encoders": False},
    "torchao_int8 base": {"base_quantization": "torchao_int8"},
    "bnb_nf4 base": {"base_quantization": "bnb_nf4"},
}
SHOWN_VARIANTS = ("sd15", "flux1_dev")


def names() -> list[str]:
    """Configs whose base is a real model, smallest name first."""
    found = sorted(CONFIGS.glob("*.yaml"))
    return [path.stem for path in found if read_config(path).get("base") in BASES]


def gibibytes(peaks: dict[str, int]) -> dict[str, float]:
    return {phase: round(peak / 2**30, 1) for phase, peak in peaks.items()}


def figures(name: str, changes: dict[str, Any]) -> dict[str, Any]:
    """Sizes, and GiB by phase."""
    path = CONFIGS / f"{name}.yaml"
    computed = compute(make_config({**read_config(path), **changes}, str(path)))
    return {
        "family": computed.family,
        "trainable": computed.sizes.trainable,
        "layers": computed.sizes.layers,
        "base": computed.sizes.base,
        "peaks": gibibytes(computed.peaks),
    }


def header(found: dict[str, Any]) -> str:
    """The lines of a config that tell its memory."""
    peaks = found["peaks"]
    parts = ", ".join(f"{PHASES[phase]} {peaks[phase]}" for phase in PHASES if phase in peaks)
    most = max(peaks.values())
    return (
        f"# Memory: {most} GiB on the GPU, computed with fake tensors, not measured\n"
        f"#   ({parts});\n"
        f"#   about 1 GiB more for CUDA itself.\n"
    )


def write_header(path: Path, lines: str) -> None:
    """Put the memory lines of a config in place of those it has."""
    path.write_text(HEADER.sub(lambda _: lines, path.read_text("utf-8"), count=1), "utf-8")


def page(known: dict[str, dict[str, Any]]) -> str:
    """docs/memory.md: the prose of the page stays, its tables are made anew."""
    text = PAGE.read_text("utf-8")
    for mark, lines in (("configs", table(known)), ("options", variants(known))):
        block = "\n".join([f"<!-- {mark} -->", *lines, "<!-- end -->"])
        text = _between(text, mark, block)
    return text


def _between(text: str, mark: str, block: str) -> str:
    return re.sub(rf"<!-- {mark} -->\n.*?<!-- end -->", lambda _: block, text, flags=re.DOTALL)


def table(known: dict[str, dict[str, Any]]) -> Iterator[str]:
    """One line per config."""
    yield f"| config | base | adapter | {' | '.join(PHASES.values())} | at most |"
    yield "|---|---|---|" + "---|" * (len(PHASES) + 1)
    for name in names():
        found = known.get(name)
        if found is not None:
            peaks = found["peaks"]
            cells = [str(peaks.get(phase, "")) for phase in PHASES]
            sizes = f"{found['base'] / 1e9:.1f} B | {found['trainable'] / 1e6:.0f} M"
            link = f"[{name}](../configs/dreambooth/{name}.yaml)"
            yield f"| {link} | {sizes} | {' | '.join(cells)} | **{max(peaks.values())}** |"


def variants(known: dict[str, dict[str, Any]]) -> Iterator[str]:
    """One line per option, for the configs in `SHOWN_VARIANTS`."""
    yield f"| option | {' | '.join(SHOWN_VARIANTS)} |"
    yield "|---|" + "---|" * len(SHOWN_VARIANTS)
    for label in VARIANTS:
        cells = [known.get(key(name, label), {}).get("peaks") for name in SHOWN_VARIANTS]
        yield f"| {label} | {' | '.join(_step(peaks) for peaks in cells)} |"


def key(name: str, label: str) -> str:
    return name if not VARIANTS[label] else f"{name}: {label}"


def _step(peaks: dict[str, float] | None) -> str:
    return "" if peaks is None else f"{peaks['train']} (at most {max(peaks.values())})"


def main(arguments: list[str]) -> None:
    """Compute and write; with --plain no options beside those of the files."""
    known = json.loads(FIGURES.read_text("utf-8")) if FIGURES.exists() else {}
    plain, chosen = "--plain" in arguments, [a for a in arguments if not a.startswith("-")]
    for name in chosen or names():
        for label, changes in VARIANTS.items():
            if changes and (plain or name not in SHOWN_VARIANTS):
                continue
            known[key(name, label)] = found = figures(name, changes)
            print(key(name, label), found["peaks"], flush=True)
            FIGURES.write_text(json.dumps(known, indent=1, sort_keys=True) + "\n", "utf-8")
        write_header(CONFIGS / f"{name}.yaml", header(known[name]))
    PAGE.write_text(page(known), "utf-8")
    print(PAGE)


if __name__ == "__main__":
    main(sys.argv[1:])
