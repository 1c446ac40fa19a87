"""New words in a pipeline's tokenizer, and out of it again.

Tokenizers can add tokens and have no verb to take them out. So words go into copies of what the
tokenizer consists of, and the originals come back with the last word: bit for bit, in the same
tokenizer object, which several pipelines may share.
"""

import copy
from collections.abc import Sequence
from typing import Any

from snell_diffusion.errors import SnellaKeyError, SnellaValueError, quoted, shown
from snell_diffusion.tuners.tokens import Word, pieces

__all__ = ["Vocabulary", "require_new"]

_ATTRIBUTE = "snella_vocabulary"


class Vocabulary:
    """The words of adapters in one tokenizer.

    Attributes:
        tokenizer: A tokenizer of transformers.
        words: By adapter, in the order they were added.
    """

    def __init__(self, tokenizer: Any) -> None:
        self.tokenizer = tokenizer
        self.words: dict[str, tuple[Word, ...]] = {}
        self._original = dict(vars(tokenizer))

    @classmethod
    def of(cls, tokenizer: Any) -> "Vocabulary":
        """The vocabulary of a tokenizer; it stays with it while it has words."""
        known = vars(tokenizer).get(_ATTRIBUTE)
        return known if isinstance(known, cls) else cls(tokenizer)

    def add(self, adapter: str, words: Sequence[Word]) -> list[int]:
        """Add words; returns the ids of their tokens. Adding them again returns the same.

        Raises:
            SnellaValueError: The tokenizer does not take them as they are; it is unchanged then.
        """
        if adapter not in self.words:
            self._rebuild({**self.words, adapter: tuple(words)})
        return self.ids(adapter)

    def remove(self, adapter: str) -> None:
        """Take an adapter's words out; ids of words added later move up. Ignores unknown names."""
        if adapter in self.words:
            self._rebuild({name: words for name, words in self.words.items() if name != adapter})

    def ids(self, adapter: str) -> list[int]:
        """The ids of an adapter's tokens."""
        found: list[int] = self.tokenizer.convert_tokens_to_ids(pieces(self.words[adapter]))
        return found

    def require_ours(self) -> None:
        """Refuse to take words out of a tokenizer that somebody else has added to since.

        Raises:
            SnellaValueError: Names the tokens that would be lost.
        """
        ours = {piece for words in self.words.values() for piece in pieces(words)}
        before = set(_added(self._original))
        others = set(_added(vars(self.tokenizer))) - before - ours
        if others:
            raise SnellaValueError(
                f"{type(self.tokenizer).__name__} has {shown(map(quoted, others))}, added after "
                "the words of a SNELLA adapter, and would lose them too: take them out first "
                "(unload_textual_inversion), then unload the adapter"
            )

    def _rebuild(self, words: dict[str, tuple[Word, ...]]) -> None:
        live = vars(self.tokenizer)
        before, self.words = (dict(live), self.words), words
        live.clear()
        live.update(self._original)
        try:
            if words:
                live.update(copy.deepcopy(self._original))
                live[_ATTRIBUTE] = self
                for some in words.values():
                    self._extend(pieces(some))
        except BaseException:
            live.clear()
            live.update(before[0])
            self.words = before[1]
            raise

    def _extend(self, tokens: list[str]) -> None:
        from transformers import AddedToken

        size = len(self.tokenizer)
        # Not normalized: `<Cup>` and `<cup>` are two words.
        self.tokenizer.add_tokens([AddedToken(t, normalized=False, special=False) for t in tokens])
        if len(self.tokenizer) != size + len(tokens):
            raise SnellaValueError(
                f"{type(self.tokenizer).__name__} took {len(self.tokenizer) - size} of the new "
                f"tokens {shown(tokens)}; choose other words"
            )


def require_new(tokenizer: Any, words: Sequence[Word], name: str, source: str) -> None:
    """Refuse words that a tokenizer already knows, or a tokenizer that cannot learn any.

    Args:
        name: What the pipeline calls the tokenizer.
        source: Where the words come from, for messages.

    Raises:
        SnellaKeyError: A word is taken.
        SnellaValueError: Not a tokenizer of transformers.
    """
    needed = ("add_tokens", "convert_tokens_to_ids", "get_vocab")
    if not all(callable(getattr(tokenizer, verb, None)) for verb in needed):
        raise SnellaValueError(
            f"{source}: brings new words, but {name} is {type(tokenizer).__name__}, which takes "
            "none: load it into a pipeline with a tokenizer of transformers"
        )
    taken = sorted(set(pieces(words)) & set(tokenizer.get_vocab()))
    if taken:
        raise SnellaKeyError(
            f"{source}: brings the words {shown(map(quoted, taken))}, which {name} already knows: "
            "unload the adapter or textual inversion that brought them, or use another adapter"
        )


def _added(state: dict[str, Any]) -> list[str]:
    """The tokens added to a tokenizer's vocabulary, from its attributes."""
    backend = state.get("_tokenizer")
    if backend is not None:
        return [token.content for token in backend.get_added_tokens_decoder().values()]
    return [token.content for token in state.get("_added_tokens_decoder", {}).values()]
