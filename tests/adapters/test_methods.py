"""Files of every method of ours, and of few bits per number: format 1.2."""

import json
import re
from pathlib import Path

import pytest
import torch
from peft import inject_adapter_in_model
from torch import nn

from snell_diffusion import SnellaConfig
from snell_diffusion.__main__ import main as command_line
from snell_diffusion.adapters import load_adapter, read_adapter, save_adapter
from snell_diffusion.adapters.container import encode, read_head, read_tensors
from snell_diffusion.adapters.export_lora import export_lora
from snell_diffusion.adapters.export_merge import merge_adapter
from snell_diffusion.adapters.quantize import quantize_adapter, rounded
from snell_diffusion.adapters.schema import DIGEST_KEY, HEADER_KEY, digest
from snell_diffusion.adapters.state import adapter_state
from snell_diffusion.core.quantize import decode, packed_bytes
from snell_diffusion.core.quantize import encode as encode_bits
from snell_diffusion.errors import SnellaError
from snell_diffusion.tuners import METHODS, delta_layers
from snell_diffusion.tuners.recipes import RECIPES, recipe
from snell_diffusion.tuners.transform import TransformLayer
from tests.tiny_models import pipeline, sd15_unet

OURS = [name for name, found in RECIPES.items() if found.ours]
TARGETS = ["to_q", "to_k", "to_v", "to_out.0", "ff.net.0.proj", "ff.net.2"]


def call(model: nn.Module) -> torch.Tensor:
    generator = torch.Generator().manual_seed(5)
    x = torch.randn(1, model.config.in_channels, 8, 8, generator=generator)
    width = model.config.cross_attention_dim
    states = torch.randn(1, 3, width, generator=generator)
    with torch.no_grad():
        return model(x, 500, encoder_hidden_states=states).sample


def trained(name: str, **settings: object) -> nn.Module:
    """A UNet with an adapter whose every float tensor has moved from its start."""
    model = sd15_unet().requires_grad_(False)
    rank = {"rank": 4} if "rank" in recipe(name).settings else {}
    config = recipe(name).config({**rank, **settings}, TARGETS, 0)
    inject_adapter_in_model(config, model, "default")
    generator = torch.Generator().manual_seed(1)
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.requires_grad:
                parameter += 0.02 * torch.randn(parameter.shape, generator=generator)
    return model.eval()


@pytest.mark.parametrize("name", OURS)
def test_a_file_gives_back_what_was_saved(name: str, tmp_path: Path) -> None:
    model = trained(name)
    path = save_adapter(tmp_path / "a.safetensors", {"unet": model})
    file = read_adapter(path)
    part = file.header.components["unet"]
    stored = METHODS[name.upper()].stored_as
    assert part.method == stored
    assert set(file.header.requires) >= {stored}
    if stored == "snella":
        assert file.header.format == "1.0"
    else:
        assert file.header.format == "1.2"
        assert all(row.tensors is not None and row.kept is None for row in part.layers.values())
    other = sd15_unet()
    report = load_adapter({"unet": other.eval()}, file)
    assert report.layers == {"unet": len(list(delta_layers(model)))}
    torch.testing.assert_close(call(other), call(model), rtol=1e-5, atol=1e-6)
    assert not torch.equal(call(other), call(sd15_unet().eval()))
    assert report.largest_update > 0


@pytest.mark.parametrize("name", OURS)
def test_saving_what_was_loaded_gives_the_same_numbers(name: str, tmp_path: Path) -> None:
    first = save_adapter(tmp_path / "a.safetensors", {"unet": trained(name)})
    model = sd15_unet()
    load_adapter({"unet": model}, read_adapter(first))
    second = read_adapter(save_adapter(tmp_path / "b.safetensors", {"unet": model})).tensors
    for key, tensor in read_adapter(first).tensors.items():
        assert torch.equal(tensor, second[key]), key


