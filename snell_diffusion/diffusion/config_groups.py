"""The settings of a DreamBooth run: one dataclass per topic.

Field names are the flag names of the diffusers training scripts. Each field's help states quantity,
range and unit; the command line, the configuration reference and the app are generated from them.
"""

import math
from typing import Annotated, Literal

from pydantic import Field
from pydantic.dataclasses import dataclass

from snell_diffusion.adapters import limits
from snell_diffusion.diffusion.concepts import ConceptConfig
from snell_diffusion.diffusion.config_types import Prompt
from snell_diffusion.diffusion.timesteps import WeightingScheme
from snell_diffusion.training.config_groups import RunSettings
from snell_diffusion.training.config_types import (
    FROZEN,
    Count,
    Decay,
    Finite,
    Heads,
    MethodName,
    NotNegative,
    Positive,
    Precision,
    Rank,
    Share,
    TrackerName,
    Whole,
    described,
)

_FROZEN, _help = FROZEN, described
SMALLEST_SIDE, LARGEST_SIDE = 8, 4096  # pixels


@dataclass(**_FROZEN)
class BaseModel:
    """The text-to-image model that is adapted."""

    pretrained_model_name_or_path: str = _help(
        "embedded",
        "Base model: 'embedded' or 'embedded-dit' (a UNet and a transformer that ship with this "
        "package, 64x64 pixels), a diffusers folder, or a hub id. `base` in a YAML file and --base "
        "mean the same.",
    )
    revision: str | None = _help(None, "Revision of a hub model: branch, tag or commit.")
    variant: str | None = _help(None, "Weight file variant of the base, for example fp16.")
    mixed_precision: Precision = _help(
        "no",
        "Precision of the frozen base and of its activations; trained tensors stay float32. "
        "fp16 needs a GPU; a step whose gradients overflow in it is skipped: it counts, but "
        "weights, average, allocation and learning rate stay as they are.",
    )
    gradient_checkpointing: bool = _help(
        False, "Recompute activations in the backward pass: less memory, about 30 % more time."
    )
    base_quantization: Literal["none", "bnb_nf4", "bnb_int8", "torchao_int8", "torchao_fp8"] = (
        _help(
            "none",
            "Keep the frozen denoiser's weights in 4 or 8 bits: bnb_nf4 and bnb_int8 "
            "(bitsandbytes, on a GPU), torchao_int8 and torchao_fp8 (also on the CPU). Needs "
            "snell-diffusion[quant]. Such a base cannot be merged with; the adapter also fits the "
            "base as it is.",
        )
    )
    offload_encoders: bool | None = _help(
        None,
        "Keep only what a phase needs on the GPU (text encoders, VAE or denoiser), and free text "
        "encoders for good once every prompt is encoded. The result is the same. Default: on, "
        "except on the CPU.",
    )
    torch_compile: Literal["no", "blocks", "model"] = _help(
        "no",
        "Compile the denoiser: blocks = its repeated blocks, each kind once; model = as a whole. "
        "The first steps take minutes; results differ in the last bits.",
    )
    torch_compile_backend: str = _help(
        "inductor", "Backend of torch_compile: a name known to torch.compile."
    )


