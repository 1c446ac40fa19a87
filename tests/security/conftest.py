"""Options of the security tests; known where pytest is given this folder or a file in it."""

import pytest


def pytest_addoption(parser: pytest.Parser) -> None:
    parser.addoption(
        "--update-snapshots", action="store_true", help="write the error texts on record anew"
    )
    parser.addoption("--mutations", type=int, help="how many damaged files to try")
