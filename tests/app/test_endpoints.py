"""Every public action from gradio_client, on a really launched page with a tiny base."""

import json
import time

import pytest
from gradio_client import Client, handle_file
from gradio_client.exceptions import AppError
from PIL import Image

from snell_diffusion.app import endpoints
from tests import tiny_models

NAMES = """
    bases presets photos captions delete_photos estimate train runs status samples pause stop
    resume delete_run adapters adapter_file delete_adapter inspect overlap generate compare
    add_photos add_adapter
"""
TAKES_RUN = ("status", "samples", "pause", "stop", "resume", "delete_run")
TAKES_ADAPTER = ("adapter_file", "delete_adapter", "inspect")


@pytest.fixture(scope="module")
def client(page_server):
    client = Client(page_server.address, verbose=False)
    yield client
    client.close()


@pytest.fixture(scope="module")
def ask(client):
    """Call an endpoint by its name."""

    def call(name, *arguments, **named):
        return client.predict(*arguments, api_name=f"/{name}", **named)

    return call


@pytest.fixture(scope="module")
def photos(tmp_path_factory):
    folder = tmp_path_factory.mktemp("photos")
    paths = [folder / f"{index}.png" for index in range(2)]
    for index, path in enumerate(paths):
        Image.radial_gradient("L").rotate(30 * index).convert("RGB").save(path)
    return [handle_file(path) for path in paths]


@pytest.fixture(scope="module")
def draft(ask, photos):
    return ask("add_photos", photos, "")["draft"]


@pytest.fixture(scope="module")
def adapters(ask, tmp_path_factory):
    """Ids of two uploaded adapters."""
    folder = tmp_path_factory.mktemp("uploads")
    ids = []
    for seed in (1, 2):
        pipe = tiny_models.pipeline()
        tiny_models.adapt(pipe.unet, seed=seed)
        path = pipe.save_snella_weights(folder / f"mine-{seed}.safetensors")
        ids.append(ask("add_adapter", handle_file(path))["id"])
    return ids


@pytest.fixture(scope="module")
def run(ask, draft):
    """Id of a finished run of two steps."""
    settings = {"rank": 4, "resolution": 32, "train_batch_size": 1, "num_inference_steps": 2}
    settings |= {"num_validation_photos": 0}
    job = ask("train", draft, "cat", base="tiny", effort="quick", steps=2, settings=settings)
    end = time.monotonic() + 240
    while (status := ask("status", job))["running"]:
        assert time.monotonic() < end, status
        time.sleep(0.5)
    assert status["state"] == "finished", status
    return job


def test_every_public_action_is_an_endpoint_with_a_description(client):
    info = client.view_api(return_format="dict", print_info=False)
    assert {name.removeprefix("/") for name in info["named_endpoints"]} == set(NAMES.split())
    assert info["unnamed_endpoints"] == {}
    for name, row in info["named_endpoints"].items():
        assert len(row["description"] or "") > 30, name
        assert "{" not in row["description"], name


def test_bases_tell_what_may_be_asked_but_not_where_they_lie(ask, tiny_base):
    (base,) = ask("bases")
    assert base["id"] == "tiny"
    assert base["min_side"] <= base["resolution"] <= base["max_side"]
    assert str(tiny_base) not in json.dumps(base)


def test_presets_and_estimates(ask):
    known = ask("presets")
    assert [row["id"] for row in known["presets"]] == ["pet", "object", "style"]
    efforts = {row["id"] for row in known["efforts"]}
    found = ask("estimate", "tiny", "pet")
    assert set(found) == efforts
    assert all(row["sentence"] for row in found.values())


def test_photos_get_captions(ask, draft):
    found = ask("captions", draft, ["on a table", ""])
    assert [photo["caption"] for photo in found["photos"]] == ["on a table", ""]
    assert ask("photos", draft)["photos"] == found["photos"]
    assert [photo["name"] for photo in found["photos"]] == ["0.png", "1.png"]
    ask("captions", draft, ["", ""])
    for wrong in (["one"], "text", [1, 2, ""], [["x"], ""]):
        with pytest.raises(AppError, match=r"list of 2 captions|texts must be"):
            ask("captions", draft, wrong)


