"""Importing the package: what it loads, and how the verbs get onto diffusers' pipelines."""

import json
import subprocess
import sys
from pathlib import Path

import pytest

from snell_diffusion.diffusion import install, pipeline

HEAVY = ("torch", "diffusers", "peft", "gradio", "transformers")


def fresh(code: str, root: Path, **environment: str) -> dict[str, object]:
    """What `code` leaves in `out`, run in a fresh interpreter."""
    import os

    result = subprocess.run(
        [sys.executable, "-c", f"import json, sys\nout = {{}}\n{code}\nprint(json.dumps(out))"],
        cwd=root,
        env={**os.environ, **environment},
        capture_output=True,
        text=True,
        check=True,
    )
    return json.loads(result.stdout.splitlines()[-1])


def test_the_package_alone_loads_nothing_heavy(repo_root: Path) -> None:
    code = f"import snell_diffusion\nout['loaded'] = [m for m in {HEAVY} if m in sys.modules]"
    assert fresh(code, repo_root) == {"loaded": []}


def test_verbs_appear_when_diffusers_is_imported_later(repo_root: Path) -> None:
    code = """
import snell_diffusion
from diffusers import StableDiffusionPipeline
out["verbs"] = hasattr(StableDiffusionPipeline, "load_snella_weights")
out["tuners"] = "snell_diffusion.tuners" in sys.modules
out["hooks"] = sum(type(f).__module__.startswith("snell") for f in sys.meta_path)
"""
    assert fresh(code, repo_root) == {"verbs": True, "tuners": False, "hooks": 0}


def test_verbs_appear_at_once_when_diffusers_is_there() -> None:
    from diffusers import DiffusionPipeline

    removed = install.remove_methods(DiffusionPipeline)
    assert sorted(removed) == sorted(install.VERBS)
    assert not hasattr(DiffusionPipeline, "load_snella_weights")
    install.install()
    assert hasattr(DiffusionPipeline, "load_snella_weights")


def test_the_verbs_can_be_switched_off(repo_root: Path) -> None:
    code = """
import snell_diffusion
out["hooks"] = sum(type(f).__module__.startswith("snell") for f in sys.meta_path)
"""
    assert fresh(code, repo_root) == {"hooks": 1}
    assert fresh(code, repo_root, SNELL_DIFFUSION_NO_METHODS="1") == {"hooks": 0}


def test_every_verb_is_a_plain_function_and_every_function_a_verb() -> None:
    assert sorted(install.VERBS) == sorted(pipeline.__all__)
    for name, summary in install.VERBS.items():
        assert callable(getattr(pipeline, name))
        assert summary.endswith(".")


def test_nothing_that_exists_is_replaced() -> None:
    class Pipeline:
        def load_snella_weights(self) -> str:
            return "theirs"

    assert "load_snella_weights" not in install.add_methods(Pipeline)
    assert Pipeline().load_snella_weights() == "theirs"
    assert install.add_methods(Pipeline) == []
    assert "load_snella_weights" not in install.remove_methods(Pipeline)
    assert Pipeline().load_snella_weights() == "theirs"
    assert not hasattr(Pipeline, "fuse_snella")


def test_a_verb_forwards_to_its_function(monkeypatch: pytest.MonkeyPatch) -> None:
    class Pipeline:
        pass

    install.add_methods(Pipeline)
    monkeypatch.setattr(pipeline, "fuse_snella", lambda pipe, scale: (pipe, scale))
    pipe = Pipeline()
    assert pipe.fuse_snella(scale=0.5) == (pipe, 0.5)  # type: ignore[attr-defined]


def test_public_names_are_found_lazily_and_unknown_ones_are_named() -> None:
    import snell_diffusion

    assert snell_diffusion.SnellaConfig.__name__ == "SnellaConfig"
    assert set(snell_diffusion.__all__) <= set(dir(snell_diffusion))
    with pytest.raises(AttributeError, match="has no attribute 'SnelaConfig'; it has Snella"):
        _ = snell_diffusion.SnelaConfig
