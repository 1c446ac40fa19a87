"""The questions of the embedded ViT: which objects, colours, places and counts there are.

The thirty classes of the embedded base come first; ninety more make the features general. There are
no letters or digits among them, so that tests on digits stay fair.
"""

from dataclasses import dataclass

from embedded_base.data import BACKGROUNDS, CLASSES, COLORS, NATURAL, Composite

EXTRA_NAMES = (
    "tiger, lion, cow, pig, koala, monkey, wolf, horse, bee, butterfly, snail, "
    "beetle, turtle, snake, octopus, crab, whale, shark, crocodile, zebra, elephant, "
    "camel, sheep, rooster, swan, parrot, hedgehog, bat, tree, palm, tulip, "
    "sunflower, maple leaf, clover, banana, grapes, watermelon, strawberry, cherries, "
    "pear, pineapple, tomato, eggplant, avocado, broccoli, carrot, corn, bread, "
    "cheese, pizza, burger, doughnut, cake, ice cream, football, trophy, drum, "
    "trumpet, violin, bicycle, bus, tractor, helicopter, ship, sailing boat, tent, "
    "umbrella, snowman, ghost, alien, skull, crown, top hat, shirt, dress, key, "
    "hammer, light bulb, camera, book, gift, balloon, bell, star, moon, fire, bomb, "
    "diamond, chair, anchor"
)
EXTRA_GLYPHS = (
    "🐯🦁🐮🐷🐨🐵🐺🐴🐝🦋🐌🐞🐢🐍🐙🦀🐳🦈🐊🦓🐘🐫🐑🐓🦢🦜🦔🦇🌳🌴"
    "🌷🌻🍁🍀🍌🍇🍉🍓🍒🍐🍍🍅🍆🥑🥦🥕🌽🍞🧀🍕🍔🍩🎂🍦⚽🏆🥁🎺🎻🚲"
    "🚌🚜🚁🚢⛵⛺☔⛄👻👽💀👑🎩👕👗🔑🔨💡📷📕🎁🎈🔔⭐🌙🔥💣💎🪑⚓"
)
GLYPHS = {name: glyph for name, (glyph, _) in CLASSES.items()} | dict(
    zip(EXTRA_NAMES.split(", "), EXTRA_GLYPHS, strict=True)
)
OBJECTS = tuple(GLYPHS)
COLOR_NAMES = (*COLORS, NATURAL)
PLAIN = "plain"  # one random colour; the toy world of the base has no such place
PLACES = (*BACKGROUNDS, PLAIN)
COUNTS = (1, 2, 3, 4)
GEOMETRY = ("centre x", "centre y", "size", "sine of the tilt", "cosine of the tilt")
HEADS = {
    "object": len(OBJECTS),
    "color": len(COLOR_NAMES),
    "background": len(PLACES),
    "count": len(COUNTS),
    "geometry": len(GEOMETRY),
}
NOTHING = len(OBJECTS)  # the label of a patch without an object
IGNORED = -100  # the label of a question that a picture does not answer


@dataclass(frozen=True)
class Scene:
    """What a picture shows.

    Args:
        what: Object, colour word and place. Held-out combinations are never trained on.
        count: Copies of the object, 1 to 4.
        two_tone: Two random colours instead of the colour word, which then has no label.
    """

    what: Composite
    count: int = 1
    two_tone: bool = False
