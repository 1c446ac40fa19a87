"""The settings of a classification run beside its images: one dataclass per topic.

Names are those of the diffusion trainer where the meaning is the same. Fields whose help says
"Default by protocol" are filled in by `PROTOCOLS` in config.py.
"""

from typing import Annotated, Literal

from pydantic import Field
from pydantic.dataclasses import dataclass

from snell_diffusion.training.config_groups import RunSettings
from snell_diffusion.training.config_types import (
    FROZEN,
    Count,
    Decay,
    NotNegative,
    Positive,
    Precision,
    Rank,
    Share,
    TrackerName,
    described,
)

_help = described


@dataclass(**FROZEN)
class BaseModel:
    """The vision model that is adapted."""

    base: str = _help(
        "embedded-vit",
        "Base model: 'embedded-vit' (a small ViT that ships with this package, 64x64 pixels), a "
        "transformers folder, or a hub id: ViT (also MAE), Swin or ConvNeXt.",
    )
    revision: str | None = _help(None, "Revision of a hub model: branch, tag or commit.")
    mixed_precision: Precision = _help(
        "no",
        "Precision of the frozen base and of its activations; trained tensors stay float32. fp16 "
        "needs a GPU; a step whose gradients overflow in it is skipped.",
    )
    gradient_checkpointing: bool = _help(
        False, "Recompute activations in the backward pass: less memory, about 30 % more time."
    )
    backbone_drop_path: Share | None = _help(
        None,
        "Stochastic depth of the base's own blocks, from 0 in the first to this share in the last, "
        "0 to 1, while training. Default by protocol: 0, or 0.1 as published.",
    )


@dataclass(**FROZEN)
class Method:
    """What is trained."""

    method: str = _help(
        "snella",
        "How the base is adapted; --list-methods names them all, with the settings they take. "
        "linear_probe trains the head alone, full everything.",
    )
    method_args: list[str] = _help(
        [],
        "More settings of the method as name=value, for example target_sparsity=0.5 heads=2; in a "
        "YAML file a table.",
    )
    rank: Rank | None = _help(None, "Rank, where the method has one. Default: the method's own.")
    update_scale: Positive | None = _help(
        None, "Constant factor of the update, above 0 (for lora: lora_alpha / rank)."
    )
    dropout: Decay | None = _help(
        None,
        "Dropout on the adapter's input, 0 to below 1. Default by protocol: the method's own, or "
        "0.1 on q, k, v (one mask), fc1 and fc2 as published.",
    )
    drop_path: Decay | None = _help(
        None,
        "Share of samples for which an adapter's effect on a layer is left out while training, 0 "
        "to below 1; the others count more. Default by protocol: 0, or 0.1 as published.",
    )
    target_modules: list[str] = _help(
        [],
        "Names of the Linear layers to adapt, matched by suffix. Default: q, k, v, output and both "
        "MLP layers of every block, or those of them that the method's paper adapts.",
    )
    train_cls_token: bool | None = _help(
        None,
        "Train a ViT's class token too; it is stored with the head. Default by protocol: no, or "
        "yes as published.",
    )
    levels: list[Decay] = _help(
        [],
        "Sparsity levels to try, shares of zeros from 0 to below 1: one training each, the best on "
        "the validation images is kept and measured on the test images.",
    )


@dataclass(**FROZEN)
class Optimization:
    """Objective, optimizer and schedule."""

    num_train_epochs: Count | None = _help(
        None, "Passes over the training images, at least 1. Default by protocol: 50 or 100."
    )
    max_train_steps: Count | None = _help(
        None, "Optimizer steps in place of epochs, at least 1; the schedule follows."
    )
    train_batch_size: Count = _help(32, "Images per step and process; at least 1.")
    eval_batch_size: Count = _help(128, "Images at once while measuring; at least 1.")
    gradient_accumulation_steps: Count = _help(
        1, "Batches whose gradients make one optimizer step; at least 1."
    )
    learning_rate: Positive = _help(1e-3, "Peak learning rate, above 0.")
    head_learning_rate: Positive | None = _help(
        None, "Peak learning rate of the new head. Default: learning_rate."
    )
    scalar_learning_rate: Positive | None = _help(
        None,
        "Peak learning rate of single numbers (alpha, gamma and beta of SNELLA). Default: "
        "learning_rate.",
    )
    lr_scheduler: Literal["cosine", "constant"] = _help(
        "cosine", "Shape of the learning rate after its warmup."
    )
    lr_update: Literal["step", "epoch"] | None = _help(
        None,
        "When the learning rate changes: with every step, or once an epoch with the index of the "
        "epoch before, as published. Default by protocol.",
    )
    warmup_epochs: NotNegative | None = _help(
        None, "Epochs over which the learning rate rises. Default by protocol: 10 %, or 10."
    )
    warmup_lr: NotNegative | None = _help(
        None, "Learning rate at the start of the warmup. Default by protocol: 0 or 1e-6."
    )
    min_lr: NotNegative | None = _help(
        None, "Learning rate at the end of the cosine. Default by protocol: 0 or 1e-5."
    )
    label_smoothing: Share = _help(0.0, "Share of a label spread over all classes, 0 to 1.")
    optimizer: str = _help(
        "AdamW", "Optimizer class: a name in torch.optim or an import path such as a.b.Optimizer."
    )
    optimizer_args: list[str] = _help(
        [], "More optimizer arguments as name=value, for example amsgrad=True."
    )
    adam_beta1: Decay = _help(0.9, "First Adam decay, 0 to below 1.")
    adam_beta2: Decay = _help(0.999, "Second Adam decay, 0 to below 1.")
    adam_weight_decay: NotNegative = _help(
        0.01, "Weight decay of matrices; vectors, biases and the class token have none."
    )
    adam_epsilon: Positive | None = _help(
        None,
        "Adam's epsilon. Default by protocol: 1e-15, because the squared rule's gradients are "
        "tiny, or 1e-8 as published.",
    )
    max_grad_norm: NotNegative | None = _help(
        None, "Gradient norm above which is clipped; 0 = never. Default by protocol: 1 or 0."
    )
    ema_decay: Decay | None = _help(
        None, "Measure and save an exponential average of what is trained, 0 to below 1."
    )
    allocate: Literal["step", "epoch"] | None = _help(
        None,
        "What alloc_init_warmup, alloc_final_warmup and alloc_interval count: layers compete anew "
        "before every such step or epoch. Default by protocol: step, or epoch as published.",
    )
    select_on: Literal["validation", "test"] = _help(
        "validation",
        "Which images the best epoch and level are chosen on. test is what published scripts do: "
        "it needs protocol paper, and its accuracy says less than it seems.",
    )
    eval_epochs: Count = _help(1, "Epochs between measurements on the validation images.")
    early_stopping_patience: Count | None = _help(
        None, "Stop after this many measurements without a better one, at least 1. Default: never."
    )


@dataclass(**FROZEN)
class Run(RunSettings):
    """Where results go, checkpoints, resuming, reproducibility."""

    output_dir: Annotated[str, Field(min_length=1)] | None = _help(
        "runs/vision", "Run folder: adapter, head, log, pictures, checkpoints. null writes nothing."
    )
    checkpointing_epochs: Count | None = _help(
        None, "Epochs between checkpoints; at least 1. Default: at the end only."
    )
    report_to: TrackerName = _help(
        "none", "Tracker beside the local log.jsonl, which is always written."
    )
    quiet: bool = _help(False, "No progress bar, no lines on the screen and no pictures.")


GROUPS = (BaseModel, Method, Optimization, Run)
