"""The next token from one row of logits: greedy, or temperature, top-k and top-p in transformers' order."""

from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray


@dataclass(frozen=True)
class Sampling:
    """How to choose a token. temperature 0 is greedy; top_k 0 and top_p 1 keep the whole vocabulary."""

    temperature: float = 0.0
    top_k: int = 0
    top_p: float = 1.0

    def __post_init__(self) -> None:
        if not (0 <= self.temperature < float("inf") and self.top_k >= 0 and 0 < self.top_p <= 1):
            raise ValueError(
                "sampling needs temperature >= 0, top_k >= 0 and 0 < top_p <= 1; got "
                f"temperature={self.temperature} top_k={self.top_k} top_p={self.top_p}"
            )


def choose_token(
    tokens: NDArray[np.int64], logits: NDArray[np.float64], sampling: Sampling, generator: np.random.Generator
) -> int:
    """One of `tokens`, which are in order of falling logits: all of the vocabulary, or the largest `top_k`."""
    if sampling.temperature == 0:
        return int(tokens[0])
    with np.errstate(over="ignore"):  # -inf at temperatures next to 0: only the largest remain
        scaled = (logits - logits[0]) / sampling.temperature
    if sampling.top_k:
        tokens, scaled = tokens[: sampling.top_k], scaled[: sampling.top_k]
    probabilities = np.exp(scaled)
    probabilities /= probabilities.sum()
    if sampling.top_p < 1:
        before = np.cumsum(probabilities) - probabilities
        kept = int(np.count_nonzero(before < sampling.top_p))  # the first token always
        tokens, probabilities = tokens[:kept], probabilities[:kept] / probabilities[:kept].sum()
    return int(generator.choice(tokens, p=probabilities))


def log_softmax(logits: NDArray[np.float32]) -> NDArray[np.float64]:
    """Log-probabilities over the last axis, in fp64."""
    shifted = logits.astype(np.float64) - logits.max(axis=-1, keepdims=True)
    return shifted - np.log(np.exp(shifted).sum(axis=-1, keepdims=True))
