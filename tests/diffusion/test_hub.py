"""Uploading a run: the real client against a hub on this machine, and what the card says."""

import json
import os
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import huggingface_hub
import pytest
import yaml
from huggingface_hub import constants

from snell_diffusion.diffusion.config import TrainConfig
from snell_diffusion.diffusion.hub import require_hub
from snell_diffusion.diffusion.licence import Licence, base_licence, read_licence
from snell_diffusion.diffusion.training import run
from snell_diffusion.errors import SnellaConfigError
from snell_diffusion.training.errors import UploadError
from tests.diffusion.hub_server import TOKEN, Hub, hub_server
from tests.diffusion.training_runs import PROMPT, config, write_photos

ROOT = Path(__file__).resolve().parents[2]
# The client's own upload of a large file.
pytestmark = pytest.mark.filterwarnings("ignore:Use 'content=:DeprecationWarning")

SHORT: dict[str, Any] = {
    "max_train_steps": 1,
    "num_validation_photos": 0,
    "target_modules": ["to_q"],
    "push_to_hub": True,
}


@pytest.fixture
def hub(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Iterator[Hub]:
    """A hub that the client in this process talks to, with a token that it takes."""
    with hub_server() as found:
        monkeypatch.setattr(constants, "ENDPOINT", found.address)
        template = f"{found.address}/{{repo_id}}/resolve/{{revision}}/{{filename}}"
        monkeypatch.setattr(constants, "HUGGINGFACE_CO_URL_TEMPLATE", template)
        monkeypatch.setattr(constants, "HF_HUB_OFFLINE", False)
        monkeypatch.setattr(constants, "HF_HUB_DISABLE_XET", True)
        monkeypatch.setattr(constants, "HF_HUB_CACHE", str(tmp_path / "cache"))
        monkeypatch.setattr(constants, "HF_TOKEN_PATH", str(tmp_path / "no-token"))
        monkeypatch.setenv("HF_TOKEN", TOKEN)
        yield found


def test_the_training_command_uploads_the_run(tiny_base: Path, tmp_path: Path) -> None:
    """Through the script, in a process of its own that knows the hub by HF_ENDPOINT alone."""
    with hub_server() as found:
        environment = {
            **os.environ,
            "HF_ENDPOINT": found.address,
            "HF_HUB_OFFLINE": "0",
            "HF_HUB_DISABLE_XET": "1",
            "HF_HUB_DISABLE_TELEMETRY": "1",
            "HF_TOKEN": TOKEN,
            "HF_HOME": str(tmp_path / "home"),
        }
        photos = write_photos(tmp_path / "photos")
        command = [
            *(sys.executable, str(ROOT / "train_dreambooth_snella.py"), "--base", str(tiny_base)),
            *("--instance_data_dir", str(photos), "--instance_prompt", PROMPT),
            *("--resolution", "16", "--max_train_steps", "1", "--rank", "4"),
            *("--target_modules", "to_q", "--validation_prompt", PROMPT),
            *("--num_inference_steps", "1", "--output_dir", str(tmp_path / "run")),
            *("--push_to_hub", "--hub_model_id", "me/cat", "--hub_private_repo"),
        ]
        done = subprocess.run(
            command, env=environment, cwd=tmp_path, capture_output=True, text=True, timeout=300
        )
    assert done.returncode == 0, done.stderr[-2000:]
    assert found.created["name"] == "cat"
    assert found.created["visibility"] == "private"
    folder = tmp_path / "run"
    assert {
        *("README.md", "pytorch_snella_weights.safetensors", "loss.png", "allocation.png"),
        *("samples.png", "samples/step-000000.png", "samples/step-000001.png"),
    } == set(found.files)
    assert all((folder / name).read_bytes() == data for name, data in found.files.items())
    everything = b"".join(p.read_bytes() for p in folder.rglob("*") if p.is_file())
    assert TOKEN.encode() not in everything + done.stdout.encode() + done.stderr.encode()
    card = found.files["README.md"].decode()
    assert str(tmp_path) not in card.replace(str(folder), "")
    assert 'pipe.load_snella_weights("me/cat")' in card
    head = yaml.safe_load(card.split("---")[1])
    assert head["widget"] == [{"text": PROMPT, "output": {"url": "samples.png"}}]


def test_a_refused_upload_loses_nothing_and_is_not_silent(
    hub: Hub, tiny_base: Path, tmp_path: Path
) -> None:
    hub.refuse = 403
    settings = config(tiny_base, tmp_path, **SHORT, hub_model_id="me/cat")
    with pytest.raises(
        UploadError, match=r"run is complete in .*uploading it to me/cat failed: "
    ) as e:
        run(settings)
    assert e.value.exit_code == 5
    status = json.loads((tmp_path / "run" / "status.json").read_text())
    assert status["state"] == "finished"
    assert "uploading it to me/cat failed" in status["message"]
    log = (tmp_path / "run" / "log.jsonl").read_text()
    assert "Try again with --resume_from_checkpoint latest" in log
    # That would upload the whole folder.
    assert "hf upload" not in log
    adapter = tmp_path / "run" / "pytorch_snella_weights.safetensors"
    kept = adapter.read_bytes()

    hub.refuse = 0
    run(TrainConfig(**{**vars(settings), "resume_from_checkpoint": "latest"}))
    assert hub.files["pytorch_snella_weights.safetensors"] == kept == adapter.read_bytes()


def test_a_hub_that_is_gone_loses_nothing(
    hub: Hub, tiny_base: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    settings = config(tiny_base, tmp_path, **SHORT)
    stock = huggingface_hub.HfApi.create_repo

    def vanish(self: Any, *arguments: Any, **options: Any) -> Any:
        self.endpoint = "http://127.0.0.1:9"
        return stock(self, *arguments, **options)

    monkeypatch.setattr(huggingface_hub.HfApi, "create_repo", vanish)
    with pytest.raises(UploadError, match="uploading it to me/run failed"):
        run(settings)
    assert (tmp_path / "run" / "README.md").is_file()


REFUSED: dict[str, tuple[dict[str, str], dict[str, Any], str]] = {
    "no token": ({"HF_TOKEN": ""}, {}, "needs a token of the Hugging Face hub: log in by"),
    "a wrong token": ({"HF_TOKEN": "hf_wrong"}, {}, "the hub did not accept the token"),
    "a bad name": ({}, {"hub_model_id": "a/b/c"}, "'a/b/c' cannot be a repository"),
}


@pytest.mark.parametrize("case", REFUSED)
def test_what_cannot_be_uploaded_is_found_before_the_training(
    case: str, hub: Hub, tiny_base: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    environment, changes, message = REFUSED[case]
    for name, value in environment.items():
        monkeypatch.setenv(name, value)
    with pytest.raises(SnellaConfigError, match=message):
        run(config(tiny_base, tmp_path, **SHORT, **changes))
    assert not (tmp_path / "run").exists()
    assert not hub.files


def test_offline_is_told(hub: Hub, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", True)
    settings = TrainConfig(instance_data_dir="x", instance_prompt="a", push_to_hub=True)
    with pytest.raises(SnellaConfigError, match="HF_HUB_OFFLINE is set"):
        require_hub(settings)


def test_nobody_is_asked_without_push_to_hub(hub: Hub) -> None:
    assert require_hub(TrainConfig(instance_data_dir="x", instance_prompt="a")) is None
    assert not hub.asked


# -- the base's licence ----------------------------------------------------------------------------


@pytest.mark.parametrize(
    "card, name, reason",
    [
        ("---\nlicense: apache-2.0\n---\n# A", "apache-2.0", ""),
        ("---\nlicense: other\nlicense_name: flux-1-dev\n---\n", "flux-1-dev", ""),
        ("---\nlicense: other\n---\n", "other", ""),
        ("---\ntags: [a]\n---\n", None, "does not state one"),
        ("---\nlicense: [a, b]\n---\n", None, "does not state one"),
        ("---\nlicense: {a\n---\n", None, "cannot be read"),
        ("# A model\n---\n", None, "has no metadata"),
        ("", None, "has no metadata"),
    ],
)
def test_the_licence_is_what_the_card_says(card: str, name: str | None, reason: str) -> None:
    found = read_licence(card)
    assert found.name == name
    assert found.reason.endswith(reason)


def test_the_embedded_base_states_its_licence() -> None:
    from snell_diffusion.models import embedded_path

    assert base_licence(str(embedded_path()), None, online=False).name == "apache-2.0"


def test_the_licence_of_a_base_on_the_hub_is_fetched(hub: Hub) -> None:
    hub.cards["you/base"] = "---\nlicense: openrail++\n---\n"
    assert base_licence("you/base", None, online=True).name == "openrail++"
    assert base_licence("you/none", None, online=True) == Licence(
        reason="its model card could not be read"
    )


def test_the_card_says_plainly_that_a_licence_is_unknown(tiny_base: Path, tmp_path: Path) -> None:
    run(config(tiny_base, tmp_path, **{**SHORT, "push_to_hub": False}))
    card = (tmp_path / "run" / "README.md").read_text()
    assert "license: unknown" in card
    assert "is unknown: its folder has no model card. Find out before you share" in card
