"""The page says what the results say: figures, verdicts, machines, and what is missing."""

import pytest
from PIL import Image

from benchmarks import page
from benchmarks.page import PAGE, draw, gpu_results
from benchmarks.results import Results
from benchmarks.targets import TARGETS, UNETS, VIT, Figure

STAMP = {
    "machine": "Abacus 9",
    "threads": 1,
    "torch": "2.99",
    "python": "3.14.0",
    "date": "2031-02-03 04:05 UTC",
    "commit": "abc1234",
}
METHODS = ("full", "lora", "plain", "ours")


def cost(saved, peak, backward, flops):
    return {"saved": saved, "peak": peak, "backward_peak": backward, "flops": flops}


COSTS = {
    "full": cost(100, 500, 90, 300),
    "lora": cost(110, 520, 120, 200),
    "plain": cost(100, 900, 600, 500),
    "ours": cost(99, 510, 150, 310),
}


def entry(ours, **more):
    """Seconds of three rounds in which LoRA takes 1, 2 and 4, and ours a multiple of it."""
    rounds = (1.0, 2.0, 4.0)
    factors = {"full": 1.4, "lora": 1.0, "plain": 4.0, "ours": ours, "base": 0.5}
    seconds = {name: [factor * r for r in rounds] for name, factor in factors.items()}
    return {"stamp": STAMP, "quick": False, "seconds": seconds, "cost": COSTS, **more}


def write(folder):
    """Results of every section."""
    results = Results(folder / "cpu.json")

    def linear(name, ours):
        sides, tokens = name.split("@")
        shape = [*map(int, sides.split("x")), int(tokens)]
        results.put("layers", name, entry(ours, linear=shape, used_by=["SD 1.5"]))

    for name in VIT:
        linear(name, 1.2)  # 0.3 of plain
    for name in UNETS:
        linear(name, 0.8)  # 0.2 of plain
    trained = dict.fromkeys(METHODS, 4 << 20)
    for name in ("trainer", "vit-b", "sd15"):
        model = entry(1.3, title=f"model {name}", batch=8, dtype="float32", trained_bytes=trained)
        results.put("models", name, model)
    for name in ("vit-b", "vit-l", "vit-h", "sd15", "sdxl", "sdxl-checkpointed", "flux"):
        told = {"title": name, "batch": 1, "dtype": "float32", "checkpointing": False}
        results.put("memory", name, {"stamp": STAMP, "cost": COSTS, **told})
    for name, place in (("weights", 0), ("tokens", 2)):
        points = []
        for size in (512, 1024, 2048):
            shape = [size, size, 256] if place == 0 else [768, 768, size]
            kernel = size**2 / 1e6 if place == 0 else 1.0
            seconds = {"full": [1.0] * 3, "ours": [1 + kernel] * 3, "plain": [1 + 3 * kernel] * 3}
            points.append({"linear": shape, "seconds": seconds, "cost": COSTS})
        results.put("scaling", name, {"stamp": STAMP, "points": points})
    for name in ("embedded-unet", "embedded-dit", "vit-b", "sd15"):
        seconds = {"base": [1.0, 2.0, 3.0], "cached": [1.01, 2.02, 3.03], "fused": [1.1, 2.2, 3.3]}
        results.put("inference", name, {"stamp": STAMP, "seconds": seconds})
    memory = {"peak": 60 << 20, "kept": 40 << 20}
    loading = {
        "seconds": {"ours": [0.7, 0.8, 0.9], "lora": [0.1, 0.2, 0.3]},
        "memory": {"ours": memory, "lora": memory},
        "file_bytes": {"ours": 40 << 20, "lora": 20 << 20},
        "base_bytes": 1000 << 20,
    }
    results.put("loading", "sdxl", {"stamp": STAMP, **loading})
    shares = [{"name": "aten::mm", "share": 0.5, "calls": 9}]
    results.put("profile", VIT[0], {"stamp": STAMP, "operators": shares})
    return results


@pytest.fixture
def results(tmp_path):
    return write(tmp_path)


@pytest.fixture
def text(results):
    return page.page(PAGE.read_text("utf-8"), results, [])


def line(text, words):
    (found,) = [row for row in text.splitlines() if words in row and row.startswith("|")]
    return found


