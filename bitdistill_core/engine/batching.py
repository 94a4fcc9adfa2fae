"""Sequences into batches for the native model: no padding, and a beginning that all share is computed once."""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field

import numpy as np
from numpy.typing import NDArray

Ids = NDArray[np.int32]

BATCH_TOKENS = 128  # more would cost memory and gain little speed


@dataclass
class Batch:
    """Segments for `Decoder.forward`, and which of their tokens' hidden states are wanted."""

    segments: list[Ids] = field(default_factory=list)
    parents: list[int] = field(default_factory=list)
    outputs: list[int] = field(default_factory=list)
    num_tokens: int = 0

    def add(self, ids: Ids, parent: int, wanted: Sequence[int]) -> int:
        """Adds a segment and returns its index; `wanted` are positions in `ids`."""
        self.outputs.extend(self.num_tokens + position for position in wanted)
        self.segments.append(ids)
        self.parents.append(parent)
        self.num_tokens += len(ids)
        return len(self.segments) - 1


def shared_prefix(sequences: Sequence[Ids]) -> int:
    """Length of the longest common beginning that leaves at least one token of every sequence; 0 for one sequence."""
    if len(sequences) < 2:
        return 0
    length = min(len(sequence) for sequence in sequences) - 1
    first = sequences[0][:length]
    for sequence in sequences[1:]:
        different = np.flatnonzero(first != sequence[: len(first)])
        if len(different):
            first = first[: different[0]]
    return len(first)


def batches(sequences: Sequence[Ids], branches: Sequence[Sequence[Ids]]) -> Iterator[tuple[Batch, range]]:
    """Batches of neighbouring sequences of up to BATCH_TOKENS tokens, and which sequences they hold.

    Wanted are the last token of each sequence, then every token of each of its branches: continuations that see the
    sequence and not each other. The order of outputs is that of the sequences.
    """
    begin = 0
    while begin < len(sequences):
        end, tokens = begin, 0
        while end < len(sequences):
            tokens += len(sequences[end]) + sum(len(branch) for branch in branches[end])
            if end > begin and tokens > BATCH_TOKENS:
                break
            end += 1
        batch, prefix = Batch(), shared_prefix(sequences[begin:end])
        root = batch.add(sequences[begin][:prefix], -1, []) if prefix else -1
        for index in range(begin, end):
            tail = sequences[index][prefix:]
            parent = batch.add(tail, root, [len(tail) - 1])
            for branch in branches[index]:
                if len(branch):
                    batch.add(branch, parent, range(len(branch)))
        yield batch, range(begin, end)
        begin = end
