"""The toy world: emoji artwork on procedural scenes, and its captions.

Images are (64, 64, 3) uint8. Objects come from the Noto Color Emoji font (SIL OFL 1.1), scenes
from the few lines of arithmetic below; nothing is downloaded.
"""

import hashlib
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from PIL import Image, ImageDraw, ImageFont

SIZE = 64  # pixels, width and height of every picture

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
}

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
}

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


def _noise(rng: np.random.Generator, cells_y: int, cells_x: int) -> np.ndarray:
    """Smooth noise in about [-1, 1], (64, 64), with that many bumps per side."""
    grid = Image.fromarray(rng.uniform(-1, 1, (cells_y, cells_x)).astype(np.float32))
    return np.asarray(grid.resize((SIZE, SIZE), Image.BICUBIC))


def _vertical(top: tuple[int, ...], bottom: tuple[int, ...]) -> np.ndarray:
    """A vertical gradient, (64, 64, 3) float32 in [0, 255]."""
    t = np.linspace(0, 1, SIZE, dtype=np.float32)[:, None, None]
    row = (1 - t) * np.array(top, np.float32) + t * np.array(bottom, np.float32)
    return np.broadcast_to(row, (SIZE, SIZE, 3)).copy()


def _below(image: np.ndarray, ground: np.ndarray, horizon: np.ndarray) -> np.ndarray:
    """Put `ground` under a horizon line given per column, in rows; softened over 1.5 rows."""
    rows = np.arange(SIZE, dtype=np.float32)[:, None]
    mask = np.clip((rows - horizon[None, :]) / 1.5, 0, 1)[..., None]
    return image * (1 - mask) + ground * mask


def _snow(rng):
    horizon = 26 + rng.uniform(-4, 4) + 3 * _noise(rng, 3, 4)[0]
    ground = _vertical((236, 242, 252), (214, 226, 246)) + 8 * _noise(rng, 5, 4)[..., None]
    return _below(_vertical((150, 184, 222), (196, 214, 236)), ground, horizon)


def _beach(rng):
    shore = 32 + rng.uniform(-4, 4) + 2 * _noise(rng, 3, 4)[0]
    sea = np.full(SIZE, 18 + rng.uniform(-3, 3), np.float32)
    image = _vertical((110, 190, 246), (170, 220, 250))
    image = _below(image, _vertical((10, 110, 170), (90, 214, 214)), sea)
    sand = _vertical((250, 226, 160), (226, 184, 112)) + 7 * _noise(rng, 16, 16)[..., None]
    return _below(image, sand, shore)


def _grass(rng):
    blades = 20 * _noise(rng, 10, 32) + 10 * _noise(rng, 4, 4)
    return _vertical((88, 176, 50), (56, 146, 36)) + blades[..., None] * [0.9, 1.0, 0.5]


def _night(rng):
    image = _vertical((8, 8, 34), (36, 34, 92)) + 6 * _noise(rng, 4, 4)[..., None]
    for _ in range(rng.integers(14, 26)):
        y, x = rng.integers(0, SIZE - 1, 2)
        image[y : y + rng.integers(1, 3), x : x + rng.integers(1, 3)] += rng.uniform(90, 200)
    return image


