"""The worker that draws: exact pictures whatever came before, counted weights, refusals."""

import shutil

import numpy as np
import pytest
import torch

from snell_diffusion.app import pipelines
from snell_diffusion.app.bases import Bases, described
from snell_diffusion.app.drawing import DrawRequest, Result, Step
from snell_diffusion.app.limits import LIMITS, Limits
from snell_diffusion.app.studio import Studio
from snell_diffusion.app.workspace import Workspaces
from snell_diffusion.diffusion import install  # noqa: F401  the verbs of pipelines
from snell_diffusion.errors import SnellaError, SnellaValueError
from snell_diffusion.tuners import delta_layers
from tests import tiny_models
from tests.app.adapters import adapter_file


@pytest.fixture(scope="module")
def bases(tiny_base):
    return Bases([described("tiny", str(tiny_base)), described("embedded", "embedded")])


@pytest.fixture(scope="module")
def workspace(bases, tmp_path_factory):
    return Workspaces(tmp_path_factory.mktemp("users"), bases=bases).of(None)


@pytest.fixture(scope="module")
def adapters(workspace, tmp_path_factory):
    """Ids of two adapters and of one with a new word."""
    folder = tmp_path_factory.mktemp("files")
    files = [adapter_file(folder / f"{seed}.safetensors", seed) for seed in (1, 5)]
    files.append(adapter_file(folder / "word.safetensors", 7, word="<toy>"))
    return [workspace.library.add(path).id for path in files]


@pytest.fixture
def studio(bases):
    """Remembers no pictures, so that every test draws."""
    return Studio(bases, remembered=0)


def request(**changes):
    usual = {"base": "tiny", "prompt": "a sks cat", "steps": 2, "guidance": 3.0, "seed": 3}
    return DrawRequest.of(**{**usual, "width": 32, "height": 32, **changes})


def draw(studio, workspace, **changes):
    news = list(studio.draw(request(**changes), workspace))
    assert all(isinstance(step, Step) for step in news[:-1])
    assert isinstance(news[-1], Result)
    return news[-1]


def pixels(result):
    return [np.asarray(picture) for picture in result.pictures]


def same(one, two):
    return all(np.array_equal(a, b) for a, b in zip(pixels(one), pixels(two), strict=True))


def stock_picture(pipe, **more):
    """What diffusers itself draws for `request()`."""
    generator = torch.Generator().manual_seed(3)
    call = {"num_inference_steps": 2, "guidance_scale": 3.0, "width": 32, "height": 32, **more}
    return np.asarray(pipe("a sks cat", generator=generator, **call).images[0])


@pytest.fixture(scope="module")
def expected(adapters, workspace):
    """The picture of each adapter alone, drawn by the verbs of a fresh pipeline."""
    pictures = []
    for name in adapters[:2]:
        pipe = tiny_models.pipeline()
        pipe.load_snella_weights(workspace.library.get(name).path)
        pictures.append(stock_picture(pipe))
    return pictures


def test_the_base_s_picture_is_diffusers_own(studio, workspace):
    result = draw(studio, workspace)
    assert np.array_equal(pixels(result)[0], stock_picture(tiny_models.pipeline()))
    assert (result.base_pictures, result.kept_share) == ((), None)


def test_a_picture_does_not_depend_on_what_was_drawn_before(studio, workspace, adapters, expected):
    one, two, word = adapters
    history = [
        {"adapters": [(one, 1.0)]},
        {"adapters": [(two, 1.0)]},
        {"adapters": [(one, 0.5), (two, 2.0)], "sparsity": 0.7},
        {"adapters": [(word, 1.0)], "prompt": "a <toy>"},
        {"prompt": "a <toy>"},
        {"adapters": [(one, 1.0), (word, 1.0)], "compare_with_base": True, "sparsity": 0.2},
        {"adapters": [(two, 1.0)]},
        {"adapters": [(one, 1.0)]},
        {"prompt": "a <toy>"},
        {"adapters": [(one, 0.3)], "sparsity": 0.9},
        {"adapters": [(one, 1.0)]},
        {"adapters": [(one, 1.0), (two, 1.0)]},
        {"adapters": [(one, 1.0)]},
    ]
    results = [draw(studio, workspace, **changes) for changes in history]
    for which, places in enumerate(((0, 7, 10, 12), (1, 6))):
        for index in places:
            assert np.array_equal(pixels(results[index])[0], expected[which])
    assert same(results[4], results[8])  # the word means nothing without its adapter
    for index in (2, 3, 5):
        fresh = Studio(studio.bases, remembered=0)
        assert same(draw(fresh, workspace, **history[index]), results[index])


def test_strength_0_and_sparsity_1_draw_what_the_base_draws(studio, workspace, adapters):
    base = draw(studio, workspace)
    assert same(base, draw(studio, workspace, adapters=[(adapters[0], 0.0)]))
    result = draw(studio, workspace, adapters=[(adapters[0], 1.0)], sparsity=1.0)
    assert same(base, result)
    assert result.kept == 0


