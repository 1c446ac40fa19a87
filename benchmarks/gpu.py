"""What a GPU can tell: the sections of the CPU, in bfloat16 and at batches that keep it busy.

    python -m benchmarks.gpu                          all (make bench-gpu)
    python -m benchmarks.gpu models sdxl              one entry of a section
    python -m benchmarks.gpu --device cpu --quick     the same code without a GPU, to see it run

Timed with CUDA events; `allocated` is what CUDA's allocator says. Results go to a file named after
the GPU. Needs torch 2.10 or newer, triton for the fused kernels, peft with transformers and
accelerate, pydantic, pyyaml, pillow, psutil and tqdm. The denoisers need diffusers too: without it
they are left out, and linears and ViTs are measured.
"""

import importlib.util
import sys
from collections.abc import Mapping, Sequence
from functools import partial

import torch

from benchmarks import inference, layers, models, scaling
from benchmarks.section import Measure, main
from benchmarks.works import WORKS

TRAINED = ("full", "lora", "lora_fp32", "dora", "plain", "ours", "fused")
# FLUX in full needs 100 GB for its gradients and AdamW's state alone.
LARGEST = ("lora", "lora_fp32", "plain", "ours", "fused")

_STEPS: dict[str, Measure] = {
    "vit-b": partial(models.compare, "vit-b", 128, TRAINED),
    "vit-l": partial(models.compare, "vit-l", 64, TRAINED),
    "vit-h": partial(models.compare, "vit-h", 32, TRAINED),
    "sd15": partial(models.compare, "sd15", 16, TRAINED),
    "sdxl": partial(models.compare, "sdxl", 4, TRAINED),
    "sd35": partial(models.compare, "sd35", 4, TRAINED),
    "flux": partial(models.compare, "flux", 1, LARGEST, checkpointing=True),
}
_CALLS: dict[str, Measure] = {
    **{name: entry for name, entry in inference.ENTRIES.items() if "@" in name},
    "vit-l": partial(inference.model, "vit-l", 64),
    "sd15": partial(inference.model, "sd15", 16),
    "sdxl": partial(inference.model, "sdxl", 4),
}
SECTIONS: dict[str, Mapping[str, Measure]] = {
    "layers": layers.ENTRIES,
    "models": _STEPS,
    "scaling": scaling.ENTRIES,
    "inference": _CALLS,
}


def possible(entries: Mapping[str, Measure]) -> dict[str, Measure]:
    """The entries whose packages are here."""
    if importlib.util.find_spec("diffusers") is not None:
        return dict(entries)
    drawn = {name for name in WORKS if not name.startswith("vit")}
    return {name: entry for name, entry in entries.items() if name not in drawn}


def run(arguments: Sequence[str], default: str = "cuda") -> int:
    """Measure sections, the one named first or all; a section that fails loses no other."""
    named = arguments[:1] if arguments and arguments[0] in SECTIONS else []
    rest, chosen = arguments[len(named) :], named or list(SECTIONS)
    if default == "cuda" and "--device" not in rest and not torch.cuda.is_available():
        print(
            "benchmarks.gpu: torch sees no NVIDIA GPU here, nothing was measured; "
            "to see the code run, add --device cpu --quick"
        )
        return 2
    failed = 0
    for name in chosen:
        entries, command = possible(SECTIONS[name]), f"python -m benchmarks.gpu {name}"
        failed |= main(name, entries, rest, command=command, device=default, rounds=10)
    return failed


if __name__ == "__main__":
    sys.exit(run(sys.argv[1:]))
