"""What counts as another base model, and what does not."""

from torch import nn

from snell_diffusion.adapters.identity import config_hash, model_settings
from tests.tiny_models import adapt, flux_transformer, sd3_transformer, sd15_unet, text_encoder


def test_equal_models_agree_and_weights_do_not_matter() -> None:
    assert config_hash(sd15_unet(seed=0)) == config_hash(sd15_unet(seed=5))
    assert config_hash(text_encoder(seed=0)) == config_hash(text_encoder(seed=5))


def test_settings_matter() -> None:
    assert config_hash(sd15_unet()) != config_hash(sd15_unet(attention_head_dim=8))
    assert config_hash(sd15_unet()) != config_hash(sd15_unet(use_linear_projection=True))


def test_precision_picture_size_and_origin_do_not_matter() -> None:
    unet = sd15_unet()
    expected = config_hash(unet)
    assert config_hash(unet.half()) == expected
    assert config_hash(sd15_unet(sample_size=64)) == expected
    unet.register_to_config(_name_or_path="somewhere/else")
    assert config_hash(unet) == expected


def test_an_adapter_does_not_matter() -> None:
    assert config_hash(adapt(sd15_unet())) == config_hash(sd15_unet())


def test_defaults_are_left_out_so_new_options_change_no_hash() -> None:
    settings = model_settings(sd15_unet())
    assert "cross_attention_dim" in settings
    assert "dropout" not in settings
    assert not [name for name in settings if name.startswith("_")]


def test_every_family_has_a_hash_of_its_own() -> None:
    models = [sd15_unet(), sd3_transformer(), flux_transformer(), text_encoder()]
    assert len({config_hash(model) for model in models}) == len(models)


def test_a_module_without_config_has_no_settings() -> None:
    assert model_settings(nn.Linear(2, 2)) == {}
    assert model_settings(sd15_unet())["block_out_channels"] == [16, 32]
