"""The command line: what starts, and what is refused with a sentence."""

from dataclasses import replace

import pytest

from snell_diffusion.app.limits import LIMITS
from snell_diffusion.app.options import (
    ACCOUNTS,
    Options,
    is_loopback,
    parse_name,
    read_accounts,
    read_options,
)
from snell_diffusion.errors import SnellaValueError


@pytest.fixture(autouse=True)
def no_accounts(monkeypatch):
    monkeypatch.delenv(ACCOUNTS, raising=False)


@pytest.fixture
def accounts(tmp_path):
    file = tmp_path / "accounts"
    file.write_text("# who may come in\nann:correct horse\n\nbob : battery:staple\n")
    file.chmod(0o600)
    return file


def test_without_arguments_the_page_is_for_this_machine_only():
    options = read_options([])
    assert options == Options()
    assert (options.host, options.exposed, options.accounts) == ("127.0.0.1", False, {})


def test_every_argument_arrives(accounts):
    arguments = "--host 0.0.0.0 --port 8000 --runs r --base a=x/y --base b=z --public-name P.Org."
    arguments += f" --auth-file {accounts} --quota 2 --upload 5 --open"
    options = read_options(arguments.split())
    assert (options.host, options.port, str(options.runs)) == ("0.0.0.0", 8000, "r")
    assert options.bases == (("a", "x/y"), ("b", "z"))
    assert options.public_names == ("p.org",)
    assert options.accounts == {"ann": "correct horse", "bob": " battery:staple"}
    assert options.limits == replace(LIMITS, quota_bytes=2 * 2**30, adapter_bytes=5 * 2**20)
    assert options.open_browser
    assert options.exposed
    assert "horse" not in repr(options)


@pytest.mark.parametrize(
    "arguments",
    ["--host 0.0.0.0", "--host ::", "--host 192.168.1.5", "--host box", "--public-name p.org"],
)
def test_off_this_machine_people_must_sign_in(arguments, capsys, monkeypatch):
    with pytest.raises(SystemExit) as exit:
        read_options(arguments.split())
    assert exit.value.code == 2
    said = capsys.readouterr().err
    assert "can be reached from other machines" in said
    assert "--auth-file FILE" in said
    monkeypatch.setenv(ACCOUNTS, "ann:correct horse")
    assert read_options(arguments.split()).accounts == {"ann": "correct horse"}


@pytest.mark.parametrize(
    "arguments, sentence",
    [
        ("--base models/mine", "--base takes NAME=FOLDER_OR_HUB_ID"),
        ("--base =x", "--base takes NAME=FOLDER_OR_HUB_ID"),
        ("--port 0", "--port must be 1 to 65535"),
        ("--quota 0", "--quota must be"),
        ("--upload 0", "--upload must be"),
        ("--public-name https://p.org", "bare host name"),
        ("--public-name p.org:80", "bare host name"),
        ("--auth-file /nowhere", "cannot be read"),
        ("--share", "unrecognized arguments: --share"),
        ("--password x", "unrecognized"),
    ],
)
def test_wrong_arguments_are_refused_with_a_sentence(arguments, sentence, capsys):
    with pytest.raises(SystemExit):
        read_options(arguments.split())
    assert sentence in capsys.readouterr().err


@pytest.mark.parametrize("mode", [0o604, 0o644, 0o602, 0o601])
def test_a_file_of_passwords_that_everybody_may_touch_is_refused(accounts, mode):
    accounts.chmod(mode)
    with pytest.raises(SnellaValueError, match="chmod 600"):
        read_accounts(accounts)


@pytest.mark.parametrize(
    "line, sentence",
    [
        ("ann", "line 1: expected user:password"),
        ("ann:short12", "at least 8 characters"),
        (":correct horse", "line 1: expected user:password"),
        ("ann:correct horse\nann:battery staple", "'ann' is there twice"),
        ("# nobody", "holds no line"),
        ("\udcff", "cannot be read as text"),
    ],
)
def test_wrong_lines_are_named_without_the_password(accounts, line, sentence):
    accounts.write_bytes(line.encode("utf-8", "surrogateescape"))
    with pytest.raises(SnellaValueError, match=sentence) as error:
        read_accounts(accounts)
    assert "short12" not in str(error.value)
    assert "horse" not in str(error.value)


def test_addresses_of_this_machine():
    assert all(map(is_loopback, ("127.0.0.1", "127.3.4.5", "::1", "[::1]", "localhost")))
    assert not any(map(is_loopback, ("0.0.0.0", "::", "10.0.0.1", "box", "")))
    assert parse_name("Photos.Example.org.") == "photos.example.org"
