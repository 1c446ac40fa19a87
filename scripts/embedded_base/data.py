"""The toy world: emoji artwork on procedural scenes, and its captions.

Images are (64, 64, 3) uint8. Objects come from the Noto Color Emoji font (SIL OFL 1.1), scenes
from a few lines of arithmetic (scenes.py); nothing is downloaded.
"""

import hashlib
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from PIL import Image, ImageDraw, ImageFont

from .scenes import SCENES, SIZE

# class -> (glyph, nouns that captions may use, the first one being the class name)
CLASSES: dict[str, tuple[str, tuple[str, ...]]] = {
    "cat": ("🐱", ("cat", "cat", "kitten")),
    "dog": ("🐶", ("dog", "dog", "puppy")),
    "duck": ("🐤", ("duck", "duck", "rubber duck")),
    "teapot": ("🫖", ("teapot",)),
    "backpack": ("🎒", ("backpack", "backpack", "bag")),
    "toy": ("🧸", ("toy", "teddy bear", "plushie", "stuffed animal")),
    "car": ("🚗", ("car",)),
    "robot": ("🤖", ("robot",)),
    "fox": ("🦊", ("fox",)),
    "panda": ("🐼", ("panda",)),
    "penguin": ("🐧", ("penguin",)),
    "owl": ("🦉", ("owl",)),
    "fish": ("🐠", ("fish",)),
    "mushroom": ("🍄", ("mushroom",)),
    "cactus": ("🌵", ("cactus",)),
    "sneaker": ("👟", ("sneaker", "sneaker", "shoe")),
    "clock": ("⏰", ("clock",)),
    "vase": ("🏺", ("vase",)),
    "rocket": ("🚀", ("rocket",)),
    "house": ("🏠", ("house",)),
    # from here on: only in the second phase of training
    "rabbit": ("🐰", ("rabbit", "rabbit", "bunny")),
    "frog": ("🐸", ("frog",)),
    "boot": ("🥾", ("boot",)),
    "candle": ("🕯️", ("candle",)),
    "can": ("🥫", ("can",)),
    "sunglasses": ("🕶️", ("sunglasses", "glasses")),
    "bowl": ("🥣", ("bowl",)),
    "guitar": ("🎸", ("guitar",)),
    "apple": ("🍎", ("apple",)),
    "monster": ("👾", ("monster", "cartoon", "monster toy")),
}
EARLY_CLASSES = tuple(CLASSES)[:20]

# colour word -> (dark, middle, light) RGB of the ramp that replaces the glyph's luminance
COLORS: dict[str, tuple[tuple[int, int, int], ...]] = {
    "red": ((70, 0, 8), (222, 30, 38), (255, 178, 170)),
    "orange": ((96, 36, 0), (250, 130, 10), (255, 216, 160)),
    "yellow": ((110, 84, 0), (250, 214, 20), (255, 248, 190)),
    "green": ((0, 50, 16), (30, 170, 60), (186, 246, 186)),
    "blue": ((0, 14, 84), (30, 90, 232), (174, 208, 255)),
    "purple": ((44, 0, 76), (142, 44, 196), (226, 184, 250)),
    "pink": ((120, 14, 72), (250, 104, 174), (255, 218, 236)),
    "white": ((120, 124, 132), (226, 228, 232), (255, 255, 255)),
    "black": ((0, 0, 0), (36, 36, 42), (120, 120, 130)),
}
NATURAL = "natural"  # the glyph's own colours; captions then use no colour word

BACKGROUNDS: dict[str, tuple[str, ...]] = {
    "snow": ("in the snow", "in the snow", "on snow"),
    "beach": ("on the beach", "on the beach", "on a sandy beach"),
    "grass": ("on top of green grass", "on the grass", "in a meadow"),
    "night": ("at night", "under the night sky", "in the night sky"),
    "brick": ("in front of a brick wall", "with a brick wall in the background"),
    "sea": ("in the sea", "floating on top of water", "in the water"),
    "jungle": ("in the jungle", "in the forest"),
    "desert": ("in the desert",),
    "fabric": ("on top of pink fabric", "on pink fabric"),
    "wood": ("on a wooden floor", "on top of a wooden floor"),
    "city": ("with a city in the background", "in the city", "on the street"),
    "cobblestone": ("on a cobblestone street", "on cobblestones"),
    "white": ("on a white background", "on a plain white background"),
    # from here on: only in the second phase of training
    "mountain": ("with a mountain in the background", "in the mountains"),
    "autumn": ("with autumn leaves in the background", "in autumn leaves"),
    "wheat": ("with a wheat field in the background", "in a wheat field"),
    "rug": ("on top of a purple rug", "on a purple rug"),
}
EARLY_BACKGROUNDS = tuple(BACKGROUNDS)[:13]

