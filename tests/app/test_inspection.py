"""Facts, sizes and overlaps of adapters, on updates that are known exactly."""

import math
from dataclasses import replace

import pytest
import torch
from safetensors.torch import load_file

from snell_diffusion.adapters import read_adapter
from snell_diffusion.adapters.export import layer_updates
from snell_diffusion.app import inspection
from snell_diffusion.app.bars import HEIGHT, WIDTH, bars, percent
from snell_diffusion.app.base_weights import folder_of, weight_norms
from snell_diffusion.app.bases import Bases, described
from snell_diffusion.app.inspection import (
    Overlap,
    facts,
    layer_facts,
    layer_overlap,
    overlap,
    size_sentence,
    sizes,
    sizes_of,
)
from snell_diffusion.app.library import Adapter
from snell_diffusion.errors import SnellaError, SnellaValueError
from tests import tiny_models


def adapter_file(folder, name, seed=1, **settings):
    """An adapter of the tiny base as a file, with levels from 0 to 0.5."""
    pipe = tiny_models.pipeline()
    tiny_models.adapt(pipe.unet, seed=seed, **settings)
    path = folder / f"{name}.safetensors"
    pipe.save_snella_weights(path, metadata={"instance_prompt": "a photo of \x1b[1m sks"})
    return path


@pytest.fixture(scope="module")
def files(tmp_path_factory):
    folder = tmp_path_factory.mktemp("adapters")
    return {
        "one": adapter_file(folder, "one"),
        "two": adapter_file(folder, "two", seed=2),
        "few": adapter_file(folder, "few", seed=3, target_modules=["to_q"]),
    }


@pytest.fixture(scope="module")
def bases(tiny_base):
    return Bases([described("tiny", str(tiny_base))])


def entry(path, base="tiny"):
    return Adapter("0" * 32, "cat (today)", path, base, False)


def test_overlap_of_a_layer_by_hand():
    a = torch.tensor([[3.0, 4.0, 0.0, 0.0]])
    b = torch.tensor([[0.0, 4.0, 0.0, 3.0]])
    row = layer_overlap("unet.x", a, b)
    assert (row.either, row.both, row.dot, row.touch) == (3, 1, 16, 16)
    assert row.cosine == row.interference == 16 / 25
    assert row.shared == 1 / 3
    opposite = layer_overlap("unet.x", a, -b)
    assert (opposite.cosine, opposite.interference) == (-16 / 25, 16 / 25)
    nothing = layer_overlap("unet.x", a, torch.zeros(1, 4))
    assert (nothing.cosine, nothing.interference, nothing.shared) == (0, 0, 0)
    with pytest.raises(SnellaValueError, match="two base models"):
        layer_overlap("unet.x", a, torch.zeros(2, 4))


def test_cosine_is_interference_times_agreement():
    generator = torch.Generator().manual_seed(0)
    a, b = (torch.randn(300, 300, generator=generator) for _ in range(2))
    row = layer_overlap("unet.x", a, a + b)
    found = Overlap((row,), (0, 0), row.norms)
    assert found.cosine == pytest.approx(1 / math.sqrt(2), abs=0.01)
    assert found.cosine == pytest.approx(found.interference * found.agreement)
    unrelated = layer_overlap("unet.x", a, b)
    assert unrelated.interference == pytest.approx(2 / math.pi, abs=0.01)


@pytest.mark.parametrize(
    "b, says",
    [
        ([[0.0, 0.0, 1.0, 1.0]], "change 0%: they hardly touch"),
        ([[1.0, 1.0, 0.0, 0.0]], "change 100%, mostly in the same direction: they do much of"),
        ([[-1.0, -1.0, 0.0, 0.0]], "mostly in opposite directions"),
        ([[1.0, -1.0, 3.0, 0.0]], "in no common direction: they do much"),
        ([[0.3, 0.0, 1.0, 0.0]], "in the same direction: they do some of their work"),
    ],
)
def test_the_reading_follows_the_figures(b, says):
    row = layer_overlap("unet.x", torch.tensor([[1.0, 1.0, 0.0, 0.0]]), torch.tensor(b))
    assert says in Overlap((row,), (0, 0), row.norms).sentence()


def test_adapters_of_different_layers_do_not_meet():
    found = Overlap((), (2, 3), (1.0, 1.0))
    assert found.sentence().startswith("They change no layer in common")
    assert found.interference == found.agreement == found.cosine == found.shared == 0


