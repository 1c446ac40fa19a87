"""What holds for the project as a whole: which part may import what, pins, and entry points."""

import ast
import json
import re
import subprocess
import sys
import tomllib
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[1]
PACKAGE = ROOT / "snell_diffusion"

# part -> (parts of ours it may import, distributions it may import beside the standard library)
CORE = ({"core"}, {"torch", "numpy", "triton"})
TUNERS = (
    {"core", "tuners", "errors", "versions"},
    CORE[1] | {"peft", "accelerate", "packaging", "psutil"},
)
ADAPTERS = (
    TUNERS[0] | {"adapters"},
    TUNERS[1] | {"safetensors", "huggingface_hub", "pydantic", "transformers"},
)
TRAINING = (
    ADAPTERS[0] | {"training"},
    ADAPTERS[1] | {"deepspeed", "matplotlib", "numpy", "PIL", "tqdm", "yaml"},
)
DIFFUSION = (
    TRAINING[0] | {"diffusion", "models"},
    TRAINING[1] | {"diffusers", "torchao"},
)
VISION = (TRAINING[0] | {"vision", "models"}, TRAINING[1] | {"sklearn", "skimage", "pydantic_core"})
ARROWS = {
    "core": CORE,
    "errors": (set(), set()),
    "versions": ({"errors"}, {"packaging"}),
    "models": ({"errors", "models"}, set()),
    "tuners": TUNERS,
    "adapters": ADAPTERS,
    "training": TRAINING,
    "diffusion": DIFFUSION,
    "compress": (
        {"compress", "errors", "models"},
        {"torch", "peft", "transformers", "diffusers", "safetensors", "huggingface_hub", "PIL"},
    ),
    "vision": VISION,
    "evaluation": (
        DIFFUSION[0] | VISION[0] | {"evaluation"},
        DIFFUSION[1] | VISION[1] | {"skimage"},
    ),
    "app": (DIFFUSION[0] | {"app"}, DIFFUSION[1] | {"gradio", "pandas", "psutil", "starlette"}),
}
BANNED = ("torchvision", "timm", "lpips")  # installing them replaces a CPU torch by a CUDA one


def parts():
    names = {path.relative_to(PACKAGE).parts[0].removesuffix(".py") for path in sources(PACKAGE)}
    return sorted(names - {"__init__", "__main__"})


def sources(folder):
    return [path for path in folder.rglob("*.py") if "__pycache__" not in path.parts]


