"""New words for a text encoder: rows beside its embedding table, which stays as it is.

    e(id) = c · row_id · min(1, limit / |row_id|)   for the ids of new words,
            c · W[id]                               for all others

Textual inversion (arXiv:2208.01618). The table is neither resized nor given a gradient: only the
new rows train. The factor c is the base's own: Gemma multiplies what it looks up by √D, most others
by 1. So rows are as long as those of the table. Shape legend: V new rows, D features of an
embedding, ids [..., L], output [..., L, D].
"""

from collections.abc import Sequence
from typing import TYPE_CHECKING, Any, NamedTuple

import torch
import torch.nn.functional as F
from peft.tuners.tuners_utils import BaseTunerLayer
from torch import Tensor, nn

from snell_diffusion.core.precision import no_autocast
from snell_diffusion.tuners.containers import PreciseBufferDict, PreciseParameterDict
from snell_diffusion.tuners.offload import onloaded

__all__ = ["TokenLayer", "Word", "pieces", "spelled", "token_layers"]


class Word(NamedTuple):
    """A new word of a prompt and how many embeddings it stands for."""

    text: str
    vectors: int


def pieces(words: Sequence[Word]) -> list[str]:
    """The tokens of words, named as in diffusers: `<cup>` of 2 vectors is `<cup>`, `<cup>_1`."""
    return [
        word.text if index == 0 else f"{word.text}_{index}"
        for word in words
        for index in range(word.vectors)
    ]


def spelled(prompt: str, words: Sequence[Word]) -> str:
    """A prompt in which every word of several vectors is written as its tokens."""
    for word in words:
        if word.vectors > 1:
            prompt = prompt.replace(word.text, " ".join(pieces([word])))
    return prompt


