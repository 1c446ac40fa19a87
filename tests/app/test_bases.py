"""The closed list of bases: what is offered, what is refused when the server starts."""

import shutil

import pytest

from snell_diffusion.adapters import read_header
from snell_diffusion.app.bases import Bases, described, fitting
from snell_diffusion.app.limits import Limits
from snell_diffusion.diffusion import families
from snell_diffusion.errors import SnellaError, SnellaValueError
from tests.app.adapters import adapter_file


def test_the_shipped_bases_are_there_without_being_asked_for():
    bases = Bases.of()
    assert [base.id for base in bases.all()] == ["embedded", "embedded-dit"]
    assert {base.resolution for base in bases.all()} == {64}
    # what training configurations take, not a place on this machine
    assert [base.source for base in bases.all()] == ["embedded", "embedded-dit"]


def test_a_given_base_comes_first_and_is_measured_by_its_configurations(tiny_base):
    first = Bases.of([("mine", str(tiny_base))]).all()[0]
    assert (first.id, first.family, first.source) == ("mine", "sd", str(tiny_base.resolve()))
    assert (first.resolution, first.min_side, first.max_side, first.multiple) == (32, 16, 64, 8)


def test_a_table_of_positions_bounds_the_side():
    assert Bases.of().get("embedded-dit").max_side == 64
    assert Bases.of().get("embedded").max_side == 128
    assert Bases.of(limits=Limits(side=96)).get("embedded").max_side == 96


def test_a_hub_id_is_taken_by_its_index_with_the_family_s_usual_settings(tiny_base, monkeypatch):
    index = tiny_base / "model_index.json"
    monkeypatch.setattr(families, "_download_index", lambda source, revision: index)
    base = Bases.of([("sd", "someone/some-model")]).get("sd")
    assert (base.location, base.resolution, base.steps, base.guidance) == (
        *("someone/some-model", 512),
        *(30, 7.5),
    )


@pytest.mark.parametrize(
    "name, source, message",
    [
        ("", "TINY", "has up to 40 letters"),
        ("../x", "TINY", "has up to 40 letters"),
        ("x" * 41, "TINY", "has up to 40 letters"),
        ("embedded", "TINY", "is given twice or is a shipped model's"),
        ("mine", "/no/such/folder", "neither a folder here nor a hub id"),
        ("mine", "https://example.org/model", "neither a folder here nor a hub id"),
        ("mine", "a/b/c", "neither a folder here nor a hub id"),
        ("mine", "EMPTY", "has no model_index.json"),
        ("mine", "someone/unreachable", "neither a folder here nor a model on the hub"),
    ],
)
def test_a_wrong_base_stops_the_start_with_a_sentence(tiny_base, tmp_path, name, source, message):
    source = {"TINY": str(tiny_base), "EMPTY": str(tmp_path)}.get(source, source)
    with pytest.raises(SnellaError, match=message):
        Bases.of([(name, source)])


def test_a_pipeline_of_no_known_family_is_refused(tiny_base, tmp_path):
    shutil.copytree(tiny_base, tmp_path / "odd")
    index = tmp_path / "odd" / "model_index.json"
    index.write_text(index.read_text().replace("StableDiffusionPipeline", "OddPipeline"))
    with pytest.raises(SnellaError, match="is a OddPipeline; this trainer knows"):
        Bases.of([("odd", str(tmp_path / "odd"))])


@pytest.mark.parametrize("name", ["", "../tiny", "tiny\n", None, 3, ["embedded"]])
def test_only_listed_ids_are_found(name):
    with pytest.raises(SnellaValueError, match="there is no base model"):
        Bases.of().get(name)


def test_a_base_is_recognised_by_what_an_adapter_file_says_of_it(tiny_base, tmp_path):
    bases = Bases([*Bases.of().all(), described("tiny", str(tiny_base))])
    header, _ = read_header(adapter_file(tmp_path / "a.safetensors"))
    part = header.components["unet"].base
    parts = {"unet": (part.model, part.config_hash)}
    assert [base.id for base in fitting(bases, parts, None)] == ["tiny"]
    assert fitting(bases, {"unet": (part.model, "0" * 64)}, None) == []


@pytest.mark.parametrize("component", ["scheduler", "tokenizer", "_class_name", "nothing"])
def test_what_is_no_model_has_no_identity(component):
    assert Bases.of().get("embedded").identity(component) is None


def test_among_bases_that_fit_the_one_of_the_file_comes_first(tiny_base, tmp_path):
    twin = shutil.copytree(tiny_base, tmp_path / "twin")
    bases = Bases([described("one", str(tiny_base)), described("two", str(twin))])
    parts = {"unet": bases.get("one").identity("unet")}
    assert [base.id for base in fitting(bases, parts, str(twin))] == ["two", "one"]
