"""The text-to-image model: the UNet with its text encoder, and their training.

Shapes: B batch, z latents (B, 8, 16, 16), ids (B, 32) tokens, t timesteps 0 to 999.
"""

from pathlib import Path

import torch
import torch.nn.functional as F
from diffusers import DDIMScheduler, UNet2DConditionModel
from diffusers.models.attention_processor import AttnProcessor
from torch import Tensor, nn
from transformers import CLIPTextConfig, CLIPTextModel, CLIPTokenizer

from .shards import BaseConfig
from .tokenizer import MAX_LENGTH
from .training import Trainer
from .vae import LATENT_CHANNELS


def build_text_encoder(tokenizer: CLIPTokenizer) -> CLIPTextModel:
    """Two causal layers of width 128, 0.56 M parameters."""
    config = CLIPTextConfig(
        vocab_size=len(tokenizer),
        hidden_size=128,
        intermediate_size=384,
        num_hidden_layers=2,
        num_attention_heads=4,
        max_position_embeddings=MAX_LENGTH,
        projection_dim=128,
        bos_token_id=tokenizer.bos_token_id,
        eos_token_id=tokenizer.eos_token_id,
        pad_token_id=tokenizer.pad_token_id,
    )
    return CLIPTextModel(config)


def build_unet() -> UNet2DConditionModel:
    """A thin convolutional rim at 16x16 and eight transformer blocks of width 160 at 8x8."""
    unet = UNet2DConditionModel(
        sample_size=16,
        in_channels=LATENT_CHANNELS,
        out_channels=LATENT_CHANNELS,
        down_block_types=("DownBlock2D", "CrossAttnDownBlock2D"),
        up_block_types=("CrossAttnUpBlock2D", "UpBlock2D"),
        block_out_channels=(48, 160),
        layers_per_block=1,
        transformer_layers_per_block=(1, 2),
        cross_attention_dim=128,
        attention_head_dim=5,  # diffusers reads this as the number of heads
        norm_num_groups=16,
    )
    for name, module in unet.named_modules():
        if name.endswith(("conv2", "proj_out", "conv_out")):
            nn.init.zeros_(module.weight)
            nn.init.zeros_(module.bias)
    return unet


def build_scheduler() -> DDIMScheduler:
    """Scaled-linear betas rescaled to zero terminal SNR, v-prediction, trailing steps."""
    return DDIMScheduler(
        beta_start=0.00085,
        beta_end=0.012,
        beta_schedule="scaled_linear",
        prediction_type="v_prediction",
        rescale_betas_zero_snr=True,
        timestep_spacing="trailing",
        clip_sample=False,
        set_alpha_to_one=True,
        steps_offset=1,  # unused with trailing steps; the pipeline asks for it
    )


def diffusion_loss(unet, text_encoder, alphas_bar: Tensor, z: Tensor, ids: Tensor, rng) -> Tensor:
    """Mean squared error of v = √ᾱ ε - √(1-ᾱ) z, t stratified over the batch.

    v-prediction: Progressive Distillation (arXiv:2202.00512), section 4.
    """
    b = len(z)
    u = (torch.arange(b) + torch.rand(b, generator=rng)) / b
    t = (u * len(alphas_bar)).long().clamp(max=len(alphas_bar) - 1)
    noise = torch.randn(z.shape, generator=rng)
    a = alphas_bar[t].sqrt().view(b, 1, 1, 1)
    s = (1 - alphas_bar[t]).sqrt().view(b, 1, 1, 1)
    noisy = (a * z + s * noise).contiguous(memory_format=torch.channels_last)
    with torch.autocast("cpu", torch.bfloat16):
        context = text_encoder(ids).last_hidden_state
        v = unet(noisy, t, context).sample
    return F.mse_loss(v.float(), a * noise - s * z)


def base_trainer(work: Path, config: BaseConfig, name: str = "base") -> Trainer:
    """UNet and text encoder, learning together from random weights."""
    torch.manual_seed(config.seed)
    tokenizer = CLIPTokenizer.from_pretrained(work / "tokenizer")
    modules = nn.ModuleDict({"unet": build_unet(), "text_encoder": build_text_encoder(tokenizer)})
    # explicit attention: the fused kernel's backward pass is several times slower on CPU
    modules["unet"].set_attn_processor(AttnProcessor())
    modules["unet"].to(memory_format=torch.channels_last)
    modules["text_encoder"].set_attn_implementation("eager")
    alphas_bar = build_scheduler().alphas_cumprod

    def loss(z: Tensor, ids: Tensor, rng: torch.Generator) -> Tensor:
        return diffusion_loss(modules["unet"], modules["text_encoder"], alphas_bar, z, ids, rng)

    return Trainer(work, config, name, modules, loss)
