"""A tiny Gemma 2 with its tokenizer, for the families whose prompts it encodes."""

from collections.abc import Sequence

import torch
from tokenizers import AddedToken
from transformers import Gemma2Config, Gemma2Model, GemmaTokenizer

from tests.families.components import LETTERS, WIDTH


def tokenizer(phrases: Sequence[str] = ()) -> GemmaTokenizer:
    """Knows single letters, and each phrase as one token."""
    words = ["<pad>", "<eos>", "<bos>", "<unk>", "<mask>", "▁", "\n", *LETTERS]
    vocabulary = {word: index for index, word in enumerate(words)}
    made = GemmaTokenizer(vocab=vocabulary, add_bos_token=True)
    made.add_tokens([AddedToken(phrase, normalized=False) for phrase in phrases])
    return made


def encoder(words: int, layers: int = 2, seed: int = 0) -> Gemma2Model:
    torch.manual_seed(seed)
    config = Gemma2Config(
        vocab_size=words,
        hidden_size=WIDTH,
        intermediate_size=37,
        num_hidden_layers=layers,
        num_attention_heads=4,
        num_key_value_heads=2,
        head_dim=8,
        query_pre_attn_scalar=8,
        initializer_range=0.2,  # else attention is all but even, and nothing reaches queries
    )
    return Gemma2Model(config).eval()
