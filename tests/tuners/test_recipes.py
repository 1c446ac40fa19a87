"""Every method behind one interface: names, settings, targets, errors."""

import pytest
import torch
from peft import inject_adapter_in_model

from snell_diffusion.errors import SnellaConfigError
from snell_diffusion.tuners import METHODS, SnellaConfig
from snell_diffusion.tuners.recipes import RECIPES, list_methods, recipe
from snell_diffusion.tuners.roles import ROLES, block_of, endings, in_words, role_of
from tests.tiny_models import sd15_unet

FOREIGN = {"lora", "dora", "adalora", "oft", "hra", "shira", "full"}


def test_every_method_of_the_folder_and_the_foreign_ones_are_there():
    assert set(RECIPES) == {name.lower() for name in METHODS} | FOREIGN
    assert {name for name, found in RECIPES.items() if found.ours} == set(RECIPES) - FOREIGN
    assert [name for name, found in RECIPES.items() if found.trains_base] == ["full"]


def test_the_list_has_a_line_and_the_settings_of_every_method():
    lines = list_methods().splitlines()
    for name, found in RECIPES.items():
        (place,) = [i for i, line in enumerate(lines) if line.split("  ")[0].strip() == name]
        assert found.summary
        assert found.summary in lines[place]
        if found.settings:
            assert lines[place + 1].strip() == ", ".join(found.settings)


@pytest.mark.parametrize("name", [name for name in RECIPES if name != "full"])
def test_every_method_wraps_layers_of_a_unet(name):
    model = sd15_unet()
    rank = {"oft": 8}.get(name, 4)
    settings = {"rank": rank} if "rank" in recipe(name).settings else {}
    config = recipe(name).config(settings, ["to_q", "to_k", "to_v"], 0, steps=50)
    model.requires_grad_(False)
    inject_adapter_in_model(config, model, "default")
    assert sum(p.numel() for p in model.parameters() if p.requires_grad) > 0


def test_shared_settings_set_the_fields_of_each_method():
    given = {"rank": 6, "update_scale": 2.0, "dropout": 0.1}
    ours = recipe("snell").config({**given, "init_sparsity": 0.3}, ["to_q"], 7)
    assert (ours.r, ours.scale, ours.dropout, ours.seed) == (6, 2.0, 0.1, 7)
    assert (ours.kernel, ours.init_sparsity) == ("distance", 0.3)
    lora = recipe("lora").config(given, ["to_q"], 0)
    assert (lora.r, lora.lora_alpha, lora.lora_dropout) == (6, 12.0, 0.1)
    assert recipe("dora").config({}, ["to_q"], 0).use_dora
    assert recipe("shira").config({"rank": 3}, ["to_q"], 5).random_seed == 5
    assert recipe("full").config({}, ["to_q"], 0) is None


def test_none_counts_as_not_given():
    assert recipe("snella").config({"rank": None}, ["to_q"], 0).r == SnellaConfig().r


def test_the_domain_chooses_the_preset_of_the_method_itself():
    for domain in ("diffusion", "vision"):
        expected = getattr(SnellaConfig, domain)()
        found = recipe("snella").config({}, ["to_q"], 0, domain)
        assert (found.scale, found.train_beta) == (expected.scale, expected.train_beta)
    assert recipe("snell").config({}, ["to_q"], 0, "diffusion").scale == 1.0


def test_adalora_needs_the_length_of_the_run():
    config = recipe("adalora").config({"rank": 4}, ["to_q"], 0, steps=200)
    assert (config.init_r, config.target_r, config.total_step) == (6, 4, 200)
    with pytest.raises(SnellaConfigError, match="method adalora: the number of optimizer steps"):
        recipe("adalora").config({"rank": 4}, ["to_q"], 0)


@pytest.mark.parametrize("steps, settings", [(1, {}), (2, {"tfinal": 1}), (5, {"tfinal": 4})])
def test_adalora_needs_a_step_before_its_ranks_are_chosen(steps, settings):
    """PEFT would look up scores that no step has left."""
    fewer = r"method adalora: .*2 optimizer steps or more before the last tfinal; got \d in all"
    with pytest.raises(SnellaConfigError, match=fewer):
        recipe("adalora").config(settings, ["to_q"], 0, steps=steps)
    assert recipe("adalora").config(settings, ["to_q"], 0, steps=steps + 1) is not None


