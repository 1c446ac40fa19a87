"""I: thirty files that people and attackers put into a photo folder.

21 are refused by name before a model loads; 9 are photos in an unusual form, and come out upright,
RGB and without metadata. A double is one of the nine: it is trained on twice, and a note says so.
"""

import gzip
import io
import os
import shutil
import struct
import tempfile
import time
import zipfile
import zlib
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image, PngImagePlugin

from snell_diffusion.app.drafts import Drafts
from snell_diffusion.diffusion import setup
from snell_diffusion.diffusion.data import find_photos
from snell_diffusion.diffusion.decoding import open_photo
from snell_diffusion.diffusion.training import run
from snell_diffusion.errors import SnellaConfigError
from tests import tiny_models
from tests.diffusion.training_runs import CLASS_PROMPT, PROMPT, config
from tests.security.forked import MIB, run_forked

MOST_EXTRA = 150 * MIB
NOBODY = 65534
SECRET = "Snell Street 42"  # what no output may tell


def scene() -> Image.Image:
    """48 x 64, every corner another colour: red, green, blue, white."""
    pixels = np.zeros((64, 48, 3), np.uint8)
    pixels[:32, :24], pixels[:32, 24:] = (250, 0, 0), (0, 250, 0)
    pixels[32:, :24], pixels[32:, 24:] = (0, 0, 250), (250, 250, 250)
    return Image.fromarray(pixels)


CORNERS = {
    (5, 5): (250, 0, 0),
    (42, 5): (0, 250, 0),
    (5, 58): (0, 0, 250),
    (42, 58): (250, 250, 250),
}


def encoded(format: str, **options: Any) -> bytes:
    buffer = io.BytesIO()
    scene().save(buffer, format, **options)
    return buffer.getvalue()


# -- refused --------------------------------------------------------------------------------------


def chunk(kind: bytes, body: bytes) -> bytes:
    return struct.pack(">I", len(body)) + kind + body + struct.pack(">I", zlib.crc32(kind + body))


