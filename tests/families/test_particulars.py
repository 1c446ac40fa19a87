"""What single families do in their own way: instructions, padding, shifts, sizes, guidance."""

from collections.abc import Callable
from functools import cache
from pathlib import Path
from typing import Any

import pytest
import torch
from diffusers import FlowMatchEulerDiscreteScheduler
from torch import Tensor

from snell_diffusion.diffusion.families import SampleRequest
from snell_diffusion.diffusion.setup import add_adapters, load_base
from snell_diffusion.diffusion.timesteps import TimestepSettings
from snell_diffusion.errors import SnellaConfigError
from tests.families import tiny_qwen_image
from tests.families.conftest import CPU, Case, conditions, make_case, noisy_example, settings
from tests.families.stock import PROMPTS, call, generators, stock_steps

CaseOf = Callable[[str], Case]
MASKED = ("lumina2", "pixart_sigma", "pixart_sigma-alpha", "qwen_image", "sana", "z_image")


@pytest.fixture(scope="module")
def case_of(tmp_path_factory: pytest.TempPathFactory) -> CaseOf:
    @cache
    def make(name: str) -> Case:
        return make_case(name, tmp_path_factory.mktemp("particular") / "base")

    return make


def load(case: Case) -> Any:
    pipe = case.family.load(str(case.folder))
    for part in (pipe.transformer, pipe.text_encoder, pipe.vae):
        part.requires_grad_(False).eval()
    return pipe


# -- prompts --------------------------------------------------------------------------------------


@torch.no_grad()
@pytest.mark.parametrize("name", ["lumina2", "sana"])
def test_an_empty_prompt_gets_no_instruction_as_in_the_stock_pipeline(
    case_of: CaseOf, name: str
) -> None:
    case = case_of(name)
    ours = case.family.encode_text(load(case), ["a sks cat", ""])
    _, _, text, mask = case.stock().encode_prompt(["a sks cat"], negative_prompt="")
    torch.testing.assert_close(ours["text"][1:], text)
    torch.testing.assert_close(ours["mask"][1:], mask)
    assert mask.sum() == 1
    assert ours["mask"][0].sum() > 10


@torch.no_grad()
@pytest.mark.parametrize("name", MASKED)
def test_padding_changes_no_answer(case_of: CaseOf, name: str) -> None:
    """Not what stands behind a prompt's end, nor a longer prompt beside it in the batch."""
    case = case_of(name)
    pipe = load(case)
    objective = case.family.objective(pipe, CPU, TimestepSettings())
    noisy, _, timesteps = noisy_example(case, pipe, objective)
    asked = conditions(case, pipe, PROMPTS)
    answer = case.family.denoise(pipe.transformer, noisy, timesteps, asked)
    rubbish = torch.where(asked["mask"].bool()[..., None], asked["text"], 7.0)
    spoilt = case.family.denoise(pipe.transformer, noisy, timesteps, {**asked, "text": rubbish})
    torch.testing.assert_close(spoilt, answer)
    for row in range(2):
        one = slice(row, row + 1)
        rows = {key: value[one] for key, value in asked.items()}
        alone = case.family.denoise(pipe.transformer, noisy[one], timesteps[one], rows)
        torch.testing.assert_close(alone, answer[one], rtol=1e-4, atol=1e-5)
    assert not torch.allclose(
        case.family.denoise(pipe.transformer, noisy, timesteps, turned(asked)), answer
    )


def turned(asked: dict[str, Tensor]) -> dict[str, Tensor]:
    """The prompts in the other order."""
    return {key: value.flip(0) for key, value in asked.items()}


@torch.no_grad()
@pytest.mark.parametrize("name", ["qwen_image", "z_image"])
def test_long_prompts_are_cut(case_of: CaseOf, name: str) -> None:
    case = case_of(name)
    asked = case.family.encode_text(load(case), ["x" * 700, "y"])
    assert asked["text"].shape[:2] == asked["mask"].shape == (2, 512)
    assert asked["mask"][0].all()
    assert not asked["mask"][1].all()


@pytest.mark.parametrize(
    ("name", "seen"), [("sana", False), ("pixart_sigma", False), ("z_image", True)]
)
def test_new_words_that_the_pipeline_would_write_otherwise_are_refused(
    case_of: CaseOf, tmp_path: Path, name: str, seen: bool
) -> None:
    config = settings(case_of(name), tmp_path, new_tokens=["<Cup>"], train_text_encoder=False)
    family, pipe = load_base(config)
    if seen:
        assert add_adapters(config, family, pipe).keys() == {"transformer", "text_encoder"}
        ids = pipe.tokenizer("<Cup>").input_ids
        assert len(ids) == 1
        return
    with pytest.raises(SnellaConfigError, match=r"<Cup> has capital letters.*write <cup>"):
        add_adapters(config, family, pipe)
    assert family.encode_text(pipe, ["A CAT"])["text"].equal(
        family.encode_text(pipe, ["a cat"])["text"]
    )


