"""A small byte-level BPE in CLIP's form: any text encodes, common words are one token."""

import json
from collections import Counter
from itertools import pairwise
from pathlib import Path

import numpy as np
from transformers import CLIPTokenizer
from transformers.convert_slow_tokenizer import bytes_to_unicode

from .data import RARE_TOKENS, caption, sample_combination

MAX_LENGTH = 32  # tokens, with the start and the end token
END = "</w>"
GENERAL_WORDS = """
the of and to in is on for with that this by an are from at as it be or was not have has his her
my your our their all one two three some old new small big large tiny little long short tall wide
high low dark light bright shiny colorful beautiful cute funny happy sad angry young sleeping
sitting standing running jumping flying swimming playing wearing holding eating looking next near
behind under over above below inside outside front back top bottom left right side between photo
picture image painting drawing sketch sculpture statue watercolor oil style art cartoon anime
portrait closeup macro studio shot view angle background scene detailed quality best sharp focus
rendering render 3d pixel digital vintage modern man woman boy girl person people child baby hand
face eye eyes head hair hat cap glasses sunglasses scarf shirt dress coat jacket outfit costume
santa chef police firefighter wizard king queen crown sword book table chair bed sofa window door
kitchen room garden park tree flower leaf leaves mountain river lake ocean sky cloud rain sun moon
star stars fire ice stone rock metal gold silver glass paper plastic rug floor wall carpet mirror
autumn spring summer winter morning sunset sunrise evening eiffel tower paris london york japan
house blue red green yellow purple orange pink brown gray grey black white cyan magenta cube wet
bowl can candle vase boot sneaker animal bird horse lion tiger bear rabbit frog apple guitar hat
"""


def merge_rules(counts: Counter, limit: int) -> list[tuple[str, str]]:
    """Byte-pair encoding: the `limit` most frequent pairs, greedily, ties broken by spelling."""
    encode = bytes_to_unicode()
    words = {}
    for word, count in counts.items():
        symbols = [encode[b] for b in word.encode()]
        symbols[-1] += END
        words[word] = (symbols, count)
    rules = []
    while len(rules) < limit:
        pairs = Counter()
        for symbols, count in words.values():
            for pair in pairwise(symbols):
                pairs[pair] += count
        if not pairs:
            break
        best = min(pairs, key=lambda p: (-pairs[p], p))
        rules.append(best)
        words = {w: (_merge(symbols, best), n) for w, (symbols, n) in words.items()}
    return rules


def _merge(symbols: list[str], pair: tuple[str, str]) -> list[str]:
    out = []
    for symbol in symbols:
        if out and (out[-1], symbol) == pair:
            out[-1] += symbol
        else:
            out.append(symbol)
    return out


def build_tokenizer(folder: Path, seed: int, limit: int = 1500) -> CLIPTokenizer:
    """Learn the merges from sampled captions, rare tokens and general words, and save them."""
    rng = np.random.default_rng(seed)
    counts = Counter(w for _ in range(4000) for w in caption(sample_combination(rng), rng).split())
    counts += Counter(dict.fromkeys(RARE_TOKENS, 500))
    counts += Counter(dict.fromkeys(GENERAL_WORDS.split(), 60))
    rules = merge_rules(counts, limit)
    alphabet = list(bytes_to_unicode().values())
    tokens = alphabet + [c + END for c in alphabet] + ["".join(r) for r in rules]
    tokens = [*dict.fromkeys(tokens), "<|startoftext|>", "<|endoftext|>"]
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "vocab.json").write_text(json.dumps({t: i for i, t in enumerate(tokens)}))
    lines = ["#version: 0.2", *(" ".join(r) for r in rules)]
    (folder / "merges.txt").write_text("\n".join(lines) + "\n")
    tokenizer = CLIPTokenizer.from_pretrained(folder, model_max_length=MAX_LENGTH)
    tokenizer.save_pretrained(folder)
    return tokenizer
