"""The cookbook can be followed: its commands parse, its examples run, its tables are current."""

import json
import re
import shlex
from pathlib import Path

import numpy as np
import pytest
import yaml
from PIL import Image

from scripts import cookbook, cookbook_photos, cookbook_tables
from scripts.cookbook_draw import LABEL, SheetRow, grid
from snell_diffusion.diffusion.concepts import OWN, OWN_HELD_OUT
from snell_diffusion.diffusion.config_files import config_text, make_config, parse_config
from snell_diffusion.diffusion.data import find_photos
from snell_diffusion.diffusion.training import run
from snell_diffusion.training.plots import sheet

ROOT = Path(__file__).resolve().parents[1]
TEXT = (ROOT / "docs" / "cookbook.md").read_text("utf-8")
TRAINER = "accelerate launch train_dreambooth_snella.py "
DRY = ["--dry_run", "true"]


def blocks(language):
    return re.findall(rf"^```{language}\n(.*?)^```", TEXT, re.MULTILINE | re.DOTALL)


def commands(start):
    """Arguments of the document's commands that start with these words."""
    lines = [line for block in blocks("bash") for line in block.replace("\\\n", "").splitlines()]
    return [shlex.split(line.removeprefix(start)) for line in lines if line.startswith(start)]


@pytest.fixture(autouse=True)
def at_the_root(monkeypatch):
    monkeypatch.chdir(ROOT)


def test_every_command_is_of_a_known_kind():
    starts = (TRAINER, "python -m scripts.cookbook", "python -m snell_diffusion memory ")
    lines = [line for block in blocks("bash") for line in block.replace("\\\n", "").splitlines()]
    assert [line for line in lines if not line.startswith(starts)] == []
    assert len(lines) >= 10


def test_the_training_commands_are_the_runs_that_were_shown():
    shown = [config_text(parse_config(words)) for words in commands(TRAINER) if words[-2:] != DRY]
    made = [
        config_text(parse_config(cookbook.arguments(name, kind)))
        for name in cookbook.RECIPES
        for kind in ("good", "too_far")
    ]
    assert shown == made


def test_the_other_commands_parse():
    dry = [words for words in commands(TRAINER) if words[-2:] == DRY]
    assert [parse_config(words).dry_run for words in dry] == [True]
    computed = commands("python -m snell_diffusion memory ")
    assert [Path(path).is_file() for (path,) in computed] == [True]
    for words in commands("python -m scripts.cookbook"):
        names = [word for word in words if not word.startswith("--")]
        assert set(names) <= set(cookbook.RECIPES), words


@pytest.mark.parametrize("name", cookbook.RECIPES)
def test_rows_of_a_picture_are_sampled_and_measured_steps_of_its_runs(name):
    assert {kind for kind, *_ in cookbook.RECIPES[name].rows} == {"good", "too_far"}
    for kind, step, _ in cookbook.RECIPES[name].rows:
        config = parse_config(cookbook.arguments(name, kind))
        assert Path(config.output_dir) == cookbook.run_folder(name, kind)
        for every in (config.sample_steps, config.validation_steps):
            assert step in (0, config.max_train_steps) or step % every == 0
        assert config.with_prior_preservation, "without it no drift is measured"


@pytest.mark.parametrize("block", blocks("yaml"), ids=lambda block: block.partition(":")[0])
def test_every_piece_of_yaml_fits_into_a_recipe(block):
    piece = yaml.safe_load(block)
    recipe = yaml.safe_load(cookbook.config_of("pet").read_text("utf-8"))
    rest = recipe
    if "concepts" in piece:
        rest = {k: v for k, v in recipe.items() if k not in (*OWN, OWN_HELD_OUT)}
    config, before = make_config({**rest, **piece}), make_config(recipe)
    for key in piece:
        assert getattr(config, key) != getattr(before, key), f"{key} changes nothing"


def test_the_tables_are_current():
    assert cookbook_tables.rewrite(TEXT) == TEXT, "run: python -m scripts.cookbook_tables"


