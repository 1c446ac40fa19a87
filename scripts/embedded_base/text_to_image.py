"""The text-to-image model: latent shards, the UNet with its text encoder, and their training.

Shapes: B batch, z latents (B, 8, 16, 16), ids (B, 32) tokens, t timesteps 0 to 999.
"""

import time
from dataclasses import dataclass, fields
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F
from diffusers import AutoencoderKL, DDIMScheduler, UNet2DConditionModel
from diffusers.models.attention_processor import AttnProcessor
from torch import Tensor, nn
from transformers import CLIPTextConfig, CLIPTextModel, CLIPTokenizer

from .data import (
    BACKGROUNDS,
    CLASSES,
    EARLY_BACKGROUNDS,
    EARLY_CLASSES,
    Composite,
    Painter,
    caption,
    sample_combination,
)
from .tokenizer import MAX_LENGTH
from .vae import LATENT_CHANNELS, to_tensor

SHARD = 6000  # composites per shard
CAPTIONS = 4  # caption variants per composite


@dataclass(frozen=True)
class BaseConfig:
    """How the diffusion model is trained."""

    steps: int = 8800  # optimizer steps in all
    batch: int = 32  # composites per step
    lr: float = 1e-3  # AdamW, peak
    warmup: int = 200  # steps of linear warm-up
    decay_from: float = 0.6  # share of the steps after which lr falls linearly to 0
    early_shards: int = 12  # 20 classes, low jitter; shard k joins at step 150 * (k - 1)
    full_from: int = 3600  # step at which shards of all classes and backgrounds start to join
    full_shards: int = 8  # half of each has wide jitter; shard k joins at full_from + 200 * k
    full_share: float = 0.8  # of a batch from then on
    caption_drop: float = 0.1  # share of captions replaced by ''
    ema: float = 0.999
    seed: int = 0


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


def write_shard(
    path: Path,
    painter: Painter,
    vae: AutoencoderKL,
    tokenizer: CLIPTokenizer,
    seed: int,
    full: bool,
) -> None:
    """Paint, caption and encode SHARD composites; a finished shard is one .pt file.

    Args:
        full: All classes and backgrounds, every second picture with wide jitter; else the early
            classes and backgrounds with low jitter.
    """
    rng = np.random.default_rng(seed)
    world = (tuple(CLASSES), tuple(BACKGROUNDS)) if full else (EARLY_CLASSES, EARLY_BACKGROUNDS)
    whats: list[Composite] = [sample_combination(rng, *world) for _ in range(SHARD)]
    jitters = (1.0, 2.0) if full else (1.0, 1.0)
    latents = torch.empty(SHARD, LATENT_CHANNELS, 16, 16, dtype=torch.float16)
    for start in range(0, SHARD, 100):
        chunk = whats[start : start + 100]
        images = np.stack([painter.paint(w, rng, jitters[k % 2]) for k, w in enumerate(chunk)])
        with torch.no_grad():
            latents[start : start + 100] = vae.encode(to_tensor(images)).latent_dist.mode().half()
    texts = [caption(w, rng) for w in whats for _ in range(CAPTIONS)]
    ids = encode_text(tokenizer, texts).view(SHARD, CAPTIONS, MAX_LENGTH).to(torch.int16)
    part = path.with_suffix(".part")
    torch.save({"latents": latents, "ids": ids}, part)
    part.rename(path)


def encode_text(tokenizer: CLIPTokenizer, texts: list[str]) -> Tensor:
    """Token ids, (len(texts), 32) int64, padded with the end token."""
    out = tokenizer(
        texts,
        padding="max_length",
        max_length=MAX_LENGTH,
        truncation=True,
        return_tensors="pt",
    )
    return out.input_ids


class ShardStream:
    """Deterministic batches from shards that may still be in the making.

    Which shards step s may use depends on s alone; a missing one is waited for.
    """

    def __init__(self, folder: Path, config: BaseConfig):
        self.folder, self.config = folder, config
        self.loaded: dict[str, dict[str, Tensor]] = {}

    def _pick(self, step: int, rng: np.random.Generator) -> tuple[str, int]:
        """Shard name and row of one sample."""
        c = self.config
        joined = 1 + (step - c.full_from) // 200
        if joined > 0 and rng.random() < c.full_share:
            return f"full{rng.integers(min(c.full_shards, joined)):02d}", rng.integers(SHARD)
        return f"low{rng.integers(min(c.early_shards, 2 + step // 150)):02d}", rng.integers(SHARD)

    def _shard(self, name: str) -> dict[str, Tensor]:
        path = self.folder / f"{name}.pt"
        while name not in self.loaded:
            if path.exists():
                self.loaded[name] = torch.load(path)
            else:
                time.sleep(2)
        return self.loaded[name]

    def batch(self, step: int, empty: Tensor) -> tuple[Tensor, Tensor]:
        """Latents (B, 8, 16, 16) float32 and ids (B, 32) int64 of a step."""
        rng = np.random.default_rng([self.config.seed, step])
        picks = [self._pick(step, rng) for _ in range(self.config.batch)]
        z = torch.stack([self._shard(n)["latents"][i] for n, i in picks]).float()
        ids = torch.stack(
            [self._shard(n)["ids"][i, rng.integers(CAPTIONS)] for n, i in picks]
        ).long()
        drop = torch.from_numpy(rng.random(len(picks)) < self.config.caption_drop)
        return z, torch.where(drop[:, None], empty[None], ids)


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


