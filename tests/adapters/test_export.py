"""LoRA exports: what is written, the error that is stated, and what stock diffusers makes of it."""

import json
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from diffusers import StableDiffusionPipeline
from peft import inject_adapter_in_model
from safetensors import safe_open
from safetensors.torch import load_file
from torch import Tensor, nn

from snell_diffusion.adapters import (
    AdapterFile,
    adapter_file_bytes,
    read_adapter,
    save_adapter,
)
from snell_diffusion.adapters.export import EXPORT_KEY, layer_updates
from snell_diffusion.adapters.export_lora import export_lora, factorize
from snell_diffusion.adapters.export_merge import merge_adapter
from snell_diffusion.errors import SnellaBaseError, SnellaFileError, SnellaValueError
from snell_diffusion.tuners import DeltaLayer, SnellaConfig, delta_layers
from tests.tiny_models import (
    adapt,
    flux_transformer,
    pipeline,
    predict,
    sd15_unet,
    text_encoder,
)

TOLERANCE = 1e-5  # float32 predictions of size 1, after 30 layers


@pytest.fixture(scope="module")
def live() -> dict[str, nn.Module]:
    """The adapter where it was made; its strength is not 1, so that a lost scale shows."""
    unet, encoder = adapt(sd15_unet(), scale=0.7), adapt(text_encoder(), seed=2, scale=0.7)
    return {"unet": unet, "text_encoder": encoder}


@pytest.fixture(scope="module")
def file(live: dict[str, nn.Module], tmp_path_factory: pytest.TempPathFactory) -> AdapterFile:
    folder = tmp_path_factory.mktemp("file")
    return read_adapter(save_adapter(folder, live, metadata={"instance_prompt": "a sks cat"}))


def predictions(pipe: StableDiffusionPipeline) -> Tensor:
    """Noise prediction of the UNet, and the text encoder's states, one after the other."""
    with torch.no_grad():
        text = pipe.text_encoder(torch.arange(10).reshape(1, 10) + 5).last_hidden_state
    return torch.cat([predict(pipe.unet, "sd15").flatten(), text.flatten()])


def by_hand(file: AdapterFile, rank: int) -> StableDiffusionPipeline:
    """The base with W + U_r S_r V_rᵀ written into its weights, by numpy's decomposition."""
    import numpy as np

    pipe = pipeline()
    for component, path, delta in layer_updates(file):
        U, S, Vh = np.linalg.svd(delta.double().numpy(), full_matrices=False)
        best = (U[:, :rank] * S[:rank]) @ Vh[:rank]
        pipe.components[component].get_submodule(path).weight.data += torch.from_numpy(best).float()
    return pipe


def test_updates_are_those_of_the_live_layers(
    live: dict[str, nn.Module], file: AdapterFile
) -> None:
    found = {(component, path): delta for component, path, delta in layer_updates(file)}
    expected = {
        (component, path): layer.get_delta_weight("default").detach()
        for component, model in live.items()
        for path, layer in delta_layers(model)
    }
    assert found.keys() == expected.keys()
    assert all(torch.equal(found[place], delta) for place, delta in expected.items())


@pytest.mark.parametrize("style", ["lora", "kohya"])
@pytest.mark.parametrize("rank", [3, None])
def test_diffusers_loads_the_best_approximation(
    style: str, rank: int | None, file: AdapterFile, tmp_path: Path
) -> None:
    report = export_lora(file, tmp_path / "out.safetensors", rank, style)
    pipe = pipeline()
    pipe.load_lora_weights(tmp_path / "out.safetensors")
    expected = predictions(by_hand(file, rank or 37))
    assert (predictions(pipe) - expected).abs().max() < TOLERANCE
    if rank is None:
        assert report.relative < 2e-6
        merged = pipeline()
        merge_adapter({"unet": merged.unet, "text_encoder": merged.text_encoder}, file)
        assert (predictions(pipe) - predictions(merged)).abs().max() < TOLERANCE
    else:
        assert (predictions(pipe) - predictions(pipeline())).abs().max() > 0.01