@pytest.mark.parametrize("bits", [1, 2, 4, 8])
@pytest.mark.parametrize("name", ["snella", "snell", "binary_lora"])
def test_few_bits_are_packed_and_mean_what_training_used(
    name: str, bits: int, tmp_path: Path
) -> None:
    model = trained(name, bits=bits)
    path = save_adapter(tmp_path / "a.safetensors", {"unet": model})
    file = read_adapter(path)
    part = file.header.components["unet"]
    assert (part.bits, file.header.format) == (bits, "1.2")
    other = sd15_unet().eval()
    load_adapter({"unet": other}, file)
    torch.testing.assert_close(call(other), call(model), rtol=1e-4, atol=1e-5)
    factors = [
        tensor
        for key, tensor in file.tensors.items()
        if key.rpartition(".")[2] in ("snella_A", "snella_B", "binary_lora_down", "binary_lora_up")
    ]
    assert all(len(tensor.unique()) <= 2**bits for tensor in factors)
    with path.open("rb") as stream:
        head = read_head(stream, path.stat().st_size, "a")
    codes = next(entry for key, entry in head.entries.items() if key.endswith("_codes"))
    expected = sum(packed_bytes(tensor.numel(), bits) - 8 for tensor in factors)
    assert (codes.dtype, codes.shape) == ("U8", (expected,))
    plain = save_adapter(tmp_path / "p.safetensors", {"unet": trained(name, bits=32)})
    assert path.stat().st_size < plain.stat().st_size


def test_plain_snella_files_are_what_readers_of_before_know(tmp_path: Path) -> None:
    file = read_adapter(save_adapter(tmp_path / "a.safetensors", {"unet": trained("snella")}))
    assert (file.header.format, file.header.requires) == ("1.0", ["snella"])
    data = file.header.to_data()["components"]["unet"]
    assert set(data) == {"method", "config", "base", "layers"}
    assert not {"bits", "quantized"} & set(data["config"])
    rows = data["layers"].values()
    names = {"kind", "shape", "r", "heads", "sparsity", "threshold", "kept"}
    assert all(set(row) == names for row in rows)


def test_the_state_of_few_bits_is_what_they_stand_for() -> None:
    model = trained("snella", bits=1)
    state = adapter_state({"unet": model})
    values = next(tensor for key, tensor in state.items() if key.endswith("snella_A"))
    assert len(values.unique()) == 2
    _, layer = next(delta_layers(model))
    assert len(layer.snella_A["default"].unique()) > 2
    assert torch.equal(layer.delta_params("default")[0], values) or torch.allclose(
        layer.delta_params("default")[0], values, atol=1e-7
    )


def test_few_bits_learn_straight_through() -> None:
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(12, 10)).requires_grad_(False)
    config = SnellaConfig(r=4, bits=2, target_modules=["0"], seed=0, sparsify="mask", scale=3.0)
    model = inject_adapter_in_model(config, model, "default").train()
    x, y = torch.randn(64, 12), torch.randn(64, 10)
    parameters = [p for p in model.parameters() if p.requires_grad]
    optimizer = torch.optim.Adam(parameters, lr=1e-2)
    losses = []
    for _ in range(60):
        optimizer.zero_grad()
        loss = (model(x) - y).square().mean()
        loss.backward()
        assert all(p.grad is not None and bool(p.grad.isfinite().all()) for p in parameters)
        optimizer.step()
        losses.append(float(loss.detach()))
    assert losses[-1] < 0.97 * losses[0]


def rewritten(path: Path, change) -> Path:
    """The file with a changed header table and tensors, and a digest that fits."""
    with path.open("rb") as stream:
        head = read_head(stream, path.stat().st_size, "x")
        tensors = read_tensors(stream, head, "x")
    data = json.loads(head.metadata[HEADER_KEY])
    change(data, tensors)
    text = json.dumps(data, separators=(",", ":"))
    metadata = {**head.metadata, HEADER_KEY: text, DIGEST_KEY: digest(text, tensors)}
    out = path.with_name("changed.safetensors")
    out.write_bytes(encode(tensors, metadata))
    return out


def rows(data: dict) -> dict:
    return data["components"]["unet"]["layers"]