PREFIXES = ("a photo of ", "a photo of ", "a photo of ", "a picture of ", "an image of ", "", "")
RARE_TOKENS = ("sks", "zwx", "ohwx", "xyz", "qzv", "vbk", "jkf", "hta", "ttl", "olis", "pll", "uue")
SYLLABLES = tuple(c + v for c in "bcdfghjklmnpqrstvwxyz" for v in "aeiou")


@dataclass(frozen=True)
class Composite:
    """What a composite shows: keys of CLASSES, COLORS (or NATURAL) and BACKGROUNDS."""

    noun: str
    color: str
    background: str

    @property
    def held_out(self) -> bool:
        """A fixed tenth of the coloured combinations that training never sees."""
        key = f"{self.noun}/{self.color}/{self.background}".encode()
        return self.color != NATURAL and hashlib.sha256(key).digest()[0] < 26


ALL_COMBINATIONS = tuple(
    Composite(n, c, b) for n in CLASSES for c in (*COLORS, NATURAL) for b in BACKGROUNDS
)


def sha256_of(path: Path) -> str:
    """Hex digest of a file, for the provenance card."""
    return hashlib.sha256(path.read_bytes()).hexdigest()


def load_glyphs(font_path: Path) -> dict[str, Image.Image]:
    """Draw each class's glyph once: tight-cropped RGBA pictures of about 120 pixels."""
    font = ImageFont.truetype(str(font_path), 109)
    glyphs = {}
    for name, (character, _) in CLASSES.items():
        canvas = Image.new("RGBA", (160, 160), (0, 0, 0, 0))
        ImageDraw.Draw(canvas).text((10, 10), character, font=font, embedded_color=True)
        glyphs[name] = canvas.crop(canvas.getbbox())
    return glyphs


def tint(glyph: Image.Image, color: str) -> Image.Image:
    """Replace the glyph's colours by a ramp over its own luminance; alpha stays."""
    if color == NATURAL:
        return glyph
    rgba = np.asarray(glyph).astype(np.float32)
    luminance = rgba[..., :3] @ np.array([0.299, 0.587, 0.114], np.float32)
    opaque = rgba[..., 3] > 128
    low, mid, high = np.percentile(luminance[opaque], [3, 50, 99])
    stops = [min(low, mid - 60), mid, max(high, mid + 60)]  # the median gets the pure colour
    ramp = np.array(COLORS[color], np.float32)
    out = rgba.copy()
    for k in range(3):
        out[..., k] = np.interp(luminance, stops, ramp[:, k])
    return Image.fromarray(out.astype(np.uint8), "RGBA")