def test_the_stated_error_is_that_of_the_file(file: AdapterFile, tmp_path: Path) -> None:
    path = tmp_path / "out.safetensors"
    report = export_lora(file, path, 3, dtype="float16")
    tensors = load_file(path)
    deltas = {f"{component}.{module}": delta for component, module, delta in layer_updates(file)}
    squares = [0.0, 0.0]
    for row in report.layers:
        stem = row.layer.replace("text_encoder.encoder", "text_encoder.text_model.encoder")
        up, down = (tensors[f"{stem}.lora_{name}.weight"].double() for name in ("B", "A"))
        assert up.shape[1] == down.shape[0] == 3
        delta = deltas[row.layer].double()
        assert row.off == pytest.approx(float((up @ down - delta).norm()), rel=1e-6)
        assert row.relative == pytest.approx(row.off / float(delta.norm()), rel=1e-6)
        S = torch.linalg.svdvals(delta).square()
        assert row.energy == pytest.approx(float(S[:3].sum() / S.sum()), rel=1e-5)
        squares[0] += row.off**2
        squares[1] += float(delta.norm()) ** 2
    assert report.relative == pytest.approx((squares[0] / squares[1]) ** 0.5, rel=1e-6)
    assert 0.01 < report.relative < 0.5
    with safe_open(path, "pt") as opened:
        texts = opened.metadata()
    noted = json.loads(texts[EXPORT_KEY])
    assert noted["relative_error"] == report.relative
    assert noted["energy_kept"] == report.energy
    assert noted["adapter_digest"] == file.digest
    assert noted["layers"].keys() == deltas.keys()
    assert texts["snella.metadata.instance_prompt"] == "a sks cat"


def test_no_export_passes_for_an_adapter(file: AdapterFile, tmp_path: Path) -> None:
    """Whatever an adapter's author calls the entries of its metadata."""
    notes = dict.fromkeys(("format", "header", "digest", "export"), "x")
    header = file.header.model_copy(update={"metadata": notes})
    path = tmp_path / "out.safetensors"
    export_lora(replace(file, header=header), path, 1)
    with safe_open(path, "pt") as opened:
        texts = opened.metadata()
    assert not {"snella.format", "snella.header", "snella.digest"} & texts.keys()
    assert json.loads(texts[EXPORT_KEY])["rank"] == 1


def test_layers_that_kohya_cannot_tell_apart_are_refused(tmp_path: Path) -> None:
    model = nn.Module()
    model.a, model.a_b = nn.Module(), nn.Module()
    model.a.b_to_q, model.a_b.to_q = nn.Linear(4, 4), nn.Linear(4, 4)
    inject_adapter_in_model(SnellaConfig(r=2, heads=2, target_modules=["b_to_q", "to_q"]), model)
    file = read_adapter(adapter_file_bytes({"unet": model}))
    with pytest.raises(SnellaValueError, match=r"one name, 'lora_unet_a_b_to_q\.lora_down"):
        export_lora(file, tmp_path / "out.safetensors", 1, "kohya")
    assert not list(tmp_path.iterdir())
    assert len(export_lora(file, tmp_path / "out.safetensors", 1).layers) == 2


def test_no_pair_of_that_rank_is_nearer() -> None:
    draw = torch.Generator().manual_seed(0)
    delta = torch.randn(12, 9, generator=draw)
    up, down, energy = factorize(delta, 4)
    assert up.shape == (12, 4)
    assert down.shape == (4, 9)
    S = torch.linalg.svdvals(delta)
    assert (up @ down - delta).norm() == pytest.approx(float(S[4:].norm()), rel=1e-5)
    assert energy == pytest.approx(float(S[:4].square().sum() / S.square().sum()), rel=1e-5)


def test_more_rank_than_there_is_becomes_zeros() -> None:
    delta = torch.eye(3, 2)
    up, down, energy = factorize(delta, 5)
    assert up.shape == (3, 5)
    assert not up[:, 2:].any()
    assert torch.allclose(up @ down, delta)
    assert energy == 1.0
    assert factorize(torch.zeros(3, 2), 1)[2] == 1.0


def test_kohya_names(file: AdapterFile, tmp_path: Path) -> None:
    export_lora(file, tmp_path / "k.safetensors", 2, "kohya")
    tensors = load_file(tmp_path / "k.safetensors")
    stem = "lora_unet_down_blocks_1_attentions_0_transformer_blocks_0_attn1_to_out_0"
    assert tensors[f"{stem}.lora_down.weight"].shape == (2, 32)
    assert tensors[f"{stem}.lora_up.weight"].shape == (32, 2)
    assert tensors[f"{stem}.alpha"] == 2.0
    assert "lora_te_text_model_encoder_layers_0_self_attn_q_proj.alpha" in tensors


def test_two_text_encoders_are_told_apart(tmp_path: Path) -> None:
    both = {"text_encoder": adapt(text_encoder()), "text_encoder_2": adapt(text_encoder())}
    adapter = read_adapter(save_adapter(tmp_path / "a", both))
    export_lora(adapter, tmp_path / "k.safetensors", 2, "kohya")
    heads = {name.split("_text_model")[0] for name in load_file(tmp_path / "k.safetensors")}
    assert heads == {"lora_te1", "lora_te2"}


