"""The models and adapters behind tests/compat/golden: everything a closed formula, nothing drawn.

Random generators change between torch versions, sines do not. What is here must stay as it is:
every release's files are tested against these models.
"""

import zlib
from pathlib import Path
from typing import Any

import torch
from diffusers import UNet2DConditionModel
from peft import inject_adapter_in_model
from torch import Tensor, nn
from transformers import CLIPTextConfig, CLIPTextModel

from snell_diffusion import SnellaConfig
from snell_diffusion.adapters import AdapterFile, load_adapter, save_adapter
from snell_diffusion.tuners import delta_layers

FOLDER = Path(__file__).parent / "golden"
EXPECTED = "expected.safetensors"
LIMIT = 64 * 1024  # bytes of a file

# Every kernel, rules of each sort, thresholds stored and taken from levels, 32 and 16 bits.
KINDS: dict[str, dict[str, Any]] = {
    "mixed_squared": {"config": {"kernel": "mixed", "sparsify": "squared"}, "stored": True},
    "distance_soft": {"config": {"kernel": "distance", "p": 1.0, "sparsify": "soft", "heads": 4}},
    "linear_none": {"config": {"kernel": "linear", "sparsify": "none", "scale": 0.5, "heads": 1}},
    "text_half": {
        "config": {"kernel": "mixed", "sparsify": "mask"},
        "components": ("unet", "text_encoder"),
        "dtype": torch.float16,
    },
}


def wave(name: str, *shape: int, size: float = 1.0) -> Tensor:
    """size · sin(1 + c + 0.7 i) over the entries i, c from the name; float32."""
    phase = zlib.crc32(name.encode()) % 1000
    count = torch.Size(shape).numel()
    steps = torch.arange(count, dtype=torch.float64)
    return (size * torch.sin(1.0 + phase + 0.7 * steps)).reshape(shape).to(torch.float32)


@torch.no_grad()
def with_waves(model: nn.Module) -> nn.Module:
    """Weights from their names: sines, of a size that keeps activations near 1."""
    for name, weight in model.named_parameters():
        if weight.dim() > 1:
            weight.copy_(wave(name, *weight.shape, size=(2 / weight[0].numel()) ** 0.5))
        else:
            centre = 1.0 if "norm" in name and name.endswith("weight") else 0.0
            weight.copy_(centre + wave(name, *weight.shape, size=0.1))
    return model.eval()


def unet() -> nn.Module:
    """A Stable Diffusion UNet of one level, 16 wide."""
    return with_waves(
        UNet2DConditionModel(
            sample_size=8,
            in_channels=4,
            out_channels=4,
            block_out_channels=(16,),
            layers_per_block=1,
            norm_num_groups=4,
            down_block_types=("CrossAttnDownBlock2D",),
            up_block_types=("CrossAttnUpBlock2D",),
            cross_attention_dim=16,
            attention_head_dim=4,
        )
    )


def text_encoder() -> nn.Module:
    """A CLIP text encoder of one layer, 16 wide."""
    return with_waves(
        CLIPTextModel(
            CLIPTextConfig(
                vocab_size=64,
                hidden_size=16,
                intermediate_size=24,
                num_hidden_layers=1,
                num_attention_heads=2,
                max_position_embeddings=8,
                projection_dim=16,
                bos_token_id=0,
                eos_token_id=1,
                pad_token_id=1,
            )
        )
    )


def base() -> dict[str, nn.Module]:
    """The base model, by component."""
    return {"unet": unet(), "text_encoder": text_encoder()}


@torch.no_grad()
def prediction(models: dict[str, nn.Module]) -> Tensor:
    """The noise prediction for one latent, two prompts and two timesteps: (2, 4, 8, 8)."""
    words = torch.arange(16).reshape(2, 8) * 3 + 2
    text = models["text_encoder"](words).last_hidden_state
    steps = torch.tensor([801.0, 20.0])
    return models["unet"](wave("latent", 2, 4, 8, 8), steps, text, return_dict=False)[0]


def with_file(file: AdapterFile) -> dict[str, nn.Module]:
    """The base with an adapter file loaded into it; the base's own hash must match."""
    models = base()
    load_adapter(models, file)
    return models


def write_golden(kind: str, path: Path) -> None:
    """Make an adapter of `KINDS` and save it to a file."""
    plan = KINDS[kind]
    models = {name: base()[name] for name in plan.get("components", ("unet",))}
    config = SnellaConfig(r=4, seed=0, target_modules=["to_q", "to_v", "q_proj"], **plan["config"])
    for component, model in models.items():
        inject_adapter_in_model(config, model, "default")
        for index, (path_in_model, layer) in enumerate(delta_layers(model, "default")):
            _fill(f"{kind}.{component}.{path_in_model}", layer)
            if config.sparsify != "none":
                layer.set_sparsity("default", 0.1 + 0.05 * index)
            if plan.get("stored"):
                _store_threshold(layer)
    notes = {"instance_prompt": "a photo of sks cat", "steps": 100, "learning_rate": 1e-3}
    save_adapter(path, models, metadata=notes, base={"source": "golden"}, dtype=plan.get("dtype"))


@torch.no_grad()
def _fill(name: str, layer: Any) -> None:
    for short, container in layer.containers():
        if "default" in container and short in ("snella_A", "snella_B"):
            tensor = container["default"]
            tensor.copy_(wave(f"{name}.{short}", *tensor.shape, size=1.5))
    for short, value in (("alpha", 0.8), ("gamma", 0.5), ("beta", 0.05)):
        container = getattr(layer, f"snella_{short}")
        if "default" in container:
            container["default"].fill_(value)


def _store_threshold(layer: Any) -> None:
    """Between two magnitudes, where rounding of another version cannot move an entry across."""
    sizes = layer.dense("default").abs().flatten().sort().values
    keep = int(layer.sparsity("default") * sizes.numel())
    layer.snella_threshold["default"].fill_(float(sizes[keep - 1 : keep + 1].mean()))


def releases() -> list[tuple[str, str]]:
    """(release, kind) of every file that is kept."""
    return [
        (expected.parent.name, path.stem)
        for expected in sorted(FOLDER.glob(f"*/{EXPECTED}"))
        for path in sorted(expected.parent.glob("*.safetensors"))
        if path != expected
    ]