@pytest.mark.parametrize(
    "words, cells",
    [
        ("Linear 768x768@1576, ours / plain", "| <= 0.35 | 0.30 (0.30 to 0.30) | 0.62 | met |"),
        ("SDXL at 256 tokens, ours / plain", "| <= 0.25 | 0.20 (0.20 to 0.20), the worst of"),
        ("embedded base, ours / LoRA", "| <= 1.25 | 1.30 (1.30 to 1.30) | 1.55 | **not met** |"),
        ("ours / full fine-tuning", "| <= 1.20 | 0.93 (0.93 to 0.93) | 1.03 | met |"),
        ("backward pass, ours / plain", "| <= 0.35 | 0.250, the worst of"),
        ("adapter cached, ours / base", "| <= 1.02 | 1.01 (1.01 to 1.01), the worst of 4"),
        ("adapter fused, ours / base", "| **not met** |"),
        ("SDXL-size adapter, seconds", "| <= 1.00 | 0.80 s (0.70 to 0.90) |  | met |"),
        ("as a share of the base", "| 0.060 (60 MiB; 40 MiB stay; the base has 1000 MiB) |"),
        ("H200: SDXL step", "|  |  | not measured: needs an H200 | `python -m benchmarks.gpu"),
    ],
)
def test_targets_have_their_figures_and_verdicts(text, words, cells):
    assert cells in line(text, words)


def test_a_figure_of_several_places_needs_all_of_them(text):
    # flux-checkpointed is missing.
    assert line(text, "saved for backward, ours").count("| not measured |") == 1


def test_every_figure_has_the_command_that_measures_it():
    for target in TARGETS:
        assert target.command.startswith("python -m benchmarks."), target.what


def test_tables_show_ratios_costs_and_where_they_come_from(text):
    assert "Measured on Abacus 9, 1 thread, torch 2.99, Python 3.14.0, commit abc1234" in text
    row = line(text, "768x3072@1576 | SD 1.5")
    assert "| 2000.0 | 1.20 (1.20-1.20) | 0.30 (0.30-0.30) | 4.00 (4.00-4.00) |" in row
    assert "| 0.900 | 0.250 | 1.550 |" in row
    assert "| sdxl, batch 1, float32 |" in text
    assert "aten::mm 50% (9)" in text


def test_the_kernel_part_is_fitted(text):
    assert "| ours | 1.00 | 1.00 |" in text
    assert "the same: 10." in text  # 310 - 300 operations at every number of tokens


def test_prose_outside_of_the_marks_stays(text):
    def outside(page):
        inside = False
        for row in page.splitlines():
            inside = inside or (row.startswith("<!-- ") and row != "<!-- end -->")
            if not inside:
                yield row
            inside = inside and row != "<!-- end -->"

    assert list(outside(text)) == list(outside(PAGE.read_text("utf-8")))


def test_without_results_the_page_says_so(tmp_path):
    text = page.page(PAGE.read_text("utf-8"), Results(tmp_path / "none.json"), [])
    assert text.count("_Not measured yet._") == 7
    assert "no GPU was at hand" in text
    assert "images/performance" not in text


def test_a_page_without_a_mark_is_refused(results):
    with pytest.raises(ValueError, match="no block from '<!-- layers -->'"):
        page.page(PAGE.read_text("utf-8").replace("<!-- layers -->", ""), results, [])


def test_an_h200_fills_its_lines_and_another_gpu_does_not(results, tmp_path):
    for name in ("nvidia-h200", "nvidia-l4"):
        model = entry(1.05, title="SD 1.5", batch=16, dtype="bfloat16", allocated={"ours": 1 << 30})
        model |= {"trained_bytes": dict.fromkeys(METHODS, 1 << 20)}
        Results(tmp_path / f"{name}.json").put("models", "sd15", model)
    gpus = gpu_results(tmp_path)
    both = page.page(PAGE.read_text("utf-8"), results, gpus)
    assert "| 1.05 (1.05 to 1.05) | 1.55 | met |" in line(both, "H200: SD 1.5 step")
    assert "### nvidia-h200" in both
    assert "| ours | 2.100 | 1.05 (1.05-1.05) | 1024.0 |" in both
    small = page.page(PAGE.read_text("utf-8"), results, [gpus[1]])
    assert gpus[1].path.stem == "nvidia-l4"
    assert "needs an H200" in line(small, "H200: SD 1.5 step")


def test_the_fused_path_counts_where_it_ran(tmp_path):
    results = Results(tmp_path / "nvidia-h200.json")
    model = entry(1.6, title="SD 1.5")
    model["seconds"]["fused"] = [1.08, 2.16, 4.32]
    results.put("models", "sd15", model)
    target = next(t for t in TARGETS if "SD 1.5 step in bf16" in t.what)
    assert target.find(results).value == pytest.approx(1.08)


def test_verdicts_are_at_the_limit_and_beyond():
    target = TARGETS[0]
    assert target.verdict(Figure(target.limit, "")) == "met"
    assert target.verdict(Figure(target.limit + 1e-6, "")) == "**not met**"


def test_pictures_are_drawn_of_what_was_measured(results, tmp_path):
    paths = draw(results, tmp_path / "images")
    assert [path.name for path in paths] == [
        f"performance_{name}.png" for name in ("layers", "models", "memory", "scaling")
    ]
    for path in paths:
        with Image.open(path) as picture:
            assert picture.width > 400
            assert len(picture.convert("RGB").getcolors(1 << 20)) > 10
    assert draw(Results(tmp_path / "none.json"), tmp_path) == []
