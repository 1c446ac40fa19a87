import pytest
import yaml

from snell_diffusion.app.bases import Base, Bases
from snell_diffusion.app.jobs import SCRIPT
from snell_diffusion.app.presets import EFFORTS, KINDS, preset_values, recipe_of, usual_word
from snell_diffusion.diffusion.config_files import make_config
from snell_diffusion.errors import SnellaValueError

BASES = Bases.of()
LARGE = Base("sdxl", "SDXL", "owner/sdxl", "sdxl", 1024, 30, 5.0, 2048, 8)


@pytest.mark.parametrize("base", [*BASES.all(), LARGE], ids=lambda base: base.id)
@pytest.mark.parametrize("effort", EFFORTS)
@pytest.mark.parametrize("kind", KINDS)
def test_every_preset_is_a_valid_configuration(base, kind, effort):
    values = preset_values(base, kind, effort, photos=5)
    more = {"instance_data_dir": "x", "instance_prompt": "x", "class_prompt": "y"}
    config = make_config({**values, **more})
    assert config.resolution == base.resolution
    assert config.guidance_scale == base.guidance
    sheets = -(-config.max_train_steps // config.sample_steps)
    assert 4 <= sheets <= 5
    assert config.num_validation_photos == 1


@pytest.mark.parametrize("kind", KINDS)
def test_balanced_on_the_embedded_base_is_the_measured_recipe(kind):
    path = SCRIPT.parent / "configs" / "dreambooth" / f"recipe_{kind}.yaml"
    recipe = yaml.safe_load(path.read_text())
    values = preset_values(BASES.get("embedded"), kind, "balanced", photos=5)
    ours = {"validation_steps", "sample_steps", "checkpointing_steps", "num_validation_photos"}
    ours |= {"checkpoints_total_limit"}
    for name, value in values.items():
        if name not in ours and not (name == "prior_loss_weight" and name not in recipe):
            assert recipe[name] == value, name


def test_the_effort_is_the_number_of_steps_and_can_be_set():
    base = BASES.get("embedded")
    steps = [preset_values(base, "pet", effort, 5)["max_train_steps"] for effort in EFFORTS]
    assert steps == [45, 90, 180]
    values = preset_values(base, "pet", "quick", 5, steps=2)
    assert (values["max_train_steps"], values["sample_steps"]) == (2, 1)


def test_few_photos_are_all_trained_on():
    values = preset_values(BASES.get("embedded"), "pet", "quick", photos=3)
    assert values["num_validation_photos"] == 0


def test_words_fit_the_base():
    assert usual_word(BASES.get("embedded"), "Red Cat") == "<my-red-cat>"
    assert usual_word(BASES.get("embedded-dit"), "cup") == "<my-cup>"
    assert usual_word(LARGE, "cat") == "sks"


def test_large_bases_spare_memory():
    assert recipe_of(LARGE).values["gradient_checkpointing"] is True
    assert recipe_of(LARGE).learning_rate["pet"] == 1e-3
    flow = Base("flux", "FLUX", "owner/flux", "flux", 1024, 28, 3.5, 2048, 16)
    assert recipe_of(flow).learning_rate["pet"] == 5e-4


@pytest.mark.parametrize("kind, effort", [("animal", "quick"), ("pet", "endless")])
def test_an_unknown_preset_is_refused(kind, effort):
    with pytest.raises(SnellaValueError, match=r"one of pet, object, style and one of quick"):
        preset_values(LARGE, kind, effort, 5)