def test_the_published_numbers_are_of_the_rows_that_are_shown():
    known = json.loads((ROOT / cookbook.FIGURES).read_text("utf-8"))
    for name, recipe in cookbook.RECIPES.items():
        assert (ROOT / cookbook.IMAGES / f"cookbook_{name}.png").is_file()
        rows = [(r["run"], r["step"], r["verdict"]) for r in known[name]["rows"]]
        assert tuple(rows) == recipe.rows


def test_a_stale_table_is_seen():
    lines = TEXT.splitlines()
    row = next(i for i, line in enumerate(lines) if line.startswith("| good"))
    stale = "\n".join([*lines[:row], lines[row].replace("0.", "1.", 1), *lines[row + 1 :]]) + "\n"
    assert stale != TEXT
    assert cookbook_tables.rewrite(stale) == TEXT


def test_the_pet_has_one_scene_per_photo_and_captions_that_name_it(tmp_path):
    cookbook_photos.write_pet(tmp_path)
    photos = find_photos(tmp_path / "photos", "none")
    (held_out,) = find_photos(tmp_path / "holdout", "none")
    assert len(photos) == 5
    assert len({p.prompt for p in [*photos, held_out]}) == 6
    assert all(p.prompt.startswith("a photo of a <chelsea> cat o") for p in photos)
    head = np.asarray(Image.open(photos[0].path))[118:148, 100:150].astype(int)
    other = np.asarray(Image.open(photos[1].path))[118:148, 100:150].astype(int)
    assert abs(head.mean((0, 1)) - other.mean((0, 1))).max() < 25, "the same cat in the middle"
    corners = [np.asarray(Image.open(p.path))[4, 4].tolist() for p in photos]
    assert len(set(map(tuple, corners))) == 5


def test_the_style_prints_in_three_inks():
    ramp = np.tile(np.linspace(0, 255, 64, dtype=np.uint8)[None, :, None], (64, 1, 3))
    inks = cookbook_photos.printed(Image.fromarray(ramp))
    inks_used = {tuple(pixel) for row in np.asarray(inks).tolist() for pixel in row}
    assert inks_used == {
        cookbook_photos.STYLE_PAPER,
        cookbook_photos.STYLE_MIDDLE,
        cookbook_photos.STYLE_INK,
    }
    assert np.asarray(inks)[0, 0].tolist() == list(cookbook_photos.STYLE_INK)
    assert np.asarray(inks)[0, -1].tolist() == list(cookbook_photos.STYLE_PAPER)


def test_style_pictures_show_each_noun_once_and_hold_others_out(tmp_path, monkeypatch):
    asked = []

    def draw(pipe, prompts):
        asked.extend(prompts)
        return [Image.new("RGB", (64, 64), "grey") for _ in prompts]

    monkeypatch.setattr("scripts.cookbook_draw.draw", draw)
    cookbook_photos.write_style(tmp_path, pipe=None)
    photos = find_photos(tmp_path / "photos", "none")
    held_out = find_photos(tmp_path / "holdout", "none")
    assert (len(photos), len(held_out)) == (8, 2)
    nouns = [p.path.stem for p in [*photos, *held_out]]
    assert len(set(nouns)) == 10
    assert all(p.prompt.endswith("in <print> style") for p in [*photos, *held_out])
    assert not any("<" in prompt for prompt in asked)


def test_a_grid_keeps_prompts_and_pictures_and_writes_beside_them(tmp_path):
    rows = []
    for step, colour in ((0, "red"), (30, "blue")):
        pictures = [Image.new("RGB", (128, 128), c) for c in (colour, "lime")]
        path = tmp_path / f"{step}.png"
        sheet([pictures], [f"step {step:06d}"], ["first words", "second"], 128).save(path)
        rows.append(SheetRow(path, ("verdict", f"step {step}")))
    picture = grid(rows, cookbook.CELL)
    top = picture.height - 2 * cookbook.CELL
    for y, colour in enumerate(((255, 0, 0), (0, 0, 255))):
        centre = top + y * cookbook.CELL + 64
        assert picture.getpixel((LABEL + 64, centre)) == colour
        assert picture.getpixel((LABEL + cookbook.CELL + 64, centre)) == (0, 255, 0)
        beside = np.asarray(picture)[centre - 40 : centre + 40, :LABEL]
        assert beside.min() < 100, "the words are there"
    assert np.asarray(picture)[:top, LABEL:].min() < 100, "the prompts are there"
    small = tmp_path / "other.png"
    sheet([[Image.new("RGB", (128, 128))]], ["step 000000"], ["one"], 128).save(small)
    with pytest.raises(ValueError, match="must have one size"):
        grid([*rows, SheetRow(small, ("x",))], cookbook.CELL)


