"""Latents <-> tokens of transformers that take 2 x 2 latent pixels as one token.

Shapes: latents [B, C, h, w] with even h and w; tokens [B, h/2 * w/2, 4 C], row by row, each with
its channels outermost.
"""

import torch
from torch import Tensor


def pack(latents: Tensor) -> Tensor:
    """Latents -> tokens."""
    b, c, h, w = latents.shape
    patches_bhwcyx = latents.reshape(b, c, h // 2, 2, w // 2, 2).permute(0, 2, 4, 1, 3, 5)
    return patches_bhwcyx.reshape(b, h // 2 * (w // 2), 4 * c)


def unpack(tokens: Tensor, height: int, width: int) -> Tensor:
    """Tokens -> latents of `height` and `width`."""
    b, _, channels = tokens.shape
    patches_bhwcyx = tokens.reshape(b, height // 2, width // 2, channels // 4, 2, 2)
    return patches_bhwcyx.permute(0, 3, 1, 4, 2, 5).reshape(b, channels // 4, height, width)


def grid(height: int, width: int, device: torch.device) -> Tensor:
    """Row and column of every token of a picture, row by row, float32 [height * width, 2]."""
    rows, columns = torch.arange(height, device=device), torch.arange(width, device=device)
    return torch.cartesian_prod(rows, columns).float()
