"""Draws the scenes of the embedded ViT, with far more variation than those of the embedded base.

Objects come from the Noto Color Emoji font (SIL OFL 1.1) and are shown at any place, at 0.3 to 0.95
of the picture's width, tilted by up to 45 degrees and mirrored; up to four of them stand beside
each other. Pictures are (64, 64, 3) uint8.
"""

from dataclasses import dataclass
from pathlib import Path

import numpy as np
from embedded_base.data import NATURAL, Composite, tint
from embedded_base.scenes import SCENES, SIZE
from PIL import Image, ImageDraw, ImageFont

from .world import COLOR_NAMES, COUNTS, GLYPHS, IGNORED, NOTHING, OBJECTS, PLACES, PLAIN, Scene

SPRITE = 72  # pixels of the longer side of a kept glyph
BANK = 120  # scenes kept per background
TILT = 45.0  # degrees
QUADRANTS = ((0, 0), (0, 1), (1, 0), (1, 1))


def load_sprites(font_path: Path) -> dict[tuple[str, str], Image.Image]:
    """Every glyph in every colour, premultiplied RGBa, cropped, SPRITE pixels long.

    Raises:
        ValueError: The font draws nothing for an object.
    """
    font = ImageFont.truetype(str(font_path), 109)
    sprites = {}
    for name, character in GLYPHS.items():
        canvas = Image.new("RGBA", (200, 160), (0, 0, 0, 0))
        ImageDraw.Draw(canvas).text((10, 10), character, font=font, embedded_color=True)
        box = canvas.getbbox()
        if box is None:
            raise ValueError(
                f"{font_path} must have a glyph for {name!r} ({character}); it drew none"
            )
        glyph = canvas.crop(box)
        scale = SPRITE / max(glyph.size)
        size = [max(round(side * scale), 1) for side in glyph.size]
        for color in COLOR_NAMES:
            sprites[name, color] = tint(glyph, color).convert("RGBa").resize(size, Image.BOX)
    return sprites


def two_tone(sprite: Image.Image, rng: np.random.Generator) -> Image.Image:
    """Two random colours over the sprite's own luminance, the contrast random."""
    rgba = np.asarray(sprite).astype(np.float32)
    alpha = rgba[..., 3:] / 255
    light = rgba[..., :3].mean(-1, keepdims=True) / np.maximum(alpha, 1e-3)
    low, high = np.percentile(light[alpha > 0.5], [5, 95])
    t = (light - low) / max(high - low, 1.0)
    t = np.clip((t - 0.5) * rng.uniform(1, 4) + 0.5, 0, 1)
    ends = rng.uniform(0, 255, (2, 1 if rng.random() < 0.5 else 3))
    rgba[..., :3] = (ends[0] * t + ends[1] * (1 - t)) * alpha
    return Image.fromarray(rgba.clip(0, 255).astype(np.uint8))


