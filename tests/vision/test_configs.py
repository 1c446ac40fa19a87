"""Every config of configs/vision loads, and holds what the authors published for its task.

The numbers were read in the scripts of SNELLA's public code (arXiv:2510.24037); where it has no
script for a task, the defaults that the SNELL paper (arXiv:2411.01800) states are expected.
"""

from pathlib import Path

import pytest
import yaml

from snell_diffusion.tuners.recipes import recipe
from snell_diffusion.vision.config import VisionConfig, parse_config
from snell_diffusion.vision.data import fgvc, vtab

FOLDER = Path(__file__).parents[2] / "configs" / "vision"
FILES = sorted(FOLDER.glob("*.yaml"))

# task: batch, learning rate, weight decay, sparsity at start and end (None: MixK, no sparsity)
FGVC = {
    "cub": (16, 1e-3, 0.05, (0.0, 0.30)),
    "dogs": (32, 1e-4, 0.005, (0.0, 0.24)),
    "flowers": (16, 1e-3, 0.001, (0.0, 0.61)),
    "nabirds": (32, 1e-3, 0.0005, (0.0, 0.16)),
    "cars": (16, 1e-3, 0.05, None),
}
VTAB = {
    "cifar": (8, 1e-3, 0.05, (0.01, 0.80)),
    "patch_camelyon": (8, 1e-3, 0.0005, (0.01, 0.76)),
    "oxford_iiit_pet": (16, 1e-3, 0.05, (0.01, 0.55)),
    "dtd": (8, 1e-3, 0.005, (0.01, 0.93)),
    "oxford_flowers102": (8, 1e-3, 0.001, (0.01, 0.40)),
    "diabetic_retinopathy": (32, 1e-3, 0.05, (0.01, 0.20)),
    "smallnorb_ele": (32, 1e-3, 0.001, (0.01, 0.63)),
    "caltech101": (16, 1e-3, 1e-4, None),
    "svhn": (16, 1e-3, 1e-4, None),
}
HALF_PRECISION = {"cifar", "patch_camelyon", "oxford_iiit_pet"}
UNPUBLISHED = sorted(set(vtab.CLASSES) - set(VTAB))
DEFAULT = (32, 1e-3, 1e-4)
SCHEDULE = {
    "rank": 32,
    "update_scale": 1.0,
    "dropout": 0.1,
    "drop_path": 0.1,
    "backbone_drop_path": 0.1,
    "train_cls_token": True,
    "num_train_epochs": 100,
    "warmup_epochs": 10,
    "warmup_lr": 1e-6,
    "min_lr": 1e-5,
    "lr_scheduler": "cosine",
    "optimizer": "AdamW",
    "adam_beta1": 0.9,
    "adam_beta2": 0.999,
    "adam_epsilon": 1e-8,
    "max_grad_norm": 0.0,
    "label_smoothing": 0.0,
    "gradient_accumulation_steps": 1,
}
ALLOCATION = {
    "alloc_init_warmup": 0,
    "alloc_final_warmup": 0,
    "alloc_interval": 1,
    "alloc_beta1": 0.85,
    "alloc_beta2": 0.85,
}
PAPER = {"heads": 2, "init": "paper", "train_beta": True}


def load(name: str) -> VisionConfig:
    return parse_config(["--config", str(FOLDER / f"{name}.yaml")])


def numbers(config: VisionConfig) -> tuple[int, float, float]:
    return config.train_batch_size, config.learning_rate, config.adam_weight_decay


@pytest.mark.parametrize("path", FILES, ids=lambda path: path.stem)
def test_every_config_loads_and_names_itself(path: Path) -> None:
    config = load(path.stem)
    assert config.output_dir == f"runs/vision/{path.stem}"
    assert config.select_on == "validation"
    assert config.protocol == "validation"
    text = path.read_text()
    assert text.startswith("# ")
    assert f"--config configs/vision/{path.name}" in text
    settings = {"rank": config.rank, **config.method_settings}
    assert recipe(config.method).config(settings, ["q_proj"], 0, "vision", steps=10) is not None


def test_there_is_one_for_every_task() -> None:
    wanted = {f"fgvc_{task}" for task in fgvc.TASKS} | {f"vtab_{task}" for task in vtab.CLASSES}
    assert {path.stem for path in FILES} == wanted | {"digits", "digits_fewshot", "skimage"}


@pytest.mark.parametrize("name", [p.stem for p in FILES if p.stem.startswith(("fgvc", "vtab"))])
def test_what_all_published_runs_share(name: str) -> None:
    config = load(name)
    assert config.base == "google/vit-base-patch16-224-in21k"
    assert {key: getattr(config, key) for key in SCHEDULE} == SCHEDULE
    given = yaml.safe_load((FOLDER / f"{name}.yaml").read_text())
    assert set(SCHEDULE) - set(given) <= {  # their defaults, of every trainer
        *("lr_scheduler", "optimizer", "label_smoothing", "gradient_accumulation_steps"),
    }
    assert name == f"{config.dataset}_{config.task}"
    assert (config.resolution, config.transform) == (
        224,
        "resize" if config.dataset == "vtab" else "random_resized_crop",
    )


@pytest.mark.parametrize("name", [*(f"fgvc_{t}" for t in FGVC), *(f"vtab_{t}" for t in VTAB)])
def test_published_values_of_each_task(name: str) -> None:
    config = load(name)
    *expected, sparsity = {"fgvc": FGVC, "vtab": VTAB}[config.dataset][config.task]
    assert numbers(config) == tuple(expected)
    assert config.ema_decay == (0.9999 if config.dataset == "fgvc" else None)
    assert config.mixed_precision == ("fp16" if config.task in HALF_PRECISION else "no")
    assert config.levels == []
    if sparsity is None:
        assert config.method == "mixk"
        assert config.method_settings == PAPER
        return
    assert config.method == "snella"
    assert config.method_settings == {
        **PAPER,
        **ALLOCATION,
        "kernel": "mixed",
        "sparsify": "squared",
        "init_sparsity": sparsity[0],
        "target_sparsity": sparsity[1],
    }


@pytest.mark.parametrize("task", UNPUBLISHED)
def test_tasks_without_published_values_say_so(task: str) -> None:
    config = load(f"vtab_{task}")
    assert numbers(config) == DEFAULT
    assert config.levels == [0.2, 0.5, 0.8]
    assert config.mixed_precision == "no"
    assert "are not published" in (FOLDER / f"vtab_{task}.yaml").read_text()
    given = config.method_settings
    assert given == {
        **PAPER,
        **ALLOCATION,
        "kernel": "mixed",
        "sparsify": "squared",
        "init_sparsity": 0.01,
    }


def test_there_are_ten_of_them() -> None:
    assert len(UNPUBLISHED) == 10


@pytest.mark.parametrize("name", ["fgvc_cub", "vtab_dmlab"])
def test_the_published_order_is_two_flags_away(name: str) -> None:
    flags = ["--protocol", "paper", "--select_on", "test"]
    config = parse_config(["--config", str(FOLDER / f"{name}.yaml"), *flags])
    assert (config.select_on, config.lr_update, config.allocate) == ("test", "epoch", "epoch")
    assert {key: getattr(config, key) for key in SCHEDULE} == SCHEDULE


@pytest.mark.parametrize("name", ["digits", "digits_fewshot", "skimage"])
def test_the_small_ones_need_no_download(name: str) -> None:
    config = load(name)
    assert config.base == "embedded-vit"
    assert config.data_dir is None
