"""Several concepts in one run: set up from lists and files, trained together, resumed exactly."""

import json
from collections import Counter
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import yaml
from PIL import Image

from snell_diffusion.diffusion.config import TrainConfig
from snell_diffusion.diffusion.config_files import (
    config_text,
    make_config,
    parse_config,
    read_concepts,
)
from snell_diffusion.diffusion.inputs import Photos
from snell_diffusion.diffusion.prior import class_images
from snell_diffusion.diffusion.run_folder import RunFolder, identity, require_same
from snell_diffusion.diffusion.training import run
from snell_diffusion.errors import SnellaConfigError
from snell_diffusion.training.errors import CheckpointError
from tests.diffusion.training_runs import SIDE, write_photos
from tests.distributed.ranks import adapter as adapter_of
from tests.distributed.ranks import largest_difference, train_to_the_end
from tests.reliability.harness import ADAPTER

DOG = {"instance_data_dir": "photos/dog", "instance_prompt": "a sks dog"}
CAT = {"instance_data_dir": "photos/cat", "instance_prompt": "a qwx cat"}


def test_a_list_in_yaml_and_in_a_file_are_the_same(tmp_path: Path) -> None:
    entries = [{**DOG, "repeats": 2}, {**CAT, "weight": 0.5, "class_prompt": "a cat"}]
    (tmp_path / "run.yaml").write_text(yaml.safe_dump({"concepts": entries, "seed": 3}))
    (tmp_path / "concepts.json").write_text(json.dumps(entries))
    from_yaml = parse_config(["--config", str(tmp_path / "run.yaml")])
    file = str(tmp_path / "concepts.json")
    for flag in ("--concepts", "--concepts_list"):
        assert parse_config([flag, file, "--seed", "3"]) == from_yaml
    assert make_config({"concepts": file, "seed": 3}) == from_yaml
    assert make_config(yaml.safe_load(config_text(from_yaml))) == from_yaml
    dog, cat = from_yaml.subjects
    assert (dog.name, dog.repeats, dog.weight, dog.num_class_images) == ("dog", 2, 1.0, 100)
    assert (cat.name, cat.repeats, cat.weight, cat.class_prompt) == ("cat", 1, 0.5, "a cat")


def test_plain_settings_are_one_concept() -> None:
    plain = make_config({**DOG, "class_prompt": "a dog", "num_validation_photos": 2})
    (concept,) = plain.subjects
    assert (concept.name, concept.num_validation_photos) == (None, 2)
    assert (concept.instance_prompt, concept.class_prompt) == ("a sks dog", "a dog")


@pytest.mark.parametrize(
    "entries, more, message",
    [
        ([DOG, DOG], {}, "2 concepts are called 'dog': give each its own name"),
        ([{**DOG, "name": "../up"}], {}, r"concept name '\.\./up' should hold letters, digits"),
        ([{"instance_prompt": "x"}], {}, r"concepts\.0 has no instance_data_dir"),
        ([DOG, {"instance_data_dir": "x"}], {}, r"concepts\.1 has no instance_prompt"),
        ([{**DOG, "repeat": 2}], {}, r"unknown key 'concepts\.0\.repeat', did you mean 'repeats'"),
        ([{**DOG, "repeats": 0}], {}, r"concepts\.0\.repeats should be greater than or equal to 1"),
        ([{**DOG, "weight": 0}], {}, r"concepts\.0\.weight should be greater than 0"),
        ([DOG], {"class_prompt": "x"}, "with concepts, class_prompt must stand in each of them"),
        ([DOG], {"with_prior_preservation": True}, "with_prior_preservation needs class_prompt"),
        (
            [{**DOG, "validation_data_dir": "v", "num_validation_photos": 1}],
            {},
            r"concepts\.0: give validation_data_dir or num_validation_photos, not both",
        ),
        ("absent.json", {}, "config file absent.json cannot be read"),
    ],
)
def test_mistakes_are_told(entries: Any, more: dict[str, Any], message: str) -> None:
    with pytest.raises(SnellaConfigError, match=message):
        make_config({"concepts": entries, **more})


def test_a_file_of_concepts_holds_a_list(tmp_path: Path) -> None:
    (tmp_path / "concepts.json").write_text(json.dumps(DOG))
    with pytest.raises(SnellaConfigError, match=r"concepts\.json should hold a list of concepts"):
        read_concepts(tmp_path / "concepts.json")


