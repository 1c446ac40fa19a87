"""Make .venv: torch first, then this project, every version as constraints.txt pins it.

Needs the standard library alone, because it runs before anything is installed.
Run it through `make`, which calls it when pyproject.toml or constraints.txt changed.
"""

import importlib.util
import json
import os
import platform
import shutil
import subprocess
import sys
import venv
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
VENV = ROOT / ".venv"
PYTHON = VENV / "bin" / "python"
CONSTRAINTS = ROOT / "constraints.txt"
EXTRAS = "app,eval,dev"
CPU_INDEX = "https://download.pytorch.org/whl/cpu"
OLDEST = (3, 11)


def check_interpreter() -> None:
    """Leave with a sentence where this Python cannot make a virtual environment."""
    name = "python{}.{}".format(*sys.version_info)
    if sys.version_info < OLDEST:
        sys.exit(
            f"snell_diffusion needs Python 3.11 or newer and this is {platform.python_version()}; "
            "install a newer one and name it: make PYTHON=python3.12"
        )
    if importlib.util.find_spec("ensurepip") is None:
        sys.exit(
            f"this Python has no venv support; on Debian and Ubuntu: apt-get install {name}-venv"
        )


def torch_pin() -> str:
    """The line of constraints.txt that pins torch, for example `torch==2.13.0`."""
    lines = CONSTRAINTS.read_text().splitlines()
    pins = [line.strip() for line in lines if line.startswith("torch==")]
    if len(pins) != 1:
        sys.exit(f"constraints.txt must pin torch exactly once, found {pins or 'no line'}")
    return pins[0]


def plain_choice(pin: str) -> str:
    """Version, with its local part, that pip would take from the index it is set up for."""
    options = ["--quiet", "--dry-run", "--no-deps", "--ignore-installed", "--report", "-"]
    report = subprocess.run(
        [PYTHON, "-m", "pip", "install", *options, pin],
        check=True,
        stdout=subprocess.PIPE,
        text=True,
    ).stdout
    return json.loads(report)["install"][0]["metadata"]["version"]


def torch_index_arguments(pin: str, wish: str) -> list[str]:
    """pip arguments that pick the build of torch.

    Args:
        pin: Requirement such as `torch==2.13.0`.
        wish: `plain` for the index pip is set up for, an index address to add to it, or `auto`:
            the CPU index is added on Linux without an NVIDIA driver, unless the plain index
            already offers a CPU build. PyPI's Linux wheels bring several GB of CUDA libraries.
    """
    if wish == "plain":
        return []
    if wish != "auto":
        return ["--extra-index-url", wish]
    if platform.system() != "Linux" or shutil.which("nvidia-smi"):
        return []
    return [] if plain_choice(pin).endswith("+cpu") else ["--extra-index-url", CPU_INDEX]


def installed_version(package: str) -> str | None:
    """Version of a package inside .venv, without its local part; None where it is absent."""
    code = "import importlib.metadata as m, sys; print(m.version(sys.argv[1]).split('+')[0])"
    found = subprocess.run([PYTHON, "-c", code, package], capture_output=True, text=True)
    return found.stdout.strip() if found.returncode == 0 else None


def pip_install(*arguments: str) -> None:
    subprocess.run([PYTHON, "-m", "pip", "install", *arguments], check=True, cwd=ROOT)


def main() -> None:
    check_interpreter()
    if not PYTHON.exists():
        print(f"creating {VENV}", flush=True)
        venv.create(VENV, with_pip=True)
    pin = torch_pin()
    if installed_version("torch") != pin.removeprefix("torch=="):
        pip_install(pin, *torch_index_arguments(pin, os.environ.get("TORCH_INDEX") or "auto"))
    pip_install("--constraint", str(CONSTRAINTS), "--editable", f".[{EXTRAS}]")


if __name__ == "__main__":
    try:
        main()
    except subprocess.CalledProcessError as failure:
        sys.exit(f"the set-up stopped: {' '.join(map(str, failure.cmd))} failed (see above)")
