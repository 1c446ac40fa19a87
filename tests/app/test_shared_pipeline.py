"""Row G3: many at once on the one pipeline draw bit for bit what each would draw alone."""

import random
import threading

import numpy as np
import pytest
from PIL import Image

from snell_diffusion.app.drawing import DrawRequest, Result
from snell_diffusion.app.studio import Studio
from tests.app.adapters import adapter_file

THREADS, EACH, LOADS = 6, 3, 20


@pytest.fixture(scope="module")
def adapters(tiny_app, tmp_path_factory):
    folder = tmp_path_factory.mktemp("files")
    library = tiny_app.workspaces.of(None).library
    files = [adapter_file(folder / f"{seed}.safetensors", seed) for seed in range(2)]
    files.append(adapter_file(folder / "word.safetensors", 2, word="<toy>"))
    return [library.add(path).id for path in files]


def request(seed, worn=(), sparsity=None):
    return DrawRequest.of(
        base="tiny",
        prompt="a <toy>",
        seed=seed,
        steps=2,
        guidance=3.0,
        width=32,
        height=32,
        adapters=worn,
        sparsity=sparsity,
    )


def pixels(studio, workspace, wanted):
    result = list(studio.draw(wanted, workspace))[-1]
    assert isinstance(result, Result)
    return np.asarray(result.pictures[0])


def requests(adapters):
    """What each thread draws: bases, single adapters, two at once, levels, in its own order."""
    worn = [(), [(adapters[0], 1.0)], [(adapters[1], 0.6)], [(adapters[2], 1.0)]]
    worn.append([(adapters[0], 1.0), (adapters[2], 0.5)])
    draw = random.Random(0)
    return [
        [request(seed, draw.choice(worn), draw.choice([None, 0.3, 0.9])) for seed in range(EACH)]
        for _ in range(THREADS)
    ]


def start_training(app, folder):
    """A real training run of two steps in a process of its own; returns its id."""
    photos = folder / "photos"
    photos.mkdir()
    for index in range(2):
        Image.radial_gradient("L").rotate(30 * index).convert("RGB").save(photos / f"{index}.png")
    jobs = app.workspaces.of(None).jobs
    job = jobs.new()
    settings = {
        "pretrained_model_name_or_path": app.bases.get("tiny").source,
        "instance_data_dir": str(photos),
        "instance_prompt": "a sks cat",
        "resolution": 32,
        "rank": 4,
        "train_batch_size": 1,
        "max_train_steps": 2,
        "num_inference_steps": 2,
        "seed": 0,
    }
    jobs.start(job, settings, "cat")
    return job


@pytest.mark.row("G3")
def test_drawings_loads_and_a_training_at_once_are_bit_equal_to_one_after_another(
    tiny_app, adapters, tmp_path, row
):
    workspace = tiny_app.workspaces.of(None)
    wanted = requests(adapters)
    # One adapter on, the next off, by turns: every other request has to load or unload.
    loads = [request(50, [(adapters[n % 3], 1.0)] if n % 2 else ()) for n in range(LOADS)]
    alone = Studio(tiny_app.bases, remembered=0)
    expected = [[pixels(alone, workspace, one) for one in mine] for mine in [*wanted, loads]]

    job = start_training(tiny_app, tmp_path)
    studio = Studio(tiny_app.bases, remembered=0)
    found, errors = {}, []

    def draw(index, mine):
        try:
            found[index] = [pixels(studio, workspace, one) for one in mine]
        except BaseException as error:
            errors.append(error)

    threads = [
        threading.Thread(target=draw, args=(index, mine))
        for index, mine in enumerate([*wanted, loads])
    ]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(120)
    assert errors == []
    equal = [
        np.array_equal(one, other)
        for index, mine in enumerate(expected)
        for one, other in zip(mine, found[index], strict=True)
    ]
    assert len(equal) == THREADS * EACH + LOADS
    assert all(equal)
    while workspace.jobs.status(job).running:
        threading.Event().wait(0.2)
    assert workspace.jobs.status(job).state == "finished", workspace.jobs.status(job)
    assert workspace.library.get(job).base_id == "tiny"
    row.cases(len(equal) + 1)
    row.figure(f"{len(equal) - sum(equal)} of {len(equal)} pictures differ, {len(errors)} errors")
