"""The page over HTTP, on a really launched server: train two steps of a tiny random model, draw."""

import json
import time
import urllib.error
import urllib.request

import pytest
import yaml
from gradio_client import Client, handle_file
from gradio_client.exceptions import AppError
from PIL import Image

from snell_diffusion.app import LIMITS, launch, make_page
from tests import tiny_models


@pytest.fixture(scope="module")
def server(tmp_path_factory):
    """(address, root of the runs) of a page over a tiny random base model."""
    folder = tmp_path_factory.mktemp("server")
    tiny_models.pipeline().save_pretrained(folder / "base")
    recipe = {
        "pretrained_model_name_or_path": str(folder / "base"),
        "resolution": 32,
        "rank": 4,
        "train_batch_size": 1,
        "num_inference_steps": 2,
        "learning_rate": 1e-2,
    }
    (folder / "recipe.yaml").write_text(yaml.safe_dump(recipe))
    page = make_page(folder / "runs", folder / "base", folder / "recipe.yaml")
    address = launch(page, None, wait=False)
    yield address, folder / "runs"
    page.close()


@pytest.fixture(scope="module")
def client(server):
    client = Client(server[0], verbose=False)
    yield client
    client.close()


@pytest.fixture(scope="module")
def photos(tmp_path_factory):
    folder = tmp_path_factory.mktemp("photos")
    paths = [folder / f"{index}.png" for index in range(2)]
    for index, path in enumerate(paths):
        Image.radial_gradient("L").rotate(30 * index).convert("RGB").save(path)
    return [handle_file(path) for path in paths]


def train(client, photos, word="cat", steps=2, seed=0):
    """Id of the run; the endpoint answers with an update of the list of runs."""
    updates = client.predict(photos, word, steps, seed, api_name="/train")
    assert updates[0] == updates[1]
    assert updates[2] == f"a photo of a sks {word} in the snow"
    return updates[0]["value"]


def wait_until_done(client, job):
    end = time.monotonic() + 240
    while (status := client.predict(job, api_name="/status"))["running"]:
        assert time.monotonic() < end, status
        time.sleep(0.5)
    return status


@pytest.fixture(scope="module")
def run(client, photos):
    job = train(client, photos)
    status = wait_until_done(client, job)
    assert status["sentence"] == "The run is finished at step 2 of 2.", status
    return job


def draw(client, job, prompt="a photo of a sks cat", seed=0, strength=1.0, own=False, level=0.5):
    paths = client.predict(job, prompt, seed, strength, own, level, api_name="/generate")
    pictures = []
    for path in paths:
        with Image.open(path) as picture:
            assert picture.size == (384, 384)  # 32 pixels a side, enlarged
            pictures.append(picture.convert("RGB").tobytes())
    return pictures


def test_a_run_leaves_its_files_and_a_new_page_lists_it(server, run):
    visitor = Client(server[0], verbose=False)
    updates = visitor.predict(api_name="/runs")
    visitor.close()
    for update in updates:
        title, job = update["choices"][0]
        assert update["value"] == job == run
        assert title.startswith("cat, 2 photos, 2 steps (")
    folder = server[1] / run
    assert (folder / "run" / "pytorch_snella_weights.safetensors").is_file()
    assert sorted(p.name for p in (folder / "photos").iterdir()) == ["photo-00.png", "photo-01.png"]
    settings = yaml.safe_load((folder / "settings.yaml").read_text())
    assert settings["instance_prompt"] == "a photo of a sks cat"
    assert json.loads((folder / "run" / "status.json").read_text())["state"] == "finished"


def test_drawing_compares_base_and_adapter_at_one_seed(client, run):
    base, adapted = draw(client, run)
    assert base != adapted
    assert draw(client, run) == [base, adapted]
    assert draw(client, run, strength=0.0) == [base, base]
    assert draw(client, run, own=True, level=1.0) == [base, base]
    assert draw(client, run, seed=1)[0] != base


@pytest.mark.parametrize(
    "wrong, message",
    [
        ({"prompt": "   "}, "the prompt is empty"),
        ({"prompt": "x" * 400}, "400 characters"),
        ({"seed": 2**40}, "seed|maximum"),
        ({"strength": 9.0}, "strength|maximum|greater"),
    ],
)
def test_a_bad_request_to_draw_is_answered_with_a_sentence(client, run, wrong, message):
    with pytest.raises((AppError, ValueError), match=message):
        draw(client, run, **wrong)


@pytest.mark.parametrize("job", ["../../etc", "0" * 32, "/etc/passwd", ""])
@pytest.mark.parametrize("endpoint", ["/status", "/stop", "/generate"])
def test_only_ids_of_runs_are_taken(client, run, job, endpoint):
    more = ["a cat", 0, 1.0, False, 0.5] if endpoint == "/generate" else []
    with pytest.raises(AppError, match=r"run|choices"):
        client.predict(job, *more, api_name=endpoint)


@pytest.mark.parametrize(
    "wrong, message",
    [
        ({"word": "cat\nseed: 3"}, "one or two English words"),
        ({"word": "../cat"}, "one or two English words"),
        ({"steps": 100_000}, "maximum|steps must be"),
        ({"photos": []}, "no photos given"),
    ],
)
def test_a_bad_request_to_train_leaves_nothing_behind(server, client, photos, run, wrong, message):
    before = sorted(server[1].iterdir())
    with pytest.raises(AppError, match=message):
        train(client, **{"photos": photos, **wrong})
    assert sorted(server[1].iterdir()) == before


def test_a_file_that_is_no_photo_is_named_without_its_place(server, client, tmp_path):
    page = tmp_path / "page.png"
    page.write_text("<html></html>")
    with pytest.raises(AppError, match=r"^page\.png is not a jpg, png or webp") as error:
        train(client, [handle_file(page)])
    assert "/" not in str(error.value)


def test_a_file_above_the_limit_is_refused(client, tmp_path):
    large = tmp_path / "large.png"
    large.write_bytes(bytes(11 * 2**20))
    with pytest.raises(Exception, match=r"413|size"):
        train(client, [handle_file(large)])


def test_files_of_the_server_are_not_served(server, run):
    address, root = server
    for path in (root / run / "settings.yaml", root / run / "job.json", "/etc/passwd"):
        with pytest.raises(urllib.error.HTTPError, match=r"403|404"):
            urllib.request.urlopen(f"{address}gradio_api/file={path}")


def test_the_server_is_local_and_shares_nothing(server):
    assert server[0].startswith("http://127.0.0.1:")
    assert LIMITS["share"] is False
    assert LIMITS["allowed_paths"] == []
    with pytest.raises(urllib.error.HTTPError, match=r"403|404"):
        urllib.request.urlopen(f"{server[0]}monitoring")


def test_a_run_can_be_stopped_and_a_second_one_waits(client, photos, run):
    job = train(client, photos, steps=2000)
    with pytest.raises(AppError, match="a run is going already"):
        train(client, photos)
    while "step" not in client.predict(job, api_name="/status")["sentence"]:
        time.sleep(0.3)
    client.predict(job, api_name="/stop")
    assert wait_until_done(client, job)["sentence"].startswith("The run is stopped at step")
