"""Bases of every family and spelling, and what is said of those that cannot be used."""

import json
import shutil
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import nn
from transformers import ViTMAEConfig, ViTMAEForPreTraining, ViTModel

from snell_diffusion.errors import SnellaBaseError
from snell_diffusion.tuners.roles import role_of
from snell_diffusion.vision.loading import base_digest, load_base
from snell_diffusion.vision.models import families, family_for
from tests.vision import runs

# transformers 4's spelling -> that of transformers 5
OLD_TO_NEW = (
    ("vit.encoder.layer.", "vit.layers."),
    ("attention.attention.query", "attention.q_proj"),
    ("attention.attention.key", "attention.k_proj"),
    ("attention.attention.value", "attention.v_proj"),
    ("attention.output.dense", "attention.o_proj"),
    ("intermediate.dense", "mlp.fc1"),
    ("output.dense", "mlp.fc2"),
)


def respelled(name: str, to_old: bool) -> str:
    for old, new in OLD_TO_NEW:
        name = name.replace(new, old) if to_old else name.replace(old, new)
    return name


@pytest.mark.parametrize("to_old", [True, False], ids=["transformers 4", "transformers 5"])
def test_both_spellings_of_a_checkpoint_load(
    to_old: bool, bases: dict[str, str], tmp_path: Path
) -> None:
    """Files of either spelling give the same model."""
    shutil.copy(Path(bases["vit"]) / "config.json", tmp_path)
    tensors = load_file(Path(bases["vit"]) / "model.safetensors")
    tensors = {respelled(name, to_old): t for name, t in tensors.items()}
    wanted = "vit.encoder.layer.0.attention.attention.query.weight"
    assert (wanted in tensors) == to_old
    save_file(tensors, tmp_path / "model.safetensors", {"format": "pt"})
    found, known = load_base(str(tmp_path), 3), load_base(bases["vit"], 3)
    assert base_digest(found.model) == base_digest(known.model)


def test_mae_checkpoint_becomes_a_classifier(tmp_path: Path) -> None:
    """Encoder as it is, decoder left out, all patches seen."""
    torch.manual_seed(0)
    small = {
        "decoder_hidden_size": 16,
        "decoder_num_hidden_layers": 1,
        "decoder_num_attention_heads": 2,
        "decoder_intermediate_size": 16,
    }
    mae = ViTMAEForPreTraining(ViTMAEConfig(**runs._VIT, **small, mask_ratio=0.0))
    mae.save_pretrained(tmp_path)
    base = load_base(str(tmp_path), 4)
    assert base.family.name == "ViT"
    states, own = mae.state_dict(), base.model.state_dict()
    assert all(torch.equal(own[k], states[k]) for k in own if k.startswith("vit."))
    pixels = torch.randn(2, 3, runs.SIDE, runs.SIDE)
    with torch.no_grad():
        order = torch.arange(4.0).expand(2, 4)  # noise of the masking: keeps the patches in order
        encoded = mae.vit(pixels, noise=order).last_hidden_state[:, 0]
        expected = base.model.classifier(encoded)
        torch.testing.assert_close(base.family.logits(base.model, pixels), expected)


def test_model_without_head_loads(bases: dict[str, str], tmp_path: Path) -> None:
    """As supervised in21k checkpoints are: a ViTModel with a pooler, no classifier."""
    ViTModel.from_pretrained(bases["vit"]).save_pretrained(tmp_path)
    assert base_digest(load_base(str(tmp_path), 5).model) == base_digest(
        load_base(bases["vit"], 5).model
    )


def test_new_head(bases: dict[str, str]) -> None:
    """Truncated normal of deviation 0.02, no bias, a function of the seed."""
    head = load_base(bases["vit"], 500, seed=3).model.classifier
    assert head.weight.std().item() == pytest.approx(0.02, rel=0.03)
    assert head.bias.abs().max() == 0
    assert torch.equal(head.weight, load_base(bases["vit"], 500, seed=3).model.classifier.weight)
    assert not torch.equal(
        head.weight, load_base(bases["vit"], 500, seed=4).model.classifier.weight
    )


@pytest.mark.parametrize("name", sorted(runs.BASES))
def test_targets_are_the_layers_of_the_blocks(name: str, bases: dict[str, str]) -> None:
    """Every Linear of attention and MLP, and nothing else: no head, no downsampling."""
    base = load_base(bases[name], 3)
    linears = [n for n, m in base.model.named_modules() if isinstance(m, nn.Linear)]
    chosen = [n for n in linears if any(n.endswith(f".{t}") for t in base.family.targets)]
    left = {n.rpartition(".")[2] for n in set(linears) - set(chosen)}
    assert left == {"classifier"} | ({"reduction"} if name == "swin" else set())
    assert {role_of(n) for n in chosen} == set(base.family.roles)
    old = [respelled(n, to_old=True) for n in chosen]
    assert all(any(n.endswith(f".{t}") for t in base.family.targets) for n in old)
    assert [role_of(n) for n in old] == [role_of(n) for n in chosen]


def test_other_picture_sizes(bases: dict[str, str]) -> None:
    """Position embeddings are interpolated where a family has them."""
    for name in runs.BASES:
        base = load_base(bases[name], 3)
        assert base.side == runs.SIDE
        with torch.no_grad():
            assert base.family.logits(base.model, torch.randn(2, 3, 24, 24)).shape == (2, 3)


def test_incomplete_base_is_refused(bases: dict[str, str], tmp_path: Path) -> None:
    """A weight that is missing would stay random: transformers only warns."""
    shutil.copy(Path(bases["vit"]) / "config.json", tmp_path)
    tensors = load_file(Path(bases["vit"]) / "model.safetensors")
    lacking = {n: t for n, t in tensors.items() if not n.endswith("position_embeddings")}
    save_file(lacking, tmp_path / "model.safetensors", {"format": "pt"})
    with pytest.raises(SnellaBaseError, match=r"missing .*position_embeddings"):
        load_base(str(tmp_path), 3)


def test_unknown_bases_are_refused(tmp_path: Path) -> None:
    with pytest.raises(SnellaBaseError, match="could not be loaded"):
        load_base(str(tmp_path / "nowhere"), 3)
    (tmp_path / "config.json").write_text(json.dumps({"model_type": "bert"}))
    with pytest.raises(SnellaBaseError, match="type 'bert'; this trainer knows convnext, swin"):
        load_base(str(tmp_path), 3)
    with pytest.raises(SnellaBaseError, match="type 'resnet'"):
        family_for("resnet", "somewhere")
    assert {family.name for family in families()} == {"ViT", "Swin", "ConvNeXt"}
