"""New words: in the adapter's own file, in and out of a pipeline without a trace, hostile files."""

import json
import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from accelerate import cpu_offload
from accelerate.hooks import remove_hook_from_module
from diffusers.hooks import apply_group_offloading
from torch import Tensor, nn
from transformers import T5Config, T5EncoderModel

import snell_diffusion  # noqa: F401  adds load_snella_weights to the pipeline
from snell_diffusion.__main__ import main
from snell_diffusion.adapters import adapter_file_bytes, formats, load_adapter, read_adapter
from snell_diffusion.adapters.export_lora import export_lora
from snell_diffusion.adapters.inspect import summary
from snell_diffusion.adapters.tokens import attach_words, remove_tokens
from snell_diffusion.errors import (
    SnellaBaseError,
    SnellaError,
    SnellaFileError,
    SnellaKeyError,
    SnellaSchemaError,
    SnellaShapeError,
    SnellaValueError,
)
from snell_diffusion.tuners.tokens import TokenLayer, Word, pieces, spelled
from tests.adapters.files import rebuilt
from tests.tiny_models import (
    adapt,
    fingerprint,
    picture,
    pipeline,
    sd15_unet,
    text_encoder,
    tokenizer,
)

CUP, DOG = Word("<cup>", 2), Word("<dog>", 1)
PROMPT = "a <cup> and a <dog>"


def make(words: tuple[Word, ...] = (CUP, DOG), seed: int = 1) -> tuple[bytes, Tensor, Tensor]:
    """An adapter's file, its rows, and a picture of the pipeline that has them."""
    pipe = pipeline()
    adapt(pipe.unet, seed=seed)
    draw = torch.Generator().manual_seed(seed)
    rows = torch.randn(sum(w.vectors for w in words), 32, generator=draw) * 0.05
    attach_words(pipe.text_encoder, pipe.tokenizer, "default", words, rows, limit=100.0)
    data = adapter_file_bytes({"unet": pipe.unet, "text_encoder": pipe.text_encoder})
    return data, rows, picture(pipe, PROMPT)


@pytest.fixture(scope="module")
def made() -> tuple[bytes, Tensor, Tensor]:
    return make()


@pytest.fixture
def path(made: Any, tmp_path: Path) -> Path:
    (tmp_path / "cup.safetensors").write_bytes(made[0])
    return tmp_path / "cup.safetensors"


def tokenizer_text(pipe: Any) -> str:
    return pipe.tokenizer._tokenizer.to_str()


def test_a_prompt_says_the_same_after_saving_and_loading(made: Any, path: Path) -> None:
    _, _, expected = made
    pipe = pipeline()
    report = pipe.load_snella_weights(path)
    assert report.words == ("<cup>", "<dog>")
    assert torch.equal(picture(pipe, PROMPT), expected)
    assert not torch.equal(picture(pipe, "a  and a "), expected)


def test_unloading_restores_every_bit(path: Path) -> None:
    pipe = pipeline()
    stock = picture(pipe, PROMPT)
    before, tokenizer, text = fingerprint(pipe), vars(pipe.tokenizer).copy(), tokenizer_text(pipe)
    pipe.load_snella_weights(path)
    assert not torch.equal(picture(pipe, PROMPT), stock)
    pipe.unload_snella_weights()
    after = fingerprint(pipe)
    assert {**after, "rng": 0} == {**before, "rng": 0}
    assert vars(pipe.tokenizer) == tokenizer  # the very objects that were there
    assert tokenizer_text(pipe) == text
    assert torch.equal(picture(pipe, PROMPT), stock)


def test_base_rows_are_read_and_never_written(path: Path) -> None:
    pipe = pipeline()
    table = pipe.text_encoder.get_input_embeddings().weight
    before = table.detach().clone()
    pipe.load_snella_weights(path)
    layer = pipe.text_encoder.get_input_embeddings()
    assert isinstance(layer, TokenLayer)
    assert layer.base_layer.weight is table
    assert torch.equal(table, before)
    plain = pipe.tokenizer("a cat", return_tensors="pt").input_ids
    assert torch.equal(layer(plain), layer.base_layer(plain))


