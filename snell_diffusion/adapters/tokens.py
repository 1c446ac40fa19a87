"""New words of an adapter: into a pipeline's tokenizers and text encoders, out again, and to files.

Encoders are named as their pipeline names them; the tokenizer of `text_encoder_2` is `tokenizer_2`.
Shape legend: V embeddings of all words of an adapter, D features of an encoder's embeddings.
"""

from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from snell_diffusion.adapters.identity import config_hash
from snell_diffusion.adapters.schema import Tokens
from snell_diffusion.adapters.state import Components
from snell_diffusion.adapters.vocabulary import Vocabulary, require_new
from snell_diffusion.errors import (
    SnellaBaseError,
    SnellaKeyError,
    SnellaShapeError,
    SnellaValueError,
    shown,
)
from snell_diffusion.tuners.tokens import TokenLayer, Word, token_layers
from snell_diffusion.tuners.traverse import unwrapped

__all__ = [
    "TENSOR",
    "Tokenizers",
    "attach_words",
    "check_tokens",
    "describe_tokens",
    "input_embedding",
    "largest_norm",
    "put_in_tokens",
    "remove_tokens",
    "require_removable",
    "set_end",
    "table_of",
    "tokenizer_of",
    "words_of",
]

Tokenizers = Mapping[str, Any]
"""Tokenizers by their names in the pipeline."""

TENSOR = "snella_tokens"

# CLIP's config told a wrong end token until 2023; with it, the pooled output is read at the largest
# id, which was the end token's until there were new words.
_LEGACY_END = 2


def tokenizer_of(encoder: str) -> str:
    """The name of a text encoder's tokenizer."""
    return encoder.replace("text_encoder", "tokenizer", 1)


def words_of(tokens: Tokens) -> list[Word]:
    """The words of a file."""
    return [Word(word.text, word.vectors) for word in tokens.words]


def input_embedding(encoder: nn.Module, place: str) -> nn.Embedding | TokenLayer:
    """The table that a text encoder looks tokens up in, with the new words it may have.

    Raises:
        SnellaValueError: It has none that can take new words; the message names `place`.
    """
    find = getattr(unwrapped(encoder), "get_input_embeddings", None)
    found = find() if callable(find) else None
    if not isinstance(found, (nn.Embedding, TokenLayer)):
        raise SnellaValueError(
            f"{place}: expected a text encoder with an embedding table, got "
            f"{type(unwrapped(encoder)).__name__} with {type(found).__name__}; unload what has "
            "wrapped it, or leave new words out"
        )
    return found


def table_of(embedding: nn.Embedding | TokenLayer) -> Tensor:
    """The base's own embeddings, [ids, D]."""
    table = embedding.base_layer if isinstance(embedding, TokenLayer) else embedding
    return table.weight  # type: ignore[return-value]


def largest_norm(table: Tensor) -> float:
    """The largest norm of a row of an embedding table."""
    norms = torch.linalg.vector_norm(table.detach(), dim=1, dtype=torch.float32)
    return float(norms.max())


def attach_words(
    encoder: nn.Module,
    tokenizer: Any,
    adapter: str,
    words: Sequence[Word],
    rows: Tensor,
    limit: float | None = None,
) -> TokenLayer:
    """Put an adapter's words into a tokenizer, and their rows [V, D] beside an embedding table.

    Args:
        limit: The rows will train, with at most this norm; None: they are fixed.
    """
    embedding = input_embedding(encoder, adapter)
    ids = Vocabulary.of(tokenizer).add(adapter, words)
    layer = embedding if isinstance(embedding, TokenLayer) else _wrapped(encoder, embedding)
    layer.add_words(adapter, words, rows, ids, limit)
    set_end(encoder, tokenizer.eos_token_id)
    return layer


def _wrapped(encoder: nn.Module, embedding: nn.Embedding) -> TokenLayer:
    """Put a layer in every place of a table; T5 has it twice, as two modules with one weight."""
    layer = TokenLayer(embedding)
    for parent in list(unwrapped(encoder).modules()):
        for name, child in list(parent.named_children()):
            if isinstance(child, nn.Embedding) and child.weight is embedding.weight:
                layer.places.append((parent, name, child))
    for parent, name, _ in layer.places:
        setattr(parent, name, layer)
    return layer


def set_end(encoder: nn.Module, end: int | None, for_good: bool = False) -> None:
    """Let a CLIP whose config tells a wrong end token pool at the tokenizer's own.

    Args:
        for_good: Correct the config too.
    """
    for module in encoder.modules():
        if vars(module).get("eos_token_id") == _LEGACY_END and end is not None:
            module.eos_token_id = end  # type: ignore[assignment]
            if for_good:
                module.config.eos_token_id = end  # type: ignore[union-attr]


def _reset_end(encoder: nn.Module) -> None:
    for module in encoder.modules():
        told = getattr(getattr(module, "config", None), "eos_token_id", None)
        if "eos_token_id" in vars(module) and told == _LEGACY_END:
            module.eos_token_id = told