def test_a_run_is_listed_with_its_samples_and_its_adapter(ask, run):
    (row,) = [row for row in ask("runs") if row["id"] == run]
    assert (row["subject"], row["base"], row["status"]) == ("cat", "tiny", "finished")
    samples = ask("samples", run)
    assert samples[0]["step"] == 0
    with Image.open(samples[0]["picture"]) as picture:
        assert picture.format == "PNG"
    (adapter,) = [row for row in ask("adapters") if row["id"] == run]
    assert (adapter["base"], adapter["uploaded"]) == ("tiny", False)
    with open(ask("adapter_file", run), "rb") as file:
        assert file.read(9)[8:] == b"{"
    with pytest.raises(AppError, match="this run is finished"):
        ask("resume", run)


def pixels(paths):
    return [Image.open(path).convert("RGB").tobytes() for path in paths]


def test_pictures_are_drawn_and_downloaded(ask, adapters):
    def draw(**more):
        found = ask("generate", "a sks cat", base="tiny", steps=2, **more)
        return pixels(found["pictures"]), found

    plain, _ = draw()
    worn, found = draw(adapters=[[adapters[0], 1.0]], compare_with_base=True, count=2)
    assert found["seeds"] == [0, 1]
    assert 0 < found["kept_share"] <= 1
    assert pixels(found["base_pictures"])[0] == plain[0] != worn[0]
    assert draw(adapters=[[adapters[0], 0]])[0] == plain
    assert draw(adapters=[[adapters[0], 1.0]], sparsity=1.0)[0] == plain
    assert draw(adapters=[[name, 1.0] for name in adapters])[0] != worn[:1]


def test_grids_are_one_labelled_picture(ask, adapters):
    more = {"base": "tiny", "steps": 1, "adapters": [[adapters[0], 1.0]]}
    found = ask("compare", "a sks cat", "seed", "0, 1", "strength", "0, 1, 2", **more)
    with Image.open(found["picture"]) as sheet:
        assert sheet.width > sheet.height
    by_adapter = {"compared": ["", *adapters], "columns": "seed", "column_values": "0"}
    found = ask("compare", "a sks cat", "adapter", "", base="tiny", steps=1, **by_adapter)
    with Image.open(found["picture"]) as sheet:
        assert sheet.height > sheet.width


def test_adapters_are_inspected_and_compared(ask, adapters):
    found = ask("inspect", adapters[0])
    assert found["facts"]["Digest check"].startswith("passed")
    assert all(row["ratio"] > 0 and 0 < row["kept_share"] <= 1 for row in found["layers"])
    pair = ask("overlap", *adapters)
    assert 0 < pair["interference"] < 1
    assert pair["cosine"] == pytest.approx(pair["interference"] * pair["agreement"])
    assert ask("overlap", adapters[0], adapters[0])["agreement"] == pytest.approx(1)


@pytest.mark.parametrize("name", ["../../etc", "0" * 32, "/etc/passwd", "", 7, None, ["x"], {}])
@pytest.mark.parametrize("endpoint", TAKES_RUN + TAKES_ADAPTER + ("photos", "delete_photos"))
def test_only_known_ids_are_taken(ask, endpoint, name):
    with pytest.raises(AppError, match=r"choose|photos|no longer there") as error:
        ask(endpoint, name)
    assert "/" not in str(error.value)