def first_row(data: dict) -> dict:
    return next(iter(rows(data).values()))


def codes_name(tensors: dict) -> str:
    return next(name for name in tensors if name.endswith("_codes"))


DAMAGE = {
    "codes short": (
        {"bits": 2},
        lambda d, t: t.update({codes_name(t): t[codes_name(t)][:-1]}),
        "codes': expected shape",
    ),
    "codes as floats": (
        {"bits": 2},
        lambda d, t: t.update({codes_name(t): t[codes_name(t)].float()}),
        "expected U8, got F32",
    ),
    "no codes": ({"bits": 2}, lambda d, t: t.pop(codes_name(t)), "by the layer table, got nothing"),
    "negative spread": (
        {"bits": 2},
        lambda d, t: t[codes_name(t).replace("codes", "numbers")].__setitem__(1, -1.0),
        "0 or more",
    ),
    "nan": (
        {"bits": 2},
        lambda d, t: t[codes_name(t).replace("codes", "numbers")].__setitem__(0, torch.nan),
        "expected finite numbers",
    ),
    "spread beyond float32": (
        {"bits": 2},
        lambda d, t: t[codes_name(t).replace("codes", "numbers")].__setitem__(1, 3.4e38),
        "snella_A': expected finite numbers",
    ),
    "other bits": (
        {"bits": 2},
        lambda d, t: d["components"]["unet"].update(bits=4),
        "codes': expected shape",
    ),
    "bits of 3": (
        {"bits": 2},
        lambda d, t: d["components"]["unet"].update(bits=3),
        "bits': expected 1, 2, 4 or 8, got 3",
    ),
    "packed unsaid": ({"bits": 2}, lambda d, t: d.update(requires=["snella"]), "expected 'packed'"),
    "sizes left out": (
        {},
        lambda d, t: first_row(d).pop("r"),
        r"\.r': expected it to be there",
    ),
    "shapes beside sizes": (
        {},
        lambda d, t: first_row(d).update(tensors={"snella_A": [1]}),
        "expected none such of method 'snella'",
    ),
    "whole numbers as factors": (
        {},
        lambda d, t: t.update({k: v.long() for k, v in t.items() if k.endswith("_B")}),
        "expected floats, got I64",
    ),
}
FOREIGN_DAMAGE = {
    "other shape": (
        lambda d, t: first_row(d)["tensors"].update(hta_d=[3]),
        "by the layer table",
    ),
    "strange tensor": (
        lambda d, t: t.update({"unet.conv_in.weight": torch.zeros(2)}),
        "expected only tensors of the layers in its table",
    ),
    "tensor of another name": (
        lambda d, t: first_row(d)["tensors"].update(weight=[3]),
        "expected names that begin with 'hta_'",
    ),
    "levels": (lambda d, t: first_row(d).update(kept=3), "nothing of SNELLA's, got kept"),
    "no shapes": (lambda d, t: first_row(d).pop("tensors"), "nothing of SNELLA's, got no shapes"),
    "earlier format": (lambda d, t: d.update(format="1.1"), "expected .?1.2"),
    "huge": (
        lambda d, t: [v.mul_(1e6) for k, v in t.items() if k.endswith(("hta_d", "hta_vl"))],
        "times as large as the weight",
    ),
    "bits": (
        lambda d, t: (d["components"]["unet"].update(bits=2), d["requires"].append("packed")),
        "whose tensors are not packed",
    ),
}


@pytest.mark.parametrize("name", DAMAGE)
def test_damaged_packed_files_are_refused(name: str, tmp_path: Path) -> None:
    settings, change, message = DAMAGE[name]
    path = save_adapter(tmp_path / "a.safetensors", {"unet": trained("snella", **settings)})
    with pytest.raises(SnellaError, match=message):
        read_adapter(rewritten(path, change))


