"""Losses against the paper's equations written out, and against themselves under accumulation."""

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from bitdistill_core import losses
from bitdistill_core.losses import Batch
from bitdistill_core.relations import captured
from bitdistill_core.surgery import operate
from tests.core.batches import make_batch, split
from tests.core.conftest import build


def reference_positions(batch: Batch) -> list[tuple[int, int]]:
    """(row, position) of every hidden state that predicts an answer token."""
    rows, columns = (batch.labels != -100).nonzero(as_tuple=True)
    return [(int(r), int(c) - 1) for r, c in zip(rows, columns, strict=True)]


def test_task_loss_is_the_mean_cross_entropy_of_answer_tokens() -> None:
    model, batch = build("qwen3"), make_batch([6, 9], [1, 3])
    logits = model(batch.input_ids).logits
    terms = [
        F.cross_entropy(logits[r, c][None], batch.input_ids[r, c + 1][None]) for r, c in reference_positions(batch)
    ]
    loss = losses.task_loss(model, losses.hidden_states(model, batch), batch)
    assert float(loss.detach()) == pytest.approx(float(torch.stack(terms).mean().detach()), rel=1e-5)


@pytest.mark.parametrize("variant", ["paper", "authors"])
def test_logits_kd_follows_eq_8_and_9(variant: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(losses, "CHUNK_ELEMENTS", 97 * 2)  # two tokens a chunk
    student, teacher, batch = build("qwen3", seed=1), build("qwen3", seed=2), make_batch([6, 9], [1, 3])
    tau = 5.0
    log_s = (student(batch.input_ids).logits / tau).log_softmax(-1)
    log_t = (teacher(batch.input_ids).logits / tau).log_softmax(-1)
    kl = (log_t.exp() * (log_t - log_s)).sum(-1)  # (B, T)
    if variant == "paper":
        expected = torch.stack([kl[r, c] for r, c in reference_positions(batch)]).mean()
    else:
        expected = tau**2 * torch.cat([kl[0, :6], kl[1, :9]]).mean()
    loss = losses.logits_kd_loss(
        student,
        losses.hidden_states(student, batch),
        teacher,
        losses.hidden_states(teacher, batch),
        batch,
        kd_temperature=tau,
        variant=variant,
    )
    assert float(loss.detach()) == pytest.approx(float(expected.detach()), rel=1e-4)


@pytest.mark.parametrize("variant", ["paper", "authors"])
def test_attention_kd_follows_eq_10_to_12(variant: str) -> None:
    batch = make_batch([5, 8], [1, 1])
    heads = 4
    generator = torch.Generator().manual_seed(7)

    def states(num_heads: int, width: int) -> tuple[Tensor, Tensor, Tensor]:
        q, k, v = (torch.randn(2, num_heads, 8, width, generator=generator) for _ in range(3))
        return q, k, v

    student, teacher = {1: states(4, 6)}, {2: states(2, 20)}  # other heads and widths than the student
    total = 0.0
    for s, t in zip(student[1], teacher[2], strict=True):
        rows = []
        for row, length in enumerate([5, 8]):
            s_heads = s[row, :, :length].transpose(0, 1).reshape(length, heads, -1).transpose(0, 1)
            t_heads = t[row, :, :length].transpose(0, 1).reshape(length, heads, -1).transpose(0, 1)
            if variant == "authors":
                s_heads, t_heads = F.normalize(s_heads, dim=-1), F.normalize(t_heads, dim=-1)
                s_logits, t_logits = s_heads @ s_heads.mT, t_heads @ t_heads.mT
            else:
                s_logits = s_heads @ s_heads.mT / s_heads.shape[-1] ** 0.5
                t_logits = t_heads @ t_heads.mT / t_heads.shape[-1] ** 0.5
            rows.append(
                F.kl_div(s_logits.log_softmax(-1), t_logits.log_softmax(-1), log_target=True, reduction="none").sum(-1)
            )  # (heads, length)
        if variant == "paper":
            total += sum(float(r.sum()) / (heads * r.shape[1]) for r in rows) / 2
        else:
            total += float(torch.cat(rows, dim=1).mean()) / heads
    loss = losses.attention_kd_loss(student, teacher, [(1, 2)], batch, num_relation_heads=heads, variant=variant)
    assert float(loss) == pytest.approx(total, rel=1e-4)


@pytest.mark.parametrize("variant", ["paper", "authors"])
def test_accumulating_micro_batches_gives_the_loss_and_gradient_of_the_whole(variant: str) -> None:
    teacher = build("qwen3", seed=2)
    batch = make_batch([5, 9, 7], [1, 2, 1])
    results = []
    for parts in ([batch], split(batch)):
        student = build("qwen3", seed=1)
        operate(student, subln="output", sub_norm_eps=1e-6)
        value = 0.0
        with captured(student, [1]) as s_states, captured(teacher, [1]) as t_states:
            for part in parts:
                s_hidden, t_hidden = losses.hidden_states(student, part), losses.hidden_states(teacher, part)
                loss = losses.task_loss(student, s_hidden, part)
                loss = loss + losses.logits_kd_loss(
                    student, s_hidden, teacher, t_hidden.detach(), part, kd_temperature=2.0, variant=variant
                )
                loss = loss + losses.attention_kd_loss(
                    s_states, t_states, [(1, 1)], part, num_relation_heads=4, variant=variant
                )
                loss.backward()
                value += float(loss.detach())
        gradient = student.get_submodule("model.layers.0.mlp.down_proj").weight.grad
        results.append((value, gradient))
    assert results[0][0] == pytest.approx(results[1][0], rel=1e-4)
    assert torch.allclose(results[0][1], results[1][1], rtol=1e-3, atol=1e-6)


def test_a_model_distilled_from_itself_has_no_kd_loss() -> None:
    model, batch = build("gemma3_text"), make_batch([6, 4], [1, 1])
    hidden = losses.hidden_states(model, batch)
    loss = losses.logits_kd_loss(model, hidden, model, hidden, batch, kd_temperature=5.0, variant="authors")
    assert loss.abs() < 1e-5


def test_padding_is_never_seen() -> None:
    for model_type in ("qwen3", "gemma3_text", "llama"):
        model = build(model_type)
        tight, loose = make_batch([7], [2]), make_batch([7], [2], pad_to=13)
        tight_hidden, loose_hidden = losses.hidden_states(model, tight), losses.hidden_states(model, loose)
        assert torch.allclose(tight_hidden, loose_hidden[:, :7], atol=1e-5)
        assert torch.allclose(
            losses.task_loss(model, tight_hidden, tight), losses.task_loss(model, loose_hidden, loose), atol=1e-5
        )


def test_no_tensor_of_the_whole_vocabulary_loss_exists(monkeypatch: pytest.MonkeyPatch) -> None:
    """The largest tensor that the vocabulary KL keeps for its backward pass is far below tokens x vocabulary."""
    monkeypatch.setattr(losses, "CHUNK_ELEMENTS", 97 * 4)
    student, teacher, batch = build("qwen3", seed=1), build("qwen3", seed=2), make_batch([40, 40], [1, 1])
    hidden, teacher_hidden = losses.hidden_states(student, batch), losses.hidden_states(teacher, batch).detach()
    saved: list[int] = []

    def pack(tensor: Tensor) -> Tensor:
        saved.append(tensor.numel())
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
        losses.logits_kd_loss(student, hidden, teacher, teacher_hidden, batch, kd_temperature=1.0, variant="authors")
    assert max(saved) <= max(97 * 32, 80 * 32)  # the head's weight or the hidden states, not 80 x 97


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_chunks_of_the_vocabulary_losses_have_the_gradients_of_the_whole(
    dtype: torch.dtype, monkeypatch: pytest.MonkeyPatch
) -> None:
    def gradients() -> dict[str, Tensor]:
        student, teacher, batch = build("qwen3", seed=1), build("qwen3", seed=2), make_batch([6, 9], [1, 3])
        with torch.autocast("cpu", dtype, enabled=dtype != torch.float32):
            hidden, taught = losses.hidden_states(student, batch), losses.hidden_states(teacher, batch).detach()
            kd = losses.logits_kd_loss(student, hidden, teacher, taught, batch, kd_temperature=2.0, variant="authors")
            (losses.task_loss(student, hidden, batch) + kd).backward()
        return {name: p.grad.clone() for name, p in student.named_parameters() if p.grad is not None}

    whole = gradients()
    monkeypatch.setattr(losses, "CHUNK_ELEMENTS", 97 * 2)  # two tokens a chunk
    chunked = gradients()
    assert whole.keys() == chunked.keys()
    assert "model.embed_tokens.weight" in whole
    tolerance = 1e-5 if dtype == torch.float32 else 0.02
    for name, gradient in whole.items():
        assert float((chunked[name] - gradient).norm()) <= tolerance * float(gradient.norm()), name
