"""Pictures hold what they say."""

from pathlib import Path

import numpy as np
from PIL import Image

from snell_diffusion.training import plots

RED, BLUE, GREEN = ((255, 0, 0), (0, 0, 255), (0, 255, 0))


def picture(colour: tuple[int, int, int]) -> Image.Image:
    return Image.new("RGB", (8, 8), colour)


def colours(image: Image.Image) -> set[tuple[int, int, int]]:
    return {tuple(c) for c in np.asarray(image).reshape(-1, 3).tolist()}


def test_sheet_places_rows_and_columns() -> None:
    rows = [[picture(RED), picture(BLUE)], [picture(GREEN), picture(RED)]]
    grid = plots.sheet(rows, ["step 000000", "step 000010"], ["a prompt", "another"], 64)
    right, bottom = grid.width - 38, grid.height - 38
    assert grid.getpixel((right, bottom)) == RED
    assert grid.getpixel((right - 70, bottom)) == GREEN
    assert grid.getpixel((right, bottom - 70)) == BLUE
    assert grid.getpixel((right - 70, bottom - 70)) == RED


def test_long_labels_are_wrapped_not_cut() -> None:
    short = plots.sheet([[picture(RED)]], [""], ["cat"], 64)
    long = plots.sheet([[picture(RED)]], [""], ["a cat that sits on a very long wall"], 64)
    assert long.width == short.width
    assert long.height > short.height


def test_stacked_sheets_show_the_labels_once(tmp_path: Path) -> None:
    paths = []
    for step, colour in enumerate((RED, BLUE)):
        path = tmp_path / f"{step}.png"
        plots.sheet([[picture(colour)]], [f"step {step:06d}"], ["a prompt"], 64).save(path)
        paths.append(path)
    with Image.open(paths[0]) as image:
        single = image.height
    stack = plots.stack_sheets(paths, ["a prompt"], 64)
    assert single < stack.height < 2 * single
    assert {RED, BLUE} <= colours(stack)


def test_large_pictures_are_stacked_at_a_size_that_can_be_opened(tmp_path: Path) -> None:
    paths = []
    for label, colours_of in (("base model", (RED, BLUE)), ("step 000010", (BLUE, RED))):
        cells = [picture(colour).resize((600, 600)) for colour in colours_of]
        path = tmp_path / f"{label}.png"
        plots.sheet([cells], [label], ["a prompt", "b"], 600).save(path)
        paths.append(path)
    stack = plots.stack_sheets(paths, ["a prompt", "b"], 600)
    small = plots.sheet([[picture(RED)] * 2] * 2, ["base model", "x"], ["a prompt", "b"], 256)
    assert stack.size == small.size
    left, top = stack.width - 2 * 262, stack.height - 2 * 262
    assert stack.getpixel((left + 128, top + 128)) == RED
    assert stack.getpixel((left + 128, top + 262 + 128)) == BLUE
    assert stack.getpixel((left + 262 + 128, top + 262 + 128)) == RED
    for row in range(2):  # each has its label
        y = top + row * 262
        assert stack.crop((0, y, left, y + 256)).convert("L").getextrema()[0] < 100


def allocation(step: int, budgets: dict[str, int]) -> dict[str, object]:
    rows = [{"name": n, "size": 10, "budget": b, "kept": 0} for n, b in budgets.items()]
    return {"event": "allocation", "step": step, "layers": rows}


def test_layers_stand_in_the_order_of_the_network() -> None:
    names = ["unet.down_blocks.0.q", "unet.up_blocks.0.q", "unet.mid_block.q", "text_encoder.0.q"]
    ordered = sorted(names, key=plots.place_of)
    assert ordered == [names[3], names[0], names[2], names[1]]


def test_pictures_are_written(tmp_path: Path) -> None:
    events: list[dict[str, object]] = [
        {"event": "step", "step": s, "loss": 1 / s} for s in range(1, 40)
    ]
    held_out = {"validation_loss": 0.5, "validation_loss_base": 0.7}
    plots.loss_curve([*events, {"event": "validation", "step": 0, **held_out}], tmp_path / "l.png")
    plots.loss_curve(events[:1], tmp_path / "one.png")
    layers = {"unet.down_blocks.0.q": 10, "unet.mid_block.q": 0, "unet.up_blocks.0.q": 5}
    records = [allocation(0, dict.fromkeys(layers, 10)), allocation(5, layers)]
    plots.allocation_picture(records, tmp_path / "a.png")
    plots.allocation_picture(records[:1], tmp_path / "b.png")
    sizes = {p.name: len(colours(Image.open(p).convert("RGB"))) for p in tmp_path.iterdir()}
    assert sizes.keys() == {"l.png", "one.png", "a.png", "b.png"}
    assert min(sizes.values()) > 10


def test_trailing_mean() -> None:
    assert plots._smooth([4, 2, 6], 2).tolist() == [4, 3, 4]
