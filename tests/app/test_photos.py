import pytest
from PIL import Image, ImageCms

from snell_diffusion.app.photos import MAX_PHOTOS, MAX_SIDE, notes, shown_name, store_photos
from snell_diffusion.errors import SnellaValueError

ORIENTATION = 0x0112
GPS = 0x8825


def read(path):
    with Image.open(path) as picture:
        picture.load()
        return picture


@pytest.fixture
def photo(tmp_path):
    path = tmp_path / "cat.jpg"
    Image.linear_gradient("L").resize((90, 70)).convert("RGB").save(path)
    return path


def test_stored_photos_are_rgb_pngs_in_upload_order(tmp_path, photo):
    other = tmp_path / "see-through.png"
    Image.new("RGBA", (80, 80), (255, 0, 0, 0)).save(other)
    stored = store_photos([photo, str(other)], tmp_path / "photos")
    assert [path.name for path in stored] == ["photo-00.png", "photo-01.png"]
    assert [read(path).size for path in stored] == [(90, 70), (80, 80)]
    assert read(stored[1]).getpixel((5, 5)) == (255, 255, 255)  # transparency lies on white


def test_stored_photos_are_upright_and_carry_no_metadata(tmp_path):
    path = tmp_path / "turned.jpg"
    exif = Image.Exif()
    exif[ORIENTATION] = 6
    exif[GPS] = {1: "N", 2: (52.0, 5.0, 1.0)}
    profile = ImageCms.ImageCmsProfile(ImageCms.createProfile("sRGB")).tobytes()
    more = {"comment": b"taken at home", "icc_profile": profile}  # Pillow would keep the profile
    Image.new("RGB", (100, 70)).save(path, exif=exif, **more)
    stored = read(store_photos([path], tmp_path / "photos")[0])
    assert stored.size == (70, 100)
    assert not stored.getexif()
    assert not stored.info


def test_large_photos_are_scaled_down(tmp_path):
    path = tmp_path / "large.png"
    Image.new("RGB", (2 * MAX_SIDE, MAX_SIDE)).save(path)
    assert read(store_photos([path], tmp_path / "photos")[0]).size == (MAX_SIDE, MAX_SIDE // 2)


def test_every_bad_upload_is_named_and_nothing_is_written(tmp_path, photo):
    page = tmp_path / "page.png"
    page.write_text("<html>not a picture</html>")
    cut = tmp_path / "cut.jpg"
    cut.write_bytes(photo.read_bytes()[:400])
    with pytest.raises(
        SnellaValueError, match=r"page\.png is not a jpg.*; cut\.jpg cannot be"
    ) as e:
        store_photos([photo, page, cut], tmp_path / "photos")
    assert str(tmp_path) not in str(e.value)
    assert not (tmp_path / "photos").exists()


def test_a_picture_that_would_fill_the_memory_is_refused(tmp_path):
    path = tmp_path / "bomb.png"
    Image.new("1", (13_000, 13_000)).save(path)
    assert path.stat().st_size < 100_000
    with pytest.raises(SnellaValueError, match=r"bomb\.png is 13000x13000, more than \d+ million"):
        store_photos([path], tmp_path / "photos")


@pytest.mark.parametrize("count, message", [(0, "no photos given"), (MAX_PHOTOS + 1, "at most 30")])
def test_the_number_of_photos_is_limited(tmp_path, photo, count, message):
    with pytest.raises(SnellaValueError, match=message):
        store_photos([photo] * count, tmp_path / "photos")


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
    store_photos([photo], tmp_path / "photos")
    assert notes(tmp_path / "photos", {"photo-00.png": "cat.jpg"}) == [
        "Only 1 so far. Three is the least that works; five to ten are better."
    ]
    assert notes(tmp_path / "nowhere", {}) == []


def test_a_long_name_is_cut_and_a_path_is_not_shown():
    assert shown_name("/srv/secret/cat.jpg") == "cat.jpg"
    assert len(shown_name("x" * 300 + ".jpg")) == 60
    assert shown_name("x" * 300 + ".jpg").endswith("x.jpg")
    assert shown_name("a\u202eb.jpg") == "a\\u202eb.jpg"
