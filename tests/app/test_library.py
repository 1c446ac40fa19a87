"""Adapters of a workspace: uploads are checked before they are stored, runs list themselves."""

import pickle

import pytest
import torch
from safetensors.torch import save_file

from snell_diffusion.app.bases import Bases, described
from snell_diffusion.app.jobs import Jobs
from snell_diffusion.app.library import Library
from snell_diffusion.app.limits import Limits
from snell_diffusion.errors import SnellaError, SnellaValueError
from tests.app.adapters import PROMPT, adapter_file, finished_run

WEIGHTS = torch.zeros(4, 4)


@pytest.fixture
def library(tiny_base, tmp_path):
    bases = Bases([described("tiny", str(tiny_base))])
    return Library(tmp_path / "adapters", Jobs(tmp_path / "runs"), bases)


@pytest.fixture
def good(tmp_path):
    return adapter_file(tmp_path / "uploads" / "My cat.safetensors")


def stored(library):
    return sorted(path.name for path in library.root.glob("*"))


def test_an_upload_is_stored_under_an_id_with_a_readable_label(library, good):
    adapter = library.add(good)
    assert library.all() == [adapter]
    assert library.get(adapter.id) == adapter
    assert (adapter.label, adapter.base_id, adapter.prompt) == ("My cat (uploaded)", "tiny", PROMPT)
    assert adapter.path.read_bytes() == good.read_bytes()
    assert stored(library) == [f"{adapter.id}.json", f"{adapter.id}.safetensors"]


def test_the_same_file_twice_is_one_adapter(library, good):
    assert library.add(good).id == library.add(good, "another name").id
    assert len(library.all()) == 1


@pytest.mark.parametrize(
    "name, label",
    [
        ("../../etc/passwd.safetensors", "passwd"),
        ("C:\\adapters\\cat.safetensors", "cat"),
        ("a\nb\x1b[31m", "a\\nb\\x1b[31m"),
        ("x" * 500, "x" * 60),
        (".safetensors", "adapter"),
    ],
)
def test_a_name_becomes_a_short_printable_label(library, good, name, label):
    assert library.add(good, name).label == f"{label} (uploaded)"


def write_kohya(path):
    save_file({"lora_unet_x.lora_down.weight": WEIGHTS}, path)


def write_pickle(path):
    path.write_bytes(pickle.dumps({"a": 1}))


def write_damaged(path):
    adapter_file(path)
    content = bytearray(path.read_bytes())
    content[-5] ^= 1
    path.write_bytes(content)


@pytest.mark.parametrize(
    "write, message",
    [
        (lambda path: path.write_text("<html>"), "is not a whole .safetensors file: choose the"),
        (write_pickle, "is not a whole .safetensors file: choose the"),
        (lambda path: path.write_bytes(b""), "has 0.0 MB"),
        (write_kohya, "is not a SNELLA adapter but a LoRA with kohya's names .*: choose the"),
        (lambda path: save_file({"a": WEIGHTS}, path), "but a safetensors file of unknown purpose"),
        (write_damaged, "were changed after they were written"),
    ],
)
def test_what_is_no_adapter_is_refused_with_a_sentence_and_leaves_nothing(
    library, tmp_path, write, message
):
    path = tmp_path / "mine.safetensors"
    write(path)
    with pytest.raises(SnellaError, match=f"^mine.*{message}") as error:
        library.add(path)
    assert str(tmp_path) not in str(error.value)
    assert stored(library) == []


def test_size_number_and_room_are_bounded(library, good, tmp_path):
    parts = tmp_path / "small", library._jobs, library._bases
    with pytest.raises(SnellaValueError, match=r"has 0\.1 MB; an adapter file of up to 0 MB"):
        Library(*parts, Limits(adapter_bytes=100)).add(good)
    full = Library(*parts, Limits(uploaded_adapters=1))
    full.add(good)
    with pytest.raises(SnellaValueError, match="1 adapters are uploaded already: delete one"):
        full.add(adapter_file(tmp_path / "b.safetensors", seed=2))

    def refuse(size):
        raise SnellaValueError(f"no room for {size}")

    poor = Library(tmp_path / "poor", library._jobs, library._bases, require_room=refuse)
    with pytest.raises(SnellaValueError, match=f"no room for {good.stat().st_size}"):
        poor.add(good)
    assert stored(poor) == []


def test_a_half_stored_file_is_in_no_list(library, good):
    adapter = library.add(good)
    (library.root / f"{adapter.id}.json").rename(library.root / "elsewhere")
    assert library.all() == []
    with pytest.raises(SnellaValueError, match="no longer there"):
        library.get(adapter.id)


def test_runs_with_an_adapter_list_themselves(library, good, tmp_path):
    job = finished_run(tmp_path / "runs", good)
    (adapter,) = library.all()
    assert (adapter.id, adapter.base_id, adapter.uploaded) == (job, "tiny", False)
    assert adapter.label.startswith("cat, 3 photos (")
    assert library.get(job) == adapter
    with pytest.raises(SnellaValueError, match="belongs to a run"):
        library.delete(job)


def test_a_run_s_lora_is_left_out_with_its_reason(library, tmp_path):
    path = tmp_path / "lora.safetensors"
    save_file({"unet.x.lora_A.weight": WEIGHTS}, path)
    job = finished_run(tmp_path / "runs", path)
    assert library.all() == []
    ((label, reason),) = library.left_out()
    assert label.startswith("cat, 3 photos (")
    assert "is not a SNELLA adapter but a LoRA with the names of diffusers" in reason
    with pytest.raises(SnellaValueError, match="not a SNELLA adapter but a LoRA"):
        library.get(job)


def test_an_adapter_of_an_unknown_base_is_kept_and_says_so(library, tmp_path):
    path = adapter_file(tmp_path / "wide.safetensors", cross_attention_dim=64)
    assert library.add(path).base_id is None


def test_a_deleted_upload_is_gone_with_its_files(library, good):
    library.delete(library.add(good).id)
    assert stored(library) == []
    assert library.all() == []


@pytest.mark.parametrize("name", ["", "../x", "0" * 32, "0" * 31, "*", None, 7, ["0" * 32]])
def test_only_ids_are_looked_up(library, name):
    with pytest.raises(SnellaValueError, match="choose"):
        library.get(name)
