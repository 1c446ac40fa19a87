"""The page over HTTP, on a really launched server: gradio's settings and what they defend."""

import asyncio
import os
import socket
import stat
import subprocess
import sys
import time
from pathlib import Path

import httpx
import pytest

from snell_diffusion.app import server
from snell_diffusion.app.cache import DAY, MINUTE
from snell_diffusion.app.options import Options
from snell_diffusion.app.server import blocked_paths, prepare_cache, settings, signs_in

ROOT = Path(__file__).resolve().parents[2]


@pytest.fixture
def web(page_server):
    with httpx.Client(base_url=page_server.address, timeout=20) as client:
        yield client


def test_nothing_is_shared_monitored_or_shown_by_accident(tiny_app, monkeypatch):
    monkeypatch.setenv("GRADIO_SHARE", "True")
    values = settings(Options(), tiny_app)
    off = ("share", "enable_monitoring", "show_error", "run_history", "mcp_server", "ssr_mode")
    assert [values[name] for name in off] == [False] * len(off)
    assert values["allowed_paths"] == []
    assert values["strict_cors"] is True
    assert values["server_name"] == "127.0.0.1"
    assert values["auth"] is None
    assert values["num_workers"] == 0
    assert values["max_threads"] == 8
    assert values["state_session_capacity"] == 64


def test_the_page_is_served_on_this_machine_with_its_headers(page_server, web):
    assert page_server.address.startswith("http://127.0.0.1:")
    answer = web.get("/")
    assert answer.status_code == 200
    assert 'lang="en"' in answer.text
    assert "frame-ancestors 'self'" in answer.headers["content-security-policy"]
    assert answer.headers["x-content-type-options"] == "nosniff"
    config = web.get("/config").json()
    assert config["enable_queue"] is True
    assert config["space_id"] is None
    assert config["analytics_enabled"] is False
    assert "https://" not in config["stylesheets"]


@pytest.mark.parametrize(
    "path",
    ["monitoring", "monitoring/x", "docs", "openapi.json", "gradio_api/openapi.json", "x"]
    + [f"gradio_api/{name}" for name in ("vibe-code/", "runs", "token", "dev/reload")],
)
def test_pages_that_are_not_ours_do_not_exist(web, path):
    assert web.get(f"/{path}").status_code == 404


def test_files_of_the_server_are_not_served(page_server, web):
    own = page_server.root / "local" / "private.txt"
    own.parent.mkdir(exist_ok=True)
    own.write_text("secret")
    for path in (own, "/etc/passwd", Path(__file__), page_server.root, "pyproject.toml"):
        answer = web.get(f"/gradio_api/file={path}")
        assert answer.status_code == 403
        assert answer.json() == {"error": "this file is not served"} | {
            "detail": answer.json()["error"]
        }


def test_an_upload_is_kept_for_its_owner_only(page_server, web):
    (path,) = web.post("/gradio_api/upload", files={"files": ("a.png", b"bytes")}).json()
    cache = page_server.root / "cache"
    assert Path(path).is_relative_to(cache)
    assert stat.S_IMODE(cache.stat().st_mode) == 0o700
    assert web.get(f"/gradio_api/file={path}").content == b"bytes"


def test_an_upload_above_the_limit_is_refused(page_server, web):
    limit = settings(Options(), page_server.app)["max_file_size"]
    assert limit == page_server.app.limits.adapter_bytes
    host, port = page_server.address.removeprefix("http://").rstrip("/").split(":")
    with socket.create_connection((host, int(port)), timeout=10) as line:
        head = "POST /gradio_api/upload HTTP/1.1", f"Host: {host}", f"Content-Length: {2**40}"
        line.sendall("\r\n".join((*head, "", "")).encode())
        assert line.recv(100).startswith(b"HTTP/1.1 413")
    answer = web.post("/gradio_api/upload", content=iter([b"x"]))  # of untold size
    assert answer.status_code == 411


def test_a_cache_is_private_and_cleared_of_what_earlier_servers_left(tmp_path, monkeypatch):
    monkeypatch.setenv("GRADIO_TEMP_DIR", "")
    monkeypatch.setenv("GRADIO_EXAMPLES_CACHE", "")
    monkeypatch.setenv("GRADIO_ALLOWED_PATHS", "/")
    cache = tmp_path / "runs" / "cache"
    for name in ("old", "new"):
        (cache / name).mkdir(parents=True)
        (cache / name / "x").write_text("x")
    cache.chmod(0o755)
    (cache / "empty").touch()
    (cache / "fresh").touch()
    os.utime(cache / "old", (time.time() - 2 * DAY,) * 2)
    os.utime(cache / "empty", (time.time() - 2 * MINUTE,) * 2)
    assert prepare_cache(tmp_path / "runs") == cache
    assert sorted(entry.name for entry in cache.iterdir()) == ["fresh", "new"]
    assert stat.S_IMODE(cache.stat().st_mode) == 0o700
    assert os.environ["GRADIO_TEMP_DIR"] == str(cache)
    assert "GRADIO_ALLOWED_PATHS" not in os.environ


def test_home_and_working_folder_are_blocked_unless_the_cache_is_inside(tmp_path, monkeypatch):
    monkeypatch.setenv("HOME", str(tmp_path / "home"))
    monkeypatch.chdir(tmp_path)
    assert blocked_paths(tmp_path / "runs" / "cache") == [str(tmp_path / "home")]
    assert blocked_paths(Path("/elsewhere")) == [str(tmp_path), str(tmp_path / "home")]


def test_a_wrong_password_costs_time_however_many_try_at_once(monkeypatch):
    monkeypatch.setattr(server, "PAUSE", 0.1)

    async def attempts():
        check = signs_in({"ann": "correct horse"})
        start = time.monotonic()
        right = await check("ann", "correct horse")
        quick = time.monotonic() - start
        wrong = [("ann", "x"), ("bob", ""), ("bob", "x"), ("ann", "correct hors\u00e9")]
        answers = await asyncio.gather(*(check(*pair) for pair in wrong))
        return right, quick, answers, time.monotonic() - start

    right, quick, answers, spent = asyncio.run(attempts())
    assert right
    assert quick < 0.1
    assert answers == [False] * 4
    assert spent >= 0.4


def test_a_page_for_other_machines_does_not_start_without_accounts(tmp_path):
    command = [sys.executable, "app.py", "--host", "0.0.0.0", "--runs", str(tmp_path / "runs")]
    environment = {k: v for k, v in os.environ.items() if k != "SNELLA_APP_ACCOUNTS"}
    ended = subprocess.run(command, cwd=ROOT, env=environment, capture_output=True, timeout=60)
    assert ended.returncode == 2
    assert b"people must sign in" in ended.stderr
    assert not (tmp_path / "runs").exists()


def test_a_base_that_is_not_there_is_named_before_anything_starts(tmp_path):
    command = [
        sys.executable,
        "app.py",
        "--base",
        f"mine={tmp_path}",
        "--runs",
        str(tmp_path / "r"),
    ]
    ended = subprocess.run(command, cwd=ROOT, capture_output=True, timeout=120)
    assert ended.returncode == 1
    assert b"base mine" in ended.stderr
    assert b"Traceback" not in ended.stderr