def test_overlap_of_files_is_that_of_their_updates(files):
    one, few = (read_adapter(files[name]) for name in ("one", "few"))
    deltas = [
        {f"{component}.{path}": delta.double() for component, path, delta in layer_updates(file)}
        for file in (one, few)
    ]
    found = overlap(one, few)
    common = deltas[0].keys() & deltas[1].keys()
    assert {row.name for row in found.layers} == common == deltas[1].keys()
    assert found.only == (len(deltas[0]) - len(common), 0)
    dot = sum(float((deltas[0][name] * deltas[1][name]).sum()) for name in common)
    norms = [sum(float(d.square().sum()) for d in side.values()) for side in deltas]
    assert found.norms == pytest.approx(norms)
    assert found.cosine == pytest.approx(dot / math.sqrt(norms[0] * norms[1]))
    back = overlap(few, one)
    assert (back.interference, back.only) == (pytest.approx(found.interference), found.only[::-1])
    itself = overlap(one, one)
    assert (itself.interference, itself.agreement) == (pytest.approx(1), pytest.approx(1))
    assert itself.shared == 1


def test_sizes_are_norms_of_updates_and_weights(files, bases, tiny_base):
    file = read_adapter(files["two"])
    weights = load_file(tiny_base / "unet" / "diffusion_pytorch_model.safetensors")
    expected = {
        f"{component}.{path}": (float(delta.norm()), float(weights[f"{path}.weight"].norm()))
        for component, path, delta in layer_updates(file)
    }
    found = sizes(file, bases.get("tiny"))
    assert [row.name for row in found] == [row.name for row in layer_facts(file.header)]
    for row in found:
        assert (row.update, row.weight) == pytest.approx(expected[row.name], rel=1e-5)
        assert row.ratio == row.update / row.weight
    update = math.hypot(*(pair[0] for pair in expected.values()))
    weight = math.hypot(*(pair[1] for pair in expected.values()))
    assert f"update is {update / weight:.1%} of the weights" in size_sentence(found)


def test_without_the_base_only_the_update_is_known(files):
    found = sizes(read_adapter(files["few"]), None)
    assert all(row.weight is row.ratio is None for row in found)
    assert "not on this machine" in size_sentence(found)


def test_a_base_that_was_never_fetched_has_no_norms(bases):
    far = replace(bases.get("tiny"), source="nobody/nothing-at-all")
    assert folder_of(far.location) is None
    assert weight_norms(far, [("unet", "x")]) == {}


def test_a_changed_file_is_measured_again(tmp_path, bases, files):
    path = tmp_path / "a.safetensors"
    path.write_bytes(files["one"].read_bytes())
    before = sizes_of(entry(path), bases)
    assert sizes_of(entry(path), bases) is before
    path.write_bytes(files["two"].read_bytes())
    assert sizes_of(entry(path), bases) != before


def test_facts_are_of_the_file_and_print_as_text(files, bases):
    file = read_adapter(files["one"])
    found = dict(facts(entry(files["one"]), file, bases))
    assert found["Name"] == "cat (today)"
    assert found["Digest check"].startswith("passed")
    assert file.digest in found["Digest check"]
    assert "fits tiny" in found["Base"]
    assert found["Method (unet)"] == "snella"
    assert found["Levels (unet)"].startswith("0% to 4")
    assert found["Note: instance_prompt"] == "a photo of \\x1b[1m sks"
    layers = file.header.components["unet"].layers
    assert found["Layers (unet)"] == f"{len(layers)}, rank 4"
    assert "none of the base models" in dict(facts(entry(files["one"], None), file, bases))["Base"]
    assert str(files["one"].parent) not in " ".join(found.values())


def test_a_damaged_file_is_named_by_its_label(tmp_path, files):
    content = bytearray(files["one"].read_bytes())
    content[-1] ^= 1
    path = tmp_path / "private-name.safetensors"
    path.write_bytes(content)
    with pytest.raises(SnellaError, match=r"^cat \(today\)") as error:
        inspection.read(entry(path))
    assert "private-name" not in str(error.value)


def test_a_measurement_that_takes_too_long_is_ended(files, monkeypatch):
    clock = iter(range(0, 10**6, 200))
    monkeypatch.setattr(inspection.time, "monotonic", lambda: next(clock))
    with pytest.raises(SnellaError, match="too large to be measured in 5 minutes"):
        sizes(read_adapter(files["one"]), None)


def test_bars_stand_on_the_floor_and_the_highest_is_at_the_top():
    picture = bars(["a", "a", "b", "b"], [0.0, 0.5, 1.0, None], top=1.0)
    assert picture.size == (WIDTH, HEIGHT)
    yellow = (253, 231, 37)
    columns = {x for x in range(WIDTH) for y in (80, 100) if picture.getpixel((x, y)) == yellow}
    assert columns
    assert max(columns) - min(columns) < WIDTH / 4
    assert bars([], []).size == (WIDTH, HEIGHT)
    assert bars(["a"], [None]).size == (WIDTH, HEIGHT)
    assert [percent(value) for value in (0, 0.004, 0.031, 0.5)] == ["0%", "0.4%", "3.1%", "50%"]
