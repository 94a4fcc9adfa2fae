"""Q, K and V of chosen layers, captured through transformers' attention interface, and their relations.

Q and K are taken after q_norm, k_norm and RoPE, V raw and before it is repeated for grouped-query attention. No model
is forked: a model switched to the attention implementation registered here computes the same SDPA attention.
"""

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from transformers import PreTrainedModel
from transformers.integrations.sdpa_attention import sdpa_attention_forward
from transformers.masking_utils import ALL_MASK_ATTENTION_FUNCTIONS
from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS

from bitdistill_core.replay import observed

IMPLEMENTATION = "bitdistill_capture"
_SINK = "_bitdistill_states"  # attribute of an attention module: where its states go

States = dict[int, tuple[Tensor, Tensor, Tensor]]  # layer -> Q (B, H, T, d), K and V (B, H_kv, T, d)


def _capturing_attention(
    module: nn.Module, query: Tensor, key: Tensor, value: Tensor, attention_mask: Tensor | None, **kwargs: Any
) -> tuple[Tensor, None]:
    sink = getattr(module, _SINK, None)
    if sink is not None:
        sink[module.layer_idx] = (query, key, value)
    out: tuple[Tensor, None] = sdpa_attention_forward(module, query, key, value, attention_mask, **kwargs)
    return out


ALL_ATTENTION_FUNCTIONS.register(IMPLEMENTATION, _capturing_attention)
ALL_MASK_ATTENTION_FUNCTIONS.register(IMPLEMENTATION, ALL_MASK_ATTENTION_FUNCTIONS["sdpa"])


@contextmanager
def captured(model: PreTrainedModel, layers: Sequence[int]) -> Iterator[States]:
    """A dict that every forward pass inside the context fills with the states of `layers`."""
    before = model.config._attn_implementation
    states: States = {}
    attentions = [model.get_decoder().layers[layer].self_attn for layer in dict.fromkeys(layers)]
    model.set_attn_implementation(IMPLEMENTATION)
    for attention in attentions:
        object.__setattr__(attention, _SINK, states)
    try:
        with observed(model, states):
            yield states
    finally:
        for attention in attentions:
            object.__delattr__(attention, _SINK)
        model.set_attn_implementation(before)


def relation_logits(states: Tensor, num_relation_heads: int, *, cosine: bool) -> Tensor:
    """Relation logits of one of Q, K, V, regrouped to relation heads: (B, R, T, T) fp32, no causal mask.

    The heads are joined to (B, T, H*d) and split anew into R heads of D/R [d_r] (MiniLMv2), so models of different
    head counts and widths compare. `cosine` False: A A^T / sqrt(d_r), BitDistill Eq. 12. True: rows are L2-normalised
    and not scaled, its Algorithm 1 and the authors' code.

    Raises:
        ValueError: H*d not divisible by R.
    """
    batch, heads, length, head_dim = states.shape
    width = heads * head_dim
    if width % num_relation_heads:
        raise ValueError(
            f"distill.num_relation_heads must divide the width of Q, K and V; got width={width}, "
            f"num_relation_heads={num_relation_heads}"
        )
    joined = states.transpose(1, 2).reshape(batch, length, num_relation_heads, width // num_relation_heads)
    with torch.autocast(states.device.type, enabled=False):  # in float32, whatever the models compute in
        regrouped = joined.transpose(1, 2).float()  # (B, R, T, d_r)
        if cosine:
            regrouped = F.normalize(regrouped, dim=-1)
            return regrouped @ regrouped.transpose(-1, -2)
        return regrouped @ regrouped.transpose(-1, -2) / (width // num_relation_heads) ** 0.5


def relation_kl(student_logits: Tensor, teacher_logits: Tensor, is_token: Tensor) -> Tensor:
    """KL(teacher || student) of each relation row, (B, R, T) fp32; padding has no part in rows or columns.

    Args:
        student_logits, teacher_logits: (B, R, T, T).
        is_token: (B, T) bool, False at padding. Rows of padding are 0.
    """
    columns = is_token[:, None, None, :]
    lowest = torch.finfo(torch.float32).min
    log_student = student_logits.masked_fill(~columns, lowest).log_softmax(dim=-1)
    log_teacher = teacher_logits.masked_fill(~columns, lowest).log_softmax(dim=-1)
    divergence = (log_teacher.exp() * (log_teacher - log_student)).masked_fill(~columns, 0.0).sum(dim=-1)
    return divergence * is_token[:, None, :]
