"""How methods are found and made known to PEFT, and what importing them must not load."""

import subprocess
import sys

import peft.mapping
import pytest

from snell_diffusion.tuners import METHODS, SnellaConfig, registry
from snell_diffusion.tuners.registry import Method, MethodName, find_methods, register
from snell_diffusion.tuners.snella import METHOD, SnellaModel


def test_every_method_of_the_folder_is_registered():
    assert dict(METHODS) == find_methods()
    for name, method in METHODS.items():
        assert peft.mapping.PEFT_TYPE_TO_CONFIG_MAPPING[name] is method.config
        assert peft.mapping.PEFT_TYPE_TO_TUNER_MAPPING[name] is method.model
        assert peft.mapping.PEFT_TYPE_TO_PREFIX_MAPPING[name] == method.model.prefix
        assert method.config.method == name


def test_names_are_strings_with_the_enums_attributes():
    name = SnellaConfig().peft_type
    assert isinstance(name, str)
    assert (name, name.value, name.name, type(name.value)) == ("SNELLA", "SNELLA", "SNELLA", str)
    assert {MethodName("SNELLA"): 1}["SNELLA"] == 1


def test_registering_again_changes_nothing():
    before = dict(peft.mapping.PEFT_TYPE_TO_CONFIG_MAPPING)
    register(METHOD)
    assert before == peft.mapping.PEFT_TYPE_TO_CONFIG_MAPPING


@pytest.mark.parametrize(
    "method, message",
    [
        (Method("Snella", SnellaConfig, SnellaModel), "must be upper case, got 'Snella'"),
        (
            Method("OTHER", SnellaConfig, SnellaModel),
            "OTHER needs a model class with prefix 'other_'",
        ),
        (Method("SNELLA", object, SnellaModel), "PEFT already has a method SNELLA: SnellaConfig"),
    ],
)
def test_methods_that_are_refused(method, message):
    with pytest.raises(ValueError, match=message):
        register(method)


def test_an_untested_peft_is_refused(monkeypatch):
    monkeypatch.setattr(registry.metadata, "version", lambda package: "0.99.0")
    with pytest.raises(ImportError, match=r"peft>=0.21,<0.23, but peft 0.99.0 .* pip install"):
        register(METHOD)


def test_a_peft_without_its_mappings_is_refused(monkeypatch):
    monkeypatch.delattr(peft.mapping, "PEFT_TYPE_TO_PREFIX_MAPPING")
    with pytest.raises(ImportError, match=r"no PEFT_TYPE_TO_PREFIX_MAPPING in peft.mapping"):
        register(METHOD)


def test_importing_the_tuners_loads_neither_diffusers_nor_gradio():
    code = (
        "import sys, snell_diffusion.tuners; "
        "print(sorted({m.partition('.')[0] for m in sys.modules} & {'diffusers', 'gradio'}))"
    )
    result = subprocess.run(
        [sys.executable, "-c", code], capture_output=True, text=True, check=True
    )
    assert result.stdout.strip() == "[]"
