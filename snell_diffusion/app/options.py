"""What the person who starts the server decides: the command line, accounts, and what is refused.

Passwords come from a file or the environment, never from the command line, where every user of the
machine could read them.
"""

import argparse
import ipaddress
import os
import stat
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path

from snell_diffusion.app.limits import LIMITS, Limits
from snell_diffusion.errors import SnellaValueError, quoted

ACCOUNTS = "SNELLA_APP_ACCOUNTS"  # environment variable with lines user:password
LOOPBACK = "127.0.0.1"
SHORTEST = 8  # characters of a password
MIB, GIB = 2**20, 2**30


@dataclass(frozen=True)
class Options:
    """How the page is served.

    Attributes:
        runs: Folder of everything users make; made here.
        host: Address to listen on.
        port: 1 to 65535, or None for the first free one from 7860.
        bases: (name, diffusers folder or hub id) of each base besides the embedded ones.
        public_names: Host names under which a reverse proxy serves the page.
        accounts: Password by user name; empty: no sign-in.
        limits: Bounds of what may be asked for.
        open_browser: Open the page in this machine's browser.
    """

    runs: Path = Path("runs/app")
    host: str = LOOPBACK
    port: int | None = None
    bases: tuple[tuple[str, str], ...] = ()
    public_names: tuple[str, ...] = ()
    accounts: Mapping[str, str] = field(default_factory=dict, repr=False)
    limits: Limits = LIMITS
    open_browser: bool = False

    def __post_init__(self) -> None:
        if self.exposed and not self.accounts:
            raise SnellaValueError(
                f"{' and '.join(self._ways_in())} can be reached from other machines, so people "
                "must sign in: give --auth-file FILE, a file with a line user:password for each "
                f"person (or the same lines in the environment variable {ACCOUNTS}), or stay on "
                f"{LOOPBACK}"
            )

    @property
    def exposed(self) -> bool:
        """Whether the page can be reached from other machines."""
        return not is_loopback(self.host) or bool(self.public_names)

    def _ways_in(self) -> list[str]:
        return [*self.public_names] if is_loopback(self.host) else [self.host, *self.public_names]


def read_options(arguments: Sequence[str] | None = None) -> Options:
    """The command line of app.py.

    Raises:
        SystemExit: Help was asked for, or an argument is wrong; the sentence has been printed.
    """
    parser = _parser()
    given = parser.parse_args(arguments)
    try:
        return _options(given)
    except SnellaValueError as error:
        parser.error(str(error))


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        description="The page of snell_diffusion: from photos to pictures with the mouse."
    )
    add = parser.add_argument
    add(
        "--host",
        default=LOOPBACK,
        help="address to listen on; any but this machine's own needs accounts",
    )
    add("--port", type=int, help="default: the first free one from 7860")
    add(
        "--runs",
        type=Path,
        default=Options.runs,
        help=f"folder of the runs; default {Options.runs}",
    )
    add(
        "--base",
        dest="bases",
        action="append",
        default=[],
        metavar="NAME=FOLDER_OR_HUB_ID",
        help="a base model to offer besides the embedded ones; may be repeated",
    )
    add("--auth-file", type=Path, metavar="FILE", help="lines user:password; only you may read it")
    add(
        "--public-name",
        dest="names",
        action="append",
        default=[],
        metavar="HOST",
        help="host name under which a reverse proxy serves the page; may be repeated",
    )
    add("--quota", type=float, metavar="GB", help="disk space of each user's runs and adapters")
    add("--upload", type=int, metavar="MB", help="size of an uploaded adapter file")
    add("--open", action="store_true", help="open the page in the browser")
    return parser


def _options(given: argparse.Namespace) -> Options:
    limits = LIMITS
    if given.quota is not None:
        limits = replace(limits, quota_bytes=_within("--quota", given.quota, 0.01, 10_000, GIB))
    if given.upload is not None:
        limits = replace(limits, adapter_bytes=_within("--upload", given.upload, 1, 4096, MIB))
    if given.port is not None:
        _within("--port", given.port, 1, 65535)
    return Options(
        runs=given.runs,
        host=given.host,
        port=given.port,
        bases=tuple(parse_base(text) for text in given.bases),
        public_names=tuple(parse_name(text) for text in given.names),
        accounts=read_accounts(given.auth_file, os.environ.get(ACCOUNTS, "")),
        limits=limits,
        open_browser=given.open,
    )


def _within(option: str, value: float, low: float, high: float, unit: int = 1) -> int:
    if not low <= value <= high:
        raise SnellaValueError(f"{option} must be {low} to {high}, got {value}")
    return int(value * unit)


def parse_base(text: str) -> tuple[str, str]:
    """NAME=FOLDER_OR_HUB_ID in two.

    Raises:
        SnellaValueError: Not of this form.
    """
    name, _, source = text.partition("=")
    if not (name.strip() and source.strip()):
        raise SnellaValueError(
            f"--base takes NAME=FOLDER_OR_HUB_ID, such as mine=models/mine, got {quoted(text)}"
        )
    return name.strip(), source.strip()


def parse_name(text: str) -> str:
    """A bare host name in lower case.

    Raises:
        SnellaValueError: It has a scheme, a port, a path or other letters than names have.
    """
    name = text.lower().rstrip(".")
    if not name.isascii() or not name.replace("-", "").replace(".", "").isalnum():
        raise SnellaValueError(
            f"--public-name takes a bare host name, such as photos.example.org, got {quoted(text)}"
        )
    return name


def read_accounts(file: Path | None, environment: str = "") -> dict[str, str]:
    """Password by user name, from a file or from the environment.

    Args:
        file: Lines user:password; empty lines and lines that start with # are left out.
        environment: The same lines; used without a file.

    Raises:
        SnellaValueError: The file cannot be read or may be read by every user of the machine, or
            a line is wrong. No message shows a password.
    """
    if file is None:
        return _accounts(environment, ACCOUNTS)
    try:
        mode = file.stat().st_mode
        text = file.read_text("utf-8")
    except (OSError, UnicodeDecodeError) as error:
        raise SnellaValueError(f"--auth-file {file}: cannot be read as text ({error})") from None
    if not stat.S_ISREG(mode) or mode & stat.S_IRWXO:
        raise SnellaValueError(
            f"--auth-file {file}: every user of this machine may read it; run: chmod 600 {file}"
        )
    accounts = _accounts(text, f"--auth-file {file}")
    if not accounts:
        raise SnellaValueError(f"--auth-file {file}: holds no line user:password")
    return accounts


def _accounts(text: str, where: str) -> dict[str, str]:
    accounts: dict[str, str] = {}
    for number, line in enumerate(text.splitlines(), 1):
        if not line.strip() or line.startswith("#"):
            continue
        name, separator, password = line.partition(":")
        name = name.strip()
        if not name or not separator or len(password) < SHORTEST:
            raise SnellaValueError(
                f"{where}, line {number}: expected user:password with a password of at least "
                f"{SHORTEST} characters"
            )
        if name in accounts:
            raise SnellaValueError(f"{where}, line {number}: user {quoted(name)} is there twice")
        accounts[name] = password
    return accounts


def is_loopback(host: str) -> bool:
    """Whether an address is reached from this machine only."""
    if host == "localhost":
        return True
    try:
        return ipaddress.ip_address(host.strip("[]")).is_loopback
    except ValueError:
        return False
