"""What the transformer's training rests on: counted tokens, flow times, the loss, its start."""

import pytest
import torch
import torch.nn.functional as F
from diffusers.models.attention_processor import JointAttnProcessor2_0
from transformers import CLIPTextConfig, CLIPTextModel

from scripts.embedded_base.flow import (
    TEXT_WIDTH,
    build_flow_scheduler,
    build_transformer,
    flow_loss,
    flow_times,
    text_features,
    velocity,
    whiten_text,
    with_projection,
)


@pytest.fixture(scope="module")
def encoder() -> CLIPTextModel:
    torch.manual_seed(0)
    config = CLIPTextConfig(
        vocab_size=50,
        hidden_size=TEXT_WIDTH,
        intermediate_size=64,
        num_hidden_layers=1,
        num_attention_heads=4,
        max_position_embeddings=8,
        projection_dim=TEXT_WIDTH,
        eos_token_id=49,
        pad_token_id=49,
    )
    return CLIPTextModel(config).eval()


@pytest.fixture(scope="module")
def transformer():
    """Random weights everywhere: the fresh one answers nothing but zeros."""
    torch.manual_seed(0)
    model = build_transformer().eval().requires_grad_(False)
    for parameter in model.parameters():
        parameter.add_(0.05 * torch.randn_like(parameter))
    return model


def test_a_fresh_transformer_answers_zero():
    model = build_transformer()
    z, tokens = torch.randn(2, 8, 16, 16), torch.randn(2, 8, 2 * TEXT_WIDTH)
    assert velocity(model, z, torch.rand(2), tokens, tokens[:, 0], 0).abs().max() == 0


@pytest.mark.parametrize("zero_tokens", [0, 1, 77, 256])
def test_one_counted_token_is_as_many_zero_vectors_in_the_stock_attention(transformer, zero_tokens):
    z, s = torch.randn(2, 8, 16, 16), torch.tensor([0.2, 0.9])
    tokens = torch.randn(2, 8, 2 * TEXT_WIDTH)
    pooled = torch.randn(2, 2 * TEXT_WIDTH)
    got = velocity(transformer, z, s, tokens, pooled, zero_tokens)
    transformer.set_attn_processor(JointAttnProcessor2_0())
    padded = F.pad(tokens, (0, 0, 0, zero_tokens))
    expected = transformer(z, padded, pooled, 1000 * s).sample
    torch.testing.assert_close(got, expected, rtol=1e-4, atol=1e-5)
    if zero_tokens > 1:  # the count is no idle number
        one = velocity(transformer, z, s, tokens, pooled, 1)
        assert (one - expected).abs().max() > 1e-2


def test_the_twin_of_a_text_encoder_gives_its_features(encoder):
    ids = torch.tensor([[48, 5, 7, 49, 49, 49, 49, 49], [48, 9, 49, 49, 49, 49, 49, 49]])
    tokens, pooled = text_features(with_projection(encoder), ids)
    with torch.no_grad():
        expected = encoder(ids, output_hidden_states=True)
    both = expected.hidden_states[-1].repeat(1, 1, 2)
    torch.testing.assert_close(tokens, both)
    torch.testing.assert_close(pooled, expected.pooler_output.repeat(1, 2))


def test_whitened_text_starts_with_directions_of_like_size():
    model = build_transformer()
    generator = torch.Generator().manual_seed(0)
    scales = torch.logspace(-1, 2, TEXT_WIDTH)
    x = torch.randn(64, 32, TEXT_WIDTH, generator=generator) * scales + 3
    tokens = x.repeat(1, 1, 2)
    whiten_text(model, tokens)
    with torch.no_grad():
        y = model.context_embedder(tokens).flatten(0, 1)
    torch.testing.assert_close(y.mean(0), torch.zeros(128), rtol=0, atol=1e-3)
    spread = torch.linalg.eigvalsh(torch.cov(y.T)).sqrt()
    known = scales / (1 + scales)  # the random sample's own deviations differ by a few percent
    torch.testing.assert_close(spread.float(), known.sort().values, rtol=0.15, atol=0.02)


def test_flow_times_are_logit_normal():
    s = flow_times(20_000, torch.Generator().manual_seed(0))
    logits = s.logit()
    assert abs(float(logits.mean())) < 0.01
    assert abs(float(logits.std()) - 1) < 0.01


def test_the_loss_of_a_fresh_transformer_is_that_of_answering_zero(encoder):
    z = torch.randn(64, 8, 16, 16, generator=torch.Generator().manual_seed(1))
    ids = torch.full((64, 8), 49)
    rng = torch.Generator().manual_seed(0)
    loss = flow_loss(build_transformer(), with_projection(encoder), z, ids, rng)
    assert abs(loss.item() - 2) < 0.05  # E|ε - z|² of two unit normals


def test_the_scheduler_walks_the_path_of_the_loss():
    """From noise, steps along ε - z end at z, whatever their number."""
    z, noise = torch.randn(1, 8, 16, 16), torch.randn(1, 8, 16, 16)
    scheduler = build_flow_scheduler()
    scheduler.set_timesteps(5)
    torch.testing.assert_close(scheduler.timesteps, torch.linspace(1000, 1, 5))  # no shift
    x = noise
    for t, sigma in zip(scheduler.timesteps, scheduler.sigmas[:-1], strict=True):
        torch.testing.assert_close(x, (1 - sigma) * z + sigma * noise)
        x = scheduler.step(noise - z, t, x).prev_sample
    torch.testing.assert_close(x, z)