def write_run(folder, settings, state="finished"):
    folder.mkdir(parents=True)
    (folder / "config.yaml").write_text(settings)
    (folder / "status.json").write_text(json.dumps({"state": state}))
    (folder / "core_seconds.json").write_text("12.4")
    events = [
        {"event": "validation", "step": s, "validation_loss": 0.5 - s / 1000, "drift": s / 100}
        for s in (0, 30, 60, 90)
    ]
    events.append({"event": "finished", "step": 90, "memory": 2**29})
    (folder / "log.jsonl").write_text("".join(json.dumps(e) + "\n" for e in events))


def test_only_finished_runs_with_the_same_settings_are_kept(tmp_path):
    write_run(tmp_path / "done", "a: 1\n")
    write_run(tmp_path / "stopped", "a: 1\n", state="stopped")
    assert cookbook.is_finished(tmp_path / "done", "a: 1\n")
    assert not cookbook.is_finished(tmp_path / "done", "a: 2\n")
    assert not cookbook.is_finished(tmp_path / "stopped", "a: 1\n")
    assert not cookbook.is_finished(tmp_path / "none", "a: 1\n")


def test_numbers_come_from_the_logs(tmp_path, monkeypatch):
    monkeypatch.setattr(cookbook, "FOLDER", tmp_path)
    rows = (("good", 30, "under-fitted"), ("too_far", 90, "over-fitted"))
    monkeypatch.setitem(cookbook.RECIPES, "pet", cookbook.Recipe((), rows))
    for kind in ("good", "too_far"):
        write_run(tmp_path / "pet" / kind, "")
    found = cookbook.figures("pet")
    assert [(r["held_out_loss"], r["drift"]) for r in found["rows"]] == [(0.47, 0.3), (0.41, 0.9)]
    assert found["runs"]["good"] == {"core_seconds": 12, "peak_gib": 0.5}
    rows = (("good", 45, "between"), ("too_far", 90, "over-fitted"))
    monkeypatch.setitem(cookbook.RECIPES, "pet", cookbook.Recipe((), rows))
    with pytest.raises(ValueError, match="was not measured at step 45"):
        cookbook.figures("pet")


def test_unknown_recipes_are_refused(capsys):
    with pytest.raises(SystemExit):
        cookbook.main(["fish"])
    assert "unknown recipe 'fish'; known: pet, object, style" in capsys.readouterr().err


@pytest.fixture
def trained(tmp_path, monkeypatch):
    """A working folder with two finished recipes; the updates are random."""
    from diffusers import StableDiffusionPipeline

    import snell_diffusion
    from snell_diffusion.models import embedded_path

    monkeypatch.chdir(tmp_path)
    for seed, name in enumerate(("pet", "style")):
        pipe = StableDiffusionPipeline.from_pretrained(embedded_path())
        pipe.unet.add_adapter(snell_diffusion.SnellaConfig.paper(r=4, seed=seed))
        pipe.save_snella_weights(cookbook.run_folder(name, "good"))


def test_the_example_after_training_runs(trained, tmp_path):
    (example,) = blocks("python")
    exec(compile(example, "docs/cookbook.md", "exec"), {})
    assert (tmp_path / "both.png").stat().st_size > 1000


@pytest.mark.full
@pytest.mark.parametrize("name", cookbook.RECIPES)
def test_a_recipe_does_a_step(name, tmp_path, monkeypatch):
    config = parse_config([*cookbook.arguments(name, "good"), "--dry_run", "true"])
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(cookbook_photos, "STYLE_NOUNS", ("car", "dog"))
    monkeypatch.setattr("scripts.cookbook_draw.STEPS", 2)
    cookbook.write_photos([name])
    result = run(config)
    assert result.adapter_path is None
    assert result.sizes.trainable > 0
