"""The transformer in the package loads in the stock pipeline and does what its card says."""

import numpy as np
import pytest
import torch
from diffusers import AutoencoderKL, StableDiffusion3Pipeline
from safetensors.torch import load_file
from transformers import CLIPTextModel

from snell_diffusion.models import embedded_dit_path, embedded_path

LIMIT_MB = 12  # of the whole folder, 1e6 bytes
STEPS = 4  # enough to tell pictures apart, not to make good ones
PROMPT = "a photo of a sks bowl on a wooden floor"
RED, BLUE = (f"a photo of a {color} teapot on a white background" for color in ("red", "blue"))
ZERO_TOKENS = [0, 77, 256]  # SD3 pads the absent T5's part; 256 unless the caller says otherwise


@pytest.fixture(scope="module")
def pipeline() -> StableDiffusion3Pipeline:
    pipe = StableDiffusion3Pipeline.from_pretrained(
        embedded_dit_path(), text_encoder_3=None, tokenizer_3=None, local_files_only=True
    )
    pipe.set_progress_bar_config(disable=True)
    return pipe


def draw(
    pipeline: StableDiffusion3Pipeline, prompt: str, seed: int = 0, zero_tokens: int = 256
) -> np.ndarray:
    """One picture, (64, 64, 3) in [0, 1]."""
    return pipeline(
        prompt,
        num_inference_steps=STEPS,
        guidance_scale=3.0,
        max_sequence_length=zero_tokens,
        generator=torch.Generator().manual_seed(seed),
        output_type="np",
    ).images[0]


def test_folder_is_within_its_limit_and_holds_half_precision_alone():
    root = embedded_dit_path()
    files = [p for p in root.rglob("*") if p.is_file()]
    assert sum(p.stat().st_size for p in files) < LIMIT_MB * 1e6
    assert {p.suffix for p in files} == {".json", ".md", ".safetensors"}
    for path in root.rglob("*.safetensors"):
        assert {t.dtype for t in load_file(path).values() if t.is_floating_point()} == {
            torch.float16
        }


def test_folder_carries_its_card():
    card = (embedded_dit_path() / "README.md").read_text()
    for word in ("Noto Color Emoji", "not photographic", "Samples seen", "Misses"):
        assert word in card


def test_components(pipeline):
    names = ("transformer", "vae", "text_encoder", "text_encoder_2")
    assert {getattr(pipeline, n).dtype for n in names} == {torch.float32}
    assert pipeline.text_encoder_3 is None
    assert pipeline.scheduler.config.shift == 1.0
    assert pipeline.transformer.config.sample_size * pipeline.vae_scale_factor == 64


@pytest.mark.parametrize("name", ["text_encoder", "text_encoder_2"])
def test_text_features_are_those_of_the_embedded_base(pipeline, name):
    """SD3 reads the layer before the last; here the last one adds nothing."""
    base = CLIPTextModel.from_pretrained(embedded_path() / "text_encoder")
    tokens = pipeline.tokenizer([PROMPT, ""], padding="max_length", return_tensors="pt").input_ids
    with torch.no_grad():
        expected = base(tokens, output_hidden_states=True)
        got = getattr(pipeline, name)(tokens, output_hidden_states=True)
    torch.testing.assert_close(got.hidden_states[-2], expected.hidden_states[-1])
    torch.testing.assert_close(got.text_embeds, expected.pooler_output)


def test_autoencoder_is_that_of_the_embedded_base(pipeline):
    base = AutoencoderKL.from_pretrained(embedded_path() / "vae").state_dict()
    got = pipeline.vae.state_dict()
    assert base.keys() == got.keys()
    assert all(torch.equal(got[key], base[key]) for key in base)


def test_same_seed_same_picture(pipeline):
    first = draw(pipeline, PROMPT)
    assert np.isfinite(first).all()
    np.testing.assert_array_equal(first, draw(pipeline, PROMPT))
    assert np.abs(first - draw(pipeline, PROMPT, seed=1)).mean() > 0.01


@pytest.mark.parametrize("zero_tokens", ZERO_TOKENS)
def test_background_follows_the_prompt(pipeline, zero_tokens):
    """In the corners snow is light, night is dark and grass is green."""
    corners = {}
    for where in ("in the snow", "at night", "on the grass"):
        picture = draw(pipeline, f"a photo of a cat {where}", zero_tokens=zero_tokens)
        corners[where] = picture[[2, 2, -3, -3], [2, -3, 2, -3]].mean(0)
    assert corners["in the snow"].mean() > 0.6
    assert corners["at night"].mean() < 0.3
    assert corners["on the grass"].argmax() == 1


@pytest.mark.parametrize("zero_tokens", ZERO_TOKENS)
def test_object_colour_follows_the_prompt(pipeline, zero_tokens):
    """The teapot fills the middle; red and blue lead there, and the scene stays white."""
    pictures = [draw(pipeline, prompt, zero_tokens=zero_tokens) for prompt in (RED, BLUE)]
    red, blue = (p[24:40, 24:40].mean((0, 1)) for p in pictures)
    assert red.argmax() == 0
    assert red[0] - red[2] > 0.3
    assert blue.argmax() == 2
    assert blue[2] - blue[0] > 0.3
    assert all(p[[2, 2], [2, -3]].min() > 0.8 for p in pictures)
