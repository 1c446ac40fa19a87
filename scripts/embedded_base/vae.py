"""The autoencoder: 64x64x3 pixels to 16x16x8 latents and back, trained on composites and photos.

Shapes: B batch, C channels, H and W pixels or latent cells. Pixel values are in [-1, 1].
"""

import time
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F
from diffusers import AutoencoderKL
from PIL import Image
from torch import Tensor, nn

from .data import Painter, sample_combination
from .scenes import SIZE

LATENT_CHANNELS = 8
PHOTOS = (  # files of skimage.data: CC0 or public domain
    "chelsea.png",
    "camera.png",
    "gravel.png",
    "brick.png",
    "grass.png",
    "retina.jpg",
    "astronaut.png",
    "rocket.jpg",
    "hubble_deep_field.jpg",
)
HELD_OUT_PHOTO = "coffee.png"  # CC0, never trained on


def build_vae() -> AutoencoderKL:
    """An AutoencoderKL of about 0.8 M parameters whose main path starts as a linear code.

    Every second convolution of a residual block starts at zero, so blocks start as identities.
    The encoder's strided convolutions gather 2x2 cells, so that all 48 values of a 4x4 patch
    stay available to the last layers, which `fit_linear_ends` solves for.
    """
    vae = AutoencoderKL(
        in_channels=3,
        out_channels=3,
        down_block_types=("DownEncoderBlock2D",) * 3,
        up_block_types=("UpDecoderBlock2D",) * 3,
        block_out_channels=(16, 48, 64),
        layers_per_block=1,
        latent_channels=LATENT_CHANNELS,
        norm_num_groups=1,
        sample_size=SIZE,
        mid_block_add_attention=False,
        scaling_factor=1.0,
        force_upcast=False,
    )
    for name, module in vae.named_modules():
        if name.endswith("conv2"):
            nn.init.zeros_(module.weight)
            nn.init.zeros_(module.bias)
    _init_encoder_path(vae.encoder)
    _init_decoder_path(vae.decoder)
    return vae


@torch.no_grad()
def _identity(conv: nn.Conv2d, keep: int) -> None:
    """Copy the first `keep` channels at the centre tap; hold the others at +-2, alternating."""
    conv.weight.zero_()
    conv.bias.zero_()
    centre = conv.kernel_size[0] // 2
    index = torch.arange(keep)
    conv.weight[index, index, centre, centre] = 1.0
    rest = torch.arange(keep, conv.out_channels)
    conv.bias[rest] = 2.0 * (1 - 2 * (rest % 2)).float()


@torch.no_grad()
def _gather_cells(conv: nn.Conv2d, channels: int) -> None:
    """Strided 3x3 convolution that stacks each 2x2 cell as average and differences (Haar)."""
    conv.weight.zero_()
    conv.bias.zero_()
    haar = torch.tensor([[1, 1, 1, 1], [1, 1, -1, -1], [1, -1, 1, -1], [1, -1, -1, 1]]) / 4.0
    haar[1:] *= 2.0
    for k in range(4):
        for c in range(channels):
            out = k * channels + c
            if out < conv.out_channels:
                conv.weight[out, c, :2, :2] = haar[k].view(2, 2)
    rest = torch.arange(min(4 * channels, conv.out_channels), conv.out_channels)
    conv.bias[rest] = 2.0 * (1 - 2 * (rest % 2)).float()


def _init_encoder_path(encoder: nn.Module) -> None:
    _identity(encoder.conv_in, 3)
    _gather_cells(encoder.down_blocks[0].downsamplers[0].conv, 3)
    _identity(encoder.down_blocks[1].resnets[0].conv_shortcut, 12)
    _gather_cells(encoder.down_blocks[1].downsamplers[0].conv, 12)
    _identity(encoder.down_blocks[2].resnets[0].conv_shortcut, 48)
    nn.init.constant_(encoder.conv_norm_out.bias, 4.0)  # SiLU is nearly linear there


@torch.no_grad()
def _smooth(conv: nn.Conv2d, keep: int) -> None:
    """Bilinear interpolation of the first `keep` channels after nearest upsampling."""
    _identity(conv, keep)
    kernel = torch.tensor([0.25, 0.5, 0.25])
    index = torch.arange(keep)
    conv.weight[index, index] = torch.outer(kernel, kernel)


@torch.no_grad()
def _init_decoder_path(decoder: nn.Module) -> None:
    """Latents and random mixtures of their neighbourhoods, interpolated up to the pixels."""
    _identity(decoder.conv_in, LATENT_CHANNELS)
    rng = torch.Generator().manual_seed(0)
    mixtures = torch.randn(40 - LATENT_CHANNELS, LATENT_CHANNELS, 3, 3, generator=rng) / 8
    decoder.conv_in.weight[LATENT_CHANNELS:40] = mixtures
    decoder.conv_in.bias[LATENT_CHANNELS:40] = 0
    _smooth(decoder.up_blocks[0].upsamplers[0].conv, 40)
    _identity(decoder.up_blocks[1].resnets[0].conv_shortcut, 40)
    _smooth(decoder.up_blocks[1].upsamplers[0].conv, 40)
    _identity(decoder.up_blocks[2].resnets[0].conv_shortcut, 12)
    nn.init.constant_(decoder.conv_norm_out.bias, 4.0)


