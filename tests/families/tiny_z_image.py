"""A tiny Z-Image."""

from pathlib import Path
from typing import Any

import torch
from diffusers import FlowMatchEulerDiscreteScheduler, ZImagePipeline, ZImageTransformer2DModel
from torch.nn.utils.rnn import pad_sequence

from snell_diffusion.diffusion.families import Conditions
from tests.families import components
from tests.families.tiny import Tiny


def transformer() -> ZImageTransformer2DModel:
    torch.manual_seed(0)
    made = ZImageTransformer2DModel(
        in_channels=4,
        dim=48,
        n_layers=2,
        n_refiner_layers=1,
        n_heads=3,
        n_kv_heads=3,
        cap_feat_dim=components.WIDTH,
        axes_dims=[8, 4, 4],
        axes_lens=[1024, 16, 16],
    )
    # Zeros at first, which would hide whether padding is told from a prompt's end.
    torch.nn.init.normal_(made.cap_pad_token)
    torch.nn.init.normal_(made.x_pad_token)
    return made.eval()


def save(folder: Path) -> None:
    ZImagePipeline(
        scheduler=FlowMatchEulerDiscreteScheduler(shift=3.0),
        vae=components.vae(scaling_factor=0.3611, shift_factor=0.1159),
        text_encoder=components.qwen3(layers=3).model,
        tokenizer=components.qwen_tokenizer(),
        transformer=transformer(),
    ).save_pretrained(folder)


def stock_text(pipe: Any, prompts: list[str]) -> Conditions:
    rows, _ = pipe.encode_prompt(list(prompts), do_classifier_free_guidance=False)
    lengths = torch.tensor([len(row) for row in rows])
    text = pad_sequence([*rows, torch.zeros(512, components.WIDTH)], batch_first=True)[:-1]
    return {"text": text, "mask": torch.arange(512) < lengths[:, None]}


TINY = Tiny(
    save=save,
    stock_text=stock_text,
    plain={"guidance_scale": 0.0},
    idle=("text_encoder.layers.2.",),  # the pipeline takes the last layer's input
    reads_values=True,
)
