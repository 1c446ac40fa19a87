"""Every picture and number of docs/cookbook.md, from one command and without a model hub.

    python -m scripts.cookbook              # all recipes, then scale, sparsity and two adapters
    python -m scripts.cookbook pet          # one recipe: training pictures, two runs, its picture
    python -m scripts.cookbook --photos     # the training pictures only, for runs of your own
    python -m scripts.cookbook --publish    # also copy pictures and numbers into docs/

Each recipe has two runs: its config as it stands, and the same with the flags of `too_far`, which
show what over-fitting looks like. A run that is finished with the same settings is not repeated.
Everything is written below runs/cookbook.
"""

import argparse
import json
import os
import resource
import shutil
import subprocess
import sys
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parents[1]
FOLDER = Path("runs") / "cookbook"
FIGURES = Path("docs") / "cookbook" / "figures.json"
IMAGES = Path("docs") / "images"
CELL = 134  # a row of a sample sheet with its margin, pixels


@dataclass(frozen=True)
class Recipe:
    """One recipe: its second run, and the rows of its picture.

    Attributes:
        too_far: Flags of the run that shows over-fitting.
        rows: Run ("good" or "too_far"), step of a sample sheet, verdict.
    """

    too_far: tuple[str, ...]
    rows: tuple[tuple[str, int, str], ...]


_TOO_FAR = "--prior_loss_weight 0 --learning_rate 2e-2 --lr_scheduler constant --max_train_steps "


def _rows(under: int, good: int, over: int) -> tuple[tuple[str, int, str], ...]:
    return (
        ("good", 0, "the base"),
        ("good", under, "under-fitted"),
        ("good", good, "good"),
        ("too_far", over, "over-fitted"),
    )


RECIPES = {
    "pet": Recipe((*_TOO_FAR.split(), "45"), _rows(15, 90, 45)),
    "object": Recipe((*_TOO_FAR.split(), "45"), _rows(30, 90, 45)),
    "style": Recipe((*_TOO_FAR.split(), "150"), _rows(15, 90, 150)),
}


def config_of(name: str) -> Path:
    """The recipe's config file."""
    return Path("configs") / "dreambooth" / f"recipe_{name}.yaml"


def arguments(name: str, run: str) -> list[str]:
    """The trainer's command line of a run, "good" or "too_far"."""
    flags = ["--config", str(config_of(name))]
    if run == "too_far":
        flags += [*RECIPES[name].too_far, "--output_dir", str(run_folder(name, run))]
    return flags


def run_folder(name: str, run: str) -> Path:
    """Where a run of a recipe lies."""
    return FOLDER / name / run


def write_photos(names: Sequence[str]) -> None:
    """Make the training pictures of these recipes."""
    from scripts import cookbook_photos as photos
    from scripts.cookbook_draw import open_base

    for name in names:
        folder = FOLDER / name
        if name == "pet":
            photos.write_pet(folder)
        elif name == "object":
            photos.write_object(folder)
        else:
            photos.write_style(folder, open_base())


def train(name: str, run: str) -> None:
    """Do one run in a process of its own, unless it is there already."""
    from snell_diffusion.diffusion.config_files import config_text, parse_config

    words, folder = arguments(name, run), run_folder(name, run)
    if is_finished(folder, config_text(parse_config(words))):
        print(f"{folder}: finished with the same settings, not repeated", flush=True)
        return
    print("\n$ python train_dreambooth_snella.py " + " ".join(words), flush=True)
    before = _child_seconds()
    if subprocess.run([sys.executable, "train_dreambooth_snella.py", *words]).returncode:
        sys.exit("the cookbook stops here: the training failed, its reason stands above")
    (folder / "core_seconds.json").write_text(json.dumps(_child_seconds() - before))


def is_finished(folder: Path, settings: str) -> bool:
    """Whether the run folder holds a finished run with exactly these settings."""
    kept = folder / "config.yaml"
    if not kept.is_file() or not (folder / "core_seconds.json").is_file():
        return False
    state = json.loads((folder / "status.json").read_text("utf-8"))["state"]
    return state == "finished" and kept.read_text("utf-8") == settings