@dataclass(**_FROZEN)
class Data:
    """Photos, captions, masks and what is kept of them."""

    instance_data_dir: str | None = _help(
        None,
        "Folder with the subject's photos (jpg, png, webp). A caption may stand in a .txt file "
        "beside a photo or in metadata.jsonl (file_name, text).",
    )
    instance_prompt: Prompt | None = _help(
        None, "Prompt with the rare token, for example 'a photo of a sks dog'."
    )
    concepts: list[ConceptConfig] = _help(
        [],
        "Several subjects in one run, in place of instance_data_dir and instance_prompt: a list in "
        "YAML (see below), or a JSON or YAML file that holds it (--concepts_list FILE).",
    )
    recursive: bool = _help(False, "Look for photos in the folders inside a photo folder, too.")
    use_captions: bool = _help(
        True, "Use a photo's own caption, where it has one, instead of instance_prompt."
    )
    caption_column: str = _help(
        "text", "Key of the caption in the lines of metadata.jsonl, beside file_name."
    )
    caption_templates: list[Prompt] = _help(
        [],
        "Sentences such as 'a photo of {}', one drawn for each sample; {} becomes instance_prompt. "
        "Captions of photos stay as they are.",
    )
    caption_dropout: Share = _help(
        0.0,
        "Share of samples trained with the empty prompt instead of theirs, 0 to 1; about 0.05 to "
        "0.1 keeps classifier-free guidance in step with the subject. Class images keep theirs.",
    )
    resolution: Annotated[int, Field(ge=SMALLEST_SIDE, le=LARGEST_SIDE)] = _help(
        512, "Side of the square training pictures in pixels, 8 to 4096, a multiple of 8."
    )
    aspect_ratio_buckets: str | None = _help(
        None,
        "Train photos in their own aspect ratio, about resolution x resolution pixels in all: auto "
        "(or true), or shapes as height,width;height,width, sides 8 to 4096. Default: "
        "squares.",
    )
    bucket_step: Count | None = _help(
        None,
        "Sides of the shapes of auto are multiples of this many pixels, 1 to resolution. Default: "
        "an eighth of resolution, at most 64.",
    )
    masked_loss: bool = _help(
        False,
        "Weigh the loss by masks: name.mask.png beside name.jpg, or masks/name.png. White counts "
        "fully, black with unmasked_weight.",
    )
    unmasked_weight: Share = _help(
        0.1, "Weight of what is black in a mask, 0 to 1; 0 leaves it free to change."
    )
    center_crop: bool = _help(
        True, "Crop at the centre; otherwise at random, which needs no cache."
    )
    random_flip: bool = _help(
        False,
        "Mirror half of the photos. Off by default: it changes lettering and asymmetric faces.",
    )
    cache_latents: bool = _help(
        True, "Encode every photo once and keep the latents in memory; the VAE then leaves the GPU."
    )
    cache_dir: Annotated[str, Field(min_length=1)] | None = _help(
        None,
        "Keep latents and text embeddings in this folder for later runs, each under a fingerprint "
        "of encoder weights, preprocessing and photo or caption. Default: in memory only.",
    )
    dataloader_num_workers: Whole = _help(
        0,
        "Processes that read and crop photos ahead of their step where cache_latents is off; at "
        "least 0 (0 = none). The result is the same for any number. No effect with cache_latents, "
        "because every photo is then read once, before the first step.",
    )


@dataclass(**_FROZEN)
class Prior:
    """Prior preservation: the class keeps its look."""

    with_prior_preservation: bool = _help(
        False, "Also hold the class of the subject to what the base makes of it; see prior_loss."
    )
    prior_loss: Literal["images", "prediction"] = _help(
        "images",
        "images: train on class images of the base, which need class_prompt. prediction: hold the "
        "answers to class_prompt (or the empty prompt), on the noisy photos themselves, to those "
        "of the base; no class images, one more forward pass.",
    )
    prior_loss_weight: NotNegative = _help(
        1.0, "Weight of the prior's loss beside the subject's; at least 0."
    )
    class_prompt: Prompt | None = _help(
        None, "Prompt of the class without the token, for example 'a photo of a dog'."
    )
    class_data_dir: str | None = _help(
        None, "Folder with class images; missing ones are generated here. Default: in output_dir."
    )
    num_class_images: Count = _help(100, "Class images wanted; at least 1.")
    class_batch_size: Count | None = _help(
        None, "Class images per step and process; at least 1. Default: train_batch_size."
    )
    sample_batch_size: Count = _help(4, "Pictures per call when class images are generated.")


