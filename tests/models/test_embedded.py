"""The model in the package loads without a network, fits its size, and does what its card says."""

import numpy as np
import pytest
import torch
from diffusers import StableDiffusionPipeline
from PIL import Image

from snell_diffusion.models import embedded_path

LIMIT_MB = 20  # safetensors in all, 1e6 bytes
STEPS = 4  # enough to tell pictures apart, not to make good ones


@pytest.fixture(scope="module")
def pipeline() -> StableDiffusionPipeline:
    pipe = StableDiffusionPipeline.from_pretrained(embedded_path(), local_files_only=True)
    pipe.set_progress_bar_config(disable=True)
    return pipe


def draw(pipeline: StableDiffusionPipeline, prompt: str, seed: int = 0) -> np.ndarray:
    """One picture, (64, 64, 3) in [0, 1]."""
    return pipeline(
        prompt,
        num_inference_steps=STEPS,
        guidance_scale=3.0,
        generator=torch.Generator().manual_seed(seed),
        output_type="np",
    ).images[0]


def test_unknown_name_lists_the_valid_ones():
    with pytest.raises(ValueError, match="'embeded' is unknown; known: embedded"):
        embedded_path("embeded")


def test_weights_are_half_precision_and_within_the_limit():
    files = list(embedded_path().rglob("*.safetensors"))
    assert {f.parent.name for f in files} == {"unet", "vae", "text_encoder"}
    assert sum(f.stat().st_size for f in files) < LIMIT_MB * 1e6


def test_folder_carries_its_card_and_no_pickles():
    root = embedded_path()
    card = (root / "README.md").read_text()
    for word in ("Noto Color Emoji", "not photographic", "Samples seen", "Misses"):
        assert word in card
    assert not [p for p in root.rglob("*") if p.suffix in {".bin", ".pt", ".ckpt", ".pkl"}]


def test_components(pipeline):
    parts = (pipeline.unet, pipeline.vae, pipeline.text_encoder)
    assert [m.dtype for m in parts] == [torch.float32] * 3  # float16 files, float32 by default
    assert pipeline.safety_checker is None
    assert pipeline.feature_extractor is None
    assert pipeline.scheduler.config.prediction_type == "v_prediction"
    assert pipeline.scheduler.alphas_cumprod[-1] < 1e-6  # zero terminal SNR
    assert pipeline.unet.config.sample_size * pipeline.vae_scale_factor == 64


@pytest.mark.parametrize("word", ["sks", "zwx", "ohwx", "dog", "teapot", "backpack", "red"])
def test_words_that_are_one_token(pipeline, word):
    assert len(pipeline.tokenizer(word).input_ids) == 3  # start, word, end


@pytest.mark.parametrize("text", ["a photo of sks dog", "zyxwv über 犬", "naïve 🦆", ""])
def test_tokenizer_takes_any_text(pipeline, text):
    tokenizer = pipeline.tokenizer
    ids = tokenizer(text).input_ids
    assert tokenizer.decode(ids, skip_special_tokens=True).strip() == text
    assert max(ids) < pipeline.text_encoder.config.vocab_size


def test_vae_reconstructs_a_photo_it_never_saw(pipeline):
    """`coffee` of scikit-image was held out of VAE training; the card says 27.8 dB."""
    data = pytest.importorskip("skimage.data")
    photo = Image.fromarray(data.coffee())
    boxes = [(0, 0, 400, 400), (200, 0, 600, 400), (150, 80, 450, 380), (300, 150, 500, 350)]
    crops = [np.asarray(photo.resize((64, 64), Image.Resampling.BOX, box)) for box in boxes]
    x = torch.from_numpy(np.stack(crops)).permute(0, 3, 1, 2) / 127.5 - 1
    with torch.no_grad():
        z = pipeline.vae.encode(x).latent_dist.mode()
        y = pipeline.vae.decode(z).sample.clamp(-1, 1)
    psnr = 10 * torch.log10(4 / (y - x).pow(2).mean((1, 2, 3)))
    assert z.shape == (4, 8, 16, 16)
    assert psnr.mean() > 26.5, psnr


def test_same_seed_same_picture(pipeline):
    first = draw(pipeline, "a photo of a dog")
    np.testing.assert_array_equal(first, draw(pipeline, "a photo of a dog"))
    assert np.abs(first - draw(pipeline, "a photo of a dog", seed=1)).mean() > 0.01


def test_background_follows_the_prompt(pipeline):
    """In the corners snow is light, night is dark and grass is green."""
    corners = {
        where: draw(pipeline, f"a photo of a cat {where}")[[2, 2, -3, -3], [2, -3, 2, -3]].mean(0)
        for where in ("in the snow", "at night", "on the grass")
    }
    assert corners["in the snow"].mean() > 0.6
    assert corners["at night"].mean() < 0.3
    assert corners["on the grass"].argmax() == 1


def test_object_colour_follows_the_prompt(pipeline):
    red = draw(pipeline, "a photo of a red teapot on a white background")[24:40, 24:40].mean((0, 1))
    blue = draw(pipeline, "a photo of a blue teapot on a white background")[24:40, 24:40].mean(
        (0, 1)
    )
    assert red.argmax() == 0
    assert blue.argmax() == 2
