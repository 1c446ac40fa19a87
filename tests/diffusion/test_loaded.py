"""What stays with a loaded adapter, and what a pipeline that holds one must not write."""

from pathlib import Path

import pytest
import torch
from diffusers import StableDiffusionPipeline

from snell_diffusion.adapters import read_adapter, save_adapter
from snell_diffusion.errors import SnellaValueError
from tests.tiny_models import adapt, picture, pipeline, text_encoder

NOTES = {"instance_prompt": "a photo of sks cat", "steps": 12, "loss": 0.25}


@pytest.fixture(scope="module")
def cat(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """An adapter of the text encoder alone."""
    folder = tmp_path_factory.mktemp("cat")
    return save_adapter(folder, {"text_encoder": adapt(text_encoder())}, metadata=NOTES)


def test_a_files_notes_survive_loading_and_saving(cat: Path, tmp_path: Path) -> None:
    pipe = pipeline()
    pipe.load_snella_weights(cat, "cat")
    again = pipe.save_snella_weights(tmp_path / "again")
    assert read_adapter(again).header.metadata == NOTES
    assert read_adapter(pipe.snella_state_dict()).header.metadata == NOTES
    other = pipe.save_snella_weights(tmp_path / "other", metadata={"steps": 13})
    assert read_adapter(other).header.metadata == {"steps": 13}


def test_another_adapter_of_the_same_name_has_its_own_notes(cat: Path, tmp_path: Path) -> None:
    pipe = pipeline()
    pipe.load_snella_weights(cat, "cat")
    pipe.unload_snella_weights()
    adapt(pipe.text_encoder, "cat")
    fresh = pipe.save_snella_weights(tmp_path, "cat")
    assert read_adapter(fresh).header.metadata == {}


def test_a_pipeline_with_an_adapted_text_encoder_is_not_saved_unreadably(
    cat: Path, tmp_path: Path
) -> None:
    pipe = pipeline()
    plain = picture(pipe)
    pipe.load_snella_weights(cat)
    with pytest.raises(SnellaValueError, match=r"CLIPTextModel.*then unload_snella_weights"):
        pipe.save_pretrained(tmp_path / "with")
    pipe.unload_snella_weights()
    pipe.save_pretrained(tmp_path / "without")
    again = StableDiffusionPipeline.from_pretrained(tmp_path / "without")
    again.set_progress_bar_config(disable=True)
    assert torch.equal(picture(again), plain)