class ScenePainter:
    """A bank of backgrounds and sprites.

    Args:
        font_path: NotoColorEmoji.ttf.
        seed: Of the bank.
    """

    def __init__(self, font_path: Path, seed: int):
        rng = np.random.default_rng([seed, 11])
        self.places = {
            name: np.stack([np.clip(scene(rng), 0, 255).astype(np.uint8) for _ in range(BANK)])
            for name, scene in SCENES.items()
        }
        self.sprites = load_sprites(font_path)

    def _ground(self, place: str, rng: np.random.Generator) -> np.ndarray:
        if place == PLAIN:
            grey = rng.random() < 0.5
            return np.full((SIZE, SIZE, 3), rng.uniform(0, 255, 1 if grey else 3), np.float32)
        ground = self.places[place][rng.integers(BANK)].astype(np.float32)
        return ground[:, ::-1] if rng.random() < 0.5 else ground

    def paint(
        self, scene: Scene, rng: np.random.Generator, spread: float = 1.0
    ) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
        """One picture, its geometry and its cover.

        Args:
            scene: What to show.
            rng: Source of all variation.
            spread: How much tilt and size vary, 0 (upright and large) to 1.

        Returns:
            The picture; (5,) float32: centre of all copies in [-1, 1] of the picture (x, y), mean
            size as a share of its width, sine and cosine of the tilt; and (8, 8) float32: the share
            of each patch of 8x8 pixels that objects cover.
        """
        image = self._ground(scene.what.background, rng)
        sprite = self.sprites[scene.what.noun, scene.what.color]
        if scene.two_tone:
            sprite = two_tone(sprite, rng)
        if rng.random() < 0.3:
            sprite = sprite.transpose(Image.FLIP_LEFT_RIGHT)
        tilt = spread * rng.uniform(-TILT, TILT)
        turned = sprite.rotate(tilt, Image.BILINEAR, expand=True)
        turned = turned.crop(turned.getbbox())
        area = SIZE if scene.count == 1 else SIZE // 2
        spots = QUADRANTS[:1]
        if scene.count > 1:
            spots = [QUADRANTS[k] for k in rng.permutation(4)[: scene.count]]
        places, cover = [], np.zeros((SIZE, SIZE), np.float32)
        for row, column in spots:
            low, high = (0.45, 0.95) if scene.count == 1 else (0.7, 1.0)
            share = high - spread * (high - low) * rng.random()
            scale = area * share / max(turned.size)
            small = turned.resize([max(round(s * scale), 1) for s in turned.size], Image.BOX)
            left = column * area + int(rng.integers(0, area - small.width + 1))
            top = row * area + int(rng.integers(0, area - small.height + 1))
            pixels = np.asarray(small).astype(np.float32)
            window = image[top : top + small.height, left : left + small.width]
            window *= 1 - pixels[..., 3:] / 255
            window += pixels[..., :3]
            cover[top : top + small.height, left : left + small.width] = pixels[..., 3] / 255
            places.append((left + small.width / 2, top + small.height / 2, max(small.size)))
        x, y, size = np.mean(places, 0)
        angle = np.deg2rad(tilt)
        geometry = [2 * x / SIZE - 1, 2 * y / SIZE - 1, size / SIZE, np.sin(angle), np.cos(angle)]
        patches = cover.reshape(8, 8, 8, 8).mean((1, 3))
        return image.clip(0, 255).astype(np.uint8), np.array(geometry, np.float32), patches


def sample_scene(rng: np.random.Generator, held_out: bool = False, spread: float = 1.0) -> Scene:
    """A random scene whose combination of object, colour and place is (not) held out.

    Args:
        rng: Source of the choice.
        spread: Share of the usual 30 % that show several copies, 0 to 1.
        held_out: The fixed tenth of the coloured combinations that training never sees.
    """
    while True:
        color = NATURAL if rng.random() < 0.45 else str(rng.choice(COLOR_NAMES[:-1]))
        place = PLAIN if rng.random() < 0.2 else str(rng.choice(PLACES[:-1]))
        what = Composite(str(rng.choice(OBJECTS)), color, place)
        if what.held_out == held_out:
            break
    count = 1 if rng.random() > 0.3 * spread else int(rng.choice(COUNTS[1:]))
    return Scene(what, count, two_tone=not held_out and rng.random() < 0.15)


def labels_of(scene: Scene) -> list[int]:
    """Indices of object, colour (IGNORED where two-tone), place and count."""
    color = IGNORED if scene.two_tone else COLOR_NAMES.index(scene.what.color)
    place = PLACES.index(scene.what.background)
    return [OBJECTS.index(scene.what.noun), color, place, COUNTS.index(scene.count)]


@dataclass(frozen=True)
class Batch:
    """Pictures and what they show.

    Args:
        images: (B, 64, 64, 3) uint8.
        labels: (B, 4) int64: object, colour, place, count; IGNORED where there is no answer.
        geometry: (B, 5) float32, see `ScenePainter.paint`.
        patches: (B, 64) int64: the object that a patch shows, `NOTHING`, or IGNORED at its edge.
    """

    images: np.ndarray
    labels: np.ndarray
    geometry: np.ndarray
    patches: np.ndarray


def paint_batch(
    painter: ScenePainter,
    rng: np.random.Generator,
    size: int,
    held_out: bool = False,
    spread: float = 1.0,
) -> Batch:
    """As many new scenes, see `sample_scene` and `ScenePainter.paint`."""
    scenes = [sample_scene(rng, held_out, spread) for _ in range(size)]
    painted = [painter.paint(scene, rng, spread) for scene in scenes]
    images, geometry, cover = (np.stack(part) for part in zip(*painted, strict=True))
    labels = np.array([labels_of(scene) for scene in scenes])
    cover = cover.reshape(size, -1)
    patches = np.where(cover > 0.4, labels[:, :1], np.where(cover < 0.05, NOTHING, IGNORED))
    return Batch(images, labels, geometry, patches)