def bomb(width: int, height: int, bits: int = 1, colour: int = 0) -> bytes:
    """A whole PNG of zeros: a few KB that unpack to width x height pixels."""
    channels = {0: 1, 2: 3}[colour]
    line = bytes(1 + (width * bits * channels + 7) // 8)
    packer, body = zlib.compressobj(9), []
    for _ in range(height):
        body.append(packer.compress(line))
    body.append(packer.flush())
    header = struct.pack(">IIBBBBB", width, height, bits, colour, 0, 0, 0)
    data = chunk(b"IHDR", header) + chunk(b"IDAT", b"".join(body)) + chunk(b"IEND", b"")
    return b"\x89PNG\r\n\x1a\n" + data


def fits_gz() -> bytes:
    """A compressed FITS picture, which one of Pillow's decoders would unpack (without a limit)."""
    cards = ["SIMPLE  =                    T", "BITPIX  =                    8"]
    cards += ["NAXIS   =                    2", "NAXIS1  =                   64"]
    cards += ["NAXIS2  =                   64", "END"]
    header = "".join(card.ljust(80) for card in cards).ljust(2880).encode()
    return gzip.compress(header + bytes(64 * 64))


def zipped() -> bytes:
    buffer = io.BytesIO()
    with zipfile.ZipFile(buffer, "w") as archive:
        archive.writestr("photo.png", encoded("PNG"))
    return buffer.getvalue()


def animated(path: Path, frames: int = 200) -> None:
    pictures = [Image.new("P", (32, 32), i) for i in range(frames)]
    pictures[0].save(path, "GIF", save_all=True, append_images=pictures[1:])


def noisy(format: str) -> bytes:
    buffer = io.BytesIO()
    pixels = np.random.default_rng(0).integers(0, 255, (96, 96, 3), np.uint8)
    Image.fromarray(pixels).save(buffer, format)
    return buffer.getvalue()[: -len(buffer.getvalue()) // 2]


def unreadable(path: Path) -> None:
    path.write_bytes(encoded("PNG"))
    path.chmod(0)


def too_many(path: Path) -> None:
    path.write_bytes(encoded("PNG"))
    for index in range(499):
        os.link(path, path.with_name(f"{index:03d}.png"))


NOT_A_PICTURE = "is not a jpg, png or webp file, whatever its name says"
SVG = b'<svg xmlns="http://www.w3.org/2000/svg"><image href="file:///etc/passwd"/></svg>'
EPS = b"%!PS-Adobe-3.0 EPSF-3.0\n%%BoundingBox: 0 0 64 64\n(/etc/passwd) (r) file\n%%EOF\n"

Make = Callable[[Path], object]


def holding(data: Callable[[], bytes]) -> Make:
    return lambda path: path.write_bytes(data())


REFUSED: dict[str, tuple[str, Make, str]] = {
    "empty": ("empty.png", holding(lambda: b""), "is empty"),
    "text": ("notes.png", holding(lambda: b"not a picture\n" * 99), NOT_A_PICTURE),
    "HTML": ("page.jpg", holding(lambda: b"<!doctype html><script>1</script>"), NOT_A_PICTURE),
    "zip": ("archive.png", holding(zipped), NOT_A_PICTURE),
    "SVG": ("drawing.png", holding(lambda: SVG), NOT_A_PICTURE),
    "EPS": ("drawing.jpg", holding(lambda: EPS), NOT_A_PICTURE),
    "TIFF as PNG": ("scan.png", holding(lambda: encoded("TIFF")), NOT_A_PICTURE),
    "FITS gz": ("sky.png", holding(fits_gz), NOT_A_PICTURE),
    "cut JPEG": ("cut.jpg", holding(lambda: noisy("JPEG")), "cannot be decoded (image file is tr"),
    "cut PNG": ("cut.png", holding(lambda: noisy("PNG")), "cannot be decoded ("),
    "80 MP": (
        "large.png",
        holding(lambda: bomb(8000, 10_000, 8, 2)),
        "is 8000x10000, more than 50 million pixels",
    ),
    "169 MP": (
        "bomb.png",
        holding(lambda: bomb(13_000, 13_000)),
        "is 13000x13000, more than 50 million pixels",
    ),
    "200 MP": ("bomb2.png", holding(lambda: bomb(20_000, 10_000)), "has more than 50 million pix"),
    "20000 x 1": ("line.png", holding(lambda: bomb(20_000, 1)), "is 20000x1, below 16 pixels"),
    "1 x 1": ("dot.png", holding(lambda: bomb(1, 1)), "is 1x1, below 16 pixels"),
    "200-frame GIF": ("moving.gif", animated, "is not jpg, png or webp"),
    "unreadable": ("locked.png", unreadable, "cannot be read (Permission denied)"),
    "FIFO": ("pipe.png", os.mkfifo, "is not a regular file"),
    "dangling link": ("link.png", lambda p: p.symlink_to("gone.png"), "is missing, or a link that"),
    "none valid": ("notes.md", holding(lambda: b"# notes"), "holds no jpg, png or webp file"),
    "501 files": ("last.png", too_many, "holds 501 photos, at most 500 are taken"),
}


def as_nobody() -> None:
    """Give up root's right to read everything; a plain user never had it."""
    if os.geteuid() == 0:
        os.setresuid(NOBODY, NOBODY, NOBODY)


@pytest.mark.row("I")
@pytest.mark.parametrize("name", REFUSED)
def test_refused_by_name_before_a_model_loads(name: str, row: Any) -> None:
    file, make, reason = REFUSED[name]
    # pytest's own folders are closed to the user who may not read the file
    folder = Path(tempfile.mkdtemp(prefix="snella-images-"))
    folder.chmod(0o755)
    try:
        photos = folder / "given"
        photos.mkdir()
        if name != "none valid":
            (photos / "fine.png").write_bytes(encoded("PNG"))
        make(photos / file)
        settings = config(folder / "no base", folder, instance_data_dir=str(photos))

        def start() -> None:
            setup.load_base = refuse_to_load
            if name == "unreadable":
                as_nobody()
            run(settings)

        outcome = run_forked(start, seconds=20)
        assert outcome.error == "SnellaConfigError", outcome.text
        # of the photo itself, or of the folder where none is to blame
        named = file if name not in ("none valid", "501 files") else f"photo folder '{photos}'"
        assert f"{named} {reason}" in outcome.text
        assert not (folder / "run").exists()
        assert outcome.extra_bytes <= MOST_EXTRA
        if name == "200 MP":
            row.figure(f"a 200 MP file costs {outcome.extra_bytes / MIB:.0f} MiB")
    finally:
        shutil.rmtree(folder)


def refuse_to_load(*_: Any) -> None:
    raise AssertionError("the base was loaded")


def test_the_guard_against_loading_works(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(setup, "load_base", refuse_to_load)
    with pytest.raises(AssertionError, match="the base was loaded"):
        run(config(tmp_path / "no base", tmp_path))


@pytest.mark.parametrize("format", ["PNG", "WEBP"])
def test_animations_in_photo_formats_are_refused(tmp_path: Path, format: str) -> None:
    pictures = [Image.new("RGB", (32, 32), (100 * i, 0, 0)) for i in range(3)]
    path = tmp_path / f"moving.{format.lower()}"
    pictures[0].save(path, format, save_all=True, append_images=pictures[1:])
    with pytest.raises(
        SnellaConfigError, match=rf"moving\.{format.lower()} is animated \(3 frames"
    ):
        find_photos(tmp_path, PROMPT)


def test_all_are_refused_at_once(tmp_path: Path) -> None:
    named = []
    for name, (file, make, reason) in REFUSED.items():
        if name not in ("none valid", "501 files", "unreadable"):
            make(tmp_path / file)
            named.append(f"{file} {reason}")
    with pytest.raises(SnellaConfigError, match=r"18 bad file\(s\)") as refused:
        find_photos(tmp_path, PROMPT)
    assert all(words in str(refused.value) for words in named)


# -- normalised -----------------------------------------------------------------------------------


def exif(orientation: int | None = None, gps: bool = False) -> Image.Exif:
    found = Image.Exif()
    found[0x010E] = SECRET  # description
    if orientation:
        found[0x0112] = orientation
    if gps:
        found.get_ifd(0x8825).update({1: "N", 2: (48.0, 51.0, 24.0), 3: "E", 4: (2.0, 21.0, 3.0)})
    return found


def cmyk(path: Path) -> None:
    scene().convert("CMYK").save(path, quality=95)


def deep(path: Path) -> None:
    grey = np.asarray(scene().convert("L"), np.uint16)
    Image.fromarray(grey * 257).save(path)  # all 16 bits are used


def see_through(mode: str) -> Make:
    def make(path: Path) -> None:
        picture = scene().convert("RGBA")
        picture.paste((9, 9, 9, 0), (24, 32, 48, 64))  # white below, so nothing is to be seen
        picture.convert(mode).save(path)

    return make


def palette(path: Path) -> None:
    scene().quantize(4).save(path)


def rotated(path: Path) -> None:
    scene().transpose(Image.Transpose.ROTATE_90).save(path, exif=exif(6), quality=95)


def located(path: Path) -> None:
    scene().save(path, exif=exif(gps=True), quality=95)


def talkative(path: Path) -> None:
    texts = PngImagePlugin.PngInfo()
    texts.add_text("Comment", (SECRET * 80_000)[: 2**20], zip=True)
    scene().save(path, pnginfo=texts, exif=exif())


NORMALISED: dict[str, tuple[str, Make]] = {
    "CMYK": ("print.jpg", cmyk),
    "I;16": ("scan.png", deep),
    "RGBA": ("cutout.png", see_through("RGBA")),
    "LA": ("cutout-grey.png", see_through("LA")),
    "palette": ("palette.png", palette),
    "EXIF rotated": ("phone.jpg", rotated),
    "GPS": ("place.jpg", located),
    "1 MB zTXt": ("text.png", talkative),
    "duplicate": ("again.jpg", located),
}


@pytest.mark.row("I")
@pytest.mark.parametrize("name", NORMALISED)
def test_normalised_to_upright_rgb(tmp_path: Path, name: str) -> None:
    file, make = NORMALISED[name]
    make(tmp_path / file)
    if name == "duplicate":
        shutil.copy(tmp_path / file, tmp_path / "first.jpg")

    def look() -> list[Any]:
        (*_, photo) = find_photos(tmp_path, PROMPT)
        picture = open_photo(photo.path)
        seen = [picture.convert("RGB").getpixel(place) for place in CORNERS]
        return [picture.mode, picture.size, seen, dict(picture.getexif()), list(picture.info)]

    outcome = run_forked(look)
    assert outcome.error == "", outcome.text
    mode, size, seen, tags, info = outcome.value
    assert (mode, tuple(size), tags, info) == ("RGB", (48, 64), {}, [])
    expected = np.array(list(CORNERS.values()), float)
    if name in ("I;16", "LA"):
        luma = expected @ [0.299, 0.587, 0.114]  # ITU-R 601, as Pillow's "L"
        expected = np.stack([luma] * 3, axis=1)
    if name in ("RGBA", "LA"):
        expected[3] = 255
    np.testing.assert_allclose(np.array(seen, float), expected, atol=14)
    assert outcome.extra_bytes <= MOST_EXTRA


# -- what is written ------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def outputs(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Any]:
    """A whole run on all nine: its folder and its result."""
    folder = tmp_path_factory.mktemp("outputs")
    tiny_models.pipeline().save_pretrained(folder / "base")
    (folder / "photos").mkdir()
    for file, make in NORMALISED.values():
        make(folder / "photos" / file)
    settings = config(
        folder / "base",
        folder,
        instance_data_dir=str(folder / "photos"),
        with_prior_preservation=True,
        class_prompt=CLASS_PROMPT,
        num_class_images=2,
        validation_prompt=PROMPT,
        max_train_steps=1,
        target_modules=["to_q"],
    )
    return folder, run(settings)


def test_a_double_is_noted(outputs: tuple[Path, Any]) -> None:
    notes = [e["message"] for e in outputs[1].history if e["event"] == "note"]
    assert "photos that equal an earlier one: place.jpg" in notes


def test_no_picture_of_a_run_tells_where_a_photo_was_taken(outputs: tuple[Path, Any]) -> None:
    folder, _ = outputs
    draft = Drafts(folder / "drafts").add(sorted((folder / "photos").iterdir()))
    stored = [photo.file for photo in draft.stored]
    written = [p for p in (folder / "run").rglob("*") if p.suffix == ".png"] + stored
    assert {"class_images", "samples", "run", "photos"} == {p.parent.name for p in written}
    for path in written:
        with Image.open(path) as picture:
            assert dict(picture.getexif()) == {}
            assert not {"exif", "Comment", "xmp"} & set(picture.info)
    for path in (*stored, *(p for p in (folder / "run").rglob("*") if p.is_file())):
        assert SECRET.encode() not in path.read_bytes()


def test_refusing_a_pipe_does_not_wait(tmp_path: Path) -> None:
    os.mkfifo(tmp_path / "pipe.png")
    start = time.monotonic()
    with pytest.raises(SnellaConfigError, match=r"pipe\.png is not a regular file"):
        find_photos(tmp_path, PROMPT)
    assert time.monotonic() - start < 2