class TokenLayer(nn.Module, BaseTunerLayer):
    """An embedding with the rows of new words, of one adapter or several.

    PEFT's verbs for layers work on it where they mean something: rows have no strength and nothing
    to merge, and stay while adapters are inactive, since a prompt may still name them. With
    adapters disabled a word means what it meant before training, where that is known.

    Attributes:
        words: By adapter, its words; their rows follow each other in this order.
        token_rows: By adapter, [V, D], float32.
        token_ids: By adapter, the rows' ids in the tokenizer, int64 [V].
        token_start: By adapter that trains, the rows before training, [V, D].
        token_limit: By adapter that trains, the largest norm a row is used with.
        factor: What the base multiplies looked-up rows by.
        places: (parent, name, module) of every module that this layer stands in for.
    """

    adapter_layer_names = ("token_rows",)
    other_param_names = ("token_ids", "token_start", "token_limit", "words")

    if TYPE_CHECKING:
        token_rows: PreciseParameterDict

    def __init__(self, base_layer: nn.Embedding) -> None:
        super().__init__()
        self.training = base_layer.training
        self.base_layer = base_layer
        self.factor = _factor(base_layer)
        self.words: dict[str, tuple[Word, ...]] = {}
        self.merged_adapters: list[str] = []
        self.token_rows = PreciseParameterDict()
        self.token_ids = PreciseBufferDict()
        self.token_start = PreciseBufferDict()
        self.token_limit = PreciseBufferDict()
        self._active_adapter: list[str] = []
        self.places: list[tuple[nn.Module, str, nn.Module]] = []

    def add_words(
        self,
        adapter: str,
        words: Sequence[Word],
        rows: Tensor,
        ids: Sequence[int],
        limit: float | None = None,
    ) -> None:
        """Add an adapter's words.

        Args:
            adapter: Not yet in this layer.
            words: What prompts say.
            rows: Their embeddings, [V, D].
            ids: The id that the tokenizer gives each row's token.
            limit: The rows will train, and are used with at most this norm; None: they are fixed.
        """
        device = self.base_layer.weight.device
        rows = rows.detach().to(device=device, dtype=torch.float32, copy=True)
        self.words[adapter] = tuple(words)
        self.token_rows[adapter] = nn.Parameter(rows, requires_grad=limit is not None)
        self.set_ids(adapter, ids)
        if limit is not None:
            self.token_start[adapter] = rows.clone()
            self.token_limit[adapter] = torch.tensor(limit, device=device)
        self._active_adapter = [*self._active_adapter, adapter]

    def set_ids(self, adapter: str, ids: Sequence[int]) -> None:
        """Give an adapter's rows other ids."""
        self.token_ids[adapter] = torch.tensor(list(ids), device=self.base_layer.weight.device)

    def rows(self, adapter: str) -> Tensor:
        """An adapter's rows as they are used now, [V, D] float32; differentiable."""
        if self.disable_adapters and adapter in self.token_start:
            start: Tensor = self.token_start[adapter]
            return start
        rows: Tensor = self.token_rows[adapter]
        if adapter not in self.token_limit:
            return rows
        return rows * (self.token_limit[adapter] / rows.norm(dim=1, keepdim=True)).clamp(max=1.0)

    def forward(self, input_ids: Tensor) -> Tensor:
        own = (child for name, child in self.named_children() if name != "base_layer")
        with onloaded(own):
            return self._looked_up(input_ids)

    def _looked_up(self, input_ids: Tensor) -> Tensor:
        with no_autocast(input_ids.device):
            rows = torch.cat([self.rows(adapter) for adapter in self.words])
        ids = torch.cat([self.token_ids[adapter] for adapter in self.words])
        found = input_ids.unsqueeze(-1) == ids
        new = found.any(-1)
        # An id beyond the table must not reach it; which row stands in does not matter.
        plain: Tensor = self.base_layer(input_ids.masked_fill(new, 0))
        picked = F.embedding(found.int().argmax(-1), rows)
        picked = picked if self.factor == 1.0 else picked * self.factor
        return torch.where(new.unsqueeze(-1), picked.to(plain.dtype), plain)

    # What other code reads off an nn.Embedding

    @property
    def num_embeddings(self) -> int:
        return int(self.base_layer.num_embeddings)

    @property
    def embedding_dim(self) -> int:
        return int(self.base_layer.embedding_dim)

    @property
    def padding_idx(self) -> int | None:
        index: int | None = self.base_layer.padding_idx
        return index

    # PEFT's verbs that mean nothing here

    def scale_layer(self, scale: float) -> None:
        """Rows have no strength."""

    def unscale_layer(self, scale: float | None = None) -> None:
        """Rows have no strength."""

    def set_scale(self, adapter: str, scale: float) -> None:
        """Rows have no strength."""

    def merge(self, safe_merge: bool = False, adapter_names: list[str] | None = None) -> None:
        """There is no weight that rows could become part of."""

    def unmerge(self) -> None:
        """Nothing is ever merged."""

    def set_adapter(self, adapter_names: Any, inference_mode: bool = False) -> None:
        """Rows stay in use; those of the named adapters train, if they were added to train."""
        names = [adapter_names] if isinstance(adapter_names, str) else list(adapter_names)
        for name, rows in self.token_rows.items():
            rows.requires_grad_(name in names and name in self.token_limit and not inference_mode)

    def delete_adapter(self, adapter_name: str) -> None:
        """Take an adapter's words out; adapters that are not here are ignored."""
        for name in (*self.adapter_layer_names, *self.other_param_names):
            if adapter_name in getattr(self, name):
                del getattr(self, name)[adapter_name]
        self._active_adapter = [name for name in self._active_adapter if name != adapter_name]


def _factor(table: nn.Embedding) -> float:
    """What a table multiplies its rows by; known also where its tensors are not in memory."""
    return float(getattr(table, "scalar_embed_scale", getattr(table, "embed_scale", 1.0)))


def token_layers(model: nn.Module, adapter: str | None = None) -> list[TokenLayer]:
    """The layers with new words in a model, of one adapter or of any; usually one or none."""
    found = [layer for layer in model.modules() if isinstance(layer, TokenLayer)]
    return [layer for layer in found if adapter is None or adapter in layer.words]
