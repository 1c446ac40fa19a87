"""New words of a run: from the config into tokenizers and text encoders, trained with the adapter.

Every text encoder of the base learns its own embeddings of the same words (textual inversion,
arXiv:2208.01618), also one that no family adapts, such as T5: it reads every prompt all the same.
The base's embedding tables stay as they are.
"""

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor, nn

from snell_diffusion.adapters.tokens import (
    attach_words,
    input_embedding,
    largest_norm,
    table_of,
    tokenizer_of,
)
from snell_diffusion.adapters.vocabulary import require_new
from snell_diffusion.diffusion.config import TrainConfig
from snell_diffusion.diffusion.data import Photo
from snell_diffusion.diffusion.families import Family
from snell_diffusion.errors import SnellaConfigError, SnellaError, shown
from snell_diffusion.training.randomness import generator
from snell_diffusion.tuners.tokens import Word

# Rows of a table that tell its mean and spread; a table can have a quarter of a million.
_SAMPLE = 4096


def new_words(config: TrainConfig) -> list[Word]:
    """The new words of a config; checked there."""
    pairs = [entry.partition("=") for entry in config.new_tokens]
    return [Word(text, int(vectors or 1)) for text, _, vectors in pairs]


def require_words_used(config: TrainConfig, photos: Sequence[Photo]) -> None:
    """Refuse new words that no prompt of a photo has: they would learn nothing.

    Raises:
        SnellaConfigError: Names them and a prompt.
    """
    prompts = [prompt for photo in photos for prompt in (photo.prompt, *photo.templates)]
    unused = [w.text for w in new_words(config) if not any(w.text in p for p in prompts)]
    if unused:
        raise SnellaConfigError(
            f"new_tokens: {shown(unused)} is in no prompt of a photo (the first is "
            f"'{prompts[0]}'): write it into instance_prompt or the captions"
        )


def add_words(config: TrainConfig, family: Family, pipe: Any, adapter: str) -> dict[str, nn.Module]:
    """Put the config's new words into a base, ready to train.

    Returns:
        The text encoders that have them, by name; none without new words.

    Raises:
        SnellaConfigError: A word is known already, its pipeline would not see it, or there is no
            place for new ones.
    """
    words = new_words(config)
    if not words:
        return {}
    _require_case(family, words)
    places = {
        name: (encoder, getattr(pipe, tokenizer_of(name)))
        for name, encoder in pipe.components.items()
        if name.startswith("text_encoder") and encoder is not None
    }
    try:
        starts = {}
        for name, (encoder, tokenizer) in places.items():
            require_new(tokenizer, words, f"the tokenizer of {name}", "new_tokens")
            table = table_of(input_embedding(encoder, "new_tokens"))
            starts[name] = start_rows(config, words, tokenizer, table, name), largest_norm(table)
        for name, (encoder, tokenizer) in places.items():
            attach_words(encoder, tokenizer, adapter, words, *starts[name])
    except SnellaConfigError:
        raise
    except SnellaError as error:
        raise SnellaConfigError(str(error)) from error
    return {name: encoder for name, (encoder, _) in places.items()}


def _require_case(family: Family, words: Sequence[Word]) -> None:
    mixed = [word.text for word in words if word.text != word.text.lower()]
    if family.lower_case and mixed:
        raise SnellaConfigError(
            f"new_tokens: {shown(mixed)} has capital letters, but {family.pipelines[0]} puts "
            f"prompts in lower case and would not find it: write {shown(m.lower() for m in mixed)}"
        )


def start_rows(
    config: TrainConfig, words: Sequence[Word], tokenizer: Any, table: Tensor, name: str
) -> Tensor:
    """Where the embeddings of new words start, [V, D] float32 on the table's device.

    With an initializer, vector k of every word starts as its k-th token, the last from then on;
    without one, as a draw from a normal distribution with the table's mean and spread.

    Raises:
        SnellaConfigError: The initializer has no token.
    """
    rows = []
    if config.initializer_token is not None:
        ids = tokenizer(config.initializer_token, add_special_tokens=False)["input_ids"]
        if not ids:
            raise SnellaConfigError(
                f"initializer_token '{config.initializer_token}' has no token in "
                f"{type(tokenizer).__name__}: give a word that it knows, such as cup"
            )
        for word in words:
            rows += [table[ids[min(k, len(ids) - 1)]] for k in range(word.vectors)]
        return torch.stack(rows).detach().float()
    some = table.detach()[:: max(1, len(table) // _SAMPLE)].float()
    mean, spread = some.mean(0), some.std(0)
    for index, word in enumerate(words):
        draws = generator(config.seed, f"new-token-{name}", index)
        noise = torch.randn(word.vectors, table.shape[1], generator=draws)
        rows.append(mean + spread * noise.to(mean.device))
    return torch.cat(rows)