@dataclass(frozen=True)
class VaeConfig:
    """How the autoencoder is trained."""

    steps: int = 1875  # optimizer steps; the shipped run did as many in its 420 seconds
    batch: int = 16  # pictures per step
    lr: float = 1.2e-3  # AdamW, peak


class VaeData:
    """Batches for the autoencoder: half composites, half photo crops with colour jitter.

    Args:
        painter: Source of the composites.
        seed: Of the stream of batches.
    """

    def __init__(self, painter: Painter, seed: int):
        self.painter = painter
        self.rng = np.random.default_rng(seed)
        self.photos = [Image.open(data_folder() / name).convert("RGB") for name in PHOTOS]

    def _photo_crop(self) -> np.ndarray:
        rng = self.rng
        # colour photos count double
        weights = np.array([3.0, 1, 0.6, 0.6, 0.6, 1, 4, 2, 2])
        photo = self.photos[rng.choice(len(self.photos), p=weights / weights.sum())]
        shortest = min(photo.size)
        side = int(np.exp(rng.uniform(np.log(SIZE), np.log(min(shortest, 512)))))
        x = int(rng.integers(0, photo.width - side + 1))
        y = int(rng.integers(0, photo.height - side + 1))
        crop = photo.resize((SIZE, SIZE), Image.BOX, (x, y, x + side, y + side))
        image = np.asarray(crop).astype(np.float32)
        if rng.random() < 0.5:
            image = image[:, ::-1]
        if rng.random() < 0.5:
            image = image[..., rng.permutation(3)]
        mean = image.mean((0, 1))
        image = (image - mean) * rng.uniform(0.7, 1.3) + mean * rng.uniform(0.7, 1.3, 3)
        return np.clip(image, 0, 255)

    def batch(self, size: int) -> Tensor:
        """(B, 3, 64, 64) in [-1, 1]."""
        images = [
            self.painter.paint(sample_combination(self.rng), self.rng, 1.5)
            if k % 2
            else self._photo_crop()
            for k in range(size)
        ]
        return to_tensor(np.stack(images).astype(np.float32))


def to_tensor(images: np.ndarray) -> Tensor:
    """(B, 64, 64, 3) in [0, 255] to (B, 3, 64, 64) in [-1, 1], channels last."""
    x = torch.from_numpy(np.ascontiguousarray(images)).permute(0, 3, 1, 2).float() / 127.5 - 1
    return x.contiguous(memory_format=torch.channels_last)


def psnr(vae: AutoencoderKL, x: Tensor) -> float:
    """Mean over pictures of the peak signal-to-noise ratio in dB, data range 2 (-1 to 1)."""
    with torch.no_grad():
        y = vae.decode(vae.encode(x).latent_dist.mode()).sample.clamp(-1, 1)
    mse = (y - x).pow(2).mean((1, 2, 3))
    return float((10 * torch.log10(4 / mse)).mean())


@torch.no_grad()
def fit_linear_ends(vae: AutoencoderKL, x: Tensor) -> None:
    """Solve the encoder's last layer for the PCA code and the decoder's last layer for the pixels.

    Both are least squares on the features of one batch; everything between stays as it is.
    """
    patches = F.pixel_unshuffle(x, 4).permute(0, 2, 3, 1).reshape(-1, 48).double()
    mean = patches.mean(0)
    _, _, basis = torch.linalg.svd(patches - mean, full_matrices=False)
    codes = (patches - mean) @ basis[:LATENT_CHANNELS].T
    codes = codes / codes.std(0)
    conv = vae.encoder.conv_out
    _solve_centre_tap(conv, _features_before(vae.encoder, conv, x), codes)
    nn.init.constant_(conv.bias[LATENT_CHANNELS:], -6.0)
    _identity(vae.quant_conv, 2 * LATENT_CHANNELS)
    _identity(vae.post_quant_conv, LATENT_CHANNELS)
    z = vae.encode(x).latent_dist.mode()
    conv = vae.decoder.conv_out
    pixels = x.permute(0, 2, 3, 1).reshape(-1, 3).double()
    _solve_centre_tap(conv, _features_before(vae.decoder, conv, z), pixels)


def _features_before(module: nn.Module, layer: nn.Module, x: Tensor) -> Tensor:
    """What `layer` receives when `module` runs on x, one row per position, (B*H*W, C)."""
    seen = []
    hook = layer.register_forward_pre_hook(lambda _, args: seen.append(args[0]))
    module(x)
    hook.remove()
    return seen[0].permute(0, 2, 3, 1).flatten(0, 2).double()


