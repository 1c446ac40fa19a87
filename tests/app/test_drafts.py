import shutil
from dataclasses import replace

import pytest
from PIL import Image

from snell_diffusion.app.drafts import Drafts
from snell_diffusion.app.limits import LIMITS
from snell_diffusion.errors import SnellaValueError

WRONG = ["", "../other", "0" * 31, "G" * 32, "0" * 32 + "/..", None, 7, ["0" * 32]]


@pytest.fixture
def drafts(tmp_path):
    return Drafts(tmp_path / "drafts")


@pytest.fixture
def photo(tmp_path):
    """photo(name, angle, size) -> a picture that looks different for every angle."""

    def make(name="cat.jpg", angle=0, size=100):
        path = tmp_path / "uploads" / name
        path.parent.mkdir(exist_ok=True)
        picture = Image.linear_gradient("L").rotate(angle).convert("RGB")
        picture.resize((size, size)).save(path)
        return path

    return make


@pytest.fixture
def broken(tmp_path):
    path = tmp_path / "holiday.png"
    path.write_text("<html></html>")
    return path


def names(draft):
    return [photo.name for photo in draft.stored]


def test_good_photos_are_kept_and_bad_ones_named(drafts, photo, broken):
    draft = drafts.add([photo("a.jpg"), broken, str(photo("b.webp", 90))])
    assert names(draft) == ["a.jpg", "b.webp"]
    assert [p.file.name for p in draft.stored] == ["photo-00.png", "photo-01.png"]
    assert draft.problems == ["holiday.png is not a jpg, png or webp file, whatever its name says."]
    assert [p.problem for p in drafts.get(draft.id).photos] == [None, None]


def test_only_bad_photos_make_an_empty_draft(drafts, broken):
    draft = drafts.add([broken])
    assert draft.stored == []
    assert len(draft.problems) == 1


def test_photos_are_added_to_a_draft(drafts, photo):
    first = drafts.add([photo("a.jpg")])
    second = drafts.add([photo("b.jpg", 90)], first.id)
    assert second.id == first.id
    assert names(second) == ["a.jpg", "b.jpg"]


def test_a_draft_survives_a_restart(drafts, photo):
    draft = drafts.add([photo("a.jpg"), photo("b.jpg", 90)])
    drafts.caption(draft.id, 1, "  on a wooden floor ")
    again = Drafts(drafts.root)
    assert again.latest() == draft.id
    assert [(p.name, p.caption) for p in again.get(draft.id).stored] == [
        ("a.jpg", ""),
        ("b.jpg", "on a wooden floor"),
    ]


def test_an_empty_caption_takes_it_back(drafts, photo):
    draft = drafts.add([photo()]).id
    drafts.caption(draft, 0, "in the snow")
    drafts.caption(draft, 0, "  ")
    assert [path.suffix for path in (drafts.root / draft / "photos").iterdir()] == [".png"]


@pytest.mark.parametrize("text", ["two\nlines", "a\x1b[31mred", "x" * (LIMITS.prompt + 1)])
def test_a_caption_is_one_line_of_bearable_length(drafts, photo, text):
    draft = drafts.add([photo()]).id
    with pytest.raises(SnellaValueError, match="a caption is one line"):
        drafts.caption(draft, 0, text)


def test_a_removed_photo_leaves_no_file_and_no_gap(drafts, photo):
    draft = drafts.add([photo("a.jpg"), photo("b.jpg", 90), photo("c.jpg", 180)]).id
    drafts.caption(draft, 1, "in the snow")
    drafts.remove(draft, 1)
    assert names(drafts.get(draft)) == ["a.jpg", "c.jpg"]
    drafts.caption(draft, 1, "on the beach")
    assert drafts.get(draft).stored[1].caption == "on the beach"
    more = drafts.add([photo("d.jpg", 45)], draft)
    assert [p.file.name for p in more.stored] == ["photo-00.png", "photo-02.png", "photo-03.png"]
    assert [p.caption for p in more.stored] == ["", "on the beach", ""]


def test_a_new_photo_does_not_inherit_the_caption_of_a_removed_one(drafts, photo):
    draft = drafts.add([photo("a.jpg"), photo("b.jpg", 90)]).id
    drafts.caption(draft, 1, "in the snow")
    drafts.remove(draft, 1)
    more = drafts.add([photo("c.jpg", 180)], draft)
    assert [(p.name, p.caption) for p in more.stored] == [("a.jpg", ""), ("c.jpg", "")]


@pytest.mark.parametrize("index", [-1, 1, True, "0", None, 0.0])
def test_a_photo_that_is_not_there_is_refused(drafts, photo, index):
    draft = drafts.add([photo()]).id
    for action in (drafts.remove, lambda d, i: drafts.caption(d, i, "x")):
        with pytest.raises(SnellaValueError, match="there is no photo"):
            action(draft, index)


@pytest.mark.parametrize("draft", WRONG)
def test_only_ids_name_drafts(drafts, photo, draft):
    drafts.add([photo()])
    for action in (drafts.get, drafts.photos, drafts.delete, lambda d: drafts.remove(d, 0)):
        with pytest.raises(SnellaValueError, match="not the id of a set of photos"):
            action(draft)


def test_an_unknown_id_is_refused(drafts, photo):
    with pytest.raises(SnellaValueError, match="no longer there"):
        drafts.add([photo()], "0" * 32)


def test_a_deleted_draft_is_gone(drafts, photo):
    first, second = drafts.add([photo()]).id, drafts.add([photo()]).id
    assert drafts.latest() == second
    drafts.delete(second)
    assert drafts.latest() == first
    assert [path.name for path in drafts.root.iterdir()] == [first]


def test_without_uploads_there_is_no_draft(drafts):
    with pytest.raises(SnellaValueError, match="no photos given"):
        drafts.add([])
    assert drafts.latest() is None


def test_the_number_of_photos_is_limited_over_all_uploads(tmp_path, photo):
    drafts = Drafts(tmp_path / "few", replace(LIMITS, photos=2))
    draft = drafts.add([photo("a.jpg")]).id
    with pytest.raises(SnellaValueError, match="3 photos are too many: at most 2"):
        drafts.add([photo("b.jpg"), photo("c.jpg")], draft)
    assert names(drafts.get(draft)) == ["a.jpg"]


def test_the_oldest_drafts_go_when_there_are_too_many(tmp_path, photo):
    drafts = Drafts(tmp_path / "few", replace(LIMITS, drafts=2))
    made = [drafts.add([photo()]).id for _ in range(3)]
    assert {path.name for path in drafts.root.iterdir()} == set(made[1:])


def test_room_is_asked_for_before_anything_is_written(tmp_path, photo):
    def full(size):
        assert size == photo().stat().st_size
        raise SnellaValueError("there is no room")

    drafts = Drafts(tmp_path / "full", LIMITS, full)
    with pytest.raises(SnellaValueError, match="no room"):
        drafts.add([photo()])
    assert not drafts.root.exists()


def test_names_of_uploads_are_shown_and_never_used_on_the_disk(drafts, photo, tmp_path):
    path = tmp_path / "uploads" / "a\x1b[31m<b>..%2f.jpg"
    shutil.copy(photo(), path)
    draft = drafts.add([path])
    assert draft.stored[0].name == "a\\x1b[31m<b>..%2f.jpg"
    assert draft.stored[0].file.name == "photo-00.png"
