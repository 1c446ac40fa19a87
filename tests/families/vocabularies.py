"""Tokenizers of the tiny bases, built from a handful of tokens: nearly one token per character."""

from collections.abc import Sequence

from tokenizers import AddedToken
from tokenizers.pre_tokenizers import ByteLevel
from transformers import GemmaTokenizer, Qwen2Tokenizer, T5Tokenizer

_CHARACTERS = [chr(code) for code in range(33, 127)]
_TURN = "<|im_start|>{{ message.role }}\n{{ message.content }}<|im_end|>\n"
_CHAT = (
    "{% for message in messages %}" + _TURN + "{% endfor %}"
    "{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
)


def t5() -> T5Tokenizer:
    special = ["<pad>", "</s>", "<unk>"]
    vocabulary = [(word, 0.0) for word in special] + [("▁", -2.0)]
    return T5Tokenizer(vocab=[*vocabulary, *((c, -3.0) for c in _CHARACTERS)], extra_ids=0)


def gemma(phrases: Sequence[str] = ()) -> GemmaTokenizer:
    """Characters, and each phrase as one token."""
    words = ["<pad>", "<eos>", "<bos>", "<unk>", "<mask>", "▁", "\n", *_CHARACTERS]
    tokenizer = GemmaTokenizer(vocab={word: i for i, word in enumerate(words)}, add_bos_token=True)
    tokenizer.add_tokens([AddedToken(phrase, normalized=False) for phrase in phrases])
    return tokenizer


def qwen(phrases: Sequence[str] = ()) -> Qwen2Tokenizer:
    """Bytes, each phrase as one token, and a chat template."""
    words = ["<|endoftext|>", *sorted(ByteLevel.alphabet())]
    tokenizer = Qwen2Tokenizer(vocab={word: i for i, word in enumerate(words)})
    tokenizer.add_tokens(["<|im_start|>", "<|im_end|>"], special_tokens=True)
    tokenizer.add_tokens(list(phrases))
    tokenizer.chat_template = _CHAT
    return tokenizer
