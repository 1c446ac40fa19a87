"""The Generate tab over HTTP: what its controls do, and what the files it gives away hold."""

import json

import numpy as np
import pytest
import torch
from gradio_client import handle_file
from gradio_client.exceptions import AppError
from PIL import Image
from safetensors.torch import save_file

from snell_diffusion.app.pictures import SETTINGS_KEY, enlarged
from tests.app.adapters import PROMPT, adapter_file, finished_run
from tests.app.visitor import Visitor

SMALL = {"generate_steps": 2}


@pytest.fixture(scope="module")
def adapters(page_server, tmp_path_factory):
    """Two adapters of the visitor's workspace."""
    folder = tmp_path_factory.mktemp("files")
    library = page_server.app.workspaces.of(None).library
    files = [adapter_file(folder / f"{name}.safetensors", seed) for seed, name in enumerate("ab")]
    return [library.add(path) for path in files]


@pytest.fixture
def visitor(page_server, adapters):
    visitor = Visitor(page_server.address)
    visitor.show("generate")
    visitor.set(**SMALL)
    yield visitor
    visitor.close()


def wear(visitor, adapter, slot=1):
    name = f"generate-adapter-{slot}"
    return visitor.press(name, "change", **{name: adapter.id})


def files(updates):
    """The pictures of the gallery, as a visitor downloads them."""
    return [item["image"] for item in updates["generate-gallery"]["value"]]


def opened(path):
    with Image.open(path) as picture:
        picture.load()
        return picture


def pixels(path):
    return np.asarray(opened(path).convert("RGB"))


def test_a_lora_run_is_named_beside_the_list(visitor, page_server, tmp_path):
    jobs = page_server.app.workspaces.of(None).jobs
    path = tmp_path / "lora.safetensors"
    save_file({"unet.x.lora_A.weight": torch.zeros(2, 2)}, path)
    job = finished_run(jobs.root, path)
    visitor.show("generate")
    said = visitor.values[visitor.ids["generate-left-out"]]
    assert "Not in the list" in said
    assert "is not a SNELLA adapter but a LoRA" in said
    jobs.delete(job)


def test_a_first_visit_draws_with_the_base_alone(visitor):
    updates = visitor.press("generate-draw")
    assert [opened(path).size for path in files(updates)] == [(32, 32)]
    assert updates["generate-slider"]["visible"] is False
    assert updates["generate-progress"].startswith('<p role="status">Done in')


def test_lists_show_adapters_and_choosing_one_suggests_its_prompt(visitor, adapters):
    visitor.show("generate")
    updates = wear(visitor, adapters[0])
    assert updates["generate-prompt"] == PROMPT
    visitor.set(generate_prompt="my own words")
    assert "generate-prompt" not in wear(visitor, adapters[1])


def test_the_slider_compares_base_and_adapter_at_one_seed(visitor, adapters):
    base = pixels(files(visitor.press("generate-draw", generate_prompt=PROMPT))[0])
    wear(visitor, adapters[0])
    updates = visitor.press("generate-draw")
    left, right = (opened(path) for path in updates["generate-slider"]["value"])
    assert left.size == right.size == (384, 384)
    assert np.array_equal(left, enlarged(Image.fromarray(base)))
    assert np.array_equal(right, enlarged(opened(files(updates)[0])))
    assert not np.array_equal(left, right)
    assert "Kept weights as trained: " in updates["generate-kept"]


def test_two_adapters_work_together(visitor, adapters):
    found = []
    for first, second in ((1, 0), (0, 1), (1, 1)):
        for slot, adapter in enumerate(adapters, 1):
            wear(visitor, adapter, slot)
        strengths = {"generate_strength_1": first, "generate_strength_2": second}
        found.append(pixels(files(visitor.press("generate-draw", **strengths))[0]))
    assert not np.array_equal(found[0], found[1])
    assert not np.array_equal(found[0], found[2])
    assert not np.array_equal(found[1], found[2])


def test_letting_go_of_the_sparsity_slider_redraws_with_the_counted_weights(visitor, adapters):
    wear(visitor, adapters[0])
    drawn = visitor.press("generate-draw")
    mode = {"generate_sparsity_mode": "Set here"}
    found = {}
    for level in (0.0, 0.9, 1.0):
        found[level] = visitor.press(
            "generate-sparsity", "release", generate_sparsity=level, **mode
        )
        trained = opened(found[level]["generate-as-trained"])
        assert np.array_equal(trained, enlarged(opened(files(drawn)[0])))
    texts = [found[level]["generate-kept"] for level in (0.0, 0.9, 1.0)]
    assert "(99.9%)" in texts[0]  # each layer's smallest entry is its threshold
    assert "at sparsity 0.90" in texts[1]
    assert "(10." in texts[1]
    assert "(0.0%)" in texts[2]
    sparse = [pixels(found[level]["generate-sparse"]) for level in found]
    assert not np.array_equal(sparse[0], sparse[1])
    base = opened(drawn["generate-slider"]["value"][0])
    assert np.array_equal(sparse[2], np.asarray(base))


