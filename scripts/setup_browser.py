"""See to it that a Chromium is there for the tests of the page: `make browser`.

Looks for one that is installed; on Debian and Ubuntu, as root, installs the distribution's package.
Playwright's own download is not used: it needs a server that closed networks do not reach. Needs
the standard library alone.
"""

import os
import shutil
import subprocess
import sys

NAMES = ("chromium", "chromium-browser", "google-chrome-stable", "google-chrome")
PACKAGES = ("chromium", "fonts-dejavu-core")


def find_browser() -> str | None:
    """Path of a Chromium: environment variable SNELL_BROWSER, else the first on PATH."""
    named = os.environ.get("SNELL_BROWSER")
    return named or next(filter(None, map(shutil.which, NAMES)), None)


def install_command() -> list[list[str]] | None:
    """The commands that install one here, or None where that is left to a person."""
    if os.name != "posix" or os.geteuid() != 0 or shutil.which("apt-get") is None:
        return None
    install = ["apt-get", "install", "--yes", "--no-install-recommends", *PACKAGES]
    return [["apt-get", "update"], install]


def main() -> None:
    found = find_browser()
    commands = install_command()
    if found is None and commands is not None:
        for command in commands:
            subprocess.run(
                command, check=True, env={**os.environ, "DEBIAN_FRONTEND": "noninteractive"}
            )
        found = find_browser()
    if found is None:
        sys.exit(
            "the tests of the page need Chromium: on Debian and Ubuntu, apt-get install chromium; "
            "elsewhere install Chromium or Chrome, or name one in SNELL_BROWSER"
        )
    print(f"browser: {found}")


if __name__ == "__main__":
    main()
