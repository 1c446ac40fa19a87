"""Sample pictures come from the modules in training and do not disturb them."""

from pathlib import Path

import numpy as np
import pytest
import torch

from snell_diffusion.diffusion.sampling import Sampler
from snell_diffusion.diffusion.setup import Model, build_model
from snell_diffusion.training.errors import NonFiniteError
from tests.diffusion.training_runs import SIDE, config


@pytest.fixture(scope="module")
def model(tiny_base: Path, tmp_path_factory: pytest.TempPathFactory) -> Model:
    settings = config(tiny_base, tmp_path_factory.mktemp("sampling"))
    return build_model(settings, torch.device("cpu"))


def sampler(model: Model, **changes: float) -> Sampler:
    values = {"size": SIDE, "steps": 2, "guidance": 4.0, "seed": 0, **changes}
    return Sampler(model, **values)  # type: ignore[arg-type]


def test_same_index_same_picture_whatever_else_is_drawn(model: Model) -> None:
    one = sampler(model).draw(["a cat"], "sample", [5])[0]
    torch.manual_seed(3)
    three = sampler(model).draw(["a dog", "a cat", "a cup"], "sample", [1, 5, 2])[1]
    assert one.size == (SIDE, SIDE)
    # another batch size may differ in the last bit of a float
    np.testing.assert_allclose(np.asarray(one, int), np.asarray(three, int), atol=1)
    other = sampler(model).draw(["a cat"], "sample", [6])[0]
    assert np.abs(np.asarray(one, int) - np.asarray(other, int)).max() > 10


def test_prompt_and_guidance_count(model: Model) -> None:
    def draw(prompt: str, guidance: float) -> np.ndarray:
        return np.asarray(sampler(model, guidance=guidance).draw([prompt], "sample", [0])[0])

    assert not np.array_equal(draw("a cat", 9.0), draw("a cat", 1.0))
    assert not np.array_equal(draw("a cat", 9.0), draw("zzzz 123", 9.0))


def test_it_is_the_stock_pipeline_s_picture(model: Model) -> None:
    """Own decoding in float32 gives what the pipeline itself gives."""
    from snell_diffusion.training.randomness import generator

    mine = sampler(model).draw(["a cat"], "sample", [0])[0]
    theirs = model.pipe(
        "a cat",
        num_inference_steps=2,
        guidance_scale=4.0,
        generator=generator(0, "sample", 0),
        height=SIDE,
        width=SIDE,
    ).images[0]
    np.testing.assert_array_equal(np.asarray(mine), np.asarray(theirs))


@pytest.mark.parametrize("part, value", [("denoiser", torch.nan), ("VAE", torch.inf)])
def test_pictures_that_are_not_finite_are_refused(
    model: Model, monkeypatch: pytest.MonkeyPatch, part: str, value: float
) -> None:
    """They would come out black (NaN) or white (infinite), which nobody could tell from a dud."""
    inside = model.pipe.unet if part == "denoiser" else model.pipe.vae.decoder
    whole = inside.forward

    def broken(*arguments: object, **options: object) -> object:
        found = whole(*arguments, **options)
        first = found if isinstance(found, torch.Tensor) else found[0]
        first[0, 0, 0, 0] = value
        return found

    monkeypatch.setattr(inside, "forward", broken)
    with pytest.raises(NonFiniteError, match=rf"the {part} gave NaN .* picture of 'a cat'; try"):
        sampler(model).draw(["a cat", "a dog"], "sample", [0, 1])