@pytest.mark.parametrize(
    "changes, message",
    [
        ({"prior_loss": "prediction"}, "prior_loss prediction needs with_prior_preservation"),
        (
            {
                "prior_loss": "prediction",
                "with_prior_preservation": True,
                "class_batch_size": 1,
            },
            "class_batch_size is for class images",
        ),
        ({"caption_templates": ["a photo"]}, "caption_templates should hold {} once"),
        ({"aspect_ratio_buckets": "64x64"}, "aspect_ratio_buckets should be auto or height,width"),
        ({"aspect_ratio_buckets": "8192,8"}, "aspect_ratio_buckets should have sides of 8 to 4096"),
        ({"bucket_step": 8}, "bucket_step has no effect without aspect_ratio_buckets auto"),
        (
            {"aspect_ratio_buckets": "auto", "resolution": 64, "bucket_step": 128},
            "bucket_step must be at most resolution, 64, or every shape",
        ),
        ({"cache_dir": ""}, "cache_dir .* should have at least 1 character"),
        ({"caption_dropout": 1.5}, "caption_dropout should be less than or equal to 1"),
        ({"noise_offset": -1}, "noise_offset should be greater than or equal to 0"),
    ],
)
def test_settings_of_data_and_prior_are_checked(changes: dict[str, Any], message: str) -> None:
    with pytest.raises(SnellaConfigError, match=message):
        make_config({**DOG, **changes})


def test_buckets_may_be_true_or_a_list() -> None:
    for value, text in ((True, "auto"), (False, None), ([[48, 32], [32, 48]], "48,32;32,48")):
        assert make_config({**DOG, "aspect_ratio_buckets": value}).aspect_ratio_buckets == text
    for value, text in (("true", "auto"), ("False", None)):  # as the command line gives them
        assert make_config({**DOG, "aspect_ratio_buckets": value}).aspect_ratio_buckets == text


# -- photos ---------------------------------------------------------------------------------------


def two(base: Path, folder: Path, **changes: Any) -> TrainConfig:
    """Two concepts, one with more photos, wide photos, and a mask; everything on."""
    for name, count in (("dog", 2), ("cat", 4)):
        write_photos(folder / name, count)
        pixels = np.random.default_rng(9).integers(0, 255, (20, 44, 3), np.uint8)
        Image.fromarray(pixels).save(folder / name / "a wide one.png")
    Image.new("L", (44, 20), 255).save(folder / "cat" / "a wide one.mask.png")
    (folder / "dog" / "0.txt").write_text("a sks dog on grass")
    entries = [
        {
            "instance_data_dir": str(folder / "dog"),
            "instance_prompt": "sks dog",
            "class_prompt": "a dog",
            "repeats": 2,
        },
        {
            "instance_data_dir": str(folder / "cat"),
            "instance_prompt": "qwx cat",
            "class_prompt": "a cat",
            "num_class_images": 3,
            "num_validation_photos": 1,
            "weight": 0.5,
        },
    ]
    values: dict[str, Any] = {
        "pretrained_model_name_or_path": str(base),
        "concepts": entries,
        "resolution": SIDE,
        "aspect_ratio_buckets": "16,16;16,32",
        "masked_loss": True,
        "caption_templates": ["a photo of a {}", "a {} outside"],
        "caption_dropout": 0.2,
        "noise_offset": 0.05,
        "random_flip": True,
        "snr_gamma": 5.0,
        "num_class_images": 2,
        "validation_timesteps": 2,
        "output_dir": str(folder / "run"),
        "max_train_steps": 4,
        "train_batch_size": 2,
        "learning_rate": 1e-3,
        "rank": 4,
        "target_modules": ["to_q", "to_v"],
        "num_inference_steps": 1,
        "checkpointing_steps": 2,
        "checkpoints_total_limit": None,
    }
    return TrainConfig(**{**values, **changes})


def found(config: TrainConfig) -> Photos:
    return Photos.find(config, RunFolder(config))


def test_photos_know_their_concept(tmp_path: Path) -> None:
    config = two(tmp_path, tmp_path)
    photos = found(config)
    assert Counter(p.concept for p in photos.instance) == {0: 3, 1: 4}
    assert [p.path.name for p in photos.held_out] == ["a wide one.png"]
    assert {(p.concept, p.repeats, p.weight, p.prior_prompt) for p in photos.instance} == {
        (0, 2, 1.0, "a dog"),
        (1, 1, 0.5, "a cat"),
    }
    by_name = {p.path.name: p for p in photos.instance if p.concept == 0}
    assert (by_name["0.png"].prompt, by_name["0.png"].templates) == ("a sks dog on grass", ())
    assert by_name["1.png"].templates == ("a photo of a sks dog", "a sks dog outside")
    assert by_name["1.png"].prompt == "a photo of a sks dog"


