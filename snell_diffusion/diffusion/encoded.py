"""Photos as latents and prompts as embeddings: encoded once where that is enough, or when asked.

What is encoded once is kept in memory, and on disk where the run has a `cache_dir`. One picture and
one prompt at a time, so that no entry depends on what else a run encodes.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from snell_diffusion.diffusion.cache import Cache, Tensors, model_digest, tokenizer_digest
from snell_diffusion.diffusion.config import TrainConfig
from snell_diffusion.diffusion.data import Photo
from snell_diffusion.diffusion.families import Conditions, Family
from snell_diffusion.diffusion.framing import Size, View, geometry, to_unit
from snell_diffusion.diffusion.masks import loss_weights
from snell_diffusion.diffusion.pixels import read_mask_pixels, read_pixels
from snell_diffusion.diffusion.setup import Model
from snell_diffusion.diffusion.views import Draws
from snell_diffusion.training.randomness import normal


def finite_rows(tensor: Tensor) -> list[bool]:
    """Which rows of [B, ...] hold finite values only."""
    sound: list[bool] = tensor.isfinite().flatten(1).all(1).tolist()
    return sound


def text_fingerprint(family: Family, pipe: Any) -> dict[str, str]:
    """What embeddings of prompts depend on: all of a pipeline that is neither denoiser nor VAE.

    Also encoders that are never adapted, such as T5 beside the CLIPs.
    """
    plain = {k: v for k, v in pipe.config.items() if isinstance(v, (bool, int, float, str))}
    found = {"family": family.name, **{k: str(v) for k, v in plain.items() if k[0] != "_"}}
    for name, part in pipe.components.items():
        if name.startswith("tokenizer") and part is not None:
            found[name] = tokenizer_digest(part)
        elif isinstance(part, nn.Module) and name not in (family.denoiser, "vae"):
            found[name] = model_digest(part)
    return found


class TextTable:
    """Encoded prompts: once, where the text encoders are frozen; anew each time, where they train.

    Args:
        model: The base.
        prompts: All that will be asked for.
        cached: Whether they are encoded now.
        cache: Where what is encoded now may lie already.

    Attributes:
        problems: Cached prompts whose embedding holds NaN or infinite values.
    """

    def __init__(self, model: Model, prompts: Sequence[str], cached: bool, cache: Cache) -> None:
        self._model, self._cache = model, cache
        self._table: dict[str, Conditions] | None = None
        self.problems: list[str] = []
        if cached:
            self._table = {prompt: self._kept(prompt) for prompt in dict.fromkeys(prompts)}

    def __call__(self, prompts: Sequence[str]) -> Conditions:
        """Conditions of the prompts, one row each."""
        if self._table is None:
            return self._encode(prompts)
        rows = [self._table[prompt] for prompt in prompts]
        return {name: torch.cat([row[name] for row in rows]) for name in rows[0]}

    @torch.no_grad()
    def _kept(self, prompt: str) -> Conditions:
        depends_on = {"prompt": prompt, **self._encoders()} if self._cache.used else {}
        found = self._cache.get("text", depends_on, lambda: self._encode([prompt]))
        if not all(all(finite_rows(rows)) for rows in found.values()):
            self.problems.append(f"prompt '{prompt}'")
        return {name: rows.to(self._model.device) for name, rows in found.items()}

    def _encoders(self) -> dict[str, str]:
        model = self._model
        return self._cache.encoder("text", lambda: text_fingerprint(model.family, model.pipe))

    def _encode(self, prompts: Sequence[str]) -> Conditions:
        return self._model.encode_text(prompts)


@dataclass(frozen=True)
class Shown:
    """One photo as the denoiser is trained on it.

    Attributes:
        latents: [C, h, w].
        weights: Weight of every latent's squared error, [1, h, w].
        geometry: See `framing.geometry`, [6].
    """

    latents: Tensor
    weights: Tensor
    geometry: Tensor


class Latents:
    """The latents of a stream of photos: kept, or encoded when asked for.

    Args:
        model: The base.
        draws: The stream; says at which shape each photo is trained.
        config: Flips, cache, masks, seed.
        cache: Where what is kept may lie already.

    Attributes:
        problems: Photos that are kept and whose latents hold NaN or infinite values.
    """

    def __init__(self, model: Model, draws: Draws, config: TrainConfig, cache: Cache) -> None:
        self._model, self._draws, self._config, self._cache = model, draws, config, cache
        self._kept: dict[tuple[int, bool], tuple[Tensor, Tensor, Tensor]] = {}
        self.problems: list[str] = []

    def fill(self) -> None:
        """Encode every photo now, as often as it is shown in another way."""
        for flip in (False, True) if self._config.random_flip else (False,):
            for index in range(len(self._draws.photos)):
                self._keep(index, View(flip=flip))

    @torch.no_grad()
    def _keep(self, index: int, view: View) -> tuple[Tensor, Tensor, Tensor]:
        photo = self._draws.photos[index]
        shape = self._draws.shape_of(photo)
        depends_on = self._depends_on(photo, shape, view) if self._cache.used else {}
        found = self._cache.get("latents", depends_on, lambda: self._encode(photo, shape, view))
        mean, std = (found[name].to(self._model.device) for name in ("mean", "std"))
        weights = self._weights(read_mask_pixels(photo, shape, view), mean)
        self._kept[index, view.flip] = mean, std, weights
        if not all(finite_rows((mean + std)[None])):
            self.problems.append(f"photo '{photo.path}'")
        return mean, std, weights

    def _depends_on(self, photo: Photo, shape: Size, view: View) -> dict[str, object]:
        return {
            "photo": photo.digest,
            "shape": shape,
            "crop": view.crop,
            "flip": view.flip,
            "family": self._model.family.name,
            "vae": self._cache.encoder("vae", lambda: model_digest(self._model.pipe.vae)),
        }

    def _encode(self, photo: Photo, shape: Size, view: View) -> Tensors:
        mean, std = self._posterior(read_pixels(photo, shape, view)[None])
        return {"mean": mean[0], "std": std[0]}

    def _posterior(self, pixels: Tensor) -> tuple[Tensor, Tensor]:
        self._model.phases.enter("latents")
        return self._model.family.encode_images(self._model.pipe, to_unit(pixels))

    def _weights(self, mask: Tensor, latents: Tensor) -> Tensor:
        size = (latents.shape[-2], latents.shape[-1])
        return loss_weights(mask, size, self._config.unmasked_weight).to(latents.device)

    @torch.no_grad()
    def draw(self, index: int, view: View, pixels: Tensor | None, *counters: int) -> Shown:
        """A sample of the latents of photo `index`.

        Args:
            index: Which photo.
            view: How it is shown.
            pixels: It as shown, uint8 [3 or 4, H, W], see `Draws.read`; None takes what is kept.
            counters: What the sample's noise is drawn from.
        """
        if pixels is None:
            mean, std, weights = self._kept[index, view.flip]
        else:
            mean, std = (part[0] for part in self._posterior(pixels[None, :3]))
            white = torch.full_like(pixels[:1], 255)
            weights = self._weights(pixels[3:] if len(pixels) > 3 else white, mean)
        purpose = f"{self._draws.name}-posterior"
        noise = normal(tuple(mean.shape), self._config.seed, purpose, *counters)
        return self._shown(index, view, mean + std * noise.to(mean.device), weights)

    def mean(self, index: int) -> Shown:
        """Photo `index` without chance: cut at the centre, the mean of its latents."""
        mean, _, weights = self._kept.get((index, False)) or self._keep(index, View())
        return self._shown(index, View(), mean, weights)

    def _shown(self, index: int, view: View, latents: Tensor, weights: Tensor) -> Shown:
        photo = self._draws.photos[index]
        told = geometry(photo.size, self._draws.shape_of(photo), view)
        return Shown(latents, weights, told.to(latents.device))