def check_tokens(
    components: Components,
    tokenizers: Tokenizers | None,
    tokens: Tokens,
    tensors: Mapping[str, Tensor],
    source: str,
    allow_other_base: bool,
    bound: float,
) -> None:
    """Refuse words that cannot be put into live encoders and tokenizers; changes nothing.

    Raises:
        SnellaKeyError: An encoder or tokenizer is missing, or a word is taken.
        SnellaBaseError: Another encoder than they were trained for.
        SnellaShapeError: Embeddings of another size.
        SnellaValueError: No place for words, or rows more than `bound` times as long as the base's.
    """
    words = words_of(tokens)
    if tokenizers is None:
        raise SnellaValueError(
            f"{source}: brings new words ({shown(w.text for w in words)}), which need the "
            "pipeline's tokenizers: load it by pipe.load_snella_weights"
        )
    for name, row in tokens.encoders.items():
        place = f"{source}: header field 'tokens.encoders.{name}'"
        tokenizer = tokenizers.get(tokenizer_of(name))
        if name not in components or tokenizer is None:
            raise SnellaKeyError(
                f"{place}: expected one of {shown(components)} with its tokenizer (there: "
                f"{shown(tokenizers) or 'none'}): load it into a pipeline of the kind it was "
                "trained for"
            )
        encoder = unwrapped(components[name])
        table = table_of(input_embedding(encoder, place))
        if table.device.type == "meta":
            raise SnellaValueError(
                f"{place}: {name} has no weights in memory (offloaded to meta): load the adapter "
                "before enable_sequential_cpu_offload or group offloading"
            )
        same = (type(encoder).__name__, config_hash(encoder)) == (row.model, row.config_hash)
        if not (same or allow_other_base):
            raise SnellaBaseError(
                f"{place}: the words were trained for a {row.model} with settings "
                f"{row.config_hash[:12]}..., this is a {type(encoder).__name__} with "
                f"{config_hash(encoder)[:12]}...: load the base they were trained on, or pass "
                "allow_other_base=True"
            )
        if table.shape[1] != row.size:
            raise SnellaShapeError(
                f"{place}.size': expected {table.shape[1]} as in this {type(encoder).__name__}, "
                f"got {row.size}; the adapter is for another model size"
            )
        require_new(tokenizer, words, tokenizer_of(name), source)
        _check_norm(
            tensors[f"{name}.{TENSOR}"], table, bound, f"{source}: tensor '{name}.{TENSOR}'"
        )


def _check_norm(rows: Tensor, table: Tensor, bound: float, place: str) -> None:
    largest, usual = largest_norm(rows), largest_norm(table)
    if not largest <= bound * usual:
        raise SnellaValueError(
            f"{place}: expected embeddings at most {bound:g} times as long as the longest of the "
            f"base, {usual:.3g}, got {largest:.3g}; the file is damaged: use another checkpoint"
        )


def put_in_tokens(
    components: Components,
    tokenizers: Tokenizers,
    tokens: Tokens,
    tensors: Mapping[str, Tensor],
    adapter: str,
) -> None:
    """Put checked words in; `remove_tokens` undoes what a failure leaves."""
    for name in tokens.encoders:
        rows = tensors[f"{name}.{TENSOR}"]
        attach_words(
            components[name], tokenizers[tokenizer_of(name)], adapter, words_of(tokens), rows
        )


def require_removable(
    components: Components, tokenizers: Tokenizers, adapters: Sequence[str]
) -> None:
    """Refuse to take words out where something would be left behind or lost.

    Raises:
        SnellaValueError: An encoder and its tokenizer here have words of different adapters, or
            somebody else has added tokens since.
    """
    for name, encoder in components.items():
        tokenizer = tokenizers.get(tokenizer_of(name))
        known = set() if tokenizer is None else set(Vocabulary.of(tokenizer).words)
        there = {adapter for layer in token_layers(encoder) for adapter in layer.words}
        if (known | there) & set(adapters) and known != there:
            raise SnellaValueError(
                f"{name} has the words of {shown(there) or 'no adapter'}, {tokenizer_of(name)} "
                f"those of {shown(known) or 'none'}: they came with another pipeline, which shares "
                "one of the two with this one: unload there"
            )
    for tokenizer in tokenizers.values():
        vocabulary = Vocabulary.of(tokenizer)
        if any(name in vocabulary.words for name in adapters):
            vocabulary.require_ours()


def remove_tokens(components: Components, tokenizers: Tokenizers, adapter: str) -> None:
    """Take an adapter's words out; with the last one, encoders and tokenizers are as they came."""
    for tokenizer in tokenizers.values():
        Vocabulary.of(tokenizer).remove(adapter)
    for name, encoder in components.items():
        for layer in token_layers(encoder):
            layer.delete_adapter(adapter)
            for other in layer.words:
                tokenizer = tokenizers[tokenizer_of(name)]
                layer.set_ids(other, Vocabulary.of(tokenizer).ids(other))
            if not layer.words:
                for parent, place, original in layer.places:
                    # Offloading replaces parameters, and knows nothing of the modules set aside.
                    original.weight = layer.base_layer.weight
                    setattr(parent, place, original)
                _reset_end(encoder)


def describe_tokens(
    components: Components, adapter: str
) -> tuple[dict[str, Any] | None, dict[str, Tensor]]:
    """The header's section and the tensors of an adapter's words; None and none without words."""
    encoders: dict[str, Any] = {}
    tensors: dict[str, Tensor] = {}
    words: Sequence[Word] = ()
    for name, encoder in components.items():
        for layer in token_layers(encoder, adapter):
            words, model = layer.words[adapter], unwrapped(encoder)
            encoders[name] = {
                "class": type(model).__name__,
                "config_hash": config_hash(model),
                "size": layer.embedding_dim,
            }
            rows = layer.rows(adapter).detach().to("cpu", torch.float32, copy=True)
            tensors[f"{name}.{TENSOR}"] = rows
    if not encoders:
        return None, {}
    rows_of = [{"text": word.text, "vectors": word.vectors} for word in words]
    return {"words": rows_of, "encoders": encoders}, tensors
