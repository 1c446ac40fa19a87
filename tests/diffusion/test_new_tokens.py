"""Runs with new words: what trains, what is kept, what a resume and a loaded file give back."""

from pathlib import Path
from typing import Any

import pytest
import torch
from diffusers import StableDiffusionPipeline
from safetensors.torch import load_file

import snell_diffusion  # noqa: F401  adds load_snella_weights to the pipeline
from snell_diffusion.adapters import read_adapter
from snell_diffusion.adapters.export_lora import export_lora
from snell_diffusion.diffusion import training
from snell_diffusion.diffusion.config import TrainConfig
from snell_diffusion.diffusion.export import export_merged
from snell_diffusion.diffusion.new_tokens import start_rows
from snell_diffusion.diffusion.optimization import parameter_groups
from snell_diffusion.diffusion.setup import ADAPTER, build_model
from snell_diffusion.diffusion.training import run
from snell_diffusion.errors import SnellaConfigError
from snell_diffusion.tuners.tokens import TokenLayer, Word, token_layers
from tests.diffusion.training_runs import config, write_photos
from tests.tiny_models import picture, pipeline

PROMPT = "a photo of <cup>"
TOKENS: dict[str, Any] = {
    "instance_prompt": PROMPT,
    "new_tokens": ["<cup>=2"],
    "initializer_token": "cup",
    "token_learning_rate": 1e-2,
}


def load(base: Path) -> StableDiffusionPipeline:
    pipe = StableDiffusionPipeline.from_pretrained(base, safety_checker=None)
    pipe.set_progress_bar_config(disable=True)
    return pipe


@pytest.fixture(scope="module")
def done(tiny_base: Path, tmp_path_factory: pytest.TempPathFactory) -> tuple[TrainConfig, Any]:
    """One run with new words, an average and checkpoints."""
    folder = tmp_path_factory.mktemp("words")
    settings = config(
        tiny_base,
        folder,
        **TOKENS,
        ema_decay=0.9,
        checkpointing_steps=2,
        checkpoints_total_limit=3,
        validation_prompt=PROMPT,
    )
    return settings, run(settings)


def test_the_file_has_deltas_and_words(done: Any, tiny_base: Path) -> None:
    file = read_adapter(done[1].adapter_path)
    assert file.header.tokens is not None
    assert [(w.text, w.vectors) for w in file.header.tokens.words] == [("<cup>", 2)]
    assert set(file.header.components) == {"unet"}
    rows = file.tensors["text_encoder.snella_tokens"]
    table = load(tiny_base).text_encoder.get_input_embeddings().weight.detach()
    assert not torch.equal(rows, table[load(tiny_base).tokenizer.convert_tokens_to_ids(["c", "u"])])
    assert float(rows.norm(dim=1).max()) <= float(table.norm(dim=1).max()) * (1 + 1e-6)


def test_stock_prompts_use_the_words(done: Any, tiny_base: Path) -> None:
    pipe = load(tiny_base)
    base = picture(pipe, PROMPT)
    pipe.load_snella_weights(done[1].adapter_path)
    assert not torch.equal(picture(pipe, PROMPT), base)
    assert not torch.equal(picture(pipe, PROMPT), picture(pipe, "a photo of cup"))
    pipe.unload_snella_weights()
    assert torch.equal(picture(pipe, PROMPT), base)


def test_resumed_in_the_middle_it_ends_with_the_same_bits(done: Any, tmp_path: Path) -> None:
    settings, result = done
    middle = result.output_dir / "checkpoints" / "step-000002"
    values = {**vars(settings), "output_dir": str(tmp_path / "run")}
    run(TrainConfig(**{**values, "resume_from_checkpoint": str(middle)}))
    again = tmp_path / "run" / result.adapter_path.name
    assert again.read_bytes() == result.adapter_path.read_bytes()