def _child_seconds() -> float:
    used = resource.getrusage(resource.RUSAGE_CHILDREN)
    return used.ru_utime + used.ru_stime


def figures(name: str) -> dict[str, Any]:
    """Held-out loss and drift at the shown steps, core-seconds and peak memory, from the logs."""
    from snell_diffusion.training.tracking import read_log

    rows, runs = [], {}
    for run, step, verdict in RECIPES[name].rows:
        events = read_log(run_folder(name, run) / "log.jsonl")
        at = {e["step"]: e for e in events if e["event"] == "validation"}
        if step not in at:
            raise ValueError(
                f"{run_folder(name, run)} was not measured at step {step}: {sorted(at)}"
            )
        rows.append(
            {
                "run": run,
                "step": step,
                "verdict": verdict,
                "held_out_loss": round(at[step]["validation_loss"], 4),
                "drift": round(at[step]["drift"], 4),
            }
        )
        seconds = json.loads((run_folder(name, run) / "core_seconds.json").read_text())
        memory = next(e["memory"] for e in events if e["event"] == "finished")
        runs[run] = {"core_seconds": round(seconds), "peak_gib": round(memory / 2**30, 2)}
    return {"rows": rows, "runs": runs}


def draw_grid(name: str, numbers: dict[str, Any]) -> Path:
    """The recipe's picture: rows are steps of its runs, columns are prompts."""
    from scripts.cookbook_draw import SheetRow, grid

    rows = []
    for row in numbers["rows"]:
        words = [row["verdict"], f"step {row['step']}"]
        words += [f"held-out {row['held_out_loss']:.3f}", f"drift {row['drift']:.3f}"]
        sheet = run_folder(name, row["run"]) / "samples" / f"step-{row['step']:06d}.png"
        rows.append(SheetRow(sheet, words))
    target = FOLDER / f"cookbook_{name}.png"
    grid(rows, CELL).save(target)
    return target


def draw_after() -> Path:
    """The picture of scale, sparsity and two adapters, from the finished recipes."""
    from scripts.cookbook_draw import after_training

    target = FOLDER / "cookbook_after.png"
    after_training(run_folder("pet", "good"), run_folder("style", "good")).save(target)
    return target


def main(words: Sequence[str]) -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawTextHelpFormatter
    )
    parser.add_argument("recipes", nargs="*", help=f"any of {', '.join(RECIPES)}; default: all")
    parser.add_argument("--photos", action="store_true", help="write the training pictures only")
    parser.add_argument("--publish", action="store_true", help="copy the results into docs/")
    given = parser.parse_args(words)
    names = given.recipes or list(RECIPES)
    if unknown := set(names) - set(RECIPES):
        parser.error(f"unknown recipe {sorted(unknown)[0]!r}; known: {', '.join(RECIPES)}")
    os.chdir(ROOT)
    os.environ.update(TRANSFORMERS_VERBOSITY="error", HF_HUB_OFFLINE="1", OMP_NUM_THREADS="1")
    write_photos(names)
    if given.photos:
        return
    found = {}
    for name in names:
        for run in ("good", "too_far"):
            train(name, run)
        found[name] = figures(name)
        print(f"picture {draw_grid(name, found[name])}")
    if {"pet", "style"} <= set(names):
        print(f"picture {draw_after()}")
    if given.publish:
        publish(found)


def publish(found: dict[str, Any]) -> None:
    """Copy grids and numbers of these recipes into the documents."""
    known = json.loads((ROOT / FIGURES).read_text("utf-8")) if (ROOT / FIGURES).is_file() else {}
    (ROOT / FIGURES).parent.mkdir(parents=True, exist_ok=True)
    (ROOT / FIGURES).write_text(json.dumps({**known, **found}, indent=1) + "\n", "utf-8")
    for picture in FOLDER.glob("cookbook_*.png"):
        shutil.copy(picture, ROOT / IMAGES)
    if "pet" in found:
        for name in ("loss", "allocation"):
            picture = run_folder("pet", "good") / f"{name}.png"
            shutil.copy(picture, ROOT / IMAGES / f"cookbook_{name}.png")


if __name__ == "__main__":
    main(sys.argv[1:])