def test_the_summary_tells_what_there_is(tmp_path: Path) -> None:
    config = two(tmp_path, tmp_path, with_prior_preservation=True)
    lines = found(config).summary(config, [(16, 16), (16, 32), (32, 32)])
    assert lines[0] == "photos: 7 to train on, 1 held out"
    assert lines[1] == (
        "concept dog: 3 photos of 'sks dog', each 2 times an epoch, weight 1, class 'a dog'"
    )
    assert "captions: 1 of 7 photos have their own" in lines
    assert "shapes in pixels (width x height) and photos: 16x16 for 6, 32x16 for 1" in lines
    assert "class images: 0 there, 5 to generate" in lines
    assert any(line.startswith("photos that equal an earlier one: 0.png, 1.png") for line in lines)


def test_class_images_of_two_concepts_are_other_pictures(tmp_path: Path) -> None:
    """Two subjects of one class: other folders, and other start noise."""
    config = two(tmp_path, tmp_path, with_prior_preservation=True)
    concepts = [replace(concept, class_prompt="a pet") for concept in config.concepts]
    config = replace(config, concepts=concepts)
    images = class_images(config, RunFolder(config))
    assert [some.folder.name for some in images] == ["dog", "cat"]
    assert [some.purpose for some in images] == ["class", "class-1"]
    assert [(some.wanted, some.weight) for some in images] == [(2, 1.0), (3, 0.5)]
    without = replace(concepts[0], class_prompt=None)
    config = replace(config, concepts=[without, concepts[1]])
    assert [some.concept for some in class_images(config, RunFolder(config))] == [1]


def test_two_classes_do_not_share_a_folder(tmp_path: Path) -> None:
    config = two(tmp_path, tmp_path, with_prior_preservation=True)
    shared = {"class_data_dir": str(tmp_path / "class")}
    config = replace(config, concepts=[replace(c, **shared) for c in config.concepts])
    with pytest.raises(SnellaConfigError, match=r"'a dog' and 'a cat' have the same class_data_d"):
        run(config)
    assert not (tmp_path / "run").exists()


def test_drift_is_measured_on_all_concepts(tmp_path: Path) -> None:
    config = two(tmp_path, tmp_path)
    photos = found(config)
    chosen = photos.drift_photos(photos.instance, config, 4)
    assert [p.concept for p in chosen] == [0, 1, 0, 1]
    assert photos.drift_photos([], config, 4) == []


# -- runs -----------------------------------------------------------------------------------------


@pytest.fixture(scope="module", params=["images", "prediction"])
def whole(request: pytest.FixtureRequest, tiny_base: Path, tmp_path_factory: Any) -> TrainConfig:
    """A finished run on two concepts with one of the priors."""
    folder = tmp_path_factory.mktemp(request.param)
    prior = {"with_prior_preservation": True, "prior_loss": request.param}
    config = two(tiny_base, folder, **prior, cache_dir=str(folder / "cache"))
    run(config)
    return config


def events(config: TrainConfig, kind: str) -> list[dict[str, Any]]:
    text = (Path(config.output_dir) / "log.jsonl").read_text()
    return [e for e in map(json.loads, text.splitlines()) if e["event"] == kind]


def test_both_parts_of_the_loss_are_logged(whole: TrainConfig) -> None:
    steps = events(whole, "step")
    assert [e["step"] for e in steps] == [1, 2, 3, 4]
    for entry in steps:
        total = entry["loss_instance"] + entry["loss_prior"]
        assert entry["loss"] == pytest.approx(total, rel=1e-5)
    measured = events(whole, "validation")
    assert 0 < measured[0]["drift"] < measured[-1]["drift"]
    assert measured[0]["validation_loss"] > 0


def test_class_images_of_each_concept_have_their_own_folder(whole: TrainConfig) -> None:
    folder = Path(whole.output_dir) / "class_images"
    if whole.prior_loss == "prediction":
        assert not folder.exists()
        return
    for name, prompt, count in (("dog", "a dog", 2), ("cat", "a cat", 3)):
        assert len(list((folder / name).glob("*.png"))) == count
        assert json.loads((folder / name / "generated.json").read_text())["prompt"] == prompt


