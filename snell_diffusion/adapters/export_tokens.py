"""New words as textual inversions, for programs that know nothing else of an adapter.

Of one encoder it is `<cup>`: [vectors, size], which `pipe.load_textual_inversion` and most programs
take; of several one tensor each, `clip_l`, `clip_g` or `t5`, as embeddings for SDXL and FLUX are
spelled. A file holds one word: readers take no more.
"""

from collections.abc import Mapping, Sequence
from pathlib import Path

from torch import Tensor

from snell_diffusion.adapters.atomic import write_atomic
from snell_diffusion.adapters.container import encode
from snell_diffusion.adapters.read import AdapterFile
from snell_diffusion.adapters.tokens import TENSOR, words_of
from snell_diffusion.errors import SnellaFileError
from snell_diffusion.tuners.tokens import Word

__all__ = ["EMBEDS_GLOB", "EMBEDS_NAME", "embeds_paths", "export_words", "write_embeds"]

EMBEDS_NAME = "learned_embeds.safetensors"
EMBEDS_GLOB = "learned_embeds*.safetensors"  # of one word, or of each of several

_CLIP = {"text_encoder": "clip_l", "text_encoder_2": "clip_g"}


def embeds_paths(folder: Path, words: Sequence[Word]) -> list[Path]:
    """Where the words go: one is learned_embeds.safetensors, several have their names in theirs."""
    if len(words) == 1:
        return [folder / EMBEDS_NAME]
    stem = EMBEDS_NAME.removesuffix(".safetensors")
    return [folder / f"{stem}_{word.text.strip('<>')}.safetensors" for word in words]


def require_free(folder: Path, words: Sequence[Word], overwrite: bool) -> None:
    """Refuse to replace files that are there, unless asked to.

    Raises:
        SnellaFileError: Names the first.
    """
    there = [path for path in embeds_paths(folder, words) if path.exists()]
    if there and not overwrite:
        raise SnellaFileError(f"{there[0]}: exists already; choose another folder or overwrite")


def write_embeds(
    folder: Path, words: Sequence[Word], rows: Mapping[str, Tensor], classes: Mapping[str, str]
) -> list[Path]:
    """Write every word's embeddings; returns the files.

    Args:
        folder: Where to.
        words: In the order of the rows.
        rows: By encoder, [V, D] float32.
        classes: By encoder, its class.
    """
    paths, start = embeds_paths(folder, words), 0
    for path, word in zip(paths, words, strict=True):
        some = slice(start, start + word.vectors)
        named = {
            word.text if len(rows) == 1 else _key(name, classes[name]): part[some].contiguous()
            for name, part in rows.items()
        }
        write_atomic(path, encode(named, {"format": "pt"}))
        start += word.vectors
    return paths


def export_words(file: AdapterFile, folder: Path) -> list[Path]:
    """Write the new words of an adapter file; returns the files, none if it has no words."""
    tokens = file.header.tokens
    if tokens is None:
        return []
    rows = {name: file.tensors[f"{name}.{TENSOR}"].float() for name in tokens.encoders}
    classes = {name: row.model for name, row in tokens.encoders.items()}
    return write_embeds(folder, words_of(tokens), rows, classes)


def _key(encoder: str, model: str) -> str:
    if model.startswith("T5"):
        return "t5"
    return _CLIP.get(encoder, encoder) if model.startswith("CLIP") else encoder
