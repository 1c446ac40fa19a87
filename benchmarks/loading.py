"""Loading an adapter of SDXL's size into a pipeline: time, and what stays beside the base.

    python -m benchmarks.loading

The UNet has SDXL's real sizes in bfloat16 and random attention weights; text encoders and VAE have
no values, since no adapter here touches them. PEFT's LoRA of rank 16 is loaded in turns with it.
"""

import gc
import sys
from collections.abc import Callable
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import torch
from torch import nn

import snell_diffusion  # noqa: F401  adds the verbs to every pipeline
from benchmarks.counting import DenseAndSparse
from benchmarks.methods import LORA_RANK, SNELLA_RANK
from benchmarks.results import Entry
from benchmarks.section import Measure, Run, main
from benchmarks.timing import interleaved, wall_seconds
from benchmarks.works import ATTENTION
from snell_diffusion import SnellaConfig
from snell_diffusion.diffusion.memory.bases import BASES
from snell_diffusion.diffusion.memory.build import build
from snell_diffusion.diffusion.memory.live import tensors_of

_BASE = "stabilityai/stable-diffusion-xl-base-1.0"


def sdxl(run: Run) -> Entry:
    """Load and unload both adapters in turns; the loads are timed."""
    pipe = _embedded_pipe() if run.quick else _sdxl_pipe()
    base = sum(p.numel() * p.element_size() for p in pipe.unet.parameters())
    with TemporaryDirectory() as folder:
        files = _write_adapters(pipe, Path(folder))
        loads = {
            "ours": lambda: pipe.load_snella_weights(str(files["ours"])),
            "lora": lambda: pipe.load_lora_weights(str(files["lora"])),
        }
        unloads = {"ours": pipe.unload_snella_weights, "lora": pipe.unload_lora_weights}
        found = {name: _memory_of(pipe, loads[name], unloads[name]) for name in loads}
        turn = dict(zip(map(id, loads.values()), unloads.values(), strict=True))

        def seconds(load: Callable[[], object]) -> float:
            took = wall_seconds(load)
            turn[id(load)]()
            return took

        times = interleaved(loads, run.rounds, seconds=seconds)
        sizes = {name: path.stat().st_size for name, path in files.items()}
    return {"seconds": times, "memory": found, "file_bytes": sizes, "base_bytes": base}


def _memory_of(
    pipe: Any, load: Callable[[], object], unload: Callable[[], object]
) -> dict[str, int]:
    """Bytes of tensors beyond the base: the most while it loads, and what stays."""
    gc.collect()
    with DenseAndSparse() as live:
        live.add(tensor for tensor in tensors_of(pipe.unet) if not tensor.is_meta)
        before = live.live
        live.reset()
        load()
        gc.collect()
        found = {"peak": live.peak - before, "kept": live.live - before}
    unload()
    return found


def _write_adapters(pipe: Any, folder: Path) -> dict[str, Path]:
    from diffusers.utils import convert_state_dict_to_diffusers
    from peft import LoraConfig, get_peft_model_state_dict

    config = SnellaConfig.diffusion(r=SNELLA_RANK, target_modules=list(ATTENTION), seed=0)
    pipe.unet.add_adapter(config)
    pipe.save_snella_weights(str(folder / "ours"))
    pipe.unload_snella_weights()
    pipe.unet.add_adapter(LoraConfig(r=LORA_RANK, target_modules=list(ATTENTION)))
    layers = convert_state_dict_to_diffusers(get_peft_model_state_dict(pipe.unet))
    pipe.save_lora_weights(str(folder / "lora"), unet_lora_layers=layers)
    pipe.unload_lora_weights()
    return {name: next((folder / name).glob("*.safetensors")) for name in ("ours", "lora")}


def _sdxl_pipe() -> Any:
    """SDXL's pipeline with a UNet in memory."""
    pipe = build(BASES[_BASE], {"unet": torch.bfloat16})
    pipe.unet.to_empty(device="cpu")
    torch.manual_seed(0)
    with torch.no_grad():
        for name, module in pipe.unet.named_modules():
            if isinstance(module, nn.Linear) and name.endswith(ATTENTION):
                module.weight.normal_(std=0.02)
    return pipe


def _embedded_pipe() -> Any:
    from diffusers import StableDiffusionPipeline

    from snell_diffusion.models import embedded_path

    return StableDiffusionPipeline.from_pretrained(embedded_path())


ENTRIES: dict[str, Measure] = {"sdxl": sdxl}

if __name__ == "__main__":
    sys.exit(main("loading", ENTRIES))