def learning_rate(step: int, config: BaseConfig) -> float:
    """Warm-up, plateau, then linear decay to zero."""
    hot = config.decay_from * config.steps
    decay = 1.0 if step < hot else (config.steps - step) / (config.steps - hot)
    return config.lr * min(1.0, (step + 1) / config.warmup) * decay


class BaseTrainer:
    """UNet, text encoder, their average and optimizer; resumes from its checkpoint.

    Args:
        work: Folder with `tokenizer/`, `shards/` and the checkpoint.
        config: The schedule.
        name: Of the checkpoint file.
    """

    def __init__(self, work: Path, config: BaseConfig, name: str = "base"):
        torch.manual_seed(config.seed)
        self.config, self.checkpoint = config, work / f"{name}.pt"
        self.tokenizer = CLIPTokenizer.from_pretrained(work / "tokenizer")
        self.modules = nn.ModuleDict(
            {"unet": build_unet(), "text_encoder": build_text_encoder(self.tokenizer)}
        )
        # explicit attention: the fused kernel's backward pass is several times slower on CPU
        self.modules["unet"].set_attn_processor(AttnProcessor())
        self.modules["unet"].to(memory_format=torch.channels_last)
        self.modules["text_encoder"].set_attn_implementation("eager")
        self.average = {k: v.clone() for k, v in self.modules.state_dict().items()}
        self.optimizer = torch.optim.AdamW(
            self.modules.parameters(),
            lr=config.lr,
            betas=(0.9, 0.98),
            weight_decay=0.01,
            fused=True,
        )
        self.stream = ShardStream(work / "shards", config)
        self.step, self.samples, self.process_s = 0, 0, 0.0
        if self.checkpoint.exists():
            self._resume()

    def _resume(self) -> None:
        state = torch.load(self.checkpoint)
        self.modules.load_state_dict(state["model"])
        self.average = state["average"]
        self.optimizer.load_state_dict(state["optimizer"])
        self.step, self.samples = state["step"], state["samples"]
        self.process_s = state["process_s"]
        print(f"resumed at step {self.step}", flush=True)

    def save(self, process_s: float) -> None:
        part = self.checkpoint.with_suffix(".part")
        state = {
            "model": self.modules.state_dict(),
            "average": self.average,
            "optimizer": self.optimizer.state_dict(),
            "step": self.step,
            "samples": self.samples,
            "process_s": process_s,
            "config": {f.name: getattr(self.config, f.name) for f in fields(self.config)},
        }
        torch.save(state, part)
        part.rename(self.checkpoint)

    @torch.no_grad()
    def _update_average(self) -> None:
        decay = min(self.config.ema, (1 + self.step) / (10 + self.step))
        model = self.modules.state_dict()
        keys = [k for k, v in model.items() if v.is_floating_point()]
        torch._foreach_lerp_(
            [self.average[k] for k in keys], [model[k] for k in keys], weight=1 - decay
        )

    def train(self, save_every_s: float = 240, max_s: float = float("inf")) -> None:
        """Run to the last step, or for `max_s` seconds of wall clock."""
        alphas_bar = build_scheduler().alphas_cumprod
        empty = encode_text(self.tokenizer, [""])[0]
        started = saved = time.time()
        first, cpu, losses = self.step, time.process_time(), []
        while self.step < self.config.steps and time.time() - started < max_s:
            lr = learning_rate(self.step, self.config)
            for group in self.optimizer.param_groups:
                group["lr"] = lr
            z, ids = self.stream.batch(self.step, empty)
            rng = torch.Generator().manual_seed(self.config.seed * 10_000_019 + self.step)
            loss = diffusion_loss(
                self.modules["unet"], self.modules["text_encoder"], alphas_bar, z, ids, rng
            )
            loss.backward()
            nn.utils.clip_grad_norm_(self.modules.parameters(), 1.0)
            self.optimizer.step()
            self.optimizer.zero_grad(set_to_none=True)
            self.step += 1
            self.samples += len(z)
            self._update_average()
            losses.append(loss.item())
            if self.step % 50 == 0:
                rate = (self.step - first) / (time.time() - started)
                left = (self.config.steps - self.step) / rate / 60
                print(
                    f"base step {self.step} samples {self.samples} loss {np.mean(losses):.4f} "
                    f"lr {lr:.1e} {rate * len(z):.0f} img/s, {left:.0f} min left",
                    flush=True,
                )
                losses = []
            if time.time() - saved > save_every_s:
                self.save(self.process_s + time.process_time() - cpu)
                saved = time.time()
        self.save(self.process_s + time.process_time() - cpu)
