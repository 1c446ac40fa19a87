"""What the trainer needs to know about a model family; each family file fills in one record."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from snell_diffusion.diffusion.losses import Objective
from snell_diffusion.diffusion.timesteps import TimestepSettings

Conditions = dict[str, Tensor]
"""Everything that the denoiser takes beside latents and timesteps; the batch is the first axis.

Text-like entries come from `encode_text` and have one length per run, so that rows of several
prompts stack; masks are entries too. The trainer adds "geometry", float32 [B, 6] in pixels: height
and width of the photo, top and left of its crop after resizing, height and width trained on.
"""

# The attention of transformers that have projections of their own for the text's tokens.
_PICTURE = ("to_q", "to_k", "to_v", "to_out.0")
JOINT_TARGETS = (*_PICTURE, "add_q_proj", "add_k_proj", "add_v_proj", "to_add_out")


@dataclass(frozen=True)
class SampleRequest:
    """Pictures to draw: one per row of `conditions`.

    Attributes:
        conditions: Encoded prompts, B rows.
        unconditional: The encoded empty prompt, one row.
        generators: One per picture.
        size: Side in pixels.
        steps: Denoising steps.
        guidance: Classifier-free guidance scale; 1 or less = off.
    """

    conditions: Conditions
    unconditional: Conditions
    generators: Sequence[torch.Generator]
    size: int
    steps: int
    guidance: float

    @property
    def call(self) -> dict[str, Any]:
        """What every stock pipeline takes beside prompts and guidance."""
        return {
            "num_inference_steps": self.steps,
            "generator": list(self.generators),
            "height": self.size,
            "width": self.size,
            "output_type": "latent",
        }

    def nothing(self, name: str) -> Tensor:
        """The empty prompt's `name`, one row for each picture."""
        row = self.unconditional[name]
        return row.expand(len(self.generators), *row.shape[1:])


def load_stock(source: str, **options: Any) -> Any:
    """The pipeline that model_index.json names, silent.

    Args:
        source: Folder or hub id.
        options: More arguments of `from_pretrained`.
    """
    from diffusers import DiffusionPipeline

    index = DiffusionPipeline.load_config(source, revision=options.get("revision"))
    # diffusers wants to be told of parts that the index says are absent, a T5 for example.
    absent = {name: None for name, part in index.items() if part == [None, None]}
    options = {**absent, **options}
    pipe = DiffusionPipeline.from_pretrained(source, use_safetensors=True, **options)
    pipe.set_progress_bar_config(disable=True)
    return pipe


@dataclass(frozen=True)
class Family:
    """A kind of text-to-image model, as data and small functions.

    Attributes:
        name: Short name, the file's name.
        pipelines: Pipeline class names (`_class_name` of model_index.json) that it covers.
        denoiser: Name of the pipeline's component that is adapted.
        text_encoders: Names of the text encoders that can be adapted; a pipeline may lack some.
        tokenizers: Names of their tokenizers, in the same order.
        targets: Suffixes of the denoiser's Linear layers to adapt by default.
        text_targets: The same for all text encoders.
        conv_targets: Suffixes of the convolutions that `target_conv` adds; none: it is refused.
        multiple: Sides of training pictures must be multiples of this, in pixels.
        native_size: (pipeline) -> side in pixels of the pictures that the base was made for.
        load: (path or id, **from_pretrained arguments) -> pipeline, on the CPU.
        encode_text: (pipeline, prompts) -> Conditions; differentiable.
        encode_images: (pipeline, pixels [B, 3, H, W] in [-1, 1]) -> mean and standard deviation
            of the latents, each [B, C, h, w], scaled as the denoiser expects.
        decode_latents: (pipeline, latents) -> pixels in [0, 1], float32 on the CPU; NaN where they
            are not finite.
        objective: (pipeline, device, settings) -> what the denoiser predicts.
        denoise: (denoiser, x_t, timesteps, Conditions) -> prediction as `objective` defines its
            target, shaped as x_t; packing and other conventions of the denoiser end here.
        sample: (pipeline, SampleRequest) -> latents.
        large_encoders: Names of text encoders too large for float32: where the denoiser is kept in
            16 bits, they are too.
        lower_case: Whether the pipeline puts prompts in lower case before it encodes them.
    """

    name: str
    pipelines: tuple[str, ...]
    denoiser: str
    text_encoders: tuple[str, ...]
    tokenizers: tuple[str, ...]
    targets: tuple[str, ...]
    text_targets: tuple[str, ...]
    multiple: int
    native_size: Callable[[Any], int]
    load: Callable[..., Any]
    encode_text: Callable[[Any, Sequence[str]], Conditions]
    encode_images: Callable[[Any, Tensor], tuple[Tensor, Tensor]]
    decode_latents: Callable[[Any, Tensor], Tensor]
    objective: Callable[[Any, torch.device, TimestepSettings], Objective]
    denoise: Callable[[nn.Module, Tensor, Tensor, Conditions], Tensor]
    sample: Callable[[Any, SampleRequest], Tensor]
    conv_targets: tuple[str, ...] = ()
    large_encoders: tuple[str, ...] = ()
    lower_case: bool = False
