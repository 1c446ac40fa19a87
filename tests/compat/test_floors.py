"""V5: a library one version too old is named at the import of the part that needs it."""

import ast
import importlib
import subprocess
import sys
import tomllib
from importlib import metadata
from pathlib import Path

import pytest
from packaging.requirements import Requirement

from snell_diffusion.app import make_app, make_page
from snell_diffusion.app.options import Options
from snell_diffusion.versions import FLOORS, require

ROOT = Path(__file__).resolve().parents[2]

# library -> (module whose import fails, version to claim)
PARTS = {
    "torch": ("snell_diffusion.tuners", "2.9.1"),
    "peft": ("snell_diffusion.tuners", "0.20.0"),
    "accelerate": ("snell_diffusion.tuners", "1.14.0"),
    "pydantic": ("snell_diffusion.adapters", "1.10.24"),
    "safetensors": ("snell_diffusion.training", "0.7.0"),
    "pillow": ("snell_diffusion.training", "12.1.1"),
    "diffusers": ("snell_diffusion.diffusion.attention", "0.41.0"),
    "transformers": ("snell_diffusion.diffusion.attention", "5.2.9"),
    "huggingface_hub": ("snell_diffusion.diffusion.sources", "0.36.0"),
}


@pytest.fixture
def pretend(monkeypatch: pytest.MonkeyPatch):
    """Makes one library claim a version, or be missing (None)."""
    real = metadata.version

    def claim(library: str, version: str | None) -> None:
        def answer(name: str) -> str:
            if name != library:
                return real(name)
            if version is None:
                raise metadata.PackageNotFoundError(name)
            return version

        monkeypatch.setattr(metadata, "version", answer)

    return claim


@pytest.mark.row("V5")
@pytest.mark.parametrize("library", PARTS)
def test_too_old_is_named_at_import(library: str, pretend, monkeypatch: pytest.MonkeyPatch) -> None:
    module, version = PARTS[library]
    importlib.import_module(module)
    pretend(library, version)
    monkeypatch.delitem(sys.modules, module)
    message = (
        rf"^snell_diffusion needs {library}>={FLOORS[library]}, but {library} {version} is "
        rf"installed: pip install --upgrade '{library}>={FLOORS[library]}'$"
    )
    with pytest.raises(ImportError, match=message.replace(".", r"\.")):
        importlib.import_module(module)


@pytest.mark.row("V5")
@pytest.mark.parametrize(
    "version, message",
    [("6.15.2", "needs gradio>=6.16, but gradio 6.15.2 is"), (None, r"'snell-diffusion\[app\]'")],
)
def test_the_app_names_gradio(version: str | None, message: str, pretend) -> None:
    pretend("gradio", version)
    with pytest.raises(ImportError, match=message):
        make_page(make_app(Options()))


@pytest.mark.row("V5")
def test_named_before_the_library_itself_is_imported() -> None:
    """An old library would fail in its own, stranger way."""
    code = (
        "import sys; from importlib import metadata; real = metadata.version\n"
        "metadata.version = lambda name: '0.1' if name == 'torch' else real(name)\n"
        "try:\n    import snell_diffusion.adapters\n"
        "except ImportError as error:\n    print(error, 'torch' in sys.modules)"
    )
    done = subprocess.run(
        [sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True, check=True
    )
    assert done.stdout.startswith("snell_diffusion needs torch>=2.10, but torch 0.1 is installed")
    assert done.stdout.rstrip().endswith("False")


@pytest.mark.parametrize("suffix", ["", ".1", "+cpu"])
def test_the_floor_itself_and_later_are_accepted(suffix: str, pretend) -> None:
    pretend("torch", FLOORS["torch"] + suffix)
    require("torch")


def test_floors_are_those_of_the_project_file_and_each_is_asked_for() -> None:
    project = tomllib.loads((ROOT / "pyproject.toml").read_text("utf-8"))["project"]
    lines = [*project["dependencies"], *project["optional-dependencies"]["app"]]
    wanted = {Requirement(line).name.replace("-", "_"): Requirement(line) for line in lines}
    for name, floor in FLOORS.items():
        assert f">={floor}" in str(wanted[name].specifier).split(","), name
    asked = {
        word.value
        for path in (ROOT / "snell_diffusion").rglob("*.py")
        for node in ast.walk(ast.parse(path.read_text("utf-8")))
        if isinstance(node, ast.Call) and getattr(node.func, "id", None) == "require"
        for word in node.args
        if isinstance(word, ast.Constant)
    }
    assert asked == set(FLOORS)
