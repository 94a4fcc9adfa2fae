"""Task loss, logits distillation and attention-relation distillation (BitDistill Eq. 7-14).

Every loss is a sum over this micro-batch divided by a count over the whole optimiser step (`Totals`), so gradient
accumulation changes nothing: the micro-batch losses of a step add up to the loss of the step.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import assert_never

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.utils.checkpoint import checkpoint
from transformers import PreTrainedModel

from bitdistill_core.choices import LossVariant
from bitdistill_core.relations import States, relation_kl, relation_logits

CHUNK_ELEMENTS = 2**24  # logits of one model that a vocabulary loss holds at once


@dataclass(frozen=True)
class Totals:
    """What an optimiser step holds, over all its micro-batches."""

    num_sequences: int
    num_tokens: int  # padding excluded
    num_targets: int  # supervised tokens


@dataclass(frozen=True)
class Batch:
    """Right-padded sequences. `labels` is -100 where nothing is predicted, not shifted."""

    input_ids: Tensor  # (B, T) int64
    labels: Tensor  # (B, T) int64
    lengths: Tensor  # (B,) int64
    totals: Totals

    @property
    def is_token(self) -> Tensor:
        """(B, T) bool, False at padding."""
        return torch.arange(self.input_ids.shape[1], device=self.lengths.device)[None] < self.lengths[:, None]

    def padded(self, multiple: int) -> "Batch":
        """The same batch with T a multiple of `multiple`."""
        more = -self.input_ids.shape[1] % multiple
        ids, labels = F.pad(self.input_ids, (0, more)), F.pad(self.labels, (0, more), value=-100)
        return Batch(ids, labels, self.lengths, self.totals)

    def to(self, device: torch.device) -> "Batch":
        """The same batch on a device."""
        return Batch(self.input_ids.to(device), self.labels.to(device), self.lengths.to(device), self.totals)


def hidden_states(model: PreTrainedModel, batch: Batch) -> Tensor:
    """Last hidden states after the final norm, (B, T, D).

    No padding mask is passed: with causal attention and padding on the right no token sees padding.
    """
    out: Tensor = model.get_decoder()(input_ids=batch.input_ids, use_cache=False).last_hidden_state
    return out


def head_logits(model: PreTrainedModel, hidden: Tensor) -> Tensor:
    """Vocabulary logits (..., V) of hidden states (..., D), with the model's own final soft-capping if it has one."""
    logits: Tensor = model.get_output_embeddings()(hidden)
    cap = getattr(model.config, "final_logit_softcapping", None)
    return logits if cap is None else cap * torch.tanh(logits / cap)


def task_loss(model: PreTrainedModel, hidden: Tensor, batch: Batch) -> Tensor:
    """Cross-entropy of the supervised tokens (BitDistill Eq. 7 and 14): sum / num_targets of the step, () fp32.

    Chunked over tokens, so a long batch never holds all its logits.
    """
    targets = batch.labels[:, 1:]
    chosen = targets != -100
    states, targets = hidden[:, :-1][chosen], targets[chosen]

    def chunk_loss(states: Tensor, targets: Tensor) -> Tensor:
        return F.cross_entropy(head_logits(model, states).float(), targets, reduction="sum")

    total = _sum_in_chunks(chunk_loss, (states, targets), model.config.vocab_size)
    return total / max(batch.totals.num_targets, 1)


def logits_kd_loss(
    student: PreTrainedModel,
    student_hidden: Tensor,
    teacher: PreTrainedModel,
    teacher_hidden: Tensor,
    batch: Batch,
    *,
    kd_temperature: float,
    variant: LossVariant,
) -> Tensor:
    """KL(teacher || student) over the vocabulary at temperature tau (BitDistill Eq. 8-9), () fp32.

    `paper`: the positions that predict the answer, sum / num_targets, no factor tau^2. `authors`: every non-padding
    position, sum / num_tokens, times tau^2, as their code computes it. Chunked and recomputed in the backward pass:
    the logits of at most CHUNK_ELEMENTS entries of each model exist at a time.
    """
    if variant == "paper":
        chosen = F.pad(batch.labels[:, 1:] != -100, (0, 1))
        scale = 1.0 / max(batch.totals.num_targets, 1)
    elif variant == "authors":
        chosen = batch.is_token
        scale = kd_temperature**2 / max(batch.totals.num_tokens, 1)
    else:
        assert_never(variant)
    student_states, teacher_states = student_hidden[chosen], teacher_hidden[chosen]
    vocab_size = min(student.config.vocab_size, teacher.config.vocab_size)

    def chunk_loss(student_states: Tensor, teacher_states: Tensor) -> Tensor:
        with torch.no_grad():
            target = (head_logits(teacher, teacher_states)[..., :vocab_size].float() / kd_temperature).log_softmax(-1)
        log_student = (head_logits(student, student_states)[..., :vocab_size].float() / kd_temperature).log_softmax(-1)
        return F.kl_div(log_student, target, reduction="sum", log_target=True)

    total = _sum_in_chunks(chunk_loss, (student_states, teacher_states), vocab_size)
    return total * scale


def attention_kd_loss(
    student_states: States,
    teacher_states: States,
    layer_pairs: Sequence[tuple[int, int]],
    batch: Batch,
    *,
    num_relation_heads: int,
    variant: LossVariant,
) -> Tensor:
    """Attention-relation distillation over Q, K, V (BitDistill Eq. 10-12), () fp32. Q, K and V terms add (alpha = 1).

    `paper`: scaled dot-product relations; mean over layers, relation heads and the tokens of a sequence, then over
    sequences. `authors`: cosine relations; mean over all rows (heads and non-padding tokens of the batch), then
    divided by layers and by relation heads once more, as their code does. Padding is masked in both; the authors'
    code leaves it in.

    Args:
        layer_pairs: (student layer, teacher layer).
    """
    is_token = batch.is_token
    if variant == "paper":
        row_weight = is_token / (batch.lengths[:, None] * batch.totals.num_sequences)
    elif variant == "authors":
        row_weight = is_token / (batch.totals.num_tokens * num_relation_heads)
    else:
        assert_never(variant)
    total = batch.lengths.new_zeros((), dtype=torch.float32)
    for student_layer, teacher_layer in layer_pairs:
        for student, teacher in zip(student_states[student_layer], teacher_states[teacher_layer], strict=True):
            rows = relation_kl(
                relation_logits(student, num_relation_heads, cosine=variant == "authors"),
                relation_logits(teacher, num_relation_heads, cosine=variant == "authors").detach(),
                is_token,
            )  # (B, R, T)
            total = total + (rows.mean(dim=1) * row_weight).sum()
    return total / len(layer_pairs)


def _sum_in_chunks(loss: Callable[..., Tensor], tensors: tuple[Tensor, Tensor], vocab_size: int) -> Tensor:
    """Sum of `loss` over chunks of tokens; with several, each is computed again in the backward pass, not kept."""
    size = max(1, CHUNK_ELEMENTS // vocab_size)
    chunks = list(zip(*(tensor.split(size) for tensor in tensors), strict=True))
    if len(chunks) == 1:
        return loss(*chunks[0])
    return torch.stack([checkpoint(loss, *chunk, use_reentrant=False) for chunk in chunks]).sum()
