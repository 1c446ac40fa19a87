import pytest
from PIL import Image, ImageCms

from snell_diffusion.app.limits import LIMITS
from snell_diffusion.app.photos import MAX_SIDE, decode, notes, shown_name
from snell_diffusion.diffusion.decoding import PhotoError

ORIENTATION = 0x0112
GPS = 0x8825


@pytest.fixture
def photo(tmp_path):
    path = tmp_path / "cat.jpg"
    Image.linear_gradient("L").resize((90, 70)).convert("RGB").save(path)
    return path


def test_a_photo_is_rgb_on_white(tmp_path, photo):
    other = tmp_path / "see-through.png"
    Image.new("RGBA", (80, 80), (255, 0, 0, 0)).save(other)
    assert decode(photo).size == (90, 70)
    assert decode(other).getpixel((5, 5)) == (255, 255, 255)  # transparency lies on white


def test_a_photo_is_upright_and_carries_no_metadata(tmp_path):
    path = tmp_path / "turned.jpg"
    exif = Image.Exif()
    exif[ORIENTATION] = 6
    exif[GPS] = {1: "N", 2: (52.0, 5.0, 1.0)}
    profile = ImageCms.ImageCmsProfile(ImageCms.createProfile("sRGB")).tobytes()
    more = {"comment": b"taken at home", "icc_profile": profile}  # Pillow would keep the profile
    Image.new("RGB", (100, 70)).save(path, exif=exif, **more)
    picture = decode(path)
    assert picture.size == (70, 100)
    assert not picture.getexif()
    assert not picture.info


def test_a_large_photo_is_scaled_down(tmp_path):
    path = tmp_path / "large.png"
    Image.new("RGB", (2 * MAX_SIDE, MAX_SIDE)).save(path)
    assert decode(path).size == (MAX_SIDE, MAX_SIDE // 2)


def test_a_picture_that_would_fill_the_memory_is_refused(tmp_path):
    path = tmp_path / "bomb.png"
    Image.new("1", (13_000, 13_000)).save(path)
    assert path.stat().st_size < 100_000
    with pytest.raises(PhotoError, match=r"is 13000x13000, more than \d+ million"):
        decode(path)


def test_a_file_above_the_limit_is_refused_before_it_is_decoded(tmp_path, photo):
    with photo.open("ab") as file:
        file.truncate(LIMITS.upload_bytes + 1)
    with pytest.raises(PhotoError, match=r"has 10\.0 MB; a photo of up to 10 MB is taken"):
        decode(photo)


def test_notes_name_what_is_worth_a_look(tmp_path):
    for index, angle in enumerate((0, 0, 90)):
        picture = Image.linear_gradient("L").rotate(angle).convert("RGB")
        picture.resize((40 if index == 2 else 200,) * 2).save(tmp_path / f"photo-{index:02d}.png")
    again = Image.linear_gradient("L").convert("RGB").resize((150, 150))
    again.save(tmp_path / "photo-03.png")
    names = {f"photo-{index:02d}.png": f"{name}.jpg" for index, name in enumerate("abcd")}
    assert notes(tmp_path, names, 64) == [
        "b.jpg is there twice: remove one of them.",
        "d.jpg looks like a.jpg. What is the same in all photos is learned as part of the subject, "
        "so different photos teach more.",
        "c.jpg is smaller than the 64 pixels that this model learns at, and is enlarged: it will "
        "look soft.",
    ]
    assert len(notes(tmp_path, names)) == 2


def test_too_few_photos_are_noted(tmp_path, photo):
    (tmp_path / "photos").mkdir()
    decode(photo).save(tmp_path / "photos" / "photo-00.png")
    assert notes(tmp_path / "photos", {"photo-00.png": "cat.jpg"}) == [
        "Only 1 so far. Three is the least that works; five to ten are better."
    ]
    assert notes(tmp_path / "nowhere", {}) == []


def test_a_long_name_is_cut_and_a_path_is_not_shown():
    assert shown_name("/srv/secret/cat.jpg") == "cat.jpg"
    assert len(shown_name("x" * 300 + ".jpg")) == 60
    assert shown_name("x" * 300 + ".jpg").endswith("x.jpg")
    assert shown_name("a\u202eb.jpg") == "a\\u202eb.jpg"
