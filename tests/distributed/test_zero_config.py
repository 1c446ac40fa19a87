"""What a launcher may ask of DeepSpeed, and what is refused by name; needs no DeepSpeed."""

import json
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from accelerate import Accelerator

from snell_diffusion.errors import SnellaConfigError
from snell_diffusion.training.parallel.zero import Zero, import_deepspeed
from snell_diffusion.training.parallel.zero_config import read_settings, require_entrywise

ACCELERATE = "ACCELERATE_"
DEEPSPEED = "ACCELERATE_DEEPSPEED_"


def from_file(folder: Path, **given: Any) -> dict[str, str]:
    path = folder / "ds.json"
    path.write_text(json.dumps(given), "utf-8")
    return {f"{DEEPSPEED}CONFIG_FILE": str(path)}


@pytest.mark.parametrize("stage", [1, 2, 3])
def test_the_stage_comes_from_the_environment(stage: int) -> None:
    assert read_settings({f"{DEEPSPEED}ZERO_STAGE": str(stage)}).stage == stage


def test_without_a_stage_it_is_accelerates_default() -> None:
    assert read_settings({f"{DEEPSPEED}CONFIG_FILE": "none"}).stage == 2


def test_a_file_gives_stage_and_tuning(tmp_path: Path) -> None:
    section = {
        "stage": 3,
        "reduce_bucket_size": 1000,
        "stage3_prefetch_bucket_size": "auto",
        "offload_param": {"device": "none"},
    }
    settings = read_settings(
        from_file(
            tmp_path,
            zero_optimization=section,
            train_batch_size="auto",
            bf16={"enabled": False},
            steps_per_print=2000,
        )
    )
    config = settings.deepspeed_config(largest=128)["zero_optimization"]
    assert config == {
        "stage": 3,
        "reduce_bucket_size": 1000,
        "stage3_param_persistence_threshold": 128,
    }


def test_the_largest_adapter_tensor_stays_whole_whatever_the_file_says(tmp_path: Path) -> None:
    key = "stage3_param_persistence_threshold"
    settings = read_settings(from_file(tmp_path, zero_optimization={"stage": 3, key: 1000}))
    assert settings.deepspeed_config(largest=128)["zero_optimization"][key] == 1000
    assert settings.deepspeed_config(largest=5000)["zero_optimization"][key] == 5000


@pytest.mark.parametrize(
    "environment, said",
    [
        ({f"{DEEPSPEED}ZERO_STAGE": "0"}, "must be 1, 2 or 3, got '0'; for stage 0 launch without"),
        ({f"{DEEPSPEED}ZERO_STAGE": "x"}, "must be 1, 2 or 3, got 'x'"),
        ({f"{DEEPSPEED}OFFLOAD_PARAM_DEVICE": "nvme"}, "PARAM_DEVICE=nvme cannot be used here"),
        ({f"{DEEPSPEED}OFFLOAD_OPTIMIZER_DEVICE": "cpu"}, "OPTIMIZER_DEVICE=cpu cannot be used"),
        ({f"{ACCELERATE}GRADIENT_CLIPPING": "1.0"}, "set max_grad_norm in the run's config"),
        (
            {f"{ACCELERATE}GRADIENT_ACCUMULATION_STEPS": "4"},
            "set gradient_accumulation_steps in the run's config",
        ),
        ({f"{DEEPSPEED}CONFIG_FILE": "nowhere.json"}, "nowhere.json cannot be read as JSON"),
    ],
)
def test_the_environment_is_refused_by_name(environment: dict[str, str], said: str) -> None:
    with pytest.raises(SnellaConfigError, match=said):
        read_settings(environment)


@pytest.mark.parametrize(
    "given, said",
    [
        (
            {"optimizer": {"type": "Adam"}},
            "optimizer in .*ds.json cannot.*set optimizer in the run",
        ),
        ({"scheduler": {"type": "WarmupLR"}}, "scheduler in .*set lr_scheduler in the run's"),
        ({"fp16": {"enabled": True}}, "fp16 in .*set mixed_precision in the run's config"),
        ({"bf16": {"enabled": True}}, "bf16 in .*set mixed_precision in the run's config"),
        ({"gradient_clipping": 1.0}, "gradient_clipping in .*set max_grad_norm"),
        ({"train_batch_size": 8}, "train_batch_size in .*set train_batch_size"),
        ({"pipeline": {"stages": 2}}, "pipeline in .*known are zero_optimization and"),
        (
            {"zero_optimization": {"offload_param": {"device": "nvme"}}},
            "zero_optimization.offload_param in .*offload is not supported",
        ),
        (
            {"zero_optimization": {"zero_quantized_weights": True}},
            "zero_optimization.zero_quantized_weights in .*known are allgather_bucket_size",
        ),
        ({"zero_optimization": 3}, "zero_optimization in .*must be a JSON object"),
        ({"zero_optimization": {"stage": 4}}, "the ZeRO stage in .*must be 1, 2 or 3, got 4"),
    ],
)
def test_a_file_is_refused_by_name(tmp_path: Path, given: dict[str, Any], said: str) -> None:
    with pytest.raises(SnellaConfigError, match=said):
        read_settings(from_file(tmp_path, **given))


def test_a_file_that_is_not_an_object_is_refused(tmp_path: Path) -> None:
    path = tmp_path / "ds.json"
    path.write_text("[1]", "utf-8")
    with pytest.raises(SnellaConfigError, match="must be a JSON object"):
        read_settings({f"{DEEPSPEED}CONFIG_FILE": str(path)})


def test_optimizers_that_look_at_whole_matrices_are_refused() -> None:
    weight = torch.nn.Parameter(torch.zeros(2, 2))
    require_entrywise(torch.optim.AdamW([weight]))
    with pytest.raises(SnellaConfigError, match=r"optimizer Adafactor cannot be cut .*AdamW"):
        require_entrywise(torch.optim.Adafactor([weight]))


def test_without_deepspeed_the_error_says_what_to_install(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "deepspeed", None)
    monkeypatch.setenv("DS_ACCELERATOR", "cpu")
    with pytest.raises(SnellaConfigError, match=r"pip install 'snell-diffusion\[deepspeed\]'"):
        import_deepspeed(torch.device("cpu"))


def test_fp16_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(Accelerator, "mixed_precision", "fp16")
    with pytest.raises(
        SnellaConfigError, match="mixed_precision fp16 does not work with DeepSpeed"
    ):
        Zero(Accelerator(cpu=True))