def test_kohya_has_no_names_for_a_transformer(tmp_path: Path) -> None:
    model = adapt(flux_transformer(), target_modules=["to_q"])
    adapter = read_adapter(save_adapter(tmp_path / "a", {"transformer": model}))
    with pytest.raises(SnellaValueError, match="this adapter also has transformer; export with"):
        export_lora(adapter, tmp_path / "k.safetensors", 2, "kohya")
    export_lora(adapter, tmp_path / "k.safetensors", 2)
    assert any(name.startswith("transformer.") for name in load_file(tmp_path / "k.safetensors"))


def test_an_export_is_not_overwritten_unless_asked(file: AdapterFile, tmp_path: Path) -> None:
    path = tmp_path / "out.safetensors"
    path.write_bytes(b"mine")
    with pytest.raises(SnellaFileError, match="exists already; choose another name or pass"):
        export_lora(file, path, 2)
    assert path.read_bytes() == b"mine"
    export_lora(file, path, 2, overwrite=True)
    assert load_file(path)
    assert [item.name for item in tmp_path.iterdir()] == ["out.safetensors"]


@pytest.mark.parametrize(
    "given, message",
    [
        ({"rank": 0}, "rank must be at least 1"),
        ({"style": "peft"}, "style 'peft': expected one of lora, kohya"),
        ({"dtype": "int8"}, "dtype 'int8': expected one of float32, float16, bfloat16"),
    ],
)
def test_requests_that_make_no_sense(
    given: dict[str, object], message: str, file: AdapterFile, tmp_path: Path
) -> None:
    with pytest.raises(SnellaValueError, match=message):
        export_lora(file, tmp_path / "out.safetensors", **given)
    with pytest.raises(SnellaFileError, match=r"a LoRA is one file; give a name ending in"):
        export_lora(file, tmp_path / "out")
    assert [*tmp_path.iterdir()] == []


def test_factors_beyond_float16_are_refused(tmp_path: Path) -> None:
    adapter = read_adapter(save_adapter(tmp_path / "a", {"unet": adapt(sd15_unet(), scale=1e12)}))
    with pytest.raises(SnellaValueError, match="exceed the range of float16; export with dtype"):
        export_lora(adapter, tmp_path / "out.safetensors", 2, dtype="float16")
    assert not (tmp_path / "out.safetensors").exists()


def test_merging_leaves_stock_modules_that_compute_the_same(
    live: dict[str, nn.Module], file: AdapterFile
) -> None:
    unet = sd15_unet()
    rows = merge_adapter({"unet": unet, "text_encoder": text_encoder()}, file)
    assert not any(isinstance(module, DeltaLayer) for module in unet.modules())
    assert not hasattr(unet, "peft_config")
    assert torch.equal(predict(unet, "sd15"), predict(live["unet"], "sd15"))
    assert max(row.relative for row in rows) < 1e-6


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_the_stated_rounding_is_that_of_the_weights(dtype: torch.dtype, file: AdapterFile) -> None:
    base, unet = sd15_unet(), sd15_unet()
    rows = merge_adapter({"unet": unet, "text_encoder": text_encoder()}, file, dtype)
    deltas = {f"{component}.{path}": delta for component, path, delta in layer_updates(file)}
    for row in rows:
        component, _, path = row.layer.partition(".")
        if component == "unet":
            before, after = (m.get_submodule(path).weight.detach().double() for m in (base, unet))
            assert torch.equal(after, after.to(dtype).double())
            off = float((after - before - deltas[row.layer].double()).norm())
            assert row.relative == pytest.approx(off / float(deltas[row.layer].norm()), rel=1e-5)
            assert 1e-5 < row.relative < 0.05


def test_a_merge_that_is_refused_changes_nothing(file: AdapterFile, tmp_path: Path) -> None:
    huge = read_adapter(save_adapter(tmp_path, {"unet": adapt(sd15_unet(), scale=1e6)}))
    unet = sd15_unet()
    before = {name: weight.clone() for name, weight in unet.state_dict().items()}
    with pytest.raises(SnellaValueError, match=r"exceeds the range of torch\.float16"):
        merge_adapter({"unet": unet}, huge, torch.float16, max_relative_update=1e9)
    with pytest.raises(SnellaBaseError):
        merge_adapter({"unet": sd15_unet(in_channels=8), "text_encoder": text_encoder()}, file)
    after = unet.state_dict()
    assert after.keys() == before.keys()
    assert all(torch.equal(after[name], weight) for name, weight in before.items())


def test_the_table_names_every_layer_and_the_whole(file: AdapterFile, tmp_path: Path) -> None:
    report = export_lora(file, tmp_path / "out.safetensors", 3)
    lines = report.table().splitlines()
    assert len(lines) == 44 + 2
    assert "unet.down_blocks.1.attentions.0.transformer_blocks.0.attn1.to_q" in lines[1]
    assert lines[-1] == (
        f"all 44 layers as lora, rank 3, float32: relative error {report.relative:.3g}, "
        f"{report.energy:.2%} of the energy kept"
    )