def test_base_and_adapted_pictures_share_their_seeds(studio, workspace, adapters):
    result = draw(studio, workspace, adapters=[(adapters[2], 1.0)], compare_with_base=True, count=2)
    assert result.seeds == (3, 4)
    for index, seed in enumerate(result.seeds):
        alone = draw(studio, workspace, seed=seed)
        assert np.array_equal(np.asarray(result.base_pictures[index]), pixels(alone)[0])
        adapted = draw(studio, workspace, seed=seed, adapters=[(adapters[2], 1.0)])
        assert np.array_equal(pixels(result)[index], pixels(adapted)[0])


def test_after_the_largest_seed_comes_0():
    assert request(seed=LIMITS.seed, count=3).seeds() == [LIMITS.seed, 0, 1]


@pytest.mark.parametrize("level", [None, 0.0, 0.37, 0.9])
def test_kept_weights_are_counted_exactly(studio, workspace, adapters, level):
    result = draw(
        studio, workspace, adapters=[(name, 1.0) for name in adapters[:2]], sparsity=level
    )
    kept = size = 0
    for name in adapters[:2]:
        pipe = tiny_models.pipeline()
        pipe.load_snella_weights(workspace.library.get(name).path, adapter_name="a")
        pipe.set_snella_sparsity(level)
        for _, layer in delta_layers(pipe.unet):
            update = layer.get_delta_weight("a")
            kept += int(update.count_nonzero())
            size += update.numel()
    assert (result.kept, result.size) == (kept, size)
    assert result.kept_share == kept / size


def test_a_negative_prompt_size_guidance_and_steps_count(studio, workspace):
    plain = draw(studio, workspace)
    for change in ({"negative_prompt": "dog"}, {"guidance": 1.0}, {"steps": 3}):
        assert not same(plain, draw(studio, workspace, **change))
    assert draw(studio, workspace, width=48, height=24).pictures[0].size == (48, 24)


def test_remembered_pictures_are_not_drawn_again(bases, workspace, adapters, monkeypatch):
    studio = Studio(bases)
    first = draw(studio, workspace, adapters=[(adapters[0], 1.0)], compare_with_base=True)
    monkeypatch.setattr(pipelines.Loaded, "picture", None)
    again = draw(studio, workspace, adapters=[(adapters[0], 1.0)], compare_with_base=True)
    assert same(first, again)
    again.pictures[0].paste("red", (0, 0, 32, 32))  # what is given away is a copy
    assert same(first, draw(studio, workspace, adapters=[(adapters[0], 1.0)]))


def test_a_changed_file_is_read_again(studio, workspace, tmp_path, bases):
    job_file = adapter_file(tmp_path / "a.safetensors", seed=11)
    adapter = workspace.library.add(job_file)
    first = draw(studio, workspace, adapters=[(adapter.id, 1.0)])
    adapter.path.write_bytes(adapter_file(tmp_path / "b.safetensors", seed=12).read_bytes())
    assert not same(first, draw(studio, workspace, adapters=[(adapter.id, 1.0)]))
    workspace.library.delete(adapter.id)


def test_another_base_takes_the_place_of_the_one_in_memory(studio, workspace):
    first = draw(studio, workspace)
    draw(studio, workspace, base="embedded", width=64, height=64)
    assert studio._loaded.base.id == "embedded"
    assert same(first, draw(studio, workspace))


@pytest.mark.parametrize(
    "changes, message",
    [
        ({"prompt": "  "}, "the prompt is empty"),
        ({"prompt": "x" * 301}, "the prompt has 301 characters; up to 300"),
        ({"prompt": 3}, "prompt must be a text, got 3"),
        ({"negative_prompt": "x" * 301}, "the negative prompt has 301 characters"),
        ({"seed": -1}, "the seed must be a whole number from 0 to 2147483647, got -1"),
        ({"seed": 2**40}, "the seed must be a whole number"),
        ({"seed": 10**5000}, "the seed must be a whole number"),
        ({"seed": True}, "the seed must be a whole number .*, got True"),
        ({"seed": 1.5}, "the seed must be a whole number"),
        ({"steps": 0}, "the number of steps must be a whole number from 1 to 100"),
        ({"steps": 101}, "the number of steps must be"),
        ({"steps": "20"}, "the number of steps must be"),
        ({"steps": None}, "the number of steps must be"),
        ({"guidance": float("nan")}, "the guidance must be a number from 0 to 30, got nan"),
        ({"guidance": float("inf")}, "the guidance must be a number"),
        ({"width": 4096}, "the width must be a whole number from 8 to 2048"),
        ({"count": 9}, "the number of pictures must be a whole number from 1 to 8"),
        ({"sparsity": 1.01}, "the sparsity must be a number from 0 to 1"),
        ({"sparsity": float("nan")}, "the sparsity must be a number"),
        ({"adapters": "x"}, "adapters must be a list of pairs"),
        ({"adapters": [("x", float("nan"))]}, "adapters must be a list of pairs"),
        ({"adapters": [("x", 2.5)]}, "the strength of an adapter must be 0 to 2, got 2.5"),
        ({"adapters": [("x", 1.0), ("x", 1.0)]}, "an adapter is chosen twice"),
        ({"adapters": [(str(i), 1.0) for i in range(5)]}, "5 adapters are chosen; up to 4"),
        ({"compare_with_base": "yes"}, "compare_with_base must be true or false"),
        ({"base": 3}, "base must be the id of one of the base models"),
        ({"path": "/etc/passwd"}, "a request to draw has no field 'path'"),
    ],
)
def test_a_wrong_value_is_refused_with_a_sentence(changes, message):
    with pytest.raises(SnellaValueError, match=message):
        request(**changes)