def test_interrupted_and_resumed_is_bit_identical(whole: TrainConfig) -> None:
    """Also with folders and names changed, and without the cache."""
    folder = Path(whole.output_dir)
    expected = (folder / ADAPTER).read_bytes()
    moved = [
        replace(
            concept,
            name=f"other{number}",
            class_data_dir=str(folder / "class_images" / str(Path(concept.instance_data_dir).name)),
        )
        for number, concept in enumerate(whole.concepts)
    ]
    again = folder.with_name("again")
    run(
        replace(
            whole,
            concepts=moved,
            cache_dir=None,
            output_dir=str(again),
            resume_from_checkpoint=str(folder / "checkpoints" / "step-000002"),
        )
    )
    last = "checkpoints/step-000004/adapter.safetensors"
    assert (again / last).read_bytes() == (folder / last).read_bytes()
    assert (again / ADAPTER).read_bytes() == expected


def require_continued(config: TrainConfig) -> None:
    """What a resume asks before it goes on."""
    checkpoint = RunFolder(replace(config, resume_from_checkpoint="latest")).find_checkpoint(print)
    assert checkpoint is not None
    base = checkpoint.state["identity"]["base"]
    require_same(checkpoint, identity(config, found(config).digest(), base, 1))


@pytest.mark.parametrize(
    "change, said",
    [
        ({"weight": 2.0}, "concepts: .*'weight': 0.5.* then, .*'weight': 2.0.* now"),
        ({"repeats": 3}, "concepts: .*'repeats': 3"),
        ({"instance_prompt": "other cat"}, "photos: "),
        ({"class_prompt": "a lion"}, "concepts: .*a lion"),
    ],
)
def test_another_concept_is_refused(whole: TrainConfig, change: dict[str, Any], said: str) -> None:
    require_continued(whole)
    concepts = [whole.concepts[0], replace(whole.concepts[1], **change)]
    with pytest.raises(CheckpointError, match=said):
        require_continued(replace(whole, concepts=concepts))


def test_concepts_in_another_order_are_refused(whole: TrainConfig) -> None:
    with pytest.raises(CheckpointError, match="photos: "):
        require_continued(replace(whole, concepts=whole.concepts[::-1]))


def test_another_mask_is_refused(whole: TrainConfig) -> None:
    mask = Path(whole.concepts[1].instance_data_dir) / "a wide one.mask.png"
    before = mask.read_bytes()
    Image.new("L", (44, 20), 254).save(mask)
    try:
        with pytest.raises(CheckpointError, match="photos: "):
            require_continued(whole)
    finally:
        mask.write_bytes(before)


def test_a_trial_step_tells_all_and_writes_nothing(whole: TrainConfig) -> None:
    folder = Path(whole.output_dir).with_name("trial")
    cache = str(folder.with_name("trial cache"))
    result = run(replace(whole, output_dir=str(folder), cache_dir=cache, dry_run=True))
    notes = "\n".join(str(e.get("message")) for e in result.history)
    assert "concept cat: 4 photos of 'qwx cat', each 1 times an epoch, weight 0.5" in notes
    assert "dry run: all checks passed, nothing was written" in notes
    assert not folder.exists()
    assert not Path(cache).exists()


def require_as_one_process(whole: TrainConfig, strategy: str) -> None:
    """Buckets, masks, dropped captions and the prior are drawn by place, not by process."""
    folder = Path(whole.output_dir).with_name(f"two {strategy}")
    class_images = [
        replace(c, class_data_dir=str(Path(whole.output_dir) / "class_images" / name))
        for c, name in zip(whole.concepts, ("dog", "cat"), strict=True)
    ]
    more = {"concepts": class_images, "output_dir": str(folder), "train_batch_size": 1}
    divided = replace(whole, **more)
    first, second = train_to_the_end(2, divided, strategy=strategy)
    assert first["adapter"] == second["adapter"]
    assert largest_difference(adapter_of(whole), adapter_of(divided)) <= 1e-6


def test_two_processes_train_what_one_does(whole: TrainConfig) -> None:
    require_as_one_process(whole, "")


@pytest.mark.parametrize("whole", ["prediction"], indirect=True)
def test_so_they_do_with_a_base_in_shards(whole: TrainConfig) -> None:
    require_as_one_process(whole, "FSDP")