@pytest.mark.parametrize(
    "endpoint, arguments, message",
    [
        ("generate", {"prompt": "   "}, "the prompt is empty"),
        ("generate", {"prompt": "x" * 400}, "400 characters"),
        ("generate", {"prompt": 7}, "prompt must be a text"),
        ("generate", {"prompt": "x", "seed": 2**40}, "the seed must be"),
        ("generate", {"prompt": "x", "seed": "0"}, "the seed must be"),
        ("generate", {"prompt": "x", "count": 10**6}, "the number of pictures must be"),
        ("generate", {"prompt": "x", "width": 10**6}, "the width must be"),
        ("generate", {"prompt": "x", "steps": 10**6}, "the number of steps must be"),
        ("generate", {"prompt": "x", "adapters": [["../x", 1.0]]}, "choose an adapter"),
        ("generate", {"prompt": "x", "adapters": "all"}, "adapters must be a list"),
        ("generate", {"prompt": "x", "base": "/etc"}, "there is no base model"),
        ("generate", {"prompt": "x", "sparsity": True}, "the sparsity must be"),
        ("compare", {"prompt": "x", "rows": "path"}, "compare one of"),
        ("compare", {"prompt": "x", "row_values": 3}, "must be given as text"),
        ("compare", {"prompt": "x", "compared": "x"}, "list of texts"),
        ("compare", {"prompt": "x", "adapters": 5}, "adapters must be a list"),
        ("estimate", {"preset": "../x"}, "choose a preset"),
        ("overlap", {"adapter": "x", "other": "y"}, "choose an adapter"),
    ],
)
def test_wrong_values_are_answered_with_a_sentence(ask, endpoint, arguments, message):
    named = {"base": "tiny", **arguments} if endpoint != "overlap" else arguments
    with pytest.raises(AppError, match=message):
        ask(endpoint, **named)


@pytest.mark.parametrize(
    "wrong, message",
    [
        ({"subject": "cat\nseed: 3"}, "one or two English words"),
        ({"word": "../cat"}, "its name must be"),
        ({"steps": 10**6}, "the steps must be"),
        ({"seed": -1}, "the seed must be"),
        ({"base": "/etc"}, "there is no base model"),
        ({"settings": {"output_dir": "/tmp/x"}}, "output_dir"),
        ({"settings": {"pretrained_model_name_or_path": "/x"}}, "pretrained_model_name_or_path"),
        ({"settings": [1]}, "given by name"),
        ({"draft": "0" * 32}, "add them again"),
        ({"preset": "x"}, "choose what it is"),
    ],
)
def test_a_bad_request_to_train_leaves_nothing_behind(page_server, ask, draft, wrong, message):
    runs = page_server.root / "local" / "runs"
    before = sorted(runs.iterdir()) if runs.is_dir() else []
    with pytest.raises(AppError, match=message):
        ask("train", **{"draft": draft, "subject": "cat", "base": "tiny", **wrong})
    assert (sorted(runs.iterdir()) if runs.is_dir() else []) == before


def test_uploads_are_deleted(ask, photos, tmp_path):
    pipe = tiny_models.pipeline()
    tiny_models.adapt(pipe.unet, seed=9)
    path = pipe.save_snella_weights(tmp_path / "gone.safetensors")
    name = ask("add_adapter", handle_file(path))["id"]
    assert ask("delete_adapter", name) == "The adapter is deleted."
    assert name not in [row["id"] for row in ask("adapters")]
    other = ask("add_photos", photos, "")["draft"]
    ask("delete_photos", other)
    with pytest.raises(AppError, match="no longer there"):
        ask("photos", other)


def test_a_fault_of_our_own_is_told_without_its_cause(ask, monkeypatch, capfd):
    def fail(*_):
        raise RuntimeError("/secret/place")

    monkeypatch.setattr(endpoints.answers, "base_values", fail)
    with pytest.raises(AppError, match="a fault of the page, not yours") as error:
        ask("bases")
    assert "secret" not in str(error.value)
    assert "/secret/place" in capfd.readouterr().err


def test_a_run_is_deleted(ask, run):
    assert ask("delete_run", run) == "The run is deleted."
    assert run not in [row["id"] for row in ask("runs")]
