"""CLIP-I, CLIP-T, DINO and diversity of pictures: means of cosines, as in arXiv:2208.12242, sec. 4.

    CLIP-I, DINO = mean over pictures i and photos j of <f(i), f(j)>     f: image features, |f| = 1
    CLIP-T       = mean over pictures i of <f(i), g(prompt of i)>        g: text features, |g| = 1
    diversity    = mean over pairs of pictures of one prompt of their distance

f is CLIP's projected image feature, or for DINO the class token of the last layer. CLIP-T's prompt
is without the rare token, which the text encoder does not know. The distance is 1 - <f(i), f(j)>
where there is a DINO model, else the root mean square between VAE latents. Higher is better in all.
"""

from collections.abc import Callable, Sequence
from itertools import combinations
from typing import Any

import torch
from PIL import Image
from torch import Tensor
from torch.nn.functional import normalize

from snell_diffusion.errors import SnellaBaseError

_BATCH = 32
Pictures = Sequence[Image.Image]


class ImageFeatures:
    """Unit image features of a transformers model with its own image processor.

    Args:
        source: Hub id or folder.
        kind: "clip": a CLIPModel. "dino": a model whose last layer begins with a class token.
        device: Where it computes.

    Raises:
        SnellaBaseError: No such model, or not of that kind.
    """

    def __init__(self, source: str, kind: str, device: torch.device) -> None:
        from transformers import AutoImageProcessor, AutoModel

        self.source, self.kind = source, kind
        try:
            self.model: Any = AutoModel.from_pretrained(source, use_safetensors=True).eval()
            self._processor = AutoImageProcessor.from_pretrained(source, backend="pil")
        except (OSError, ValueError) as error:
            raise SnellaBaseError(
                f"--{kind} {source}: cannot be loaded ({str(error).partition(chr(10))[0][:200]}); "
                f"give a hub id or a folder with safetensors weights and preprocessor_config.json"
            ) from error
        if kind == "clip" and not hasattr(self.model, "get_text_features"):
            raise SnellaBaseError(
                f"--clip {source}: expected a CLIP model with image and text features, got "
                f"{type(self.model).__name__}"
            )
        self.model.to(device)
        self.device = device

    @torch.no_grad()
    def __call__(self, pictures: Pictures) -> Tensor:
        """Features of RGB pictures of any sizes, [B, D] of length 1, on the CPU."""
        rows = []
        for start in range(0, len(pictures), _BATCH):
            some = list(pictures[start : start + _BATCH])
            pixels = self._processor(images=some, return_tensors="pt")["pixel_values"]
            rows.append(self._features(pixels.to(self.device)).float().cpu())
        return normalize(torch.cat(rows), dim=-1)

    def _features(self, pixels: Tensor) -> Tensor:
        if self.kind == "clip":
            return _pooled(self.model.get_image_features(pixel_values=pixels))
        last: Tensor = self.model(pixel_values=pixels).last_hidden_state
        return last[:, 0]


class Clip(ImageFeatures):
    """A CLIP model: image features, and text features in the same space."""

    def __init__(self, source: str, device: torch.device) -> None:
        from transformers import AutoTokenizer

        super().__init__(source, "clip", device)
        self._tokenizer = AutoTokenizer.from_pretrained(source)

    @torch.no_grad()
    def text(self, prompts: Sequence[str]) -> Tensor:
        """Features of prompts, [B, D] of length 1, on the CPU; what is too long is cut."""
        tokens = self._tokenizer(
            list(prompts),
            padding=True,
            truncation=True,
            max_length=self.model.config.text_config.max_position_embeddings,
            return_tensors="pt",
        ).to(self.device)
        found = self.model.get_text_features(
            input_ids=tokens["input_ids"], attention_mask=tokens["attention_mask"]
        )
        return normalize(_pooled(found).float().cpu(), dim=-1)


def _pooled(found: Any) -> Tensor:
    """Transformers 5 wraps the projected feature into an output, before it was the tensor."""
    features: Tensor = found if isinstance(found, Tensor) else found.pooler_output
    return features


def likeness(pictures: Tensor, photos: Tensor) -> float:
    """Mean cosine between unit features of pictures [B, D] and of photos [N, D]: CLIP-I, DINO."""
    return float((pictures @ photos.T).mean())


def obedience(pictures: Tensor, prompts: Tensor) -> float:
    """Mean cosine between unit features of pictures [B, D] and of their prompts [B, D]: CLIP-T."""
    return float((pictures * prompts).sum(-1).mean())


def diversity(values: Tensor, groups: Sequence[int], distance: Callable[..., Tensor]) -> float:
    """Mean distance of the pairs of one group, averaged over groups.

    Args:
        values: One row per picture, [B, ...].
        groups: Which prompt each picture was drawn for.
        distance: Of two rows.

    Raises:
        ValueError: No group has two pictures.
    """
    means = []
    for group in dict.fromkeys(groups):
        rows = [values[i] for i, other in enumerate(groups) if other == group]
        pairs = [float(distance(a, b)) for a, b in combinations(rows, 2)]
        if pairs:
            means.append(sum(pairs) / len(pairs))
    if not means:
        raise ValueError("diversity needs two pictures of a prompt at least")
    return sum(means) / len(means)


def cosine_distance(a: Tensor, b: Tensor) -> Tensor:
    """1 - <a, b> of unit vectors: 0 where they are equal, 2 at most."""
    return 1 - (a * b).sum()


def root_mean_square(a: Tensor, b: Tensor) -> Tensor:
    """Root of the mean squared difference of two tensors of one shape."""
    return (a - b).square().mean().sqrt()
