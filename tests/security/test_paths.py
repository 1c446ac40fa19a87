"""A5: names that lead out of the folder or are no plain file are refused, and nothing is opened."""

import ast
import json
import os
import sys
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import huggingface_hub
import pytest

from snell_diffusion.adapters import WEIGHTS_NAME, read_adapter
from snell_diffusion.diffusion.sources import cache_label, locate
from snell_diffusion.errors import SnellaError

COMMIT = "0123456789abcdef0123456789abcdef01234567"
PACKAGE = Path(__file__).resolve().parents[2] / "snell_diffusion"


@dataclass(frozen=True)
class Case:
    """A request, made below a folder `mine` that lies beside `secret.safetensors`.

    Attributes:
        make: Puts the trap in place.
        ask: Arguments of `locate`; `{mine}` stands for the folder.
        says: Part of the message.
    """

    make: Callable[[Path], object]
    ask: dict[str, str]
    says: str
    source: str = field(default="{mine}")


def nothing(mine: Path) -> None:
    """The trap is in the name alone."""


def link(name: str, target: str) -> Callable[[Path], None]:
    return lambda mine: (mine / name).symlink_to(target)


CASES = {
    "traversal": Case(
        nothing, {"weight_name": "../secret.safetensors"}, "expected a plain file name"
    ),
    "absolute": Case(
        nothing, {"weight_name": "/tmp/secret.safetensors"}, "expected a plain file name"
    ),
    "link to a file outside": Case(
        link("a.safetensors", "../secret.safetensors"),
        {"weight_name": "a.safetensors"},
        "a link that leads out of",
    ),
    "link to a folder outside": Case(
        link("sub", ".."),
        {"weight_name": "secret.safetensors", "subfolder": "sub"},
        "a link that leads out of",
    ),
    "named pipe": Case(
        lambda mine: os.mkfifo(mine / WEIGHTS_NAME), {}, "expected a regular file, found"
    ),
    "device": Case(
        link("zero.safetensors", "/dev/zero"),
        {},
        "expected a regular file, found",
        "{mine}/zero.safetensors",
    ),
    "directory": Case(
        lambda mine: (mine / WEIGHTS_NAME).mkdir(), {}, "expected a regular file, found"
    ),
    "subfolder that leads up": Case(
        nothing,
        {"weight_name": "secret.safetensors", "subfolder": "sub/../.."},
        "expected a folder below the source",
    ),
    "hub name that leads up": Case(nothing, {}, "not a hub id", "someone/..secret"),
    "name that differs in case": Case(
        lambda mine: (mine / WEIGHTS_NAME.upper()).write_bytes(b"twin"), {}, "no such file"
    ),
    "revision that leads up": Case(
        nothing, {"revision": "../../../mine"}, "expected a branch, a tag or a commit", "a/b"
    ),
    "file of another kind": Case(
        nothing, {}, "expected a file ending in .safetensors", "/etc/passwd"
    ),
}


@pytest.fixture
def mine(tmp_path: Path) -> Path:
    folder = tmp_path / "mine"
    folder.mkdir()
    (tmp_path / "secret.safetensors").write_bytes(b"secret")
    return folder


def load(case: Case, mine: Path) -> None:
    source = case.source.format(mine=mine)
    hub = {"cache_dir": str(mine / "hub"), "local_files_only": True}
    read_adapter(locate(source, **{**hub, **case.ask}))


def watched(call: Callable[[], None]) -> dict[str, Any]:
    """Run in a forked child, under a hook that sees every file opened and folder listed."""
    readable, writable = os.pipe()
    child = os.fork()
    if child == 0:
        os.close(readable)
        result: dict[str, Any] = {"seen": [], "error": None, "text": ""}
        sys.addaudithook(
            lambda event, about: (
                result["seen"].append(os.fsdecode(about[0]))
                if event in ("open", "os.listdir", "os.scandir")
                and isinstance(about[0], str | bytes)
                else None
            )
        )
        try:
            call()
        except SnellaError as error:
            result |= {"error": type(error).__name__, "text": str(error)}
        finally:
            os.write(writable, json.dumps(result).encode())
            os._exit(0)
    os.close(writable)
    with os.fdopen(readable, "rb") as stream:
        answer = json.loads(stream.read())
    os.waitpid(child, 0)
    return answer


