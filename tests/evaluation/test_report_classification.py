"""The section on classification: from a folder and from kept results alike, and who wins."""

import json
import re
from dataclasses import asdict
from pathlib import Path
from typing import Any

import pytest
from pydantic import TypeAdapter

from snell_diffusion.errors import SnellaFileError
from snell_diffusion.evaluation.__main__ import main
from snell_diffusion.evaluation.classification_plan import Plan
from snell_diffusion.evaluation.classification_records import Record, save_record
from snell_diffusion.evaluation.report_classification import from_folder, load
from tests.evaluation.made_up import ABOUT

PLAN: dict[str, Any] = {
    "base": "embedded-vit",
    "reference": "lora",
    "tasks": {"digits": {"dataset": "digits"}},
    "shots": [1, "all"],
    "seeds": [0, 1, 2],
    "methods": {"lora": {"method": "lora"}, "ours": {"method": "snella"}},
}


def record(method: str, shots: Any, seed: int, accuracy: float) -> Record:
    return Record(
        *("digits", shots, method, seed, "d", 1e-3),
        validation_accuracy=accuracy,
        validation_loss=1 - accuracy,
        test_accuracy=accuracy,
        trainable=1000,
        head=650,
        adapter_bytes=4096,
        head_bytes=2600,
        seconds=2.0,
    )


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A finished comparison: ours wins with one image per class, nobody with all."""
    path = tmp_path_factory.mktemp("classes")
    plan = asdict(TypeAdapter(Plan).validate_python(PLAN))
    (path / "trials").mkdir()
    (path / "about.json").write_text(json.dumps({**ABOUT, "plan": plan}))
    for seed in range(3):
        for method, few, whole in (("lora", 0.5, 0.9), ("ours", 0.6, 0.9 + (seed - 1) / 100)):
            for shots, accuracy in ((1, few + seed / 50), ("all", whole)):
                name = path / "records" / f"{method}-{shots}-{seed}.json"
                save_record(name, record(method, shots, seed, accuracy))
    return path


def test_the_page_says_who_wins(folder: Path, tmp_path: Path) -> None:
    keep = ["--keep", str(tmp_path / "kept")]
    start = ["report", "--output", str(tmp_path / "a")]
    assert main([*start, "--classification", str(folder), *keep]) == 0
    text = re.sub(r"<[^>]+>", " ", (tmp_path / "a" / "index.html").read_text())
    assert "few images per class: ours (62.0 %); all others are worse" in text
    assert re.search(r"all images: (lora|ours) \(90.0 %\); not told apart from it: ", text)
    assert "52.0 ± 2.0" in text
    assert "a &lt;i&gt;processor&lt;/i&gt;" in text

    saved = tmp_path / "kept" / "classification.json"
    assert main(["report", "--output", str(tmp_path / "b"), "--from", str(saved)]) == 0
    pages = [(tmp_path / name / "index.html").read_text() for name in ("a", "b")]
    assert pages[0] == pages[1]
    assert load(saved).records == from_folder(folder).records


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda v: v.update(kind="personalization"), "expected results of kind 'classification'"),
        (lambda v: v["records"][0].update(surprise=1), "not complete: TypeError .*surprise"),
        (lambda v: v.pop("trials"), "not complete: KeyError 'trials'"),
        (lambda v: v["plan"].update(reference="x"), "its plan is none: .*reference 'x'"),
    ],
)
def test_a_wrong_file_is_refused(folder: Path, change: Any, message: str, tmp_path: Path) -> None:
    start = ["report", "--classification", str(folder), "--output", str(tmp_path)]
    assert main([*start, "--keep", str(tmp_path)]) == 0
    path = tmp_path / "classification.json"
    values = json.loads(path.read_text())
    change(values)
    path.write_text(json.dumps(values))
    with pytest.raises(SnellaFileError, match=message):
        load(path)


def test_a_folder_without_records_says_what_to_do(folder: Path, tmp_path: Path) -> None:
    (tmp_path / "about.json").write_text((folder / "about.json").read_text())
    (tmp_path / "records").mkdir()
    with pytest.raises(SnellaFileError, match="run the comparison first"):
        from_folder(tmp_path)