def imports(path):
    """(module, line) of every import statement, also inside functions; relative ones resolved."""
    package = path.relative_to(ROOT).with_suffix("").parts[:-1]
    for node in ast.walk(ast.parse(path.read_text("utf-8"))):
        if isinstance(node, ast.Import):
            yield from ((alias.name, node.lineno) for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            base = list(package[: len(package) + 1 - node.level]) if node.level else []
            module = ".".join(base + ([node.module] if node.module else []))
            inside = [f"{module}.{alias.name}" for alias in node.names]
            yield from (
                (name, node.lineno) for name in (inside if module == PACKAGE.name else [module])
            )


def files_of(part):
    single = PACKAGE / f"{part}.py"
    return [single] if single.is_file() else sources(PACKAGE / part)


@pytest.mark.parametrize("part", parts())
def test_imports_follow_the_arrows(part):
    assert part in ARROWS, f"say in ARROWS what snell_diffusion.{part} may import"
    ours, others = ARROWS[part]
    wrong = []
    for path in files_of(part):
        for module, line in imports(path):
            top, *rest = module.split(".")
            if top == PACKAGE.name:
                allowed = not rest or rest[0] in ours or rest[0] == "__version__"
            else:
                allowed = top in others or top in sys.stdlib_module_names
            if not allowed:
                wrong.append(f"{path.relative_to(ROOT)}:{line} imports {module}")
    assert wrong == []


def test_the_import_scan_sees_what_it_should(tmp_path, monkeypatch):
    monkeypatch.setitem(globals(), "ROOT", tmp_path)
    path = tmp_path / "snell_diffusion" / "core" / "x.py"
    path.parent.mkdir(parents=True)
    path.write_text(
        "import torch.nn\nfrom . import y\nfrom ..tuners import z\n"
        "def f():\n    from snell_diffusion import app\n    import gradio\n"
    )
    assert [module for module, _ in imports(path)] == [
        "torch.nn",
        "snell_diffusion.core",
        "snell_diffusion.tuners",
        "snell_diffusion.app",
        "gradio",
    ]


@pytest.mark.parametrize(
    "module, kept_out",
    [
        ("snell_diffusion", ["torch", "peft", "diffusers", "transformers", "gradio"]),
        (
            "snell_diffusion.core",
            ["peft", "diffusers", "transformers", "gradio", "accelerate", "triton"],
        ),
        ("snell_diffusion.tuners", ["diffusers", "gradio"]),
    ],
)
def test_a_fresh_interpreter_loads_only_what_a_part_needs(module, kept_out):
    code = f"import json, sys, {module}; print(json.dumps(sorted(sys.modules)))"
    done = subprocess.run(
        [sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True, check=True
    )
    loaded = {name.split(".")[0] for name in json.loads(done.stdout.splitlines()[-1])}
    assert "snell_diffusion" in loaded
    assert loaded.isdisjoint(kept_out)


def requirements():
    project = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
    extras = project["optional-dependencies"]
    assert {"app", "eval", "quant", "dev"} <= set(extras)
    return project["dependencies"] + [line for name in extras for line in extras[name]]


def normal(name):
    return re.sub(r"[-_.]+", "-", re.split(r"[\[<>=! ]", name)[0]).lower()


def pins():
    lines = (ROOT / "constraints.txt").read_text().splitlines()
    return [line for line in lines if line and not line.startswith("#")]


def test_torch_is_pinned_first_and_everything_is_pinned_exactly():
    assert pins()[0].startswith("torch==")
    assert [line for line in pins() if not re.fullmatch(r"[\w.-]+==[\w.!+]+", line)] == []


def test_every_requirement_that_make_installs_is_pinned():
    # not among those that make installs
    own_extras = {"bitsandbytes", "deepspeed", "prodigyopt", "torchao"}
    missing = {normal(line) for line in requirements()} - {normal(line) for line in pins()}
    assert missing == own_extras


def test_floors_checked_at_run_time_are_those_that_pip_checks():
    from snell_diffusion.versions import FLOORS

    floors = dict(re.match(r"([\w-]+)>=([\d.]+)", line).groups() for line in requirements())
    assert {name: floors[normal(name)] for name in FLOORS} == FLOORS


def test_packages_that_swap_torch_are_in_no_list():
    assert not {normal(line) for line in [*requirements(), *pins()]} & set(BANNED)


@pytest.mark.parametrize(
    "target",
    [
        "demo",
        "demo-dit",
        "test",
        "test-full",
        "reliability",
        "defences",
        "lint",
        "format",
        "app",
        "docs",
        "setup",
    ],
)
def test_make_knows_its_targets(target):
    done = subprocess.run(["make", "-n", target], cwd=ROOT, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    scripts = re.findall(r"python3? (?:-m )?(\S+)", done.stdout)
    files = [name if name.endswith(".py") else name.replace(".", "/") + ".py" for name in scripts]
    assert [name for name in files if not (ROOT / name).is_file()] == []


def test_the_version_is_said_once():
    import snell_diffusion

    project = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
    assert project["version"] == snell_diffusion.__version__
    assert f"version: {project['version']}" in (ROOT / "CITATION.cff").read_text()


def test_the_training_script_stays_thin():
    script = ROOT / "train_dreambooth_snella.py"
    assert len(script.read_text().splitlines()) < 100
