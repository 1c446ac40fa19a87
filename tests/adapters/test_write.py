"""Saving: what is written, that it is exact, and what is refused."""

from pathlib import Path

import pytest
import torch
from safetensors import safe_open
from safetensors.torch import load_file
from torch import nn

from snell_diffusion.adapters import (
    adapter_file_bytes,
    adapter_names,
    adapter_state,
    read_adapter,
    save_adapter,
    state_with_header,
)
from snell_diffusion.adapters.doubles import join_doubles
from snell_diffusion.adapters.write import target_file
from snell_diffusion.errors import (
    SnellaConfigError,
    SnellaKeyError,
    SnellaSchemaError,
    SnellaValueError,
)
from snell_diffusion.tuners import delta_layers
from tests.tiny_models import adapt, sd15_unet

PLACE = "mid_block.attentions.0.transformer_blocks.0.attn1.to_q"
Components = dict[str, nn.Module]


def test_a_folder_gets_the_default_name(tmp_path: Path) -> None:
    assert target_file(tmp_path) == tmp_path / "pytorch_snella_weights.safetensors"
    assert target_file(tmp_path / "a.safetensors") == tmp_path / "a.safetensors"


def test_keys_are_component_path_and_tensor_without_the_adapter_name(
    adapter_path: Path, adapted: Components
) -> None:
    names = set(load_file(adapter_path))
    assert f"unet.{PLACE}.snella_A" in names
    assert "text_encoder.encoder.layers.0.self_attn.q_proj.snella_B" in {
        name.replace("text_model.", "") for name in names
    }
    assert {name.rpartition(".")[2] for name in names} == {
        *(f"snella_{name}" for name in ("A", "B", "alpha", "gamma", "beta", "signs", "sparsity")),
        "snella_method",
    }
    layers = sum(len(list(delta_layers(model))) for model in adapted.values())
    assert len(names) == 7 * layers + 2


def test_values_are_the_live_ones_bit_for_bit(adapter_path: Path, adapted: Components) -> None:
    stored = load_file(adapter_path)
    for path, layer in delta_layers(adapted["unet"]):
        assert torch.equal(stored[f"unet.{path}.snella_A"], layer.snella_A["default"])
        level = join_doubles(stored[f"unet.{path}.snella_sparsity"], path)
        assert torch.equal(level, layer.snella_sparsity["default"])


def test_the_layer_table_tells_level_and_kept_entries(
    adapter_path: Path, adapted: Components
) -> None:
    rows = read_adapter(adapter_path).header.components["unet"].layers
    layers = dict(delta_layers(adapted["unet"]))
    assert list(rows) == list(layers)
    for path, row in rows.items():
        assert row.sparsity == layers[path].sparsity("default")
        assert row.kept == int((layers[path].get_delta_weight("default") != 0).sum())
        assert row.threshold is None
    assert len({row.sparsity for row in rows.values()}) == len(rows)


def test_other_tools_see_the_header(adapter_path: Path) -> None:
    with safe_open(adapter_path, framework="pt") as file:
        metadata = file.metadata()
    assert metadata["format"] == "pt"
    assert metadata["snella.format"] == "1.0"


def test_equal_adapters_give_equal_bytes(adapted: Components) -> None:
    assert adapter_file_bytes(adapted) == adapter_file_bytes(adapted)
    other = {"unet": adapt(sd15_unet(), seed=9)}
    assert adapter_file_bytes({"unet": adapted["unet"]}) != adapter_file_bytes(other)


def test_a_stored_threshold_is_kept_and_told() -> None:
    unet = adapt(sd15_unet())
    layer = dict(delta_layers(unet))[PLACE]
    value = layer.store_threshold("default")
    data = adapter_file_bytes({"unet": unet})
    file = read_adapter(data)
    assert file.header.components["unet"].layers[PLACE].threshold == value
    assert float(file.tensors[f"unet.{PLACE}.snella_threshold"]) == value


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_half_precision_rounds_the_factors_alone(dtype: torch.dtype) -> None:
    unet = adapt(sd15_unet())
    dict(delta_layers(unet))[PLACE].store_threshold("default")
    full = adapter_file_bytes({"unet": unet})
    half = adapter_file_bytes({"unet": unet}, dtype=dtype)
    assert len(half) < len(full)
    file = read_adapter(half)
    exact = read_adapter(full).tensors
    assert file.header.components["unet"].layers[PLACE].threshold is None
    for name, tensor in file.tensors.items():
        factor = name.endswith(("_A", "_B"))
        assert tensor.dtype == (dtype if factor else exact[name].dtype)
        assert torch.equal(tensor, exact[name].to(tensor.dtype))