@pytest.mark.parametrize("name", FOREIGN_DAMAGE)
def test_damaged_files_of_other_methods_change_nothing(name: str, tmp_path: Path) -> None:
    change, message = FOREIGN_DAMAGE[name]
    path = save_adapter(tmp_path / "a.safetensors", {"unet": trained("hta")})
    model = sd15_unet().eval()
    before = call(model)
    with pytest.raises(SnellaError, match=message):
        load_adapter({"unet": model}, read_adapter(rewritten(path, change)))
    assert torch.equal(call(model), before)
    assert not list(delta_layers(model))


def test_layers_of_another_model_are_refused(tmp_path: Path) -> None:
    path = save_adapter(tmp_path / "a.safetensors", {"unet": trained("arc")})
    other = sd15_unet(block_out_channels=(24, 48), norm_num_groups=8)
    with pytest.raises(SnellaError, match=re.compile("trained on|expected")):
        load_adapter({"unet": other}, read_adapter(path), allow_other_base=True)
    assert not list(delta_layers(other))


@pytest.mark.parametrize("name", [n for n in OURS if n not in ("snella", "snell", "klora", "mixk")])
def test_bare_tensors_of_other_methods_say_what_is_missing(name: str) -> None:
    state = adapter_state({"unet": trained(name)})
    with pytest.raises(SnellaError, match=r"expected a tensor '<component>.snella_method'"):
        read_adapter(state)


def test_transform_layers_have_a_size() -> None:
    _, layer = next(delta_layers(trained("arc")))
    assert isinstance(layer, TransformLayer)
    assert layer.update_size("default") > 0


def test_a_selection_of_spt_comes_back_from_its_tensors(tmp_path: Path) -> None:
    model = sd15_unet().requires_grad_(False)
    paths = [p for p, m in model.named_modules() if p.endswith(("attn1.to_q", "attn1.to_out.0"))]
    norm = next(p for p, m in model.named_modules() if isinstance(m, nn.LayerNorm))
    selection = {
        "structured": paths[:1],
        "vectors": [f"{paths[1]}.bias", f"{norm}.weight"],
        "entries": {f"{paths[1]}.weight": [3, 7, 250], f"{norm}.bias": [1]},
    }
    config = METHODS["SPT_LORA"].config(r=2, selection=selection, seed=0)
    inject_adapter_in_model(config, model, "default")
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.requires_grad:
                parameter += 0.1
    path = save_adapter(tmp_path / "a.safetensors", {"unet": model.eval()})
    other = sd15_unet().eval()
    load_adapter({"unet": other}, read_adapter(path))
    assert {p for p, _ in delta_layers(other)} == {paths[0], paths[1], norm}
    torch.testing.assert_close(call(other), call(model), rtol=1e-5, atol=1e-6)

    def out_of_range(data: dict, tensors: dict) -> None:
        name = next(n for n in tensors if n.endswith("spt_lora_positions"))
        tensors[name][0] = 10**9

    third = sd15_unet().eval()
    with pytest.raises(SnellaError, match=r"positions.*1000000000"):
        load_adapter({"unet": third}, read_adapter(rewritten(path, out_of_range)))
    assert not list(delta_layers(third))


@pytest.mark.parametrize("bits", [1, 2, 4, 8])
def test_quantizing_a_file_rounds_the_factors_and_nothing_else(bits: int, tmp_path: Path) -> None:
    source = save_adapter(tmp_path / "a.safetensors", {"unet": trained("snella")})
    before = read_adapter(source)
    path = quantize_adapter(source, tmp_path / "b.safetensors", bits)
    after = read_adapter(path)
    assert set(before.tensors) == set(after.tensors)
    for name, tensor in after.tensors.items():
        if name.endswith(("snella_A", "snella_B")):
            assert torch.equal(tensor, decode(*pack_bits(before.tensors[name], bits), tensor.shape))
        elif not name.endswith("_method"):
            assert torch.equal(tensor, before.tensors[name]), name
    assert path.stat().st_size < source.stat().st_size
    assert rounded(before, bits).tensors.keys() == after.tensors.keys()
    assert all(torch.equal(t, after.tensors[n]) for n, t in rounded(before, bits).tensors.items())
    model = sd15_unet().eval()
    load_adapter({"unet": model}, after)
    error = float((call(model) - call(trained("snella"))).norm())
    assert (error < 1e-2) if bits == 8 else (error > 0)


