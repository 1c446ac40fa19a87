"""Every key is documented, checked, and found by its nearest name."""

import dataclasses
import re
from pathlib import Path

import pytest
import yaml

from snell_diffusion.diffusion.config import TrainConfig
from snell_diffusion.diffusion.config_files import (
    KEYS,
    config_text,
    make_config,
    make_parser,
    parse_config,
    read_config,
)
from snell_diffusion.diffusion.config_groups import GROUPS
from snell_diffusion.errors import SnellaConfigError

LEAST = ["--instance_data_dir", "photos", "--instance_prompt", "a sks cat"]
LEAST_VALUES = {"instance_data_dir": "photos", "instance_prompt": "a sks cat"}

# Flags that users of the diffusers scripts know: they must keep these names.
DIFFUSERS_NAMES = """
pretrained_model_name_or_path revision variant instance_data_dir class_data_dir instance_prompt
class_prompt with_prior_preservation prior_loss_weight num_class_images output_dir seed resolution
center_crop train_text_encoder train_batch_size sample_batch_size max_train_steps
checkpointing_steps checkpoints_total_limit resume_from_checkpoint gradient_accumulation_steps
gradient_checkpointing learning_rate text_encoder_lr lr_scheduler snr_gamma lr_warmup_steps
lr_num_cycles lr_power optimizer adam_beta1 adam_beta2 adam_weight_decay adam_epsilon max_grad_norm
report_to mixed_precision rank random_flip cache_latents validation_prompt num_validation_images
dataloader_num_workers
""".split()  # noqa: SIM905


def test_names_of_the_diffusers_scripts_are_there() -> None:
    assert set(DIFFUSERS_NAMES) <= set(KEYS)


@pytest.mark.parametrize("key", KEYS)
def test_every_key_says_what_it_is(key: str) -> None:
    field = {f.name: f for f in dataclasses.fields(TrainConfig)}[key]
    assert re.fullmatch(r"[A-Za-z].{15,}[.)]", field.metadata["help"], re.DOTALL)


def test_groups_hold_every_key_once() -> None:
    names = [f.name for group in GROUPS for f in dataclasses.fields(group)]
    assert sorted(names) == sorted(KEYS)
    assert all(group.__doc__ for group in GROUPS)


def test_numbers_of_yaml_are_numbers(tmp_path: Path) -> None:
    path = tmp_path / "run.yaml"
    path.write_text("instance_data_dir: p\ninstance_prompt: x\nlearning_rate: 2e-5\n")
    assert parse_config(["--config", str(path)]).learning_rate == 2e-5


def test_command_line_wins_over_the_file(tmp_path: Path) -> None:
    path = tmp_path / "run.yaml"
    values = {**LEAST_VALUES, "rank": 4, "cache_latents": True, "center_crop": True, "seed": 7}
    path.write_text(yaml.safe_dump({**values, "optimizer_args": {"amsgrad": True}}))
    config = parse_config(
        ["--config", str(path), "--rank", "8", "--no_cache_latents", "--sample_prompts", "a", "b"]
    )
    assert (config.rank, config.cache_latents, config.seed) == (8, False, 7)
    assert config.sample_prompts == ["a", "b"]
    assert config.optimizer_args == ["amsgrad=True"]


@pytest.mark.parametrize("flag", ["--base", "--pretrained_model_name_or_path"])
def test_base_has_a_short_name(flag: str) -> None:
    assert parse_config([*LEAST, flag, "x/y"]).pretrained_model_name_or_path == "x/y"
    assert make_config({**LEAST_VALUES, "base": "z"}).pretrained_model_name_or_path == "z"


def test_saved_text_reads_back_to_an_equal_config(tmp_path: Path) -> None:
    config = make_config({**LEAST_VALUES, "snr_gamma": 5, "sample_prompts": ["ä: #1"], "rank": 4})
    path = tmp_path / "config.yaml"
    path.write_text(config_text(config), "utf-8")
    assert make_config(read_config(path)) == config
    assert set(read_config(path)) == set(KEYS)


