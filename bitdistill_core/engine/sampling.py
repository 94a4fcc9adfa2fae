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


def choose_token(logits: NDArray[np.float32], sampling: Sampling, generator: np.random.Generator) -> int:
    """Token id from (V,) logits. A greedy tie takes the lowest id."""
    if sampling.temperature == 0:
        return int(np.argmax(logits))
    scaled = logits.astype(np.float64) / sampling.temperature
    order = np.argsort(-scaled, kind="stable")
    if sampling.top_k:
        order = order[: sampling.top_k]
    probabilities = np.exp(scaled[order] - scaled[order[0]])
    probabilities /= probabilities.sum()
    if sampling.top_p < 1:
        before = np.cumsum(probabilities) - probabilities
        kept = int(np.count_nonzero(before < sampling.top_p))  # the first token always
        order, probabilities = order[:kept], probabilities[:kept] / probabilities[:kept].sum()
    return int(generator.choice(order, p=probabilities))


def log_softmax(logits: NDArray[np.float32]) -> NDArray[np.float64]:
    """Log-probabilities over the last axis, in fp64."""
    shifted = logits.astype(np.float64) - logits.max(axis=-1, keepdims=True)
    return shifted - np.log(np.exp(shifted).sum(axis=-1, keepdims=True))
