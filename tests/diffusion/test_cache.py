"""What is encoded once may lie on disk: an entry answers for exactly what it was made from."""

import errno
import math
import os
import shutil
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file

from snell_diffusion.diffusion import cache as caches
from snell_diffusion.diffusion import encoded
from snell_diffusion.diffusion.cache import Cache, fingerprint, model_digest, tokenizer_digest
from snell_diffusion.diffusion.config import TrainConfig
from snell_diffusion.diffusion.training import run
from snell_diffusion.errors import SnellaConfigError
from snell_diffusion.training.errors import OutputError
from tests import tiny_models
from tests.diffusion.training_runs import config

KEY = {"photo": "abc", "shape": (16, 16)}


def made() -> dict[str, torch.Tensor]:
    return {"mean": torch.rand(4, 2, 2), "std": torch.rand(4, 2, 2).bfloat16()}


def ask(folder: Path, key: dict[str, Any] = KEY, **options: Any) -> tuple[Cache, Any]:
    cache = Cache(folder, **options)
    return cache, cache.get("latents", key, made)


def test_an_entry_is_kept_bit_for_bit(tmp_path: Path) -> None:
    first, tensors = ask(tmp_path)
    second, again = ask(tmp_path)
    assert (first.found, first.made, second.found, second.made) == (0, 1, 1, 0)
    assert all(torch.equal(tensors[name], again[name]) for name in tensors)
    assert second.summary() == f"cache '{tmp_path}': 1 entries found, 0 made"


def cut(path: Path) -> None:
    path.write_bytes(path.read_bytes()[:-3])


def flip(path: Path) -> None:
    data = bytearray(path.read_bytes())
    data[-1] ^= 1
    path.write_bytes(data)


def foreign(path: Path) -> None:
    """Another entry's file under this name."""
    other = path.with_name("other.safetensors")
    ask(path.parent.parent, {"photo": "other"})
    (source,) = set(path.parent.iterdir()) - {path}
    shutil.copy(source, other)
    other.replace(path)


def unmarked(path: Path) -> None:
    """The right tensors without a mark, as another program would write them."""
    save_file(load_file(path), path)


@pytest.mark.parametrize("damage", [cut, flip, foreign, unmarked, lambda p: p.write_bytes(b"")])
def test_partial_damaged_and_foreign_entries_are_made_anew(
    tmp_path: Path, damage: Callable[[Path], object]
) -> None:
    ask(tmp_path)
    (path,) = (tmp_path / "latents").iterdir()
    damage(path)
    cache, tensors = ask(tmp_path)
    assert (cache.found, cache.made, cache.damaged) == (0, 1, 1)
    assert "1 made, 1 of them in place of damaged ones" in str(cache.summary())
    again, kept = ask(tmp_path)
    assert again.found == 1
    assert torch.equal(kept["mean"], tensors["mean"])


def test_what_is_not_finite_is_not_kept(tmp_path: Path) -> None:
    bad = {"mean": torch.tensor([math.nan])}
    cache = Cache(tmp_path)
    for _ in range(2):
        assert cache.get("latents", KEY, lambda: bad)["mean"].isnan()
    assert (cache.found, cache.made) == (0, 2)


def test_a_trial_reads_and_writes_nothing(tmp_path: Path) -> None:
    ask(tmp_path / "cache", writable=False)
    assert not (tmp_path / "cache").exists()
    assert Cache(None).get("latents", KEY, lambda: {"x": torch.ones(1)})["x"] == 1


@pytest.mark.parametrize("place", ["file", "file/below"])
def test_a_cache_that_cannot_be_written_is_refused_first(
    tiny_base: Path, tmp_path: Path, place: str
) -> None:
    (tmp_path / "file").touch()
    settings = config(tiny_base / "nowhere", tmp_path, cache_dir=str(tmp_path / place))
    with pytest.raises(SnellaConfigError, match=r"cache_dir .* '.*/file' is not a folder; name an"):
        run(settings)
    assert not (tmp_path / "run").exists()
    Cache(tmp_path / "new" / "folder").check()
    assert not (tmp_path / "new").exists()