@pytest.mark.parametrize(
    "arguments, message",
    [
        (["--lerning_rate", "1"], r"unknown argument '--lerning_rate', did you mean '--learning_r"),
        (["--learning-rat=1"], r"unknown argument '--learning-rat', did you mean '--learning_rate"),
        (["--learning_rate", "0"], r"learning_rate should be greater than 0, got 0.0"),
        (["--learning_rate", "nan"], r"learning_rate should be a finite number, got nan"),
        (["--learning_rate", "x"], r"--learning_rate.*: invalid float value: 'x'"),
        (["--method", "lokr"], r"argument --method: invalid choice: 'lokr'"),
        (["--resolution", "60"], r"resolution must be a multiple of 8 pixels, got 60"),
        (["--ema_decay", "1"], r"ema_decay should be less than 1, got 1.0"),
        (["--with_prior_preservation"], r"with_prior_preservation needs class_prompt"),
        (["--no_center_crop"], r"random crops \(center_crop off\) need cache_latents off"),
        (["--optimizer_args", "amsgrad"], r"optimizer_args expected name=value, got 'amsgrad'"),
        (["--validation_data_dir", "v", "--num_validation_photos", "1"], r"not both"),
        (["--config", "absent.yaml"], r"config file absent.yaml cannot be read: No such file"),
        (["--rank", "1025"], r"rank should be less than or equal to 1024, got 1025"),
        (["--heads", "65"], r"heads should be less than or equal to 64, got 65"),
        (["--seed", str(2**63)], r"seed should be less than 9223372036854775808"),
        (["--dataloader_num_workers", "-1"], r"dataloader_num_workers should be greater than or"),
    ],
)
def test_mistakes_are_told(arguments: list[str], message: str) -> None:
    with pytest.raises(SnellaConfigError, match=message):
        parse_config([*LEAST, *arguments])


@pytest.mark.parametrize("key", ["instance_prompt", "class_prompt"])
def test_prompts_that_no_adapter_file_can_hold_are_refused_at_once(key: str) -> None:
    make_config({**LEAST_VALUES, key: "a" * 2048})
    with pytest.raises(
        SnellaConfigError,
        match=rf"{key} should have at most 2048 characters, has 2049, got 'a{{79}}\.\.\.$",
    ):
        make_config({**LEAST_VALUES, key: "a" * 2049})
    with pytest.raises(SnellaConfigError, match=rf"{key} should be text that UTF-8 can hold"):
        make_config({**LEAST_VALUES, key: "a \udcff cat"})


@pytest.mark.parametrize("missing", LEAST_VALUES)
def test_what_must_be_given_is_named(missing: str) -> None:
    values = {k: v for k, v in LEAST_VALUES.items() if k != missing}
    with pytest.raises(SnellaConfigError, match=f"{missing} is missing"):
        make_config(values)


def test_all_unknown_keys_of_a_file_are_named() -> None:
    values = {**LEAST_VALUES, "lr": 1, "instance_promt": "x", "zzz": 1}
    with pytest.raises(SnellaConfigError) as error:
        make_config(values, where="run.yaml")
    for part in ("run.yaml: ", "'lr'", "'instance_promt', did you mean 'instance_prompt'", "'zzz'"):
        assert part in str(error.value)


def test_files_of_another_encoding_are_refused(tmp_path: Path) -> None:
    path = tmp_path / "run.yaml"
    path.write_bytes(b"instance_prompt: caf\xe9\n")
    with pytest.raises(SnellaConfigError, match=r"run\.yaml is not UTF-8 text"):
        read_config(path)


@pytest.mark.parametrize("text", ["- a\n- b\n", "a: [1\n"])
def test_files_that_are_no_mapping_are_refused(tmp_path: Path, text: str) -> None:
    path = tmp_path / "run.yaml"
    path.write_text(text)
    with pytest.raises(SnellaConfigError, match=r"run.yaml (should hold|is not valid YAML)"):
        read_config(path)


def test_help_can_be_printed() -> None:
    text = " ".join(make_parser().format_help().split())
    assert "about 30 % more time" in text
    assert "--resume_from_checkpoint" in text


def test_settings_cannot_be_changed_afterwards() -> None:
    config = make_config(LEAST_VALUES)
    with pytest.raises(dataclasses.FrozenInstanceError):
        config.rank = 3  # type: ignore[misc]


@pytest.mark.parametrize("name", ["demo", "demo_dit", "sd15", "sd21", "small_file"])
def test_shipped_configs_are_valid(repo_root: Path, name: str) -> None:
    path = repo_root / "configs" / "dreambooth" / f"{name}.yaml"
    config = make_config(read_config(path), where=str(path))
    assert f"configs/dreambooth/{name}.yaml" in path.read_text()
    assert config.method == "snella"
