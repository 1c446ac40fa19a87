"""Every distinct Linear shape of the real models, with the tokens it meets there.

Shapes are (in features, out features). Tokens are those of one picture: 4096, 1024 and 256 at the
three sizes of a UNet, 4096 in transformers at 1024 pixels, 77 in a prompt; of 8 pictures of 197 or
257 tokens in a ViT. All UNet shapes are measured at 256 tokens too, where the kernel weighs most.
"""

from typing import NamedTuple


class Linear(NamedTuple):
    """One Linear and how many tokens it multiplies."""

    inputs: int
    outputs: int
    tokens: int

    @property
    def name(self) -> str:
        return f"{self.inputs}x{self.outputs}@{self.tokens}"

    @property
    def multiply_adds(self) -> int:
        """Of one product."""
        return self.inputs * self.outputs * self.tokens


def _mlp(width: int, tokens: int, gated: bool = False) -> list[Linear]:
    """Feed-forward: to four times the width and back; twice that on the way out where gated."""
    up = 8 * width if gated else 4 * width
    return [Linear(width, up, tokens), Linear(4 * width, width, tokens)]


def _unet(sizes: dict[int, int], text: int) -> list[Linear]:
    found = []
    for width, tokens in sizes.items():
        found += [Linear(width, width, tokens), Linear(text, width, 77)]
        found += _mlp(width, tokens, gated=True)
    return found + [Linear(i, o, 256) for i, o, _ in found]


def _vit(width: int, tokens: int) -> list[Linear]:
    return [Linear(width, width, tokens), *_mlp(width, tokens)]


MODELS: dict[str, list[Linear]] = {
    "SD 1.5": _unet({320: 4096, 640: 1024, 1280: 256}, 768),
    "SDXL": _unet({640: 4096, 1280: 1024}, 2048),
    "SD 3": [Linear(1536, 1536, 4096), Linear(1536, 1536, 77), *_mlp(1536, 4096)],
    "FLUX": [Linear(3072, 3072, 4096), *_mlp(3072, 4096), Linear(15360, 3072, 4096)],
    "ViT-B/16": _vit(768, 8 * 197),
    "ViT-L/16": _vit(1024, 8 * 197),
    "ViT-H/14": _vit(1280, 8 * 257),
}


def linears() -> dict[Linear, list[str]]:
    """Every distinct linear with the models that have it."""
    found: dict[Linear, list[str]] = {}
    for model, shapes in MODELS.items():
        for linear in shapes:
            users = found.setdefault(linear, [])
            if model not in users:
                users.append(model)
    return found