@pytest.mark.row("A5")
@pytest.mark.parametrize("case", CASES.values(), ids=CASES)
def test_refused_and_nothing_outside_is_opened(case: Case, mine: Path) -> None:
    case.make(mine)
    result = watched(lambda: load(case, mine))
    assert result["error"] is not None
    assert case.says in result["text"]
    inside = mine.resolve()
    outside = [path for path in result["seen"] if not Path(path).resolve().is_relative_to(inside)]
    assert outside == []
    assert not Path(WEIGHTS_NAME).exists()


def test_the_watch_sees_an_open(mine: Path) -> None:
    secret = mine.parent / "secret.safetensors"
    assert str(secret) in watched(lambda: secret.read_bytes() and None)["seen"]


@pytest.mark.row("A5")
def test_a_link_that_stays_inside_is_followed(mine: Path) -> None:
    (mine / "real.safetensors").write_bytes(b"inside")
    (mine / "link.safetensors").symlink_to("real.safetensors")
    assert locate(mine, "link.safetensors").read_bytes() == b"inside"


def test_a_folder_that_looks_like_the_hubs_cache_gains_nothing(tmp_path: Path) -> None:
    """Only the layout of the real cache, and only its blobs, may be linked to."""
    (tmp_path / "secret.safetensors").write_bytes(b"secret")
    for snapshot in (
        tmp_path / "snapshots" / COMMIT,
        tmp_path / "models--a--b" / "snapshots" / "main",
        tmp_path / "models--a--b" / "snapshots" / COMMIT,
    ):
        snapshot.mkdir(parents=True)
        (snapshot / "a.safetensors").symlink_to(tmp_path / "secret.safetensors")
        with pytest.raises(SnellaError, match="a link that leads out of"):
            locate(snapshot, "a.safetensors")


@pytest.fixture
def fetched(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> list[tuple[Any, ...]]:
    """A hub that answers every request from a snapshot, and the requests made to it."""
    snapshot = tmp_path / "models--someone--a-cat" / "snapshots" / COMMIT
    (snapshot / "sub").mkdir(parents=True)
    requests: list[tuple[Any, ...]] = []

    def download(repo: str, name: str, subfolder: str | None = None, **options: Any) -> str:
        requests.append((repo, name, subfolder, options))
        path = snapshot / (subfolder or "") / name
        path.write_bytes(b"weights")
        return str(path)

    monkeypatch.setattr(huggingface_hub, "hf_hub_download", download)
    return requests


def test_one_file_is_fetched_and_its_commit_is_on_record(fetched: list[tuple[Any, ...]]) -> None:
    path = locate("someone/a-cat", "cat.safetensors", "sub", revision="v1.0", token=None)
    assert fetched == [("someone/a-cat", "cat.safetensors", "sub", {"revision": "v1.0"})]
    assert cache_label(path) == f"someone/a-cat@{COMMIT}/sub/cat.safetensors"


def calls(name: str) -> Iterator[tuple[str, ast.Call]]:
    for path in PACKAGE.rglob("*.py"):
        for node in ast.walk(ast.parse(path.read_text("utf-8"))):
            if isinstance(node, ast.Call) and isinstance(node.func, ast.Attribute | ast.Name):
                called = node.func.attr if isinstance(node.func, ast.Attribute) else node.func.id
                if called == name:
                    yield f"{path.relative_to(PACKAGE)}:{node.lineno}", node


WITHOUT_WEIGHTS = ("AutoConfig", "AutoImageProcessor", "AutoTokenizer", "PeftConfig")


def test_models_bring_no_code_and_no_pickles() -> None:
    found = [*calls("from_pretrained")]
    assert found
    for place, call in found:
        options = {word.arg: word.value for word in call.keywords}
        assert "trust_remote_code" not in options, place
        if ast.unparse(call.func).removesuffix(".from_pretrained") in WITHOUT_WEIGHTS:
            continue
        safe = options.get("use_safetensors")
        assert isinstance(safe, ast.Constant), place
        assert safe.value is True, place
    unpickled = [
        place
        for place, call in calls("load")
        if isinstance(call.func, ast.Attribute) and ast.unparse(call.func) == "torch.load"
    ]
    assert unpickled == []