@dataclass(**_FROZEN)
class Method:
    """The adapter: which update, how large, how sparse. Unset fields: SnellaConfig.diffusion()."""

    method: MethodName = _help(
        "snella",
        "How the model learns: snella (kernelized sparse update), lora (PEFT's, the yardstick), or "
        "any other that --list-methods lists with its settings.",
    )
    method_args: list[str] = _help(
        [],
        "Settings of the method as name=value, for example bits=1; those that have a key of their "
        "own here may stand in either place.",
    )
    rank: Rank | None = _help(
        None, f"Columns of the factors A and B together, over all heads; 1 to {limits.MAX_RANK}."
    )
    heads: Heads | None = _help(
        None, f"Kernel heads with alternating signs, 1 to {limits.MAX_HEADS}; divides rank."
    )
    kernel: Literal["mixed", "distance", "linear"] | None = _help(
        None, "Kernel between the factors: mixed = distance + softmax over outputs + constant."
    )
    sparsify: (
        Literal["squared", "squared_true", "printed", "printed_true", "mask", "soft", "none"] | None
    ) = _help(
        None, "What happens to entries above the threshold; squared is the papers' public code."
    )
    init_sparsity: Decay | None = _help(
        None, "Share of zeros in the update at the start, 0 to below 1."
    )
    target_sparsity: Decay | None = _help(None, "Share of zeros at the end, 0 to below 1.")
    init: Literal["paper", "identity"] | None = _help(
        None, "Start of the update: paper = small random, identity = exactly zero."
    )
    init_scale: Positive | None = _help(
        None, "Factor on the range that A and B are drawn from, above 0."
    )
    update_scale: Positive | None = _help(
        None, "Constant factor of the update, above 0 (for lora: lora_alpha / rank)."
    )
    dropout: Decay | None = _help(None, "Dropout on the adapter's input, 0 to below 1.")
    train_alpha: bool | None = _help(None, "Train the weight of the softmax term.")
    train_gamma: bool | None = _help(None, "Train the temperature of the softmax term.")
    train_beta: bool | None = _help(None, "Train the constant term.")
    target_modules: list[str] = _help(
        [], "Names of the Linear layers to adapt, matched by suffix. Default: the family's list."
    )
    target_conv: bool = _help(
        False,
        "Adapt convolutions too, their kernels flattened to rows: those of the family's list.",
    )
    train_text_encoder: bool = _help(False, "Adapt the text encoder too (then its cache is off).")
    text_encoder_rank: Rank | None = _help(
        None, f"Rank of the text encoder's adapter; 1 to {limits.MAX_RANK}. Default: rank."
    )
    new_tokens: list[str] = _help(
        [],
        "New words for the prompts, trained with the adapter and kept in its file: <cup>, or "
        f"<cup>=2 for two embeddings, up to {limits.MAX_VECTORS} (then the text cache is off).",
    )
    initializer_token: str | None = _help(
        None,
        "Known words that new_tokens start as, for example cup. Default: random, like the base's.",
    )
    alloc_init_warmup: Whole | None = _help(
        None, "Steps before the layers start to compete for the budget."
    )
    alloc_final_warmup: Whole | None = _help(None, "Steps at the end that hold the target budget.")
    alloc_interval: Count | None = _help(None, "Steps between two allocations of the budget.")
    alloc_beta1: Decay | None = _help(None, "Smoothing of the importance scores, 0 to below 1.")
    alloc_beta2: Decay | None = _help(None, "Smoothing of their uncertainty, 0 to below 1.")
    alloc_metric: Literal["ipt", "mag", "w_mag"] | None = _help(
        None,
        "Importance: ipt = |parameter x gradient|, mag = |parameter|, w_mag = mean kept |update|.",
    )


@dataclass(**_FROZEN)
class Optimization:
    """Objective, optimizer and schedule."""

    max_train_steps: Count = _help(500, "Optimizer steps; at least 1.")
    train_batch_size: Count = _help(4, "Photos of the subject per step and process; at least 1.")
    gradient_accumulation_steps: Count = _help(
        1, "Batches whose gradients are averaged into one optimizer step; at least 1."
    )
    learning_rate: Positive = _help(
        1e-3,
        "Peak learning rate of the factors, above 0. 1e-3 is the papers' value for SNELLA; LoRA "
        "usually wants 1e-4 to 5e-4.",
    )
    scalar_learning_rate: NotNegative | None = _help(
        None, "Learning rate of alpha, gamma and beta; at least 0. Default: learning_rate."
    )
    text_encoder_lr: Positive | None = _help(
        None, "Learning rate of the text encoder's adapter. Default: learning_rate."
    )
    token_learning_rate: Positive = _help(
        5e-4, "Learning rate of the embeddings of new_tokens, above 0; they have no weight decay."
    )
    lr_scheduler: Literal[
        "linear", "cosine", "cosine_with_restarts", "polynomial", "constant", "constant_with_warmup"
    ] = _help("constant", "Shape of the learning rate over the steps.")
    lr_warmup_steps: Whole = _help(0, "Steps over which the learning rate rises from 0.")
    lr_num_cycles: Count = _help(1, "Hard restarts of cosine_with_restarts.")
    lr_power: Positive = _help(1.0, "Power of the polynomial schedule.")
    optimizer: str = _help(
        "AdamW",
        "Optimizer class: a name in torch.optim or an import path such as "
        "bitsandbytes.optim.AdamW8bit.",
    )
    optimizer_args: list[str] = _help(
        [], "More optimizer arguments as name=value, for example amsgrad=True."
    )
    adam_beta1: Decay = _help(0.9, "First Adam decay, 0 to below 1.")
    adam_beta2: Decay = _help(0.999, "Second Adam decay, 0 to below 1.")
    adam_weight_decay: NotNegative = _help(0.01, "Weight decay of the factors; scalars have none.")
    adam_epsilon: Positive = _help(
        1e-15,
        "Adam's epsilon. Tiny, because the squared rule's gradients are: at 1e-8 they could stall.",
    )
    max_grad_norm: NotNegative = _help(1.0, "Gradient norm above which is clipped; 0 = never.")
    snr_gamma: Positive | None = _help(
        None,
        "Min-SNR weight (arXiv:2303.09556), about 5, for models that predict noise or v. Default: "
        "every timestep weighs the same.",
    )
    weighting_scheme: WeightingScheme | None = _help(
        None,
        "Flow models (SD 3, FLUX, ...): logit_normal or mode draw the middle of the paths more "
        "often, cosmap and sigma_sqrt weigh the loss (arXiv:2403.03206). Default: the family's.",
    )
    logit_mean: Finite = _help(0.0, "Mean of logit_normal.")
    logit_std: Positive = _help(1.0, "Standard deviation of logit_normal, above 0.")
    mode_scale: Annotated[float, Field(ge=-1, le=2 / (math.pi - 2))] = _help(
        1.29, "Scale of mode, -1 to 1.75; above 0 favours the middle."
    )
    timestep_shift: Positive | None = _help(
        None,
        "Flow models: shift of the timesteps, above 0; more than 1 = noisier. Default: the shift "
        "that the base's scheduler samples with at this resolution.",
    )
    timestep_sampling: Literal["uniform", "stratified"] = _help(
        "stratified", "Training timesteps: stratified spreads each batch over their density."
    )
    noise_offset: NotNegative = _help(
        0.0,
        "Also shift the noise of each sample and channel by this times a normal draw; at least 0. "
        "About 0.05 to 0.1 lets models that predict noise learn very dark and bright pictures.",
    )
    ema_decay: Decay | None = _help(
        None, "Keep and save an exponential average of the adapter with this decay, 0 to below 1."
    )


