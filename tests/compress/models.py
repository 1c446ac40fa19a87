"""Small models for the compression tests."""

import torch
from torch import nn
from transformers import (
    SwinConfig,
    SwinForImageClassification,
    ViTConfig,
    ViTForImageClassification,
)


def small_vit(seed: int = 0, **changes: object) -> ViTForImageClassification:
    """Two layers of width 32, 16x16 pixels in patches of 8, 12 classes."""
    torch.manual_seed(seed)
    config = {
        "hidden_size": 32,
        "num_hidden_layers": 2,
        "num_attention_heads": 4,
        "intermediate_size": 64,
        "image_size": 16,
        "patch_size": 8,
        "num_labels": 12,
        "hidden_dropout_prob": 0.0,
        "attention_probs_dropout_prob": 0.0,
        "initializer_range": 0.2,
    }
    return ViTForImageClassification(ViTConfig(**{**config, **changes})).eval()


def small_swin() -> SwinForImageClassification:
    torch.manual_seed(0)
    config = SwinConfig(
        image_size=16,
        patch_size=4,
        embed_dim=16,
        depths=[1, 1],
        num_heads=[2, 2],
        window_size=2,
        num_labels=12,
    )
    return SwinForImageClassification(config).eval()


def pixels(count: int = 4, seed: int = 1) -> torch.Tensor:
    return torch.randn(count, 3, 16, 16, generator=torch.Generator().manual_seed(seed))


class FusedBlock(nn.Module):
    """A block of the ViT that the published counts are of: q, k and v in one Linear."""

    def __init__(self, width: int) -> None:
        super().__init__()
        self.norm1, self.norm2 = nn.LayerNorm(width), nn.LayerNorm(width)
        self.qkv = nn.Linear(width, 3 * width)
        self.proj = nn.Linear(width, width)
        self.fc1 = nn.Linear(width, 4 * width)
        self.fc2 = nn.Linear(4 * width, width)


class FusedVit(nn.Module):
    """Shapes of ViT-B/16 without its head, for counts on the meta device."""

    def __init__(self, width: int = 768, depth: int = 12) -> None:
        super().__init__()
        self.cls_token = nn.Parameter(torch.empty(1, 1, width))
        self.pos_embed = nn.Parameter(torch.empty(1, 197, width))
        self.patch_embed = nn.Conv2d(3, width, 16, 16)
        self.blocks = nn.ModuleList(FusedBlock(width) for _ in range(depth))
        self.norm = nn.LayerNorm(width)
