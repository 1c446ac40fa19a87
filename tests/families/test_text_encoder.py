"""Text encoders of every family: updates of their layers and new words, learnt and loaded back."""

from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import snell_diffusion  # noqa: F401  adds load_snella_weights to the pipelines
from snell_diffusion.adapters import read_adapter, save_adapter
from snell_diffusion.adapters.tokens import attach_words, input_embedding, table_of, tokenizer_of
from snell_diffusion.diffusion.families import Conditions
from snell_diffusion.diffusion.losses import squared_error
from snell_diffusion.diffusion.setup import ADAPTER, add_adapters, load_base
from snell_diffusion.diffusion.timesteps import TimestepSettings
from snell_diffusion.training.adapter_tensors import trainable_parameters
from snell_diffusion.tuners.tokens import Word, spelled, token_layers
from tests.families.conftest import CPU, Case, conditions, noisy_example, settings

WORD = Word("<cup>", 2)
PROMPTS = [f"a {WORD.text} on grass", "a photo"]
SPELLED = [spelled(prompt, [WORD]) for prompt in PROMPTS]


@dataclass(frozen=True)
class Learnt:
    """A base after one step of plain descent, and the file it was saved to."""

    pipe: Any
    components: dict[str, nn.Module]
    grads: dict[str, Tensor]
    path: Path


@pytest.fixture(scope="module")
def learnt(base: Case, tmp_path_factory: pytest.TempPathFactory) -> Learnt:
    folder = tmp_path_factory.mktemp("text")
    config = settings(
        base,
        folder,
        train_text_encoder=True,
        new_tokens=[f"{WORD.text}={WORD.vectors}"],
        init="paper",
        init_sparsity=0,
        target_sparsity=0,
    )
    family, pipe = load_base(config)
    components = add_adapters(config, family, pipe)
    objective = family.objective(pipe, CPU, TimestepSettings())
    noisy, target, timesteps = noisy_example(base, pipe, objective)
    asked = conditions(base, pipe, SPELLED)
    answer = family.denoise(components[family.denoiser], noisy, timesteps, asked)
    parameters = trainable_parameters(components)
    loss = squared_error(answer, target).mean()
    found = torch.autograd.grad(loss, list(parameters.values()), allow_unused=True)
    grads = {n: g for n, g in zip(parameters, found, strict=True) if g is not None and g.any()}
    with torch.no_grad():
        for name, grad in grads.items():
            parameters[name].sub_(0.1 * grad / grad.norm())
    return Learnt(pipe, components, grads, save_adapter(folder, components))


def encoders(case: Case) -> list[str]:
    """Every text encoder that the pipeline has."""
    parts = case.stock().components
    return [n for n, part in parts.items() if n.startswith("text_encoder") and part is not None]


@torch.no_grad()
def encoded(case: Case, pipe: Any) -> Conditions:
    return case.family.encode_text(pipe, SPELLED)


def test_gradients_reach_text_encoders_and_new_words(base: Case, learnt: Learnt) -> None:
    reached = {name.partition(".")[0] for name in learnt.grads if "snella_" in name}
    assert {base.family.denoiser, *base.family.text_encoders} <= reached
    words = {name.partition(".")[0] for name in learnt.grads if "token_rows" in name}
    assert words == set(encoders(base))


def test_the_file_has_the_updates_and_the_words(base: Case, learnt: Learnt) -> None:
    header = read_adapter(learnt.path).header
    assert set(header.components) == {base.family.denoiser, *base.family.text_encoders}
    assert header.tokens is not None
    assert set(header.tokens.encoders) == set(encoders(base))


@pytest.mark.filterwarnings("ignore:.*does not expand words of several vectors")
def test_a_stock_pipeline_reads_prompts_as_the_trained_one(base: Case, learnt: Learnt) -> None:
    stock = base.stock()
    before = encoded(base, stock)
    parts = stock.components.items()
    texts = {n: part for n, part in parts if n.startswith("tokenizer") and part is not None}
    states = {name: vars(tokenizer).copy() for name, tokenizer in texts.items()}
    stock.load_snella_weights(learnt.path)
    expected = encoded(base, learnt.pipe)
    for name, rows in encoded(base, stock).items():
        torch.testing.assert_close(rows, expected[name], rtol=1e-4, atol=1e-5)
    # Somewhere the words are read: also in the rows that a plain prompt has of its own.
    assert any(not torch.equal(rows, before[n]) for n, rows in expected.items())

    stock.unload_snella_weights()
    assert {name: vars(tokenizer) for name, tokenizer in texts.items()} == states
    for name, rows in encoded(base, stock).items():
        assert torch.equal(rows, before[name])


def test_a_row_means_what_the_same_row_of_the_table_means(base: Case) -> None:
    """Also where the encoder multiplies what it looks up, as Gemma does."""
    pipe = base.stock()
    for name in encoders(base):
        encoder, tokenizer = getattr(pipe, name), getattr(pipe, tokenizer_of(name))
        known = torch.tensor([5, 6])
        expected = input_embedding(encoder, name)(known)
        rows = table_of(input_embedding(encoder, name))[known]
        layer = attach_words(encoder, tokenizer, "x", [WORD], rows)
        assert torch.equal(layer(layer.token_ids["x"]), expected)


def test_every_vector_of_a_word_is_read(base: Case, learnt: Learnt) -> None:
    """No tokenizer splits or drops a new word, whatever the pipeline does to prompts first."""
    seen: dict[str, set[int]] = {}
    hooks = []
    for name in encoders(base):
        [layer] = token_layers(getattr(learnt.pipe, name))
        ids = set(layer.token_ids[ADAPTER].tolist())

        def note(module: nn.Module, given: Any, n: str = name, new: set[int] = ids) -> None:
            seen.setdefault(n, set()).update(new & set(given[0].flatten().tolist()))

        hooks.append(layer.register_forward_pre_hook(note))
    encoded(base, learnt.pipe)
    for hook in hooks:
        hook.remove()
    assert {name: len(found) for name, found in seen.items()} == dict.fromkeys(
        encoders(base), WORD.vectors
    )
    assert all(getattr(learnt.pipe, tokenizer_of(name)) is not None for name in seen)