@dataclass(**_FROZEN)
class Feedback:
    """Held-out loss, sample pictures and logs."""

    validation_data_dir: str | None = _help(
        None, "Folder with photos of the subject that are not trained on, for the held-out loss."
    )
    num_validation_photos: Whole = _help(
        0, "Photos taken out of instance_data_dir for the held-out loss (the last by name)."
    )
    validation_steps: Count | None = _help(
        None,
        "Steps between measurements of the held-out loss and of the drift on class images; at "
        "least 1. Default: at the start and the end.",
    )
    early_stopping_patience: Count | None = _help(
        None,
        "Stop after this many measurements (validation_steps) without a lower held-out loss, at "
        "least 1; the adapter kept is the best one measured. Default: never, and the last is kept.",
    )
    early_stopping_min_delta: NotNegative = _help(
        0.0, "How much lower a held-out loss must be to count as lower; at least 0."
    )
    validation_timesteps: Count = _help(
        8, "Fixed timesteps per photo at which held-out loss and drift are measured."
    )
    validation_prompt: str | None = _help(None, "One prompt to sample during training.")
    sample_prompts: list[str] = _help([], "More prompts to sample during training.")
    num_validation_images: Count = _help(1, "Pictures per prompt; at least 1.")
    sample_steps: Count | None = _help(
        None, "Steps between sample sheets; at least 1. Default: at the start and the end."
    )
    num_inference_steps: Count = _help(25, "Denoising steps of a sample picture; at least 1.")
    guidance_scale: NotNegative = _help(
        7.5, "Classifier-free guidance of sample pictures and class images; 1 = none."
    )
    report_to: TrackerName = _help(
        "none", "Tracker beside the local log.jsonl, which is always written."
    )


@dataclass(**_FROZEN)
class Run(RunSettings):
    """Where results go, checkpoints, resuming, reproducibility."""

    output_dir: str = _help("runs/dreambooth", "Run folder: adapter, log, pictures, checkpoints.")
    checkpointing_steps: Count | None = _help(
        None, "Steps between checkpoints; at least 1. Default: at the end only."
    )
    push_to_hub: bool = _help(
        False,
        "Upload adapter, model card, settings and pictures to the Hugging Face hub at the end. The "
        "token comes from `hf auth login` or HF_TOKEN, never from here.",
    )
    hub_model_id: str | None = _help(
        None, "Repository to upload to, owner/name. Default: your account, output_dir's name."
    )
    hub_private_repo: bool = _help(False, "Make the repository private, if it is made here.")
    dry_run: bool = _help(
        False,
        "Load all, check all photos, do a few steps, draw a picture where the run will; print "
        "sizes, time and the peak memory of every phase; write nothing.",
    )


GROUPS = (BaseModel, Data, Prior, Method, Optimization, Feedback, Run)