def test_a_full_disk_is_told_with_the_setting_of_the_cache(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def full(*_: object) -> None:
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    monkeypatch.setattr(caches, "save_file", full)
    with pytest.raises(OutputError, match=r"free space there, or choose another cache_dir$"):
        ask(tmp_path)


def test_runs_elsewhere_may_write_the_same_entry(tmp_path: Path) -> None:
    """Processes of other machines and containers: their ids mean nothing here, or are our own."""
    folder = tmp_path / "latents"
    folder.mkdir()
    theirs = [folder / f".tmp-{pid}-x.safetensors" for pid in (2**22 + 1, os.getpid())]
    old = folder / f".tmp-{2**22 + 1}-old.safetensors"
    for path in (*theirs, old):
        path.touch()
    os.utime(old, (0, 0))

    def made_by_another() -> dict[str, torch.Tensor]:
        # While we make it, a process with our id writes the same entry.
        (folder / f".tmp-{os.getpid()}-{fingerprint('latents', KEY)}.safetensors").mkdir()
        return made()

    Cache(tmp_path).get("latents", KEY, made_by_another)
    assert ask(tmp_path)[0].found == 1
    assert all(path.exists() for path in theirs)
    assert not old.exists()


def test_fingerprints_tell_everything_apart(monkeypatch: pytest.MonkeyPatch) -> None:
    keys = [KEY, {**KEY, "photo": "abd"}, {**KEY, "shape": (16, 24)}, {**KEY, "flip": True}]
    marks = [fingerprint(kind, key) for kind in ("latents", "text") for key in keys]
    monkeypatch.setattr(caches, "version", lambda name: "0.0")
    marks.append(fingerprint("latents", KEY))
    assert len(set(marks)) == len(marks) == 9


def test_models_are_told_apart_by_every_number() -> None:
    vae = tiny_models.vae()
    before = model_digest(vae)
    assert model_digest(tiny_models.vae()) == before
    with torch.no_grad():
        vae.decoder.conv_out.weight.view(-1)[-1] += 1e-4
    assert model_digest(vae) != before
    changed = tiny_models.vae()
    changed.register_to_config(scaling_factor=0.2)
    assert model_digest(changed) != before
    assert model_digest(tiny_models.vae().bfloat16()) != before


def test_tokenizers_are_told_apart() -> None:
    before = tokenizer_digest(tiny_models.tokenizer())
    used = tiny_models.tokenizer()
    used("a cat", padding="max_length", truncation=True)
    assert tokenizer_digest(used) == before
    longer, more = tiny_models.tokenizer(), tiny_models.tokenizer()
    longer.model_max_length = 8
    more.add_tokens(["<new>"])
    assert len({before, tokenizer_digest(longer), tokenizer_digest(more)}) == 3


# -- in a run -------------------------------------------------------------------------------------


def trained(settings: TrainConfig) -> tuple[bytes, str]:
    """The adapter of a run, and what it says of its cache."""
    result = run(settings)
    assert result.adapter_path is not None
    notes = [e["message"] for e in result.history if e["event"] == "note"]
    return result.adapter_path.read_bytes(), next((n for n in notes if "entries" in n), "")


def test_a_run_is_the_same_with_and_without_its_cache(tiny_base: Path, tmp_path: Path) -> None:
    """Made, found, and made again after each thing that it depends on changed."""
    folder = tmp_path / "cache"
    (tmp_path / "photos").mkdir()
    (tmp_path / "photos" / "0.txt").write_text("its own caption")
    plain = config(tiny_base, tmp_path, max_train_steps=2, random_flip=True)
    told: dict[str, str] = {}

    def again(name: str, **changes: Any) -> bytes:
        changes = {"cache_dir": str(folder), "output_dir": str(tmp_path / name), **changes}
        adapter, told[name] = trained(replace(plain, **changes))
        return adapter

    alone, _ = trained(plain)
    # 3 photos to train on in two views, 1 held out, 2 prompts
    assert again("made") == again("found") == alone
    assert "1 entries found, 9 made" in told["made"]  # the held-out photo's prompt comes twice
    assert "10 entries found, 0 made" in told["found"]
    (tmp_path / "photos" / "0.txt").write_text("another caption")
    again("caption")
    assert "9 entries found, 1 made" in told["caption"]
    again("resolution", resolution=24)
    assert "3 entries found, 7 made" in told["resolution"]
    pipe = tiny_models.pipeline()
    with torch.no_grad():
        pipe.text_encoder.get_input_embeddings().weight[0, 0] += 0.1
    pipe.save_pretrained(tmp_path / "base")
    again("encoder", pretrained_model_name_or_path=str(tmp_path / "base"))
    assert "8 entries found, 2 made" in told["encoder"]
    for path in (folder / "text").iterdir():
        cut(path)
    again("damaged")
    assert "8 entries found, 2 made, 2 of them in place of damaged ones" in told["damaged"]


def test_encoders_are_read_once_a_run(
    tiny_base: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Photos, held-out photos and prompts of both ask for them; a T5 takes seconds to read."""
    asked: list[str] = []

    def digest(model: torch.nn.Module) -> str:
        asked.append(type(model).__name__)
        return model_digest(model)

    monkeypatch.setattr(encoded, "model_digest", digest)
    run(config(tiny_base, tmp_path, max_train_steps=1, cache_dir=str(tmp_path / "cache")))
    assert sorted(asked) == ["AutoencoderKL", "CLIPTextModel"]
