"""Block-wise distillation: every decoder block of a student alone learns its teacher's output, first block first.

A block's input is what the student's finished blocks before it put out, its target the hidden state that the teacher
has after the same block on the same tokens; so a block also makes good what the blocks before it lost. The method is
block reconstruction (BRECQ, arXiv 2102.05426; trained on all parameters of a block: EfficientQAT, arXiv 2407.11062).
An optimiser step quantises and updates one block only, and no gradient passes through another. Embeddings, final norm
and head are the teacher's from the start: its hidden states mean nothing to another head.
"""

import json
import os
import shutil
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from itertools import accumulate
from pathlib import Path
from typing import Any

import numpy as np
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor, nn
from transformers import PreTrainedModel

from bitdistill_core import train
from bitdistill_core.block_outputs import hidden_kd_loss
from bitdistill_core.choices import ChannelWeights, Precision
from bitdistill_core.disk import sync
from bitdistill_core.losses import Batch, Totals
from bitdistill_core.manifest import METRICS, Metrics, Report
from bitdistill_core.passage import Passage
from bitdistill_core.replay import Replay, length_multiple


@dataclass(frozen=True)
class BlockBatch:
    """A micro-batch before one block, and what should stand behind it."""

    batch: Batch
    states: Tensor  # (B, T, D), the student's
    target: Tensor  # (B, T, D), the teacher's

    @property
    def lengths(self) -> Tensor:
        """Tokens of each sequence."""
        return self.batch.lengths

    def to(self, device: torch.device) -> "BlockBatch":
        """The same batch on a device."""
        return BlockBatch(self.batch.to(device), self.states.to(device), self.target.to(device))


def train_blocks(
    student: PreTrainedModel,
    teacher: PreTrainedModel,
    steps: Sequence[Sequence[Batch]],
    *,
    name: str,
    num_epochs: float,
    seed: int,
    work_dir: Path,
    report: Report,
    device: torch.device,
    precision: Precision,
    channel_weights: ChannelWeights = "none",
    **options: Any,
) -> Metrics:
    """Trains the student's blocks in place and returns the relative error of the last one.

    Reports `NAME/loss`, the relative squared distance of `hidden_kd_loss`, at steps that count on from block to block,
    and `NAME/block_error` behind each block, over all sequences. Finished blocks are kept in `work_dir`.

    Args:
        student, teacher: of as many blocks and the same width; the student with the teacher's embeddings, final norm
            and head (`take_over_frame`), the teacher on `device`.
        steps: the micro-batches of each optimiser step of an epoch; their hidden states stay in memory.
        precision: of the forward passes and the hidden states held.
        channel_weights: of the distance; next_norm: the gains of the teacher's norm that reads the block's output.
        options: what else `train.fit` takes.
    Raises:
        ValueError: a block diverged.
    """
    nn.Module.to(student, device).eval()
    flat = [batch.padded(length_multiple(device)).to(device) for step in steps for batch in step]
    ends = list(accumulate((len(step) for step in steps), initial=0))
    num_steps = max(1, round(num_epochs * len(steps)))
    metrics: Metrics = {}
    dtype = train.compute_dtype(precision)
    # uncached: a cast of a bias must not outlive the step that changes it
    with torch.autocast(device.type, torch.bfloat16, enabled=dtype == torch.bfloat16, cache_enabled=False):
        theirs, ours = (Passage.begin(model, [batch.input_ids for batch in flat]) for model in (teacher, student))
        for passage in (theirs, ours):
            passage.hidden = [states.to(dtype) for states in passage.hidden]
        num_blocks = len(ours.decoder_blocks)
        for index, block in enumerate(ours.decoder_blocks):
            theirs.advance()
            weights = _next_gains(teacher, index) if channel_weights == "next_norm" else None
            finished = work_dir / f"block-{index}.safetensors"
            if finished.is_file():
                with train.damage_named(finished):
                    state = load_file(finished)
                block.load_state_dict(state)
            else:
                train.fit(
                    block,
                    partial(_step_batches, flat, ends, ours.hidden, theirs.hidden, [seed, index]),
                    _loss_fn(ours, device, weights),
                    name=name,
                    title=f"{name} {index + 1}/{num_blocks}",
                    num_steps=num_steps,
                    seed=seed,
                    work_dir=work_dir / f"block-{index}",
                    report=partial(_report_from, index * num_steps, report),
                    device=device,
                    precision=precision,
                    **options,
                )
                _save(block, finished)
            ours.advance()
            errors = [
                hidden_kd_loss([student_states], [teacher_states], batch, weights)
                for student_states, teacher_states, batch in zip(ours.hidden, theirs.hidden, flat, strict=True)
            ]
            metrics = {f"{name}/block_error": float(torch.stack(errors).double().sum()) / len(steps)}
            report(metrics, (index + 1) * num_steps)
    (work_dir / METRICS).write_text(json.dumps(metrics))
    return metrics


