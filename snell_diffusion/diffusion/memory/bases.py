"""Published sizes of real base models, so that their memory can be computed without their weights.

Values are those of the models' own config files; what equals the default of the class is left out.
A component is (library, class name, settings); tokenizers are how many tokens they pad a prompt to.
"""

from typing import Any, NamedTuple

Component = tuple[str, str, dict[str, Any]]


class Base(NamedTuple):
    """The components of a pipeline, by name, as in its model_index.json.

    Attributes:
        pipeline: Class name in diffusers.
        parts: Models and scheduler.
        tokens: Longest prompt of each tokenizer, in tokens.
    """

    pipeline: str
    parts: dict[str, Component]
    tokens: dict[str, int]


def _clip(kind: str, **settings: Any) -> Component:
    shared = {"max_position_embeddings": 77, "vocab_size": 49408, "eos_token_id": 2}
    return "transformers", kind, {**shared, **settings}


_L = {
    "hidden_size": 768,
    "intermediate_size": 3072,
    "num_hidden_layers": 12,
    "num_attention_heads": 12,
    "projection_dim": 768,
}
_G = {
    "hidden_size": 1280,
    "intermediate_size": 5120,
    "num_hidden_layers": 32,
    "num_attention_heads": 20,
    "hidden_act": "gelu",
    "projection_dim": 1280,
}
_H = {
    "hidden_size": 1024,
    "intermediate_size": 4096,
    "num_hidden_layers": 23,
    "num_attention_heads": 16,
    "hidden_act": "gelu",
    "projection_dim": 512,
}
_T5_XXL: Component = (
    "transformers",
    "T5EncoderModel",
    {
        "d_model": 4096,
        "d_ff": 10240,
        "d_kv": 64,
        "num_layers": 24,
        "num_heads": 64,
        "vocab_size": 32128,
        "feed_forward_proj": "gated-gelu",
    },
)
_GEMMA_2_2B: Component = (
    "transformers",
    "Gemma2Model",
    {
        "hidden_size": 2304,
        "intermediate_size": 9216,
        "num_hidden_layers": 26,
        "num_attention_heads": 8,
        "num_key_value_heads": 4,
        "head_dim": 256,
        "vocab_size": 256000,
    },
)
_QWEN3_4B = {
    "hidden_size": 2560,
    "intermediate_size": 9728,
    "num_hidden_layers": 36,
    "num_attention_heads": 32,
    "num_key_value_heads": 8,
    "head_dim": 128,
    "vocab_size": 151936,
    "tie_word_embeddings": True,
}
_QWEN2_5_VL_7B: Component = (
    "transformers",
    "Qwen2_5_VLForConditionalGeneration",
    {
        "text_config": {
            "hidden_size": 3584,
            "intermediate_size": 18944,
            "num_hidden_layers": 28,
            "num_attention_heads": 28,
            "num_key_value_heads": 4,
            "vocab_size": 152064,
            "rope_parameters": {
                "rope_type": "default",
                "rope_theta": 1000000.0,
                "mrope_section": [16, 24, 24],
            },
        },
        "vision_config": {"hidden_size": 1280, "out_hidden_size": 3584},
        "tie_word_embeddings": False,
    },
)


def _vae(channels: int, size: int, scaling: float, **settings: Any) -> Component:
    values = {
        "block_out_channels": [128, 256, 512, 512],
        "down_block_types": ["DownEncoderBlock2D"] * 4,
        "up_block_types": ["UpDecoderBlock2D"] * 4,
        "layers_per_block": 2,
        "latent_channels": channels,
        "sample_size": size,
        "scaling_factor": scaling,
    }
    return "diffusers", "AutoencoderKL", {**values, **settings}


_BARE = {"use_quant_conv": False, "use_post_quant_conv": False}
_SD_VAE = _vae(4, 512, 0.18215)
_SDXL_VAE = _vae(4, 1024, 0.13025)
_SD3_VAE = _vae(16, 1024, 1.5305, shift_factor=0.0609, **_BARE)
_FLUX_VAE = _vae(16, 1024, 0.3611, shift_factor=0.1159, **_BARE)


def _noise(kind: str, **settings: Any) -> Component:
    steps = {"beta_start": 0.00085, "beta_end": 0.012, "beta_schedule": "scaled_linear"}
    return "diffusers", kind, {**steps, **settings}


def _flow(shift: float, **settings: Any) -> Component:
    return "diffusers", "FlowMatchEulerDiscreteScheduler", {"shift": shift, **settings}


