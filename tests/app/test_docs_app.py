"""docs/app.md tells the truth: its example runs, its lists of endpoints and options are whole."""

import re
from pathlib import Path

import pytest
from gradio_client import Client
from PIL import Image

from snell_diffusion.app.limits import LIMITS
from snell_diffusion.app.options import read_options

TEXT = (Path(__file__).resolve().parents[2] / "docs" / "app.md").read_text("utf-8")


def example(address):
    """The documented program, for the tiny base and two steps."""
    (code,) = re.findall(r"^```python\n(.*?)^```", TEXT, re.MULTILINE | re.DOTALL)
    for old, new in (
        ('"http://127.0.0.1:7860/"', repr(address)),
        ('"embedded"', '"tiny"'),
        ("steps=400", "steps=2"),
    ):
        assert old in code
        code = code.replace(old, new)
    return compile(code, "app.md", "exec")


@pytest.mark.timeout(280)
def test_the_example_goes_from_photos_to_a_picture(page_server, tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    for number in (1, 2, 3):
        photo = Image.radial_gradient("L").rotate(30 * number).convert("RGB")
        photo.save(f"cup-{number}.png")
    names = {}
    exec(example(page_server.address), names)
    names["client"].close()
    assert names["status"]["state"] == "finished", names["status"]
    adapted, base = (
        Image.open(names["drawn"][key][0]).convert("RGB") for key in ("pictures", "base_pictures")
    )
    assert adapted.size == base.size == (32, 32)
    assert adapted.tobytes() != base.tobytes()
    assert "with the adapter:" in capsys.readouterr().out


def test_every_endpoint_is_listed(page_server):
    client = Client(page_server.address, verbose=False)
    known = client.view_api(return_format="dict", print_info=False)["named_endpoints"]
    client.close()
    assert set(re.findall(r"^\| `(/\w+)` \|", TEXT, re.MULTILINE)) == set(known)


def test_every_option_is_listed_with_its_default(capsys):
    with pytest.raises(SystemExit):
        read_options(["--help"])
    known = set(re.findall(r"--[a-z-]+", capsys.readouterr().out)) - {"--help"}
    assert set(re.findall(r"^\| `(--[a-z-]+)", TEXT, re.MULTILINE)) == known
    assert f"| {LIMITS.quota_bytes // 2**30} |" in TEXT
    assert f"| {LIMITS.adapter_bytes // 2**20} |" in TEXT
    assert f"{LIMITS.queue} more may wait" in TEXT
