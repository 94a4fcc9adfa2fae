"""Captured Q, K, V against the architecture's own projections, and relations against Eq. 11-12."""

import pytest
import torch
from transformers import PreTrainedModel
from transformers.models.qwen3.modeling_qwen3 import apply_rotary_pos_emb

from bitdistill_core.relations import captured, relation_kl, relation_logits
from tests.core.conftest import build

IDS = torch.tensor([[3, 14, 15, 92, 65, 35]])


def test_capturing_does_not_change_the_model(any_model: PreTrainedModel) -> None:
    with torch.no_grad():
        before = any_model(IDS).logits
        with captured(any_model, [0, 1]) as states:
            during = any_model(IDS).logits
        after = any_model(IDS).logits
    assert torch.equal(before, during)
    assert torch.equal(before, after)
    assert sorted(states) == [0, 1]
    query, key, value = states[1]
    assert query.shape[:3] == (1, 4, 6)
    assert key.shape[:3] == value.shape[:3] == (1, 2, 6)


def test_q_and_k_come_after_norm_and_rope_and_v_raw() -> None:
    model = build("qwen3")
    layer = model.model.layers[0]
    with torch.no_grad(), captured(model, [0]) as states:
        model(IDS)
        hidden = layer.input_layernorm(model.model.embed_tokens(IDS))
        attention = layer.self_attn
        query = attention.q_norm(attention.q_proj(hidden).view(1, 6, 4, 8)).transpose(1, 2)
        key = attention.k_norm(attention.k_proj(hidden).view(1, 6, 2, 8)).transpose(1, 2)
        value = attention.v_proj(hidden).view(1, 6, 2, 8).transpose(1, 2)
        cos, sin = model.model.rotary_emb(hidden, torch.arange(6)[None])
        query, key = apply_rotary_pos_emb(query, key, cos, sin)
    for got, expected in zip(states[0], (query, key, value), strict=True):
        assert torch.allclose(got, expected, atol=1e-6)


def test_relation_logits_follow_eq_12() -> None:
    states = torch.randn(2, 4, 5, 6, generator=torch.Generator().manual_seed(0))  # (B, H, T, d)
    logits = relation_logits(states, 3, cosine=False)
    joined = torch.cat([states[:, h] for h in range(4)], dim=-1)  # (B, T, 24)
    for head in range(3):
        part = joined[..., 8 * head : 8 * head + 8]
        assert torch.allclose(logits[:, head], part @ part.transpose(1, 2) / 8**0.5, atol=1e-5)


def test_cosine_relations_follow_algorithm_1() -> None:
    states = torch.randn(1, 2, 4, 6, generator=torch.Generator().manual_seed(1))
    logits = relation_logits(states, 2, cosine=True)
    unit = states / states.norm(dim=-1, keepdim=True)
    assert torch.allclose(logits, unit @ unit.transpose(-1, -2), atol=1e-6)


def test_relation_kl_matches_torch_without_padding() -> None:
    generator = torch.Generator().manual_seed(2)
    student, teacher = torch.randn(2, 3, 5, 5, generator=generator), torch.randn(2, 3, 5, 5, generator=generator)
    rows = relation_kl(student, teacher, torch.ones(2, 5, dtype=torch.bool))
    expected = torch.nn.functional.kl_div(
        student.log_softmax(-1), teacher.log_softmax(-1), log_target=True, reduction="none"
    ).sum(-1)
    assert torch.allclose(rows, expected, atol=1e-6)


def test_padding_changes_nothing() -> None:
    generator = torch.Generator().manual_seed(3)
    student, teacher = torch.randn(1, 2, 7, 7, generator=generator), torch.randn(1, 2, 7, 7, generator=generator)
    is_token = torch.arange(7)[None] < 4
    rows = relation_kl(student, teacher, is_token)
    alone = relation_kl(student[..., :4, :4], teacher[..., :4, :4], is_token[:, :4])
    assert torch.allclose(rows[..., :4], alone, atol=1e-6)
    assert not rows[..., 4:].any()


def test_a_model_has_no_divergence_from_itself() -> None:
    logits = torch.randn(1, 2, 5, 5, generator=torch.Generator().manual_seed(4))
    assert relation_kl(logits, logits, torch.ones(1, 5, dtype=torch.bool)).abs().max() < 1e-6


def test_relation_heads_must_divide_the_width() -> None:
    with pytest.raises(ValueError, match=r"width=24, num_relation_heads=5"):
        relation_logits(torch.zeros(1, 4, 2, 6), 5, cosine=False)


def test_a_layer_asked_for_twice_is_captured_once() -> None:
    model = build("qwen3")
    with torch.no_grad(), captured(model, [1, 1]) as states:
        model(IDS)
    assert sorted(states) == [1]
    assert model.config._attn_implementation == "sdpa"


@pytest.mark.parametrize("cosine", [False, True])
def test_relations_are_computed_in_float32_under_autocast(cosine: bool) -> None:
    states = torch.randn(2, 2, 5, 8, generator=torch.Generator().manual_seed(3)).bfloat16()
    is_token = torch.ones(2, 5, dtype=torch.bool)
    expected = relation_logits(states, 2, cosine=cosine)
    with torch.autocast("cpu", torch.bfloat16):
        logits = relation_logits(states, 2, cosine=cosine)
        divergence = relation_kl(logits, logits.roll(1, 0), is_token)
    assert logits.dtype == divergence.dtype == torch.float32
    assert torch.equal(logits, expected)
    assert torch.isfinite(divergence).all()