def _sd3(**transformer: Any) -> Base:
    shared = {
        "sample_size": 128,
        "patch_size": 2,
        "in_channels": 16,
        "out_channels": 16,
        "attention_head_dim": 64,
        "joint_attention_dim": 4096,
        "pooled_projection_dim": 2048,
        "qk_norm": "rms_norm",
    }
    parts = {
        "transformer": ("diffusers", "SD3Transformer2DModel", {**shared, **transformer}),
        "text_encoder": _clip("CLIPTextModelWithProjection", **_L),
        "text_encoder_2": _clip("CLIPTextModelWithProjection", **_G),
        "text_encoder_3": _T5_XXL,
        "vae": _SD3_VAE,
        "scheduler": _flow(3.0),
    }
    tokens = {"tokenizer": 77, "tokenizer_2": 77, "tokenizer_3": 512}
    return Base("StableDiffusion3Pipeline", parts, tokens)


def _flux(guidance: bool) -> Base:
    parts: dict[str, Component] = {
        "transformer": ("diffusers", "FluxTransformer2DModel", {"guidance_embeds": guidance}),
        "text_encoder": _clip("CLIPTextModel", **_L),
        "text_encoder_2": _T5_XXL,
        "vae": _FLUX_VAE,
        "scheduler": _flow(3.0, use_dynamic_shifting=True),
    }
    return Base("FluxPipeline", parts, {"tokenizer": 77, "tokenizer_2": 512})


def _z_image(shift: float) -> Base:
    parts: dict[str, Component] = {
        "transformer": ("diffusers", "ZImageTransformer2DModel", {}),
        "text_encoder": ("transformers", "Qwen3Model", _QWEN3_4B),
        "vae": _FLUX_VAE,
        "scheduler": _flow(shift),
    }
    return Base("ZImagePipeline", parts, {"tokenizer": 512})


_FLUX2_KLEIN_4B = Base(
    "Flux2KleinPipeline",
    {
        "transformer": (
            "diffusers",
            "Flux2Transformer2DModel",
            {
                "num_layers": 5,
                "num_single_layers": 20,
                "num_attention_heads": 24,
                "joint_attention_dim": 7680,
                "guidance_embeds": False,
            },
        ),
        "text_encoder": ("transformers", "Qwen3ForCausalLM", _QWEN3_4B),
        "vae": ("diffusers", "AutoencoderKLFlux2", {}),
        "scheduler": _flow(3.0, use_dynamic_shifting=True),
    },
    {"tokenizer": 512},
)

