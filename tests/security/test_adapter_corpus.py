"""Every hostile file is refused by an error that tells a user what to do; its text is on record.

`pytest tests/security/test_adapter_corpus.py --update-snapshots` writes the texts anew.
"""

import json
import re
from collections import Counter
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
from diffusers import StableDiffusionPipeline

from snell_diffusion import read_adapter
from tests.security.corpus import CASES, COUNTS, good_bytes
from tests.security.forked import Outcome, run_forked
from tests.tiny_models import pipeline

SNAPSHOT = Path(__file__).parent / "snapshots" / "adapter_corpus.json"
SECONDS = 20
# What a next step says, in one of these words.
STEPS = re.compile(
    r"\b(download|choose|load|save|get it again|upgrade|install|use another|check|raise)\b"
)
# What the file as a whole is about, where there is no field or tensor yet.
WHOLE_FILE = re.compile(r"\b(header|safetensors|tensors)\b")


@pytest.fixture(scope="module")
def pipe() -> StableDiffusionPipeline:
    good_bytes()
    return pipeline()


@pytest.fixture(scope="module")
def texts() -> dict[str, dict[str, str]]:
    return json.loads(SNAPSHOT.read_text("utf-8")) if SNAPSHOT.is_file() else {}


@pytest.fixture(scope="module")
def record(request: pytest.FixtureRequest, texts: dict[str, Any]) -> Any:
    """Collects texts; writes them at the end of the module if asked to."""
    said: dict[str, dict[str, str]] = {}
    yield said
    if request.config.getoption("--update-snapshots", False):
        SNAPSHOT.parent.mkdir(exist_ok=True)
        kept = {name: text for name, text in {**texts, **said}.items() if name in CASES}
        SNAPSHOT.write_text(json.dumps(kept, indent=1, sort_keys=True) + "\n", "utf-8")


@pytest.fixture
def refuse(pipe: StableDiffusionPipeline, tmp_path: Path) -> Callable[[str], Outcome]:
    def attempt(name: str) -> Outcome:
        path = tmp_path / "FILE.safetensors"
        path.write_bytes(CASES[name].build())
        outcome = run_forked(lambda: str(pipe.load_snella_weights(path)), SECONDS)
        text = outcome.text.replace(str(tmp_path) + "/", "")
        # Digests, hashes and measured sizes may differ between machines and library versions.
        text = re.sub(r"\b[0-9a-f]{12,16}\b", "HASH", text)
        return replace(outcome, text=re.sub(r"got \S+ times", "got N times", text))

    return attempt


@pytest.mark.row("A1")
@pytest.mark.parametrize("name", CASES)
def test_a_hostile_file_is_refused_with_its_reason(
    name: str,
    refuse: Callable[[str], Outcome],
    texts: dict[str, dict[str, str]],
    record: dict[str, dict[str, str]],
    request: pytest.FixtureRequest,
) -> None:
    outcome = refuse(name)
    assert "SnellaError" in outcome.kinds, outcome
    text = outcome.text
    record[name] = {"error": outcome.error, "text": text}
    assert text.startswith("FILE.safetensors: ")
    assert re.search(r"'[^']+'|layer \S+", text) or WHOLE_FILE.search(text), text
    assert STEPS.search(text), text
    assert text.isprintable()
    assert len(text) < 1200
    if not request.config.getoption("--update-snapshots", False):
        assert texts.get(name) == record[name], "run with --update-snapshots if this is meant"


def test_the_corpus_has_what_is_promised() -> None:
    groups = Counter(case.group for case in CASES.values())
    assert {name: groups[name] for name in COUNTS} == COUNTS
    assert sum(COUNTS.values()) == 72


def test_every_text_on_record_is_of_a_case(texts: dict[str, Any]) -> None:
    assert set(texts) <= set(CASES)


def test_the_file_all_cases_start_from_is_good(
    pipe: StableDiffusionPipeline, tmp_path: Path
) -> None:
    path = tmp_path / "good.safetensors"
    path.write_bytes(good_bytes())
    assert len(read_adapter(path).tensors) > 60
    outcome = run_forked(lambda: pipe.load_snella_weights(path).layers, SECONDS)
    assert outcome.value == {"unet": 8, "text_encoder": 2}


def test_no_text_on_record_tells_of_a_machine() -> None:
    texts = json.loads(SNAPSHOT.read_text("utf-8"))
    told = " ".join(entry["text"] for entry in texts.values())
    assert "/" not in told.replace("https://", "")
