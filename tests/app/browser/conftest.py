"""A real browser before a really started `python app.py` with the embedded base.

The flows are skipped where no Chromium is installed (`make browser` installs one), unless
SNELL_REQUIRE_BROWSER says that this must not happen. Every flow saves screenshots to
runs/screenshots/; `--publish-screenshots` also copies those that the README shows to docs/images/.
"""

import os
import re
import shutil
import signal
import socket
import subprocess
import sys
import time
import urllib.request
from pathlib import Path

import pytest
from playwright.sync_api import expect, sync_playwright

from scripts.setup_browser import find_browser

ROOT = Path(__file__).resolve().parents[3]
SCREENSHOTS = ROOT / "runs" / "screenshots"
IMAGES = ROOT / "docs" / "images"
WIDE, PHONE = (1280, 900), (390, 844)
PATIENCE = 150_000  # milliseconds that a flow waits; a training starts slowly on a busy machine
expect.set_options(timeout=PATIENCE)
# What Chromium does by itself over the network is switched off: a flow must see only the page.
QUIET = [
    "--no-sandbox",
    "--disable-gpu",
    "--disable-quic",
    "--no-first-run",
    "--disable-background-networking",
    "--disable-component-update",
    "--disable-sync",
]


class AppProcess:
    """`python app.py` over a folder of runs; can be killed and started again on the same port."""

    def __init__(self, runs: Path, log: Path) -> None:
        self.runs, self._log = runs, log
        with socket.socket() as probe:
            probe.bind(("127.0.0.1", 0))
            self.port = probe.getsockname()[1]
        self._process: subprocess.Popen[bytes] | None = None

    @property
    def address(self) -> str:
        return f"http://127.0.0.1:{self.port}/"

    def start(self) -> None:
        """Start and wait until the page is served."""
        command = [sys.executable, "app.py", "--port", str(self.port), "--runs", str(self.runs)]
        with self._log.open("ab") as log:
            self._process = subprocess.Popen(
                command, cwd=ROOT, stdin=subprocess.DEVNULL, stdout=log, stderr=subprocess.STDOUT
            )
        end = time.monotonic() + 90
        while not self._answers():
            assert self._process.poll() is None, self._log.read_text()
            assert time.monotonic() < end, self._log.read_text()
            time.sleep(0.2)

    def _answers(self) -> bool:
        try:
            with urllib.request.urlopen(self.address, timeout=5) as answer:
                return bool(answer.status == 200)
        except OSError:
            return False

    def end(self, signum: int = signal.SIGTERM) -> None:
        """End the server by a signal."""
        if self._process is not None:
            self._process.send_signal(signum)
            self._process.wait(30)


@pytest.fixture(scope="module")
def app_process(tmp_path_factory):
    """A started page over an empty folder of runs, one per file of flows."""
    folder = tmp_path_factory.mktemp("page")
    app = AppProcess(folder / "runs", folder / "server.log")
    app.start()
    yield app
    app.end()


@pytest.fixture(scope="session")
def chromium():
    """A headless Chromium."""
    found = find_browser()
    if found is None:
        if os.environ.get("SNELL_REQUIRE_BROWSER"):
            pytest.fail("no Chromium is installed, and SNELL_REQUIRE_BROWSER is set: make browser")
        pytest.skip("no Chromium is installed: make browser")
    with sync_playwright() as playwright:
        browser = playwright.chromium.launch(executable_path=found, args=QUIET)
        yield browser
        browser.close()


class Visitor:
    """A person with a browser window of their own, who sees a problem that the page hides."""

    def __init__(self, browser, address: str, size: tuple[int, int]) -> None:
        width, height = size
        self._context = browser.new_context(
            viewport={"width": width, "height": height}, accept_downloads=True
        )
        self._context.set_default_timeout(PATIENCE)
        self.page = self._context.new_page()
        self.problems: list[str] = []
        self.strangers: list[str] = []
        self.page.on("pageerror", lambda error: self.problems.append(str(error)))
        self._context.route(re.compile("."), self._only_here)
        self.address = address

    def _only_here(self, route) -> None:
        if re.match(r"(http://127\.0\.0\.1:|data:|blob:)", route.request.url):
            route.continue_()
        else:
            self.strangers.append(route.request.url)
            route.abort()

    def open(self) -> None:
        """Load the page, or load it again, and wait until it is drawn."""
        self.page.goto(self.address)
        expect(self.page.get_by_role("tab", name="Personalize")).to_be_visible()

    def tab(self, name: str) -> None:
        """Go to a tab; on a narrow screen the last ones are behind a button."""
        tab = self.page.get_by_role("tab", name=name, exact=True)
        if not tab.is_visible():
            self.page.locator(".overflow-menu > button").first.click()
            tab = self.page.locator(".overflow-dropdown").get_by_text(name, exact=True)
        tab.click()

    def at(self, elem_id: str):
        """The element with an id of ours."""
        return self.page.locator(f"#{elem_id}")

    def give(self, button, *paths: Path) -> None:
        """Choose files in the dialogue that a button opens."""
        with self.page.expect_file_chooser() as chooser:
            button.click()
        chooser.value.set_files(list(paths))

    def snap(self, name: str, full: bool = True) -> Path:
        """Save a screenshot for people to look at."""
        SCREENSHOTS.mkdir(parents=True, exist_ok=True)
        path = SCREENSHOTS / f"{name}.png"
        self.page.screenshot(path=path, full_page=full)
        return path

    def leave(self) -> None:
        self._context.close()


@pytest.fixture
def visit(chromium, app_process):
    """visit(size) -> Visitor on the page; at the end, none may have met a script error."""
    visitors = []

    def start(size: tuple[int, int] = WIDE) -> Visitor:
        visitor = Visitor(chromium, app_process.address, size)
        visitors.append(visitor)
        visitor.open()
        return visitor

    yield start
    problems = [problem for visitor in visitors for problem in visitor.problems]
    strangers = [url for visitor in visitors for url in visitor.strangers]
    for visitor in visitors:
        visitor.leave()
    assert not problems
    assert not strangers, "the page asked for something outside of this machine"


@pytest.fixture(scope="session")
def publish(request):
    """publish(path, name): copy a screenshot to docs/images/ if the run was asked to."""

    def copy(path: Path, name: str) -> None:
        if request.config.option.publish_screenshots:
            shutil.copyfile(path, IMAGES / name)

    return copy