def pack_bits(tensor: torch.Tensor, bits: int) -> tuple[torch.Tensor, torch.Tensor, int]:
    codes, stats = encode_bits(tensor, bits)
    return codes, stats, bits


@pytest.mark.parametrize(
    "name, settings, bits, message",
    [
        ("hta", {}, 2, "has no factors that are stored in few bits"),
        ("snella", {"bits": 2}, 1, "has 2 bits per number already"),
        ("snella", {}, 3, "bits must be one of 1, 2, 4, 8, got 3"),
    ],
)
def test_what_cannot_be_quantized(
    name: str, settings: dict, bits: int, message: str, tmp_path: Path
) -> None:
    source = save_adapter(tmp_path / "a.safetensors", {"unet": trained(name, **settings)})
    with pytest.raises(SnellaError, match=message):
        quantize_adapter(source, tmp_path / "b.safetensors", bits)
    assert not (tmp_path / "b.safetensors").exists()


def test_quantize_from_the_command_line(tmp_path: Path, capsys: pytest.CaptureFixture) -> None:
    source = save_adapter(tmp_path / "a.safetensors", {"unet": trained("snella")})
    arguments = ["quantize", str(source), "--bits", "4", "--output", str(tmp_path / "b")]
    assert command_line(arguments) == 0
    (path,) = (tmp_path / "b").glob("*.safetensors")
    assert f"-> {path.stat().st_size:,} bytes" in capsys.readouterr().out
    assert command_line(arguments) == 1
    assert "pass --overwrite" in capsys.readouterr().err
    assert command_line([*arguments, "--overwrite"]) == 0


@pytest.mark.parametrize("name", ["arc", "spt_lora", "hta", "binary_lora"])
def test_merging_for_good_leaves_stock_modules_that_compute_the_same(
    name: str, tmp_path: Path
) -> None:
    file = read_adapter(save_adapter(tmp_path / "a.safetensors", {"unet": trained(name)}))
    model = sd15_unet().eval()
    rows = merge_adapter({"unet": model}, file)
    assert max(row.relative for row in rows) < 1e-5
    torch.testing.assert_close(call(model), call(trained(name)), rtol=1e-4, atol=1e-5)
    assert not list(delta_layers(model))


@pytest.mark.parametrize("name", ["spt_adapter", "binary_adapter"])
def test_what_cannot_be_merged_leaves_the_model_as_it_was(name: str, tmp_path: Path) -> None:
    file = read_adapter(save_adapter(tmp_path / "a.safetensors", {"unet": trained(name)}))
    model = sd15_unet().eval()
    with pytest.raises(ValueError, match="cannot be merged"):
        merge_adapter({"unet": model}, file)
    assert torch.equal(call(model), call(sd15_unet().eval()))


def test_a_lora_of_what_is_no_matrix_is_refused(tmp_path: Path) -> None:
    file = read_adapter(save_adapter(tmp_path / "a.safetensors", {"unet": trained("arc")}))
    with pytest.raises(SnellaError, match="is no matrix added to each weight"):
        export_lora(file, tmp_path / "b.safetensors", 4, "lora")


def test_levels_belong_to_methods_that_have_them(tmp_path: Path) -> None:
    pipe = pipeline()
    for name in ("hta", "snella"):
        path = save_adapter(tmp_path / f"{name}.safetensors", {"unet": trained(name)})
        pipe.load_snella_weights(str(path), adapter_name=name)
    with pytest.raises(SnellaError, match=r"'?hta'? are of a method without sparsity levels"):
        pipe.set_snella_sparsity(0.5, "hta")
    pipe.set_snella_sparsity(0.5)
    levels = [x.sparsity("snella") for _, x in delta_layers(pipe.unet, "snella")]
    assert set(levels) == {0.5}
