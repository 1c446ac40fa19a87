"""IP-Adapter beside ours on a whole Stable Diffusion pipeline, in either order."""

from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from transformers import CLIPImageProcessorPil, CLIPVisionConfig, CLIPVisionModelWithProjection

from snell_diffusion import SnellaAttnProcessor
from snell_diffusion.adapters import save_adapter
from tests.tiny_models import adapt, picture, pipeline, sd15_unet

CROSS = 32  # the tiny UNet's text width
EMBEDDING, TOKENS = 16, 4


def image_encoder() -> CLIPVisionModelWithProjection:
    torch.manual_seed(0)
    config = CLIPVisionConfig(
        hidden_size=16,
        intermediate_size=16,
        num_hidden_layers=1,
        num_attention_heads=2,
        image_size=8,
        patch_size=4,
        projection_dim=EMBEDDING,
    )
    return CLIPVisionModelWithProjection(config).eval()


def ip_adapter(unet: nn.Module) -> dict[str, dict[str, Tensor]]:
    """Weights of an IP-Adapter: a projection to tokens, and keys and values of each attn2."""
    draw = torch.Generator().manual_seed(4)

    def normal(*shape: int) -> Tensor:
        return torch.randn(*shape, generator=draw) / shape[-1] ** 0.5

    cross = [unet.get_submodule(name.removesuffix(".processor")) for name in unet.attn_processors]
    cross = [attn for attn in cross if attn.is_cross_attention]
    attention = {
        f"{2 * index + 1}.to_{letter}_ip.weight": normal(attn.to_k.out_features, CROSS)
        for index, attn in enumerate(cross)
        for letter in "kv"
    }
    projection = {
        "proj.weight": normal(TOKENS * CROSS, EMBEDDING),
        "proj.bias": torch.zeros(TOKENS * CROSS),
        "norm.weight": torch.ones(CROSS),
        "norm.bias": torch.zeros(CROSS),
    }
    return {"image_proj": projection, "ip_adapter": attention}


def pipe_with_encoder() -> Any:
    pipe = pipeline()
    size = {"height": 8, "width": 8}
    pipe.register_modules(
        image_encoder=image_encoder(),
        feature_extractor=CLIPImageProcessorPil(size=size, crop_size=size),
    )
    return pipe


def with_image(pipe: Any) -> Tensor:
    image = torch.rand(1, 3, 8, 8, generator=torch.Generator().manual_seed(1))
    return picture(pipe, ip_adapter_image=image)


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return save_adapter(tmp_path_factory.mktemp("ip"), {"unet": adapt(sd15_unet())}).parent


@pytest.fixture(scope="module")
def expected(folder: Path) -> Tensor:
    """What an IP-Adapter draws on a UNet whose weights have our update in them."""
    pipe = pipe_with_encoder()
    pipe.load_snella_weights(folder)
    pipe.fuse_snella()
    pipe.load_ip_adapter(ip_adapter(sd15_unet()), subfolder="", weight_name="")
    return with_image(pipe)


@pytest.mark.parametrize("order", ["ours first", "theirs first", "processors first"])
def test_either_order(order: str, folder: Path, expected: Tensor) -> None:
    pipe = pipe_with_encoder()
    weights = ip_adapter(pipe.unet)
    if order == "theirs first":
        pipe.load_ip_adapter(weights, subfolder="", weight_name="")
        alone = with_image(pipe)
        pipe.load_snella_weights(folder)
    else:
        pipe.load_snella_weights(folder)
        alone = picture(pipe)
        if order == "processors first":
            SnellaAttnProcessor.install(pipe.unet)
        pipe.load_ip_adapter(weights, subfolder="", weight_name="")
    drawn = with_image(pipe)
    torch.testing.assert_close(drawn, expected, rtol=0, atol=1e-4)
    assert not torch.allclose(drawn, alone, rtol=0, atol=1e-3)
    pipe.set_ip_adapter_scale(0.0)
    without = with_image(pipe)
    assert not torch.allclose(without, drawn, rtol=0, atol=1e-3)
    pipe.unload_snella_weights()
    assert not torch.allclose(with_image(pipe), without, rtol=0, atol=1e-3)
