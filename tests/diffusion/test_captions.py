"""Captions come from text files and metadata.jsonl; bad ones are named."""

import json
from pathlib import Path

import pytest
from PIL import Image

from snell_diffusion.diffusion.data import Search, data_digest, find_photos
from snell_diffusion.errors import SnellaConfigError


def scene() -> Image.Image:
    return Image.new("RGB", (20, 20), (200, 0, 0))


def test_captions(tmp_path: Path) -> None:
    for name in ("a.png", "b.png", "c.png"):
        scene().save(tmp_path / name)
    (tmp_path / "a.txt").write_text("from the text file\n", "utf-8")
    lines = [{"file_name": n, "text": f"line of {n}"} for n in ("a.png", "b.png")]
    (tmp_path / "metadata.jsonl").write_text("\n".join(map(json.dumps, lines)) + "\n\n")
    (tmp_path / ".hidden.png").write_text("junk")
    (tmp_path / "Thumbs.db").write_text("junk")
    prompts = [p.prompt for p in find_photos(tmp_path, "the prompt")]
    assert prompts == ["from the text file", "line of b.png", "the prompt"]
    without = find_photos(tmp_path, "the prompt", Search(captions=False))
    assert {p.prompt for p in without} == {"the prompt"}
    assert data_digest(without) != data_digest(find_photos(tmp_path, "the prompt"))


@pytest.mark.parametrize(
    "file, content, message",
    [
        ("a.txt", b"  \n", "a.png has an empty caption a.txt"),
        ("a.txt", b"\xff\xfe\x00", "a.png has a caption a.txt that is not UTF-8"),
        ("metadata.jsonl", b"{}\n", "metadata.jsonl line 1: expected"),
        ("metadata.jsonl", b"[" * 100_000, "metadata.jsonl line 1: expected"),
        ("metadata.jsonl", b"\xff", "caption file .*metadata.jsonl is not UTF-8 text"),
        ("metadata.jsonl", b'{"file_name": "a.png", "text": 3}', "line 1: expected .* two texts"),
        ("metadata.jsonl", b'{"file_name": "b.png", "text": "x"}', "the folder holds no 'b.png'"),
        ("metadata.jsonl", b'{"file_name": "a.png", "text": "x"}\nnope\n', "line 2: .*got nope"),
    ],
)
def test_bad_captions_are_named(tmp_path: Path, file: str, content: bytes, message: str) -> None:
    scene().save(tmp_path / "a.png")
    (tmp_path / file).write_bytes(content)
    with pytest.raises(SnellaConfigError, match=message):
        find_photos(tmp_path, "x")


def test_captions_must_be_files(tmp_path: Path) -> None:
    scene().save(tmp_path / "a.png")
    (tmp_path / "a.txt").mkdir()
    with pytest.raises(SnellaConfigError, match=r"a\.png has a caption a\.txt that is not a regu"):
        find_photos(tmp_path, "x")
    (tmp_path / "a.txt").rmdir()
    (tmp_path / "metadata.jsonl").symlink_to("nowhere")
    with pytest.raises(SnellaConfigError, match=r"metadata.jsonl is not a regular file"):
        find_photos(tmp_path, "x")


def test_captions_may_have_another_key(tmp_path: Path) -> None:
    scene().save(tmp_path / "a.png")
    lines = [{"file_name": "a.png", "text": "short", "long": "a long caption"}]
    (tmp_path / "metadata.jsonl").write_text("\n".join(map(json.dumps, lines)))
    (photo,) = find_photos(tmp_path, "x", Search(caption_column="long"))
    assert (photo.prompt, photo.captioned) == ("a long caption", True)
    with pytest.raises(SnellaConfigError, match=r'line 1: expected {"file_name": ..., "other": .*'):
        find_photos(tmp_path, "x", Search(caption_column="other"))