def test_only_the_new_rows_train_and_never_decay(tiny_base: Path, tmp_path: Path) -> None:
    settings = config(tiny_base, tmp_path, **TOKENS)
    model = build_model(settings, torch.device("cpu"))
    [layer] = token_layers(model.components["text_encoder"])
    trained = {n for n, p in model.components["text_encoder"].named_parameters() if p.requires_grad}
    assert {name.rpartition("token_rows.")[2] for name in trained} == {ADAPTER}
    groups = {g["name"]: g for g in parameter_groups(settings, model.components)}
    assert groups["tokens"]["params"] == [layer.token_rows[ADAPTER]]
    assert (groups["tokens"]["lr"], groups["tokens"]["weight_decay"]) == (1e-2, 0.0)


def test_the_base_table_stays_bit_for_bit(
    tiny_base: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    built = []

    def watched(*arguments: Any) -> Any:
        built.append(build_model(*arguments))
        return built[0]

    monkeypatch.setattr(training, "build_model", watched)
    run(config(tiny_base, tmp_path, **TOKENS, adam_weight_decay=0.5))
    [layer] = token_layers(built[0].components["text_encoder"])
    table = load(tiny_base).text_encoder.get_input_embeddings().weight
    assert torch.equal(layer.base_layer.weight, table)
    assert not torch.equal(layer.token_rows[ADAPTER], layer.token_start[ADAPTER])


def test_words_and_text_encoder_deltas_together(tiny_base: Path, tmp_path: Path) -> None:
    run(config(tiny_base, tmp_path, **TOKENS, train_text_encoder=True))
    file = read_adapter(tmp_path / "run" / "pytorch_snella_weights.safetensors")
    assert set(file.header.components) == {"unet", "text_encoder"}
    pipe = load(tiny_base)
    stock = picture(pipe, PROMPT)
    pipe.load_snella_weights(tmp_path / "run")
    pipe.unload_snella_weights()
    assert torch.equal(picture(pipe, PROMPT), stock)


@pytest.mark.parametrize("method", ["snella", "lora"])
def test_the_subject_is_learnt_with_its_word(method: str, tiny_base: Path, tmp_path: Path) -> None:
    """Words and deltas together end lower on held-out photos than they began."""
    settings = config(
        tiny_base,
        tmp_path,
        **TOKENS,
        method=method,
        max_train_steps=16,
        validation_steps=16,
        validation_timesteps=4,
        learning_rate=1e-2,
    )
    result = run(settings)
    losses = [e["validation_loss"] for e in result.history if e["event"] == "validation"]
    assert losses[-1] < losses[0]
    assert result.validation_loss_after < result.validation_loss_before


def test_beside_a_lora_the_words_are_a_textual_inversion(tiny_base: Path, tmp_path: Path) -> None:
    result = run(config(tiny_base, tmp_path, **TOKENS, method="lora"))
    embeds = load_file(result.output_dir / "learned_embeds.safetensors")
    assert embeds["<cup>"].shape == (2, 32)
    pipe = load(tiny_base)
    pipe.load_textual_inversion(result.output_dir, weight_name="learned_embeds.safetensors")
    pipe.load_lora_weights(result.output_dir)
    picture(pipe, PROMPT)


def test_exports_bring_the_words_along(done: Any, tiny_base: Path, tmp_path: Path) -> None:
    file = read_adapter(done[1].adapter_path)
    pipe = load(tiny_base)
    pipe.load_snella_weights(done[1].adapter_path)
    expected = picture(pipe, PROMPT)

    export_lora(file, tmp_path / "cup.safetensors", rank=None)
    other = load(tiny_base)
    other.load_textual_inversion(tmp_path / "learned_embeds.safetensors")
    other.load_lora_weights(tmp_path / "cup.safetensors")
    torch.testing.assert_close(picture(other, PROMPT), expected, rtol=1e-3, atol=1e-3)

    export_merged(file, tiny_base, tmp_path / "merged")
    merged = picture(load(tmp_path / "merged"), PROMPT)
    torch.testing.assert_close(merged, expected, rtol=1e-3, atol=1e-3)


def test_adapters_off_a_word_means_what_it_started_as() -> None:
    layer = TokenLayer(torch.nn.Embedding(5, 3))
    start = torch.ones(1, 3)
    layer.add_words("default", [Word("<a>", 1)], start, [9], limit=10.0)
    with torch.no_grad():
        layer.token_rows["default"].mul_(2)
        assert torch.equal(layer(torch.tensor([9])), start * 2)
        layer.enable_adapters(False)
        assert torch.equal(layer(torch.tensor([9])), start)


def test_rows_are_used_no_longer_than_the_limit() -> None:
    layer = TokenLayer(torch.nn.Embedding(5, 3))
    layer.add_words("default", [Word("<a>", 2)], torch.eye(3)[:2] * 4, [9, 10], limit=5.0)
    with torch.no_grad():
        layer.token_rows["default"][0].mul_(100)
        found = layer(torch.tensor([9, 10]))
    torch.testing.assert_close(found, torch.tensor([[5.0, 0, 0], [0, 4, 0]]))


def test_start_rows_are_the_initializers_or_like_the_tables(tiny_base: Path) -> None:
    pipe = pipeline()
    table = pipe.text_encoder.get_input_embeddings().weight.detach()
    words = [Word("<a>", 3), Word("<b>", 1)]
    plain = {"instance_data_dir": "x", "instance_prompt": "<a> <b>", "new_tokens": ["<a>=3", "<b>"]}
    named = TrainConfig(**plain, initializer_token="ab")
    a, b = pipe.tokenizer("ab", add_special_tokens=False)["input_ids"]
    rows = start_rows(named, words, pipe.tokenizer, table, "text_encoder")
    assert torch.equal(rows, table[[a, b, b, a]])
    random = start_rows(TrainConfig(**plain), words, pipe.tokenizer, table, "text_encoder")
    again = start_rows(TrainConfig(**plain), words, pipe.tokenizer, table, "text_encoder")
    assert torch.equal(random, again)
    assert float(random.std()) == pytest.approx(float(table.std()), rel=0.3)


BAD: dict[str, tuple[dict[str, Any], str]] = {
    "not in a prompt": ({"instance_prompt": "a cat"}, r"<cup> is in no prompt of a photo"),
    "known already": ({"new_tokens": ["<taken>"], "instance_prompt": "<taken>"}, "already knows"),
    "no initializer": ({"initializer_token": " "}, "has no token in CLIPTokenizer"),
}


@pytest.mark.parametrize("case", BAD)
def test_bad_words_are_refused_before_anything_is_written(case: str, tmp_path: Path) -> None:
    changes, message = BAD[case]
    base = pipeline()
    base.tokenizer.add_tokens(["<taken>"])
    base.save_pretrained(tmp_path / "base")
    with pytest.raises(SnellaConfigError, match=message):
        run(config(tmp_path / "base", tmp_path, **{**TOKENS, **changes}))
    assert not (tmp_path / "run").exists()


@pytest.mark.parametrize(
    "changes, message",
    [
        ({"new_tokens": ["cup"]}, "should be words in brackets"),
        ({"new_tokens": ["<cup>=0"]}, "should be words in brackets"),
        ({"new_tokens": ["<cup>=99"]}, "at most 32 embeddings"),
        ({"new_tokens": ["<cup>", "<cup>=2"]}, "name each word once"),
        ({"initializer_token": "cup"}, "give new_tokens too"),
    ],
)
def test_the_config_checks_words(changes: dict[str, Any], message: str, tmp_path: Path) -> None:
    with pytest.raises(ValueError, match=message):
        TrainConfig(instance_data_dir=str(tmp_path), instance_prompt="<cup>", **changes)
    given = {"instance_data_dir": "x", "instance_prompt": "<cup>"}
    assert TrainConfig(**given, new_tokens={"<cup>": 2}).new_tokens == ["<cup>=2"]


def test_a_word_may_stand_in_captions_alone(tiny_base: Path, tmp_path: Path) -> None:
    settings = config(tiny_base, tmp_path, **{**TOKENS, "instance_prompt": "a cup"}, dry_run=True)
    photos = write_photos(tmp_path / "photos")
    (photos / "0.txt").write_text("my <cup> on a table")
    assert run(settings).adapter_path is None