def _loss_fn(passage: Passage, device: torch.device, weights: Tensor | None = None) -> train.LossFn:
    """The distance of the present block's output from its target; on a GPU replayed."""
    if device.type != "cuda":
        return lambda micro: {
            "hidden_kd": hidden_kd_loss([passage.run(micro.states)], [micro.target], micro.batch, weights)
        }

    def distance(parameters: Mapping[str, Tensor], inputs: tuple[Tensor, ...]) -> tuple[Tensor]:
        states, target, input_ids, lengths = inputs
        batch = Batch(input_ids, input_ids, lengths, Totals(1, 1, 1))  # a sum: totals are no tensors
        return (hidden_kd_loss([passage.run(states, parameters)], [target], batch, weights),)

    replay = Replay(distance, passage.block)

    def loss_fn(micro: BlockBatch) -> train.LossParts:
        (total,) = replay(micro.states, micro.target, micro.batch.input_ids, micro.lengths)
        return {"hidden_kd": total / micro.batch.totals.num_tokens}

    return loss_fn


@torch.no_grad()
def _next_gains(teacher: PreTrainedModel, index: int) -> Tensor:
    """(D) fp32: the gains of the norm behind block `index`, whatever the architecture adds to them (Gemma: 1)."""
    decoder = teacher.get_decoder()
    is_last = index + 1 == len(decoder.layers)
    norm = decoder.norm if is_last else decoder.layers[index + 1].input_layernorm
    ones = torch.ones(1, int(teacher.config.hidden_size), device=teacher.device)  # of which a norm makes its gains
    return norm(ones)[0].float()


def read_block_metrics(work_dir: Path) -> Metrics:
    """What `train_blocks` returned when it finished in `work_dir`."""
    with train.damage_named(work_dir / METRICS):
        metrics: Metrics = json.loads((work_dir / METRICS).read_text())
    return metrics


@torch.no_grad()
def take_over_frame(student: PreTrainedModel, teacher: PreTrainedModel) -> None:
    """Gives the student everything of the teacher outside the decoder blocks. Before the teacher is cast."""
    theirs = dict(teacher.named_parameters())
    for name, parameter in student.named_parameters():
        if ".layers." not in name:
            parameter.copy_(theirs[name])


def _step_batches(
    flat: Sequence[Batch],
    ends: Sequence[int],
    states: Sequence[Tensor],
    targets: Sequence[Tensor],
    seed: Sequence[int],
    step: int,
) -> list[BlockBatch]:
    """The micro-batches of an optimiser step; their order is shuffled anew each epoch."""
    epoch, place = divmod(step, len(ends) - 1)
    chosen = int(np.random.default_rng([*seed, epoch]).permutation(len(ends) - 1)[place])
    return [BlockBatch(flat[i], states[i], targets[i]) for i in range(ends[chosen], ends[chosen + 1])]


def _report_from(first_step: int, report: Report, metrics: Metrics, step: int) -> None:
    report(metrics, first_step + step)


def _save(block: nn.Module, path: Path) -> None:
    """Writes a finished block atomically; its training checkpoints go."""
    path.parent.mkdir(parents=True, exist_ok=True)
    temporary = path.with_suffix(".tmp")
    save_file({key: value.detach().cpu().contiguous() for key, value in block.state_dict().items()}, temporary)
    sync(temporary)
    os.replace(temporary, path)
    shutil.rmtree(path.with_suffix(""), ignore_errors=True)