def _solve_centre_tap(conv: nn.Conv2d, features: Tensor, targets: Tensor) -> None:
    ones = torch.ones(len(features), 1, dtype=features.dtype)
    design = torch.cat([features, ones], 1)
    gram = design.T @ design
    gram += 1e-6 * gram.diagonal().mean() * torch.eye(len(gram), dtype=gram.dtype)
    solution = torch.linalg.solve(gram, design.T @ targets).float()
    n = targets.shape[1]
    conv.weight.zero_()
    conv.bias.zero_()
    conv.weight[:n, :, 1, 1] = solution[:-1].T
    conv.bias[:n] = solution[-1]


def vae_loss(x: Tensor, y: Tensor, moments: Tensor) -> Tensor:
    """L1 + 0.5 MSE + 0.25 L1 of the differences between neighbours + 2e-4 KL to N(0, 1)."""
    loss = F.l1_loss(y, x) + 0.5 * F.mse_loss(y, x)
    e = y - x
    loss = loss + 0.25 * (e.diff(dim=2).abs().mean() + e.diff(dim=3).abs().mean())
    mean, logvar = moments.chunk(2, 1)
    kl = 0.5 * (mean.pow(2) + logvar.exp() - 1 - logvar).mean()
    return loss + 2e-4 * kl


def train_vae(vae: AutoencoderKL, data: VaeData, config: VaeConfig, checkpoint: Path) -> None:
    """Fit the linear ends, train everything with a cosine to zero, and save."""
    fit_linear_ends(vae, data.batch(256))
    vae.to(memory_format=torch.channels_last)
    held_out = held_out_crops(24)
    print(f"vae start: {psnr(vae, held_out):.2f} dB on crops of {HELD_OUT_PHOTO}", flush=True)
    optimizer = torch.optim.AdamW(
        vae.parameters(), lr=config.lr, betas=(0.9, 0.99), weight_decay=1e-4, fused=True
    )
    started = time.time()
    for step in range(config.steps):
        cosine = 0.5 * (1 + np.cos(np.pi * step / config.steps))
        for group in optimizer.param_groups:
            group["lr"] = config.lr * min(1.0, (step + 1) / 50) * cosine
        x = data.batch(config.batch)
        with torch.autocast("cpu", torch.bfloat16):
            moments = vae.quant_conv(vae.encoder(x))
            mean, logvar = moments.chunk(2, 1)
            z = mean + torch.randn_like(mean) * (0.5 * logvar.clamp(-20, 4)).exp()
            y = vae.decoder(vae.post_quant_conv(z))
        loss = vae_loss(x, y.float(), moments.float())
        loss.backward()
        nn.utils.clip_grad_norm_(vae.parameters(), 1.0)
        optimizer.step()
        optimizer.zero_grad(set_to_none=True)
        if (step + 1) % 200 == 0:
            left = (time.time() - started) / (step + 1) * (config.steps - step - 1)
            print(
                f"vae step {step + 1} loss {loss.item():.4f} "
                f"held-out {psnr(vae, held_out):.2f} dB, {left:.0f} s left",
                flush=True,
            )
    torch.save(vae.state_dict(), checkpoint)


def held_out_crops(count: int) -> Tensor:
    """Square crops of the photo that training never sees, (count, 3, 64, 64)."""
    photo = Image.open(data_folder() / HELD_OUT_PHOTO).convert("RGB")
    rng = np.random.default_rng(7)
    crops = []
    for _ in range(count):
        side = int(rng.integers(150, min(photo.size)))
        x = int(rng.integers(0, photo.width - side + 1))
        y = int(rng.integers(0, photo.height - side + 1))
        crops.append(photo.resize((SIZE, SIZE), Image.BOX, (x, y, x + side, y + side)))
    return to_tensor(np.stack([np.asarray(c) for c in crops]).astype(np.float32))


def data_folder() -> Path:
    """The folder in which scikit-image keeps the pictures that come with the package."""
    import skimage

    return Path(skimage.__file__).parent / "data"


@torch.no_grad()
def whiten_latents(vae: AutoencoderKL, x: Tensor) -> None:
    """Fold mean 0 and standard deviation 1 per latent channel into the two 1x1 convolutions."""
    z = vae.encode(x).latent_dist.mode()
    mean, std = z.mean((0, 2, 3)), z.std((0, 2, 3))
    n = LATENT_CHANNELS
    quant, post = vae.quant_conv, vae.post_quant_conv
    quant.weight[:n] /= std.view(-1, 1, 1, 1)
    quant.bias[:n] = (quant.bias[:n] - mean) / std
    quant.bias[n:] -= 2 * std.log()
    post.bias += (post.weight[:, :, 0, 0] * mean).sum(1)
    post.weight *= std.view(1, -1, 1, 1)