def test_adapters_with_other_words_coexist_and_leave_in_any_order(made: Any, path: Path) -> None:
    data, rows, _ = make((Word("<hat>", 1),), seed=2)
    pipe = pipeline()
    pipe.load_snella_weights(path, adapter_name="one")
    (path.parent / "hat.safetensors").write_bytes(data)
    pipe.load_snella_weights(path.parent / "hat.safetensors", adapter_name="two")
    layer = pipe.text_encoder.get_input_embeddings()

    def embedded(word: str) -> Tensor:
        ids = pipe.tokenizer.convert_tokens_to_ids([word])
        return layer(torch.tensor(ids))[0]

    assert torch.equal(embedded("<cup>_1"), made[1][1])
    assert torch.equal(embedded("<hat>"), rows[0])
    pipe.set_snella_adapters("two")
    assert torch.equal(embedded("<dog>"), made[1][2])  # words stay while adapters are inactive
    pipe.delete_snella_adapters("one")
    assert torch.equal(embedded("<hat>"), rows[0])  # its id has moved up
    assert "<cup>" not in pipe.tokenizer.get_vocab()
    pipe.unload_snella_weights()
    assert not isinstance(pipe.text_encoder.get_input_embeddings(), TokenLayer)


def test_a_word_that_is_taken_is_refused_before_anything_changes(path: Path) -> None:
    pipe = pipeline()
    pipe.load_snella_weights(path, adapter_name="one")
    before, text = fingerprint(pipe), tokenizer_text(pipe)
    with pytest.raises(SnellaKeyError, match=r"'<cup>'.* which tokenizer already knows"):
        pipe.load_snella_weights(path, adapter_name="two")
    assert {**fingerprint(pipe), "rng": 0} == {**before, "rng": 0}
    assert tokenizer_text(pipe) == text
    assert pipe.get_list_snella_adapters() == {"unet": ["one"]}