def test_only_listed_storage_types(adapted: Components) -> None:
    with pytest.raises(SnellaValueError, match="dtype must be float32, float16 or bfloat16, got"):
        adapter_file_bytes(adapted, dtype=torch.float64)


def test_an_unknown_name_lists_the_known_ones(adapted: Components) -> None:
    message = "no layer of text_encoder, unet has a SNELLA adapter named 'x'; loaded: default"
    with pytest.raises(SnellaKeyError, match=message):
        save_adapter("unused", adapted, "x")
    with pytest.raises(SnellaKeyError, match="loaded: none"):
        adapter_state({"unet": sd15_unet()})


def test_components_without_the_adapter_are_left_out(adapted: Components) -> None:
    unet = adapt(sd15_unet(), "other")
    data = adapter_file_bytes({**adapted, "unet": unet}, "other")
    assert list(read_adapter(data).header.components) == ["unet"]
    assert adapter_names({**adapted, "unet": unet}) == ["other", "default"]


def test_broken_values_are_not_written(tmp_path: Path) -> None:
    unet = adapt(sd15_unet())
    with torch.no_grad():
        dict(delta_layers(unet))[PLACE].snella_B["default"][0, 1, 1] = torch.nan
    with pytest.raises(SnellaValueError, match=rf"'unet.{PLACE}.snella_B' .* holds NaN"):
        save_adapter(tmp_path, {"unet": unet})
    assert list(tmp_path.iterdir()) == []


def test_metadata_beyond_the_limits_is_not_written(tmp_path: Path, adapted: Components) -> None:
    with pytest.raises(SnellaSchemaError, match=r"metadata.prompt"):
        save_adapter(tmp_path, adapted, metadata={"prompt": "x" * 2049})
    with pytest.raises(
        SnellaSchemaError, match=r"expected at most 64 entries.*nothing was written"
    ):
        save_adapter(tmp_path, adapted, metadata={f"n{i}": i for i in range(65)})
    assert list(tmp_path.iterdir()) == []


def test_modules_to_save_have_no_place_in_the_format() -> None:
    unet = adapt(sd15_unet(), modules_to_save=["conv_out"])
    with pytest.raises(SnellaConfigError, match=r"trains whole modules .conv_out."):
        adapter_file_bytes({"unet": unet})


def test_one_component_has_one_config() -> None:
    unet = adapt(sd15_unet())
    other = adapt(sd15_unet(), r=8)
    layer = dict(delta_layers(unet))[PLACE]
    layer.configs["default"] = dict(delta_layers(other))[PLACE].configs["default"]
    with pytest.raises(SnellaConfigError, match="has other settings than the layers before it"):
        adapter_file_bytes({"unet": unet})


def test_state_with_header_is_read_as_the_file_is(adapted: Components) -> None:
    state = state_with_header(adapted)
    assert isinstance(state["snella.header"], str)
    file = read_adapter(state)
    assert file.header.components == read_adapter(adapter_file_bytes(adapted)).header.components


def test_of_a_local_base_only_the_folder_name_is_told(tmp_path: Path, adapted: Components) -> None:
    folder = tmp_path / "my-base"
    folder.mkdir()
    data = adapter_file_bytes(adapted, base={"source": str(folder), "revision": "x" * 999})
    origin = read_adapter(data).header.origin
    assert (origin.source, len(origin.revision or "")) == ("my-base", 256)
    assert (
        read_adapter(adapter_file_bytes(adapted, base={"source": None})).header.origin.source
        is None
    )


def test_a_double_precision_model_is_saved_in_float32() -> None:
    unet = adapt(sd15_unet()).double()
    file = read_adapter(adapter_file_bytes({"unet": unet}))
    assert {tensor.dtype for tensor in file.tensors.values()} == {torch.float32}


def test_a_level_below_what_a_file_holds_is_not_written() -> None:
    unet = adapt(sd15_unet())
    dict(delta_layers(unet))[PLACE].set_sparsity("default", 1e-40)
    message = rf"{PLACE}.snella_sparsity of adapter 'default': expected 0 or .*1e-40"
    with pytest.raises(SnellaValueError, match=message):
        adapter_file_bytes({"unet": unet})


def test_a_safety_checker_is_no_component_of_an_adapter(adapted: Components) -> None:
    with pytest.raises(SnellaSchemaError, match=r"'safety_checker', which no adapter may change"):
        adapter_file_bytes({"safety_checker": adapted["text_encoder"]})


def test_texts_of_commas_beyond_what_a_reader_takes_are_not_written(adapted: Components) -> None:
    notes = {f"n{index}": "," * 2048 for index in range(40)}
    with pytest.raises(SnellaSchemaError, match=r"at most 65,536 values .*nothing was written"):
        adapter_file_bytes(adapted, metadata=notes)