@pytest.mark.parametrize(
    "name, settings, message",
    [
        ("lora", {"heads": 2}, "method lora has no heads; it takes rank, update_scale, dropout"),
        ("full", {"rank": 2}, "method full has no rank; it takes no settings"),
        ("snella", {"rank": 3}, "method snella: r must be divisible by heads"),
        ("snell", {"kernel": "mixed"}, "method snell has no kernel"),
    ],
)
def test_settings_that_are_refused(name, settings, message):
    with pytest.raises(SnellaConfigError, match=message):
        recipe(name).config(settings, ["to_q"], 0)


def test_an_unknown_method_lists_the_known():
    with pytest.raises(SnellaConfigError, match=r"'lokr' is unknown; known: .*snella"):
        recipe("lokr")


@pytest.mark.parametrize(
    "method, field, value",
    [("SNELL", "kernel", "linear"), ("KLORA", "sparsify", "mask"), ("MIXK", "init_sparsity", 0.5)],
)
def test_what_makes_a_method_cannot_be_set(method, field, value):
    with pytest.raises(SnellaConfigError, match=f"{field} of {method} is .*, got {value!r}"):
        METHODS[method].config(**{field: value})


def test_settings_of_snella_compute_what_they_are_named_after():
    x = torch.randn(3, 8, generator=torch.Generator().manual_seed(0))
    for method, kernel, rule in (
        ("SNELL", "distance", "squared"),
        ("KLORA", "distance", "none"),
        ("MIXK", "mixed", "none"),
    ):
        outputs = []
        for kind, more in (
            (METHODS[method].config, {}),
            (SnellaConfig, {"kernel": kernel, "sparsify": rule}),
        ):
            torch.manual_seed(0)
            model = torch.nn.Sequential(torch.nn.Linear(8, 6))
            level = 0.5 if method == "SNELL" else 0.0
            config = kind(r=4, target_modules=["0"], seed=3, init_sparsity=level, **more)
            outputs.append(inject_adapter_in_model(config, model, "default")(x))
        assert torch.equal(*outputs)


def test_targets_of_a_paper_are_taken_from_those_of_the_family(monkeypatch):
    kind = METHODS["SNELL"].config
    monkeypatch.setattr(kind, "default_roles", ("q", "v"))
    snell = recipe("snell")
    assert snell.config({}, ["to_q", "to_k", "to_v"], 0).target_modules == ["to_q", "to_v"]
    assert snell.config({}, ["to_k"], 0, chosen=True).target_modules == ["to_k"]
    assert "q_proj" in snell.config({}, ["to_k"], 0).target_modules


@pytest.mark.parametrize(
    "path, role, block",
    [
        ("down.0.attn1.to_q", "q", "down.0.attn1"),
        ("down.0.attn1.to_out.0", "proj", "down.0.attn1"),
        ("blocks.3.attn.add_k_proj", "k", "blocks.3.attn:context"),
        ("encoder.layer.0.attention.attention.query", "q", "encoder.layer.0.attention"),
        ("encoder.layer.0.attention.output.dense", "proj", "encoder.layer.0"),
        ("encoder.layer.0.output.dense", "fc2", "encoder.layer.0"),
        ("layers.1.attention.o_proj", "proj", "layers.1.attention"),
        ("mid.ff.net.0.proj", "fc1", "mid"),
        ("stages.0.layers.0.pwconv2", "fc2", "stages.0.layers.0"),
        ("classifier", None, None),
        ("my_to_q", None, None),
    ],
)
def test_roles_and_blocks(path, role, block):
    assert role_of(path) == role
    assert block_of(path) == block


def test_what_a_method_adapts_is_said_only_of_a_model_without_it():
    hta = recipe("hta")
    assert hta.lacks(["blocks.0.pwconv1"]) == "attention's q, k, v and output projections"
    assert hta.lacks(["blocks.0.pwconv1", "blocks.0.q_proj"]) is None
    assert recipe("lora").lacks([]) is None


@pytest.mark.parametrize(
    "roles, words",
    [
        (("q", "v"), "attention's q and v projections"),
        (("fc2",), "the MLP's second layer"),
        (("q", "fc1", "fc2"), "attention's q projection and the MLP's first and second layers"),
    ],
)
def test_roles_in_words(roles, words):
    assert in_words(roles) == words


def test_endings_are_those_of_the_roles():
    assert set(endings(("q", "v"))) == {*ROLES["q"], *ROLES["v"]}
