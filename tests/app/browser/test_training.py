"""Flows of training, from photos to pictures, with the embedded base."""

import re
import signal
from pathlib import Path

import pytest
from playwright.sync_api import expect

from scripts.demo_photos import write_photos
from tests.app.browser.conftest import PHONE

pytestmark = pytest.mark.timeout(600)
RUN = "personalize-run"
STEPS = 20


@pytest.fixture(scope="module")
def photos(tmp_path_factory):
    """Photos of a cup, as files."""
    folder, _ = write_photos(tmp_path_factory.mktemp("photos"))
    return sorted(folder.glob("*.png"))


def add_photos(visitor, photos: list[Path], count: int) -> None:
    """Give photos and wait until so many are taken."""
    visitor.give(visitor.at("personalize-photos").get_by_role("button").first, *photos)
    expect(visitor.at("personalize-thumbnails").get_by_role("button")).to_have_count(count)


def fill(visitor, elem_id: str, text: str) -> None:
    """Fill a box; again where it was quicker than the page, which had not set it up yet."""
    box = visitor.at(elem_id).locator("input, textarea")
    for _ in range(10):
        box.fill(text)
        box.blur()
        visitor.page.wait_for_timeout(500)
        if box.input_value() == text:
            return
    pytest.fail(f"{elem_id} does not keep {text!r}")


def answer(visitor, steps: int, subject: str = "bowl") -> None:
    """Go from the photos to the settings, and ask for so many training steps."""
    visitor.at("personalize-next-1").click()
    fill(visitor, "personalize-class", subject)
    visitor.at("personalize-next-2").click()
    visitor.at("personalize-advanced").get_by_role("button").first.click()
    fill(visitor, "personalize-train-steps", str(steps))
    expect(visitor.at("personalize-expected")).to_contain_text("Expected")


def begin(visitor, photos: list[Path], steps: int) -> None:
    """Start a training."""
    add_photos(visitor, photos, len(photos))
    answer(visitor, steps)
    visitor.at("personalize-start").click()
    expect(visitor.at(f"{RUN}-bar")).to_be_visible()


def bar(visitor):
    """The sentence under the progress bar."""
    return visitor.at(f"{RUN}-bar").locator("p")


def start_anew(visitor) -> None:
    """Leave the run that is shown, and its photos."""
    visitor.at("personalize-again").click()
    visitor.at("personalize-over").click()
    expect(visitor.at("personalize-thumbnails")).to_be_hidden()


def test_a_bad_photo_is_named_and_the_good_ones_stay(visit, photos, tmp_path):
    bad = tmp_path / "holiday.jpg"
    bad.write_bytes(b"<html>no picture</html>")
    visitor = visit()
    visitor.give(visitor.at("personalize-photos").get_by_role("button").first, photos[0], bad)
    problems = visitor.at("personalize-problems")
    expect(problems).to_contain_text("holiday.jpg is not a jpg, png or webp file")
    expect(visitor.at("personalize-thumbnails").get_by_role("button")).to_have_count(1)
    visitor.snap("bad-photo")
    visitor.at("personalize-over").click()
    expect(visitor.at("personalize-thumbnails")).to_be_hidden()


def test_two_steps_are_trained_and_their_samples_seen(visit, photos, publish):
    visitor = visit()
    add_photos(visitor, photos, len(photos))
    publish(visitor.snap("photos"), "app_photos.png")
    answer(visitor, 2)
    publish(visitor.snap("settings"), "app_settings.png")
    visitor.at("personalize-start").click()
    expect(bar(visitor)).to_contain_text("Finished: step 2 of 2")
    samples = visitor.at(f"{RUN}-samples").locator("img")
    expect(samples.first).to_be_visible()
    assert samples.count() >= 2  # of the base before, and at least one after
    expect(visitor.at(f"{RUN}-samples")).to_contain_text("step 0")
    expect(visitor.at(f"{RUN}-curves").locator("path[stroke-width]").first).to_be_visible()
    visitor.snap("two-steps")
    visitor.at(f"{RUN}-draw").click()
    chosen = visitor.at("generate-adapter-1").locator("input")
    expect(chosen).to_have_value(re.compile("bowl, 5 photos, 2 steps"))
    visitor.at("generate-draw").click()
    expect(visitor.at("generate-slider")).to_be_visible()


@pytest.mark.full  # two minutes
def test_a_run_survives_a_reload_a_second_window_a_stop_and_a_new_server(
    visit, photos, app_process, publish
):
    visitor = visit()
    begin(visitor, photos, STEPS)
    expect(bar(visitor)).to_contain_text(re.compile(r"step \d+ of 20"))
    visitor.open()
    expect(bar(visitor)).to_contain_text(re.compile(r"step \d+ of 20"))
    second = visit(PHONE)
    expect(bar(second)).to_contain_text(re.compile(r"step \d+ of 20"))
    expect(visitor.at(f"{RUN}-samples")).to_contain_text("step 8")
    publish(visitor.snap("training"), "app_training.png")
    second.snap("training-phone")
    visitor.at(f"{RUN}-stop").click()
    expect(bar(visitor)).to_contain_text(re.compile(r"Stopped at step \d+ of 20"))
    app_process.end(signal.SIGKILL)
    app_process.start()
    visitor.open()
    visitor.tab("Runs")
    expect(visitor.at("runs-table")).to_contain_text("stopped")
    visitor.at("runs-choice").locator("input").click()
    visitor.page.get_by_role("option").first.click()
    visitor.at("runs-run-resume").click()
    expect(visitor.at("runs-run-bar").locator("p")).to_contain_text("Finished: step 20 of 20")
    publish(visitor.snap("runs"), "app_runs.png")


def test_a_run_is_deleted_only_after_a_question(visit):
    visitor = visit()
    visitor.tab("Runs")
    expect(visitor.at("runs-table")).to_contain_text("bowl")  # the list is there too
    choice = visitor.at("runs-choice").locator("input")
    choice.click()
    options = visitor.page.get_by_role("option")
    before = options.count()
    assert before
    options.first.click()
    visitor.at("runs-delete").click()
    visitor.snap("delete-question")
    visitor.at("runs-delete-no").click()
    expect(visitor.at("runs-delete-yes")).to_be_hidden()
    visitor.at("runs-delete").click()
    visitor.at("runs-delete-yes").click()
    expect(visitor.at("runs-details")).to_be_hidden()
    choice.click()
    expect(options).to_have_count(before - 1)