def test_a_failure_while_loading_leaves_nothing(
    path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    pipe = pipeline()
    before, text = fingerprint(pipe), tokenizer_text(pipe)

    def fail(*_: Any, **__: Any) -> None:
        raise MemoryError("no memory for the rows")

    monkeypatch.setattr(TokenLayer, "add_words", fail)
    with pytest.raises(MemoryError, match="no memory"):
        pipe.load_snella_weights(path)
    monkeypatch.undo()
    assert {**fingerprint(pipe), "rng": 0} == {**before, "rng": 0}
    assert tokenizer_text(pipe) == text


def test_tokens_that_others_added_since_are_not_lost(path: Path) -> None:
    pipe = pipeline()
    pipe.load_snella_weights(path)
    pipe.tokenizer.add_tokens(["<theirs>"])
    with pytest.raises(SnellaValueError, match=r"'<theirs>', added after the words"):
        pipe.unload_snella_weights()
    assert pipe.get_list_snella_adapters() == {"unet": ["default_0"]}


def test_saving_the_pipeline_is_refused_while_words_are_there(path: Path, tmp_path: Path) -> None:
    pipe = pipeline()
    pipe.load_snella_weights(path)
    with pytest.raises(SnellaValueError, match=r"CLIPTextModel.save_pretrained\(\) would write 1"):
        pipe.text_encoder.save_pretrained(tmp_path / "saved")
    pipe.unload_snella_weights()
    pipe.text_encoder.save_pretrained(tmp_path / "saved")


def test_saved_again_the_file_is_the_same(made: Any, path: Path, tmp_path: Path) -> None:
    pipe = pipeline()
    pipe.load_snella_weights(path)
    again = read_adapter(pipe.save_snella_weights(tmp_path / "again.safetensors"))
    first = read_adapter(path)
    assert again.header.tokens == first.header.tokens
    assert all(torch.equal(again.tensors[n], t) for n, t in first.tensors.items())
    state = pipe.snella_state_dict()
    pipe.unload_snella_weights()
    assert pipe.load_snella_weights(state).words == ("<cup>", "<dog>")


def test_only_what_needs_it_is_of_the_later_format(made: Any, adapter_bytes: bytes) -> None:
    assert read_adapter(adapter_bytes).header.format == "1.0"
    header = read_adapter(made[0]).header
    assert (header.format, header.requires) == ("1.1", ["snella", "tokens"])
    assert "tokens" not in json.loads(read_adapter(adapter_bytes).header.to_json())


def test_a_reader_of_before_refuses_by_name(made: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(formats, "FEATURES", frozenset({"snella"}))
    monkeypatch.setattr(formats.limits, "FORMAT", "1.0")
    with pytest.raises(SnellaFileError, match=r"features this version knows .*got 'tokens'; inst"):
        read_adapter(made[0])


def test_info_shows_words(path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert "new words: <cup> (2 vectors), <dog> (1 vector)" in summary(read_adapter(path))
    assert main(["info", str(path), "--no-layers"]) == 0
    assert "text_encoder: 3 x 32 numbers on CLIPTextModel" in capsys.readouterr().out


def test_words_need_tokenizers(made: Any) -> None:
    models = {"unet": sd15_unet(), "text_encoder": text_encoder()}
    with pytest.raises(SnellaValueError, match=r"new words \(<cup>, <dog>\), which need the pipe"):
        load_adapter(models, read_adapter(made[0]))
    load_adapter(models, read_adapter(made[0]).without_tokens())


def test_pooling_finds_the_end_where_the_config_is_of_before() -> None:
    """CLIP configs until 2023 say 2, and pool at the largest id: now a new word's."""
    pipe = pipeline()
    encoder, end = pipe.text_encoder, pipe.tokenizer.eos_token_id
    encoder.config.eos_token_id = encoder.eos_token_id = 2
    attach_words(encoder, pipe.tokenizer, "x", [DOG], torch.zeros(1, 32))
    assert encoder.eos_token_id == end
    remove_tokens({"text_encoder": encoder}, {"tokenizer": pipe.tokenizer}, "x")
    assert encoder.eos_token_id == 2


def test_words_are_spelled_as_diffusers_spells_them(path: Path) -> None:
    assert pieces([CUP, DOG]) == ["<cup>", "<cup>_1", "<dog>"]
    pipe = pipeline()
    pipe.load_snella_weights(path)
    stock = pipe.maybe_convert_prompt(PROMPT, pipe.tokenizer)
    assert spelled(PROMPT, [CUP, DOG]) == stock == "a <cup> <cup>_1 and a <dog>"


def test_a_pipeline_that_does_not_expand_words_says_so(path: Path) -> None:
    pipe = pipeline()

    class Plain:
        """A pipeline without diffusers' textual inversion."""

        components = pipe.components

    from snell_diffusion.diffusion.pipeline import load_snella_weights

    with pytest.warns(UserWarning, match=r"write <cup> as '<cup> <cup>_1' in its prompts"):
        load_snella_weights(Plain(), path)


def test_a_warning_that_is_an_error_changes_nothing(path: Path) -> None:
    pipe = pipeline()
    before, text = fingerprint(pipe), tokenizer_text(pipe)

    class Plain:
        """A pipeline without diffusers' textual inversion."""

        components = pipe.components

    from snell_diffusion.diffusion.pipeline import load_snella_weights

    with warnings.catch_warnings():
        warnings.simplefilter("error")
        with pytest.raises(UserWarning, match="does not expand words"):
            load_snella_weights(Plain(), path)
    assert {**fingerprint(pipe), "rng": 0} == {**before, "rng": 0}
    assert tokenizer_text(pipe) == text


@pytest.mark.parametrize("part", ["tokenizer", "text_encoder"])
def test_a_pipeline_with_half_of_the_words_cannot_take_them_out(part: str, path: Path) -> None:
    pipe = pipeline()
    pipe.load_snella_weights(path)
    expected = picture(pipe, PROMPT)
    other = pipeline()
    for name in {"unet", "tokenizer", "text_encoder"} - {part}:
        other.register_modules(**{name: getattr(pipe, name)})
    for remove in (other.unload_snella_weights, lambda: other.delete_snella_adapters("default_0")):
        with pytest.raises(SnellaValueError, match=r"came with another pipeline.*: unload there"):
            remove()
    assert torch.equal(picture(pipe, PROMPT), expected)
    pipe.unload_snella_weights()
    assert "<cup>" not in pipe.tokenizer.get_vocab()


def sequential(model: nn.Module) -> None:
    cpu_offload(model, torch.device("cpu"), offload_buffers=True)


def leaves(model: nn.Module) -> None:
    device = torch.device("cpu")
    apply_group_offloading(model, onload_device=device, offload_type="leaf_level")


@pytest.mark.parametrize("way", [sequential, leaves])
def test_words_of_an_offloaded_encoder_are_read(
    way: Callable[[nn.Module], None], made: Any, path: Path
) -> None:
    _, rows, _ = made
    pipe = pipeline()
    stock = picture(pipe)
    pipe.load_snella_weights(path)
    for model in (pipe.text_encoder, pipe.unet, pipe.vae):
        way(model)
    layer = pipe.text_encoder.get_input_embeddings()
    ids = torch.tensor(pipe.tokenizer.convert_tokens_to_ids(pieces([CUP, DOG])))
    assert torch.equal(layer(ids), rows)
    pipe.unload_snella_weights()
    assert torch.equal(picture(pipe), stock)
    pipe.load_snella_weights(path)
    assert torch.equal(pipe.text_encoder.get_input_embeddings()(ids), rows)


def test_t5_whose_table_is_there_twice_can_be_offloaded() -> None:
    config = T5Config(vocab_size=190, d_model=32, d_kv=8, d_ff=37, num_layers=1, num_heads=4)
    encoder, words = T5EncoderModel(config).eval(), tokenizer()
    attach_words(encoder, words, "x", [DOG], torch.ones(1, 32))
    ids = torch.tensor([[3, 5, 190]])
    expected = encoder(ids).last_hidden_state
    sequential(encoder)
    assert torch.equal(encoder(ids).last_hidden_state, expected)
    remove_hook_from_module(encoder, recurse=True)
    remove_tokens({"text_encoder": encoder}, {"tokenizer": words}, "x")
    assert encoder.shared.weight is encoder.encoder.embed_tokens.weight


# -- hostile files ---------------------------------------------------------------------------------

Change = Callable[[dict[str, Any]], Any]


def words(*rows: tuple[Any, Any]) -> Change:
    return lambda header: header["tokens"].update(
        words=[{"text": text, "vectors": count} for text, count in rows]
    )


def encoder(**values: Any) -> Change:
    return lambda header: header["tokens"]["encoders"]["text_encoder"].update(values)


HOSTILE: dict[str, tuple[Change, type[SnellaError], str]] = {
    "no word": (words(), SnellaSchemaError, "expected 1 or more entries"),
    "too many words": (
        words(*((f"<w{i}>", 1) for i in range(65))),
        SnellaSchemaError,
        "expected at most 64 entries",
    ),
    "too many vectors of one": (words(("<a>", 33)), SnellaSchemaError, "expected 32 or less"),
    "no vectors": (words(("<a>", 0)), SnellaSchemaError, "expected 1 or more"),
    "too many in all": (
        words(*((f"<w{i}>", 32) for i in range(9))),
        SnellaSchemaError,
        "at most 256 embeddings in all, got 288",
    ),
    "twice": (words(("<a>", 1), ("<a>", 2)), SnellaSchemaError, "each word once, got '<a>'"),
    "an ordinary word": (words(("the", 3)), SnellaSchemaError, "words such as '<cup>'"),
    "a piece's name": (words(("<a>", 2), ("<a>_1", 1)), SnellaSchemaError, "got '<a>_1'"),
    "a control character": (words(("<a\x1b[2J>", 3)), SnellaSchemaError, "words such as"),
    "a line": (words(("<a>\n", 3)), SnellaSchemaError, "words such as"),
    "a long word": (words((f"<{'a' * 80}>", 3)), SnellaSchemaError, "at most 64 characters"),
    "a number for a word": (words((7, 3)), SnellaSchemaError, "expected a text"),
    "no encoder": (
        lambda header: header["tokens"].update(encoders={}),
        SnellaSchemaError,
        "expected 1 or more entries",
    ),
    "an odd encoder": (
        lambda header: header["tokens"]["encoders"].update({"a/b": {}}),
        SnellaSchemaError,
        "tokens.encoders.a/b",
    ),
    "another count": (words(("<a>", 1)), SnellaShapeError, r"expected shape \[1, 32\]"),
    "another size": (encoder(size=31), SnellaShapeError, r"expected shape \[3, 31\]"),
    "size zero": (encoder(size=0), SnellaSchemaError, "expected 1 or more"),
    "not required": (
        lambda header: header.update(requires=["snella"]),
        SnellaSchemaError,
        "expected 'tokens', which the file uses",
    ),
    "no section": (
        lambda header: header.pop("tokens"),
        SnellaKeyError,
        "only tensors of the layers in its table, got text_encoder.snella_tokens",
    ),
    "an unknown field": (
        lambda header: header["tokens"].update(code="import os"),
        SnellaSchemaError,
        "no such field",
    ),
}


@pytest.mark.parametrize("case", HOSTILE)
def test_a_hostile_section_is_refused(case: str, made: Any) -> None:
    change, error, message = HOSTILE[case]
    with pytest.raises(error, match=message):
        read_adapter(rebuilt(made[0], change, version="1.1"))


def test_a_file_of_the_first_format_cannot_have_words(made: Any) -> None:
    def change(header: dict[str, Any]) -> None:
        header["format"] = "1.0"

    with pytest.raises(SnellaSchemaError, match=r"expected 1\.1 or later, which has 'tokens'"):
        read_adapter(rebuilt(made[0], change))


UNFIT: dict[str, tuple[Change, Callable[[dict[str, Tensor]], Any], type[SnellaError], str]] = {
    "another encoder": (
        encoder(config_hash="0" * 64),
        lambda tensors: None,
        SnellaBaseError,
        "trained for a CLIPTextModel with settings 000000000000",
    ),
    "a missing encoder": (
        lambda h: h["tokens"]["encoders"].update(
            text_encoder_9=h["tokens"]["encoders"].pop("text_encoder")
        ),
        lambda t: t.update({"text_encoder_9.snella_tokens": t.pop("text_encoder.snella_tokens")}),
        SnellaKeyError,
        "expected one of .* with its tokenizer",
    ),
    "an image encoder": (
        lambda h: h["tokens"]["encoders"].update(vae=h["tokens"]["encoders"].pop("text_encoder")),
        lambda t: t.update({"vae.snella_tokens": t.pop("text_encoder.snella_tokens")}),
        SnellaKeyError,
        "expected one of .* with its tokenizer",
    ),
    "a token that exists": (
        words(("<taken>", 1), ("<x>", 2)),
        lambda tensors: None,
        SnellaKeyError,
        "already knows",
    ),
    "rows out of proportion": (
        lambda header: None,
        lambda t: t["text_encoder.snella_tokens"].mul_(1e5),
        SnellaValueError,
        "at most 100 times as long as the longest of the base",
    ),
}


@pytest.mark.parametrize("case", UNFIT)
def test_what_does_not_fit_the_pipeline_is_refused(case: str, made: Any, tmp_path: Path) -> None:
    header, tensors, error, message = UNFIT[case]
    (tmp_path / "x.safetensors").write_bytes(rebuilt(made[0], header, tensors, version="1.1"))
    pipe = pipeline()
    pipe.tokenizer.add_tokens(["<taken>"])
    before, text = fingerprint(pipe), tokenizer_text(pipe)
    with pytest.raises(error, match=message):
        pipe.load_snella_weights(tmp_path / "x.safetensors")
    assert {**fingerprint(pipe), "rng": 0} == {**before, "rng": 0}
    assert tokenizer_text(pipe) == text


def test_bare_tensors_do_not_know_the_words(made: Any) -> None:
    from safetensors.torch import load

    with pytest.raises(SnellaKeyError, match="only the header tells which words"):
        read_adapter(load(made[0]))


def test_a_lora_does_not_share_its_file_with_a_word(tmp_path: Path) -> None:
    file = read_adapter(make((CUP,))[0])
    target = tmp_path / "learned_embeds.safetensors"
    with pytest.raises(SnellaFileError, match="the file of a new word goes there"):
        export_lora(file, target, rank=4)
    assert not target.exists()
    export_lora(file, tmp_path / "lora.safetensors", rank=4)
    assert target.exists()