@pytest.mark.parametrize(
    "changes, message",
    [
        ({"base": "other"}, "there is no base model 'other': choose one of embedded, tiny"),
        ({"width": 8}, "the width must be 16 to 64 pixels in steps of 8 for tiny, got 8"),
        ({"height": 33}, "the height must be 16 to 64 pixels in steps of 8"),
        ({"adapters": [("../x", 1.0)]}, "choose an adapter from the list"),
        ({"adapters": [("0" * 32, 1.0)]}, "this adapter is no longer there"),
    ],
)
def test_what_is_not_there_is_refused_before_anything_is_drawn(studio, workspace, changes, message):
    with pytest.raises(SnellaValueError, match=message):
        studio.draw(request(**changes), workspace)
    assert studio._worker is None


def test_an_adapter_of_another_base_is_refused_by_name(studio, workspace, adapters, tmp_path):
    with pytest.raises(
        SnellaValueError, match=r"^1 \(uploaded\) was trained on the base tiny, not"
    ):
        studio.draw(
            request(base="embedded", width=64, height=64, adapters=[(adapters[0], 1.0)]), workspace
        )
    wide = workspace.library.add(adapter_file(tmp_path / "w.safetensors", cross_attention_dim=64))
    with pytest.raises(SnellaValueError, match="a base model that this server does not have"):
        studio.draw(request(adapters=[(wide.id, 1.0)]), workspace)
    workspace.library.delete(wide.id)


def test_messages_about_a_file_name_it_as_the_list_does(studio, workspace, tmp_path):
    path = adapter_file(tmp_path / "odd.safetensors", seed=21, norm_num_groups=4)
    adapter = workspace.library.add(path)
    record = workspace.library.get(adapter.id)
    garment = pipelines.Garment.of(record)
    loaded = pipelines.Loaded(studio.bases.get("tiny"))
    with pytest.raises(SnellaError, match=r"odd \(uploaded\)") as error:
        loaded.wear([(garment, 1.0)], None, lambda: None)
    assert str(record.path) not in str(error.value)
    assert adapter.id not in str(error.value)
    workspace.library.delete(adapter.id)


def test_a_drawing_that_takes_too_long_is_ended(bases, workspace):
    studio = Studio(bases, Limits(draw_seconds=1e-9))
    with pytest.raises(SnellaValueError, match="took longer than 1e-09 seconds and was ended: ask"):
        list(studio.draw(request(), workspace))


@pytest.mark.parametrize(
    "fault",
    [
        torch.OutOfMemoryError("CUDA out of memory"),
        MemoryError(),
        RuntimeError("DefaultCPUAllocator: can't allocate memory: you tried to allocate 9 bytes"),
    ],
)
def test_too_little_memory_is_a_sentence_and_the_next_drawing_works(
    studio, workspace, monkeypatch, fault
):
    expected = draw(studio, workspace)

    def fail(*_):
        raise fault

    with monkeypatch.context() as patch:
        patch.setattr(pipelines.Loaded, "picture", fail)
        with pytest.raises(SnellaValueError, match="not enough memory for this picture: ask for a"):
            list(studio.draw(request(), workspace))
    assert studio._loaded is None
    assert same(expected, draw(studio, workspace))


def test_a_base_that_cannot_be_loaded_is_a_sentence_without_its_place(workspace, bases, tmp_path):
    folder = shutil.copytree(bases.get("tiny").location, tmp_path / "gone")
    broken = Bases([described("broken", str(folder))])
    shutil.rmtree(folder / "unet")
    with pytest.raises(SnellaValueError, match="the base broken cannot be loaded") as error:
        list(Studio(broken).draw(request(base="broken"), workspace))
    assert str(tmp_path) not in str(error.value)


def test_steps_say_how_far_a_drawing_is(studio, workspace, monkeypatch):
    monkeypatch.setattr("snell_diffusion.app.studio.HEARTBEAT", 0.005)
    news = list(studio.draw(request(steps=60), workspace))[:-1]
    assert {step.phase for step in news} <= {"waiting", "loading", "drawing"}
    done = [step.done for step in news]
    assert done == sorted(done)
    assert 0 < done[-1] <= 60
    assert {step.total for step in news} == {60}
    assert all(step.left_s >= 0 for step in news if step.left_s is not None)
    assert news[-1].left_s is not None
