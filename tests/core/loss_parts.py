"""Every part of the loss, for what must change none of them."""

from contextlib import ExitStack
from typing import Any

import torch
from transformers import PreTrainedModel

from bitdistill_core import losses
from bitdistill_core.block_outputs import captured_blocks, hidden_kd_loss
from bitdistill_core.losses import Batch
from bitdistill_core.relations import captured


def step(model: PreTrainedModel, teacher: PreTrainedModel, batch: Batch, precision: torch.dtype) -> tuple[Any, Any]:
    """Every kind of loss part, twice differentiated apart as for the balance of the parts, and the whole gradient."""
    with ExitStack() as stack:
        states, targets = (stack.enter_context(captured(m, [1])) for m in (model, teacher))
        ours, theirs = (stack.enter_context(captured_blocks(m)) for m in (model, teacher))
        model.zero_grad()
        with torch.autocast(batch.lengths.device.type, torch.bfloat16, enabled=precision is torch.bfloat16):
            with torch.no_grad():
                teacher_hidden = losses.hidden_states(teacher, batch)
            hidden = losses.hidden_states(model, batch)
            kd = {"kd_temperature": 1.0, "variant": "paper"}
            parts = {
                "task": losses.task_loss(model, hidden, batch),
                "logits": losses.logits_kd_loss(model, hidden, teacher, teacher_hidden, batch, **kd),  # type: ignore[arg-type]
                "relations": losses.attention_kd_loss(
                    states, targets, [(1, 1)], batch, num_relation_heads=2, variant="authors"
                ),
                "blocks": hidden_kd_loss(ours, theirs, batch),
            }
        trained = list(model.parameters())
        apart = [torch.autograd.grad(part, trained, retain_graph=True, allow_unused=True) for part in parts.values()]
        torch.stack(list(parts.values())).sum().backward()
    summed = [sum(g.float() for g in grads if g is not None) for grads in zip(*apart, strict=True)]
    return (
        {name: part.detach() for name, part in parts.items()},
        [(p.grad.clone(), total) for p, total in zip(trained, summed, strict=True) if p.grad is not None],
    )