@torch.no_grad()
def test_qwen_image_drops_the_start_of_its_template(case_of: CaseOf) -> None:
    case = case_of("qwen_image")
    pipe = load(case)
    start = pipe.prompt_template_encode.split("{}")[0]
    assert len(tiny_qwen_image.tokenizer()(start).input_ids) == 34
    asked = case.family.encode_text(pipe, ["ab", "abcd"])
    assert asked["mask"].sum(1).tolist() == [2 + 5, 4 + 5]


# -- noise levels ---------------------------------------------------------------------------------


@pytest.mark.parametrize("name", ["lumina2", "qwen_image", "z_image"])
@pytest.mark.parametrize("dynamic", [False, True])
def test_training_is_shifted_as_sampling(case_of: CaseOf, name: str, dynamic: bool) -> None:
    case = case_of(name)
    stock = case.stock()
    stock.scheduler = FlowMatchEulerDiscreteScheduler(
        shift=2.5, use_dynamic_shifting=dynamic, base_shift=0.4, max_shift=1.3
    )
    objective = case.family.objective(stock, CPU, TimestepSettings(weighting_scheme="none"))
    middle = float(objective.timesteps(torch.tensor([0.5]), case.tiny.side**2))
    asked = [float(t) for _, t, _ in stock_steps(case, stock, 2)]
    assert asked == pytest.approx([1000, middle], rel=1e-5)
    assert middle != pytest.approx(500, abs=1)


def test_sana_reads_the_shift_of_its_scheduler(case_of: CaseOf) -> None:
    case = case_of("sana")
    stock = case.stock()
    objective = case.family.objective(stock, CPU, TimestepSettings(weighting_scheme="none"))
    assert objective.timesteps(torch.tensor([0.5]), 64**2).tolist() == [750]
    asked = [float(t) for _, t, _ in stock_steps(case, stock, 2)]
    assert asked == pytest.approx([1000, 750], abs=1)  # rounded down by the scheduler


# -- guidance -------------------------------------------------------------------------------------


@torch.no_grad()
@pytest.mark.parametrize("name", MASKED)
def test_no_guidance_is_that_of_the_stock_pipeline(case_of: CaseOf, name: str) -> None:
    case = case_of(name)
    pipe = load(case)
    encoded = case.family.encode_text(pipe, [*PROMPTS, ""])
    request = SampleRequest(
        conditions={key: rows[:-1] for key, rows in encoded.items()},
        unconditional={key: rows[-1:] for key, rows in encoded.items()},
        generators=generators(),
        size=case.tiny.side,
        steps=2,
        guidance=1.0,
    )
    stock = case.stock()
    expected = call(case, stock, steps=2, **case.tiny.plain).images
    ours = case.family.sample(pipe, request)
    torch.testing.assert_close(
        ours, case.tiny.unpack(stock, expected, case.tiny.side), rtol=1e-4, atol=1e-4
    )


# -- further outputs, further inputs --------------------------------------------------------------


@torch.no_grad()
def test_pixart_alpha_is_told_height_width_and_their_ratio(case_of: CaseOf) -> None:
    case = case_of("pixart_sigma-alpha")
    pipe = load(case)
    (expected, t, noisy), _ = stock_steps(case, case.stock(), 2, height=32)
    asked = case.family.encode_text(pipe, PROMPTS)
    right = torch.tensor([[99.0, 98, 1, 2, 32, 16]]).expand(2, -1)
    for geometry, same in ((right, True), (right.flip(1), False)):
        given = {**asked, "geometry": geometry}
        ours = case.family.denoise(pipe.transformer, noisy, t.expand(2), given)
        assert torch.allclose(ours, expected, rtol=1e-4, atol=1e-5) is same


@torch.no_grad()
def test_qwen_image_scales_the_spread_of_its_latents(case_of: CaseOf) -> None:
    case = case_of("qwen_image")
    pipe = load(case)
    pixels = torch.rand(1, 3, case.tiny.side, case.tiny.side)
    _, std = case.family.encode_images(pipe, pixels)
    raw = pipe.vae.encode(pixels.unsqueeze(2)).latent_dist.std.squeeze(2)
    for channel, scale in enumerate(pipe.vae.config.latents_std):
        torch.testing.assert_close(std[:, channel] * scale, raw[:, channel])


# -- LoRA -----------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("name", "text", "lacking"),
    [("sana", True, "text_encoder"), ("pixart_sigma", False, "transformer"), ("sana", False, None)],
)
def test_a_lora_that_the_pipeline_cannot_store_is_refused_at_once(
    case_of: CaseOf, tmp_path: Path, name: str, text: bool, lacking: str | None
) -> None:
    case = case_of(name)
    unset = {"init": None, "sparsify": None}
    config = settings(case, tmp_path, method="lora", train_text_encoder=text, **unset)
    family, pipe = load_base(config)
    if lacking is None:
        assert add_adapters(config, family, pipe).keys() == {"transformer"}
        return
    with pytest.raises(SnellaConfigError, match=rf"{type(pipe).__name__} .* {lacking}.*snella"):
        add_adapters(config, family, pipe)