def _bricks(rng, width, height, brick, mortar, spread):
    picture = Image.new("RGB", (SIZE, SIZE), mortar)
    draw = ImageDraw.Draw(picture)
    shift = rng.integers(0, width)
    for row, y in enumerate(range(-int(rng.integers(0, height)), SIZE, height)):
        for x in range(-int(shift) - (row % 2) * width // 2 - width, SIZE, width):
            shade = rng.uniform(-spread, spread)
            fill = tuple(int(np.clip(c + shade, 0, 255)) for c in brick)
            draw.rectangle((x, y, x + width - 2, y + height - 2), fill=fill)
    return np.asarray(picture).astype(np.float32)


def _brick(rng):
    return (
        _bricks(rng, 16, 8, (166, 74, 56), (214, 196, 184), 18) + 5 * _noise(rng, 20, 20)[..., None]
    )


def _sea(rng):
    waves = 26 * _noise(rng, 20, 5) + 8 * _noise(rng, 5, 4)
    return _vertical((34, 122, 200), (8, 76, 150)) + waves[..., None] * [0.7, 1.0, 0.9]


def _jungle(rng):
    leaves = 26 * _noise(rng, 14, 14) + 14 * _noise(rng, 5, 5)
    image = _vertical((30, 92, 46), (16, 54, 28)) + leaves[..., None] * [0.6, 1.0, 0.5]
    for x in rng.permutation(8)[:3] * 8 + rng.integers(0, 4):
        image[:, x : x + 4] = np.array([74, 50, 30]) + 10 * _noise(rng, 16, 4)[:, x : x + 4, None]
    return image


def _desert(rng):
    image = _vertical((250, 206, 120), (255, 236, 190))
    for row, color in ((24, (232, 150, 70)), (40, (206, 112, 44))):
        t = np.arange(SIZE) / SIZE
        dune = row + rng.uniform(-3, 3) + 5 * np.sin(2 * np.pi * (t + rng.uniform()))
        ground = np.array(color, np.float32) + 6 * _noise(rng, 12, 5)[..., None]
        image = _below(image, ground, dune.astype(np.float32))
    return image


def _fabric(rng):
    y, x = np.mgrid[0:SIZE, 0:SIZE] / SIZE
    folds = np.sin(2 * np.pi * (3 * x + rng.uniform(0.5, 1.5) * y + 0.3 * _noise(rng, 3, 3)))
    return np.array([242, 152, 190]) + (20 * folds + 4 * _noise(rng, 30, 30))[..., None]


def _wood(rng):
    planks = _bricks(rng, 64, 11, (176, 118, 66), (96, 58, 28), 14)
    return planks + 12 * _noise(rng, 48, 5)[..., None] * [1.0, 0.8, 0.6]


def _city(rng):
    picture = Image.fromarray(_vertical((176, 206, 232), (224, 228, 232)).astype(np.uint8))
    draw = ImageDraw.Draw(picture)
    x = -int(rng.integers(0, 8))
    while x < SIZE:
        width, top = int(rng.integers(10, 18)), int(rng.integers(4, 22))
        shade = int(rng.integers(90, 150))
        draw.rectangle((x, top, x + width - 1, 50), fill=(shade, shade + 2, shade + 12))
        for wy in range(top + 3, 46, 6):
            for wx in range(x + 2, x + width - 3, 4):
                draw.rectangle((wx, wy, wx + 1, wy + 2), fill=(244, 226, 150))
        x += width
    draw.rectangle((0, 48, SIZE, SIZE), fill=(84, 84, 90))
    draw.rectangle((0, 47, SIZE, 48), fill=(190, 190, 190))
    return np.asarray(picture).astype(np.float32)


def _cobblestone(rng):
    return (
        _bricks(rng, 10, 8, (148, 146, 142), (84, 82, 80), 22) + 8 * _noise(rng, 24, 24)[..., None]
    )


def _white(rng):
    return np.full((SIZE, SIZE, 3), rng.uniform(244, 253)) + 2 * _noise(rng, 3, 3)[..., None]


SCENES = {
    "snow": _snow,
    "beach": _beach,
    "grass": _grass,
    "night": _night,
    "brick": _brick,
    "sea": _sea,
    "jungle": _jungle,
    "desert": _desert,
    "fabric": _fabric,
    "wood": _wood,
    "city": _city,
    "cobblestone": _cobblestone,
    "white": _white,
}


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
            jitter: 0 is centred at one size, 1 the usual small shifts, above 1 wider ones.
        """
        bank = self.scenes[what.background]
        scene = bank[rng.integers(len(bank))].astype(np.float32)
        if rng.random() < 0.5:
            scene = scene[:, ::-1]
        scene = scene * rng.uniform(0.94, 1.06)
        glyph = self.objects[what.noun, what.color]
        side = SIZE * (0.72 + 0.05 * jitter * rng.uniform(-1, 1) - 0.07 * max(jitter - 1, 0))
        scale = side / max(glyph.size)
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


def sample_combination(rng: np.random.Generator) -> Composite:
    """A combination that is not held out; 45 % carry no colour word."""
    nouns, colors, backgrounds = tuple(CLASSES), tuple(COLORS), tuple(BACKGROUNDS)
    while True:
        color = NATURAL if rng.random() < 0.45 else str(rng.choice(colors))
        what = Composite(str(rng.choice(nouns)), color, str(rng.choice(backgrounds)))
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
