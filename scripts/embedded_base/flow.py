"""The flow-matching transformer: an SD3 denoiser beside the UNet, on the same text and latents.

Shapes: B batch, z latents (B, 8, 16, 16), ids (B, 32) tokens, s flow time (B,) from 0 (picture) to
1 (noise), N tokens of picture and text together, D width.
"""

import math
from pathlib import Path

import torch
import torch.nn.functional as F
from diffusers import FlowMatchEulerDiscreteScheduler, SD3Transformer2DModel
from torch import Tensor, nn
from transformers import CLIPTextModel, CLIPTextModelWithProjection

from .shards import BaseConfig
from .training import Trainer
from .vae import LATENT_CHANNELS

TEXT_WIDTH = 128
# Without T5, StableDiffusion3Pipeline appends max_sequence_length (256 unless told) zero vectors
# to the text. A batch draws how many it sees from these.
ZERO_TOKENS = (0, 77, 256, 256)


def build_transformer() -> SD3Transformer2DModel:
    """Six joint blocks of width 128 on 8x8 patches; every block starts as the identity."""
    transformer = SD3Transformer2DModel(
        sample_size=16,
        patch_size=2,
        in_channels=LATENT_CHANNELS,
        out_channels=LATENT_CHANNELS,
        num_layers=6,
        num_attention_heads=4,
        attention_head_dim=32,
        joint_attention_dim=2 * TEXT_WIDTH,
        caption_projection_dim=128,
        pooled_projection_dim=2 * TEXT_WIDTH,
        pos_embed_max_size=8,
    )
    for name, module in transformer.named_modules():
        if isinstance(module, nn.Linear):
            nn.init.xavier_uniform_(module.weight)
            nn.init.zeros_(module.bias)
            if "norm" in name or name == "proj_out":
                nn.init.zeros_(module.weight)
    return transformer


def build_flow_scheduler() -> FlowMatchEulerDiscreteScheduler:
    """Unshifted flow time: at 64 positions, noise hides no more than the formula says."""
    return FlowMatchEulerDiscreteScheduler(num_train_timesteps=1000, shift=1.0)


@torch.no_grad()
def with_projection(encoder: CLIPTextModel) -> CLIPTextModelWithProjection:
    """The same text encoder in the form that SD3 reads.

    SD3 takes the hidden states before the last layer, and a projection of the end token after it.
    One more layer that adds nothing and an identity projection make these the encoder's own.
    """
    config = type(encoder.config)(**encoder.config.to_dict())
    config.num_hidden_layers += 1
    twin = CLIPTextModelWithProjection(config)
    missing, _ = twin.text_model.load_state_dict(encoder.state_dict(), strict=False)
    extra = twin.text_model.encoder.layers[-1]
    if len(missing) != len(extra.state_dict()):
        raise ValueError(f"the encoder lacks more than the added layer: {missing}")
    for linear in (extra.self_attn.out_proj, extra.mlp.fc2):
        nn.init.zeros_(linear.weight)
        nn.init.zeros_(linear.bias)
    nn.init.eye_(twin.text_projection.weight)
    return twin.eval().requires_grad_(False)


@torch.no_grad()
def text_features(encoder: CLIPTextModelWithProjection, ids: Tensor) -> tuple[Tensor, Tensor]:
    """What SD3 hands to its transformer when both of its text encoders are this one.

    Returns:
        Tokens (B, 32, 256) and pooled text (B, 256).
    """
    out = encoder(ids, output_hidden_states=True)
    return out.hidden_states[-2].repeat(1, 1, 2), out.text_embeds.repeat(1, 2)


@torch.no_grad()
def whiten_text(transformer: SD3Transformer2DModel, tokens: Tensor) -> None:
    """Start the text embedding at the principal components of the tokens, near unit variance.

    SD3 reads the text before its last norm. There a few directions are a hundred times larger than
    those that tell the words apart, and learning would have to undo that first.

    Args:
        tokens: (B, 32, 256) of many captions, from `text_features`.
    """
    x = tokens[..., :TEXT_WIDTH].flatten(0, 1).double()
    mean = x.mean(0)
    variance, basis = torch.linalg.eigh((x - mean).T @ (x - mean) / len(x))
    weight = (basis / (1 + variance.clamp(min=0).sqrt())).T
    linear = transformer.context_embedder
    linear.weight.copy_(torch.cat([weight, weight], 1) / 2)
    linear.bias.copy_(-weight @ mean)


