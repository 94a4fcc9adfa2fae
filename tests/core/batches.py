"""Batches of random tokens."""

import torch

from bitdistill_core.losses import Batch, Totals


def make_batch(lengths: list[int], answers: list[int] | None = None, seed: int = 0, pad_to: int | None = None) -> Batch:
    """Random tokens; the last `answers[i]` tokens of row i, or the last one, are the answer."""
    answers = [1] * len(lengths) if answers is None else answers
    generator = torch.Generator().manual_seed(seed)
    size = pad_to or max(lengths)
    ids = torch.zeros(len(lengths), size, dtype=torch.int64)
    labels = torch.full_like(ids, -100)
    for row, (length, answer) in enumerate(zip(lengths, answers, strict=True)):
        ids[row, :length] = torch.randint(3, 97, (length,), generator=generator)
        labels[row, length - answer : length] = ids[row, length - answer : length]
    return Batch(ids, labels, torch.tensor(lengths), Totals(len(lengths), sum(lengths), sum(answers)))


def split(batch: Batch) -> list[Batch]:
    """One micro-batch a row, padding cut off."""
    return [
        Batch(batch.input_ids[i : i + 1, :n], batch.labels[i : i + 1, :n], batch.lengths[i : i + 1], batch.totals)
        for i, n in enumerate(batch.lengths.tolist())
    ]