BASES: dict[str, Base] = {
    "stable-diffusion-v1-5/stable-diffusion-v1-5": Base(
        "StableDiffusionPipeline",
        {
            "unet": (
                "diffusers",
                "UNet2DConditionModel",
                {"cross_attention_dim": 768, "sample_size": 64},
            ),
            "text_encoder": _clip("CLIPTextModel", **_L),
            "vae": _SD_VAE,
            "scheduler": _noise("PNDMScheduler", skip_prk_steps=True, steps_offset=1),
        },
        {"tokenizer": 77},
    ),
    "stabilityai/stable-diffusion-2-1": Base(
        "StableDiffusionPipeline",
        {
            "unet": (
                "diffusers",
                "UNet2DConditionModel",
                {
                    "sample_size": 96,
                    "cross_attention_dim": 1024,
                    "attention_head_dim": [5, 10, 20, 20],
                    "use_linear_projection": True,
                    "upcast_attention": True,
                },
            ),
            "text_encoder": _clip("CLIPTextModel", **_H),
            "vae": _vae(4, 768, 0.18215),
            "scheduler": _noise("DDIMScheduler", prediction_type="v_prediction", steps_offset=1),
        },
        {"tokenizer": 77},
    ),
    "stabilityai/stable-diffusion-xl-base-1.0": Base(
        "StableDiffusionXLPipeline",
        {
            "unet": (
                "diffusers",
                "UNet2DConditionModel",
                {
                    "sample_size": 128,
                    "block_out_channels": [320, 640, 1280],
                    "down_block_types": [
                        "DownBlock2D",
                        "CrossAttnDownBlock2D",
                        "CrossAttnDownBlock2D",
                    ],
                    "up_block_types": ["CrossAttnUpBlock2D", "CrossAttnUpBlock2D", "UpBlock2D"],
                    "transformer_layers_per_block": [1, 2, 10],
                    "attention_head_dim": [5, 10, 20],
                    "cross_attention_dim": 2048,
                    "use_linear_projection": True,
                    "addition_embed_type": "text_time",
                    "addition_time_embed_dim": 256,
                    "projection_class_embeddings_input_dim": 2816,
                },
            ),
            "text_encoder": _clip("CLIPTextModel", **_L),
            "text_encoder_2": _clip("CLIPTextModelWithProjection", **_G),
            "vae": _SDXL_VAE,
            "scheduler": _noise("EulerDiscreteScheduler", steps_offset=1),
        },
        {"tokenizer": 77, "tokenizer_2": 77},
    ),
    "stabilityai/stable-diffusion-3.5-medium": _sd3(
        num_layers=24,
        num_attention_heads=24,
        caption_projection_dim=1536,
        pos_embed_max_size=384,
        dual_attention_layers=list(range(13)),
    ),
    "stabilityai/stable-diffusion-3.5-large": _sd3(
        num_layers=38,
        num_attention_heads=38,
        caption_projection_dim=2432,
        pos_embed_max_size=192,
    ),
    "black-forest-labs/FLUX.1-dev": _flux(guidance=True),
    "PixArt-alpha/PixArt-Sigma-XL-2-1024-MS": Base(
        "PixArtSigmaPipeline",
        {
            "transformer": (
                "diffusers",
                "PixArtTransformer2DModel",
                {
                    "sample_size": 128,
                    "cross_attention_dim": 1152,
                    "caption_channels": 4096,
                    "use_additional_conditions": False,
                },
            ),
            "text_encoder": _T5_XXL,
            "vae": _SDXL_VAE,
            "scheduler": (
                "diffusers",
                "DPMSolverMultistepScheduler",
                {"beta_start": 0.0001, "beta_end": 0.02, "beta_schedule": "linear"},
            ),
        },
        {"tokenizer": 300},
    ),
    "Efficient-Large-Model/Sana_1600M_1024px_BF16_diffusers": Base(
        "SanaPipeline",
        {
            "transformer": ("diffusers", "SanaTransformer2DModel", {}),
            "text_encoder": _GEMMA_2_2B,
            "vae": (
                "diffusers",
                "AutoencoderDC",
                {
                    "encoder_block_types": ["ResBlock"] * 3 + ["EfficientViTBlock"] * 3,
                    "decoder_block_types": ["ResBlock"] * 3 + ["EfficientViTBlock"] * 3,
                    "encoder_layers_per_block": [2, 2, 2, 3, 3, 3],
                    "decoder_layers_per_block": [3, 3, 3, 3, 3, 3],
                    "encoder_qkv_multiscales": [[], [], [], [5], [5], [5]],
                    "decoder_qkv_multiscales": [[], [], [], [5], [5], [5]],
                    "downsample_block_type": "Conv",
                    "upsample_block_type": "interpolate",
                    "scaling_factor": 0.41407,
                },
            ),
            "scheduler": (
                "diffusers",
                "DPMSolverMultistepScheduler",
                {"prediction_type": "flow_prediction", "use_flow_sigmas": True, "flow_shift": 3.0},
            ),
        },
        {"tokenizer": 300},
    ),
    "Alpha-VLLM/Lumina-Image-2.0": Base(
        "Lumina2Pipeline",
        {
            "transformer": (
                "diffusers",
                "Lumina2Transformer2DModel",
                {"cap_feat_dim": 2304, "axes_dim_rope": [32, 32, 32], "axes_lens": [300, 512, 512]},
            ),
            "text_encoder": _GEMMA_2_2B,
            "vae": _FLUX_VAE,
            "scheduler": _flow(6.0),
        },
        {"tokenizer": 256},
    ),
    "Qwen/Qwen-Image": Base(
        "QwenImagePipeline",
        {
            "transformer": ("diffusers", "QwenImageTransformer2DModel", {}),
            "text_encoder": _QWEN2_5_VL_7B,
            "vae": ("diffusers", "AutoencoderKLQwenImage", {}),
            "scheduler": _flow(1.0, use_dynamic_shifting=True),
        },
        {"tokenizer": 512},
    ),
    "Tongyi-MAI/Z-Image": _z_image(6.0),
    "Tongyi-MAI/Z-Image-Turbo": _z_image(3.0),
    "black-forest-labs/FLUX.2-klein-base-4B": _FLUX2_KLEIN_4B,
    "black-forest-labs/FLUX.2-klein-4B": _FLUX2_KLEIN_4B,
}