class CountedTokenProcessor:
    """Joint attention in which the last token stands for `count` equal ones.

    Equal tokens without a position stay equal in every block, and a softmax over n equal logits l
    is one over l + ln n. So 256 zero vectors cost as much as one. Written out instead of fused
    because the fused kernel's backward pass is several times slower on CPU.

    Args:
        count: At least 1.
    """

    def __init__(self, count: int):
        self.count = count

    def __call__(self, attn, hidden_states: Tensor, encoder_hidden_states: Tensor, **_):
        """Picture (B, 64, D) and text (B, n, D), out the same; the last text token is counted."""
        b, pixels, _ = hidden_states.shape
        projections = (
            (attn.to_q, attn.add_q_proj),
            (attn.to_k, attn.add_k_proj),
            (attn.to_v, attn.add_v_proj),
        )
        q, k, v = (
            torch.cat([picture(hidden_states), text(encoder_hidden_states)], 1)
            .unflatten(2, (attn.heads, -1))
            .transpose(1, 2)
            .flatten(0, 1)
            for picture, text in projections
        )  # each (B * heads, N, D / heads)
        bias = q.new_zeros(k.shape[1])
        bias[-1] = math.log(self.count)
        logits = torch.baddbmm(bias.view(1, 1, -1), q, k.transpose(1, 2), alpha=attn.scale)
        out = torch.bmm(logits.softmax(-1), v)
        out = out.unflatten(0, (b, -1)).transpose(1, 2).flatten(2)
        picture, text = out[:, :pixels], out[:, pixels:]
        if not attn.context_pre_only:
            text = attn.to_add_out(text)
        return attn.to_out[0](picture), text


def velocity(
    transformer: SD3Transformer2DModel,
    noisy: Tensor,
    s: Tensor,
    tokens: Tensor,
    pooled: Tensor,
    zero_tokens: int,
) -> Tensor:
    """The transformer's answer to text followed by `zero_tokens` zero vectors, (B, 8, 16, 16)."""
    if zero_tokens:
        tokens = F.pad(tokens, (0, 0, 0, 1))
    transformer.set_attn_processor(CountedTokenProcessor(max(1, zero_tokens)))
    return transformer(noisy, tokens, pooled, 1000 * s).sample


def flow_times(count: int, rng: torch.Generator) -> Tensor:
    """Logit-normal flow times (arXiv:2403.03206, section 3.1), stratified, (count,) in (0, 1)."""
    u = (torch.arange(count) + torch.rand(count, generator=rng)) / count
    return torch.special.ndtri(u.clamp(1e-4, 1 - 1e-4)).sigmoid()


def flow_loss(
    transformer: SD3Transformer2DModel,
    encoder: CLIPTextModelWithProjection,
    z: Tensor,
    ids: Tensor,
    rng: torch.Generator,
) -> Tensor:
    """Mean squared error of the velocity ε - z at (1 - s) z + s ε.

    Rectified flow: arXiv:2209.03003, eq. (1), time reversed as in SD3.
    """
    s = flow_times(len(z), rng)
    noise = torch.randn(z.shape, generator=rng)
    zero_tokens = ZERO_TOKENS[int(torch.randint(len(ZERO_TOKENS), (), generator=rng))]
    at = s.view(-1, 1, 1, 1)
    noisy = (1 - at) * z + at * noise
    with torch.autocast("cpu", torch.bfloat16):
        tokens, pooled = text_features(encoder, ids)
        v = velocity(transformer, noisy, s, tokens, pooled, zero_tokens)
    return F.mse_loss(v.float(), noise - z)


def flow_trainer(
    work: Path, config: BaseConfig, encoder: CLIPTextModelWithProjection, name: str = "dit"
) -> Trainer:
    """The transformer, learning from random weights beside a frozen text encoder."""
    torch.manual_seed(config.seed)
    transformer = build_transformer()
    ids = torch.load(work / "shards" / "low00.pt")["ids"][:1000, 0].long()
    whiten_text(transformer, text_features(encoder, ids)[0])

    def loss(z: Tensor, ids: Tensor, rng: torch.Generator) -> Tensor:
        return flow_loss(transformer, encoder, z, ids, rng)

    return Trainer(work, config, name, nn.ModuleDict({"transformer": transformer}), loss)