def test_a_sparsity_without_an_adapter_says_what_to_do(visitor):
    updates = visitor.press("generate-sparsity", "release", generate_sparsity_mode="Set here")
    assert "Choose an adapter first" in updates["generate-kept"]


def test_a_locked_seed_stays_an_unlocked_one_changes_and_shuffle_gives_another(visitor):
    visitor.press("generate-draw", generate_seed=7)
    assert visitor.value("generate-seed") == 7
    visitor.press("generate-draw", generate_lock=False)
    first = visitor.value("generate-seed")
    assert first != 7
    visitor.press("generate-shuffle")
    assert visitor.value("generate-seed") not in (7, first)


def test_several_pictures_have_following_seeds_and_their_own_files(visitor):
    updates = visitor.press("generate-draw", generate_count=3, generate_seed=5)
    captions = [item["caption"] for item in updates["generate-gallery"]["value"]]
    assert captions == ["Seed 5", "Seed 6", "Seed 7"]
    single = visitor.press("generate-draw", generate_count=1, generate_seed=6)
    assert np.array_equal(pixels(files(updates)[1]), pixels(files(single)[0]))


def test_settings_are_in_the_file_only_if_ticked(visitor, adapters):
    wear(visitor, adapters[0])
    plain = files(visitor.press("generate-draw", generate_seed=9))[0]
    assert opened(plain).info == {}
    ticked = {"generate_settings_in_png": True, "generate_count": 2}
    second = files(visitor.press("generate-draw", generate_strength_1=0.5, **ticked))[1]
    settings = json.loads(opened(second).info[SETTINGS_KEY])
    assert settings == {
        "base": "tiny",
        "prompt": PROMPT,
        "negative_prompt": "",
        "seed": 10,
        "steps": 2,
        "guidance": visitor.value("generate-guidance"),
        "width": 32,
        "height": 32,
        "sparsity": None,
        "adapters": [{"name": "a (uploaded)", "strength": 0.5}],
    }
    unticked = files(visitor.press("generate-draw", generate_settings_in_png=False))[0]
    assert opened(unticked).info == {}


@pytest.mark.parametrize(
    "changes, message",
    [
        ({"generate_prompt": " "}, "the prompt is empty"),
        ({"generate_prompt": "x" * 301}, "characters"),
        ({"generate_seed": 2**40}, "seed|maximum"),
        ({"generate_seed": None}, "the seed must be a whole number"),
        ({"generate_steps": 10**6}, "steps|maximum"),
        ({"generate_width": 20}, "the width must be"),
        ({"generate_count": 99}, "pictures|maximum"),
        ({"generate_adapter_1": "0" * 32}, "choices|no longer there"),
        ({"generate_adapter_1": "../../etc/passwd"}, "choices|choose"),
        ({"generate_base": "/etc"}, "choices|no base model"),
    ],
)
def test_a_wrong_value_is_answered_with_a_sentence(visitor, changes, message):
    with pytest.raises(AppError, match=message):
        visitor.press("generate-draw", **changes)


def test_an_uploaded_adapter_is_checked_stored_and_selected(visitor, tmp_path, page_server):
    good = adapter_file(tmp_path / "My own.safetensors", seed=33)
    added = visitor.client.predict(handle_file(good), api_name="/add_adapter")
    assert (added["label"], added["base"]) == ("My own (uploaded)", "tiny")
    library = page_server.app.workspaces.of(None).library
    assert library.get(added["id"]).path.read_bytes() == good.read_bytes()
    library.delete(added["id"])


def test_a_bad_upload_is_refused_with_what_to_do(visitor, tmp_path, page_server):
    library = page_server.app.workspaces.of(None).library
    before = library.all()
    bad = tmp_path / "bad.safetensors"
    bad.write_bytes(b"no adapter" * 100)
    with pytest.raises(AppError, match=r"^bad is not a whole \.safetensors file: choose") as error:
        visitor.client.predict(handle_file(bad), api_name="/add_adapter")
    assert "/" not in str(error.value)
    assert library.all() == before


def test_only_the_upload_is_a_public_event_of_the_tab(visitor):
    ids = {number for name, number in visitor.ids.items() if name.startswith("generate-")}
    public = [
        known["api_name"]
        for known in visitor.dependencies
        if known["api_visibility"] == "public" and ids & {pair[0] for pair in known["targets"]}
    ]
    assert public == ["add_adapter"]