class Painter:
    """Draws composites from a bank of scenes and tinted glyphs.

    Args:
        font_path: NotoColorEmoji.ttf.
        seed: Of the scene bank.
        bank: Scenes kept per background.
    """

    def __init__(self, font_path: Path, seed: int, bank: int = 160):
        rng = np.random.default_rng(seed)
        self.scenes = {
            name: np.stack([np.clip(scene(rng), 0, 255).astype(np.uint8) for _ in range(bank)])
            for name, scene in SCENES.items()
        }
        glyphs = load_glyphs(font_path)
        self.objects = {
            (noun, color): tint(glyph, color).convert("RGBa")
            for noun, glyph in glyphs.items()
            for color in (*COLORS, NATURAL)
        }

    def paint(self, what: Composite, rng: np.random.Generator, jitter: float = 1.0) -> np.ndarray:
        """One composite, (64, 64, 3) uint8.

        Args:
            what: Class, colour and background.
            rng: Source of all variation.
            jitter: 0 is centred at one size, 1 small shifts; above 1 also mirrored, tilted by up
                to 8 degrees and 0.55 to 0.8 of the picture's width.
        """
        bank = self.scenes[what.background]
        scene = bank[rng.integers(len(bank))].astype(np.float32)
        if rng.random() < 0.5:
            scene = scene[:, ::-1]
        scene = scene * rng.uniform(0.94, 1.06)
        glyph = self.objects[what.noun, what.color]
        share = 0.72 + 0.05 * jitter * rng.uniform(-1, 1) - 0.07 * max(jitter - 1, 0)
        if jitter > 1:
            glyph = glyph.transpose(Image.FLIP_LEFT_RIGHT) if rng.random() < 0.3 else glyph
            glyph = glyph.rotate(rng.uniform(-8, 8), Image.BILINEAR, expand=True)
            glyph = glyph.crop(glyph.getbbox())
            share = rng.uniform(0.55, 0.8)
        scale = SIZE * share / max(glyph.size)
        small = glyph.resize([max(round(s * scale), 1) for s in glyph.size], Image.BOX)
        dx, dy = np.round(2.5 * jitter * rng.uniform(-1, 1, 2)).astype(int)
        left = int(np.clip((SIZE - small.width) // 2 + dx, 0, SIZE - small.width))
        top = int(np.clip((SIZE - small.height) // 2 + 2 + dy, 0, SIZE - small.height))
        layer = np.zeros((SIZE, SIZE, 4), np.float32)
        layer[top : top + small.height, left : left + small.width] = np.asarray(small)
        scene = self._shadow(scene, left, top, small)
        image = layer[..., :3] + scene * (1 - layer[..., 3:] / 255)
        return np.clip(image, 0, 255).astype(np.uint8)

    @staticmethod
    def _shadow(scene: np.ndarray, left: int, top: int, small: Image.Image) -> np.ndarray:
        y, x = np.mgrid[0:SIZE, 0:SIZE].astype(np.float32)
        cx, cy = left + small.width / 2, top + small.height - 1
        r = ((x - cx) / (small.width * 0.5)) ** 2 + ((y - cy) / 4.5) ** 2
        return scene * (1 - 0.45 * np.exp(-r))[..., None]


def sample_combination(
    rng: np.random.Generator,
    classes: tuple[str, ...] = EARLY_CLASSES,
    backgrounds: tuple[str, ...] = EARLY_BACKGROUNDS,
) -> Composite:
    """A combination that is not held out; 45 % carry no colour word."""
    colors = tuple(COLORS)
    while True:
        color = NATURAL if rng.random() < 0.45 else str(rng.choice(colors))
        what = Composite(str(rng.choice(classes)), color, str(rng.choice(backgrounds)))
        if not what.held_out:
            return what


def rare_word(rng: np.random.Generator) -> str:
    """An identifier such as 'sks', or a random made-up word."""
    if rng.random() < 0.5:
        return str(rng.choice(RARE_TOKENS))
    return "".join(rng.choice(SYLLABLES, rng.integers(1, 4)))


def caption(what: Composite, rng: np.random.Generator) -> str:
    """One of the many captions of a composite; 22 % carry a rare word before the noun."""
    nouns = CLASSES[what.noun][1]
    words = [str(rng.choice(nouns))]
    if what.color != NATURAL:
        words.insert(0, what.color)
    if rng.random() < 0.22:
        words.insert(rng.integers(0, len(words)), rare_word(rng))
    article = str(rng.choice(("a", "a", "a", "the", "one", "")))
    where = "" if rng.random() < 0.12 else str(rng.choice(BACKGROUNDS[what.background]))
    text = " ".join(w for w in (article, *words, where) if w)
    return str(rng.choice(PREFIXES)) + text


def plain_prompt(what: Composite) -> str:
    """The canonical prompt used for scoring: 'a photo of a red teapot on the beach'."""
    color = "" if what.color == NATURAL else f"{what.color} "
    return f"a photo of a {color}{what.noun} {BACKGROUNDS[what.background][0]}"
