"""Comparisons of two models on the same examples: McNemar's test, a bootstrap interval, agreement."""

from collections.abc import Mapping
from typing import Any

import numpy as np

from bitdistill_core.report.gather import Evaluation

NUM_RESAMPLES = 10_000


def mcnemar_p(only_first: int, only_second: int) -> float:
    """Two-sided exact p of McNemar's test: binomial, one half, on the examples that one model alone gets right."""
    total, fewer = only_first + only_second, min(only_first, only_second)
    term, tail = 1, 0  # C(total, 0), then up by recurrence: exact integers
    for index in range(fewer + 1):
        tail += term
        term = term * (total - index) // (index + 1)
    return min(1.0, 2 * tail / 2**total)


def bootstrap_interval(only_first: int, only_second: int, num_examples: int) -> tuple[float, float]:
    """95% percentile interval of the accuracy difference, examples resampled in pairs.

    A pair's difference is 1, -1 or 0, so resampling examples is drawing the three counts: one multinomial each.
    """
    shares = np.array([only_first, only_second, num_examples - only_first - only_second]) / num_examples
    counts = np.random.default_rng(0).multinomial(num_examples, shares, size=NUM_RESAMPLES)
    low, high = np.quantile((counts[:, 0] - counts[:, 1]) / num_examples, [0.025, 0.975])
    return float(low), float(high)


def compare(first: Evaluation, second: Evaluation, split: str) -> dict[str, Any]:
    """Accuracy of `first` minus accuracy of `second`, its 95% interval, and McNemar's p.

    Raises:
        ValueError: the two were not evaluated on the same examples.
    """
    pairs = _pairs(first, second, split)
    correct = [(a["prediction"] == a["label"], b["prediction"] == b["label"]) for a, b in pairs]
    only_first, only_second = correct.count((True, False)), correct.count((False, True))
    low, high = bootstrap_interval(only_first, only_second, len(pairs))
    return {
        "first": first.method,
        "second": second.method,
        "split": split,
        "num_examples": len(pairs),
        "difference": (only_first - only_second) / len(pairs),
        "ci_low": low,
        "ci_high": high,
        "only_first_correct": only_first,
        "only_second_correct": only_second,
        "mcnemar_p": mcnemar_p(only_first, only_second),
    }


def agreement(student: Evaluation, packed: Evaluation, split: str) -> float:
    """Share of examples on which the packed model predicts what the student predicts."""
    pairs = _pairs(student, packed, split)
    return sum(a["prediction"] == b["prediction"] for a, b in pairs) / len(pairs)


def _pairs(first: Evaluation, second: Evaluation, split: str) -> list[tuple[dict[str, Any], dict[str, Any]]]:
    one, two = first.predictions(split), second.predictions(split)
    if not one or one.keys() != two.keys() or _labels(one) != _labels(two):
        raise ValueError(
            f"a comparison needs predictions for the same examples; got split={split}, "
            f"{first.method}={len(one)} and {second.method}={len(two)} examples; evaluate both again"
        )
    return [(one[index], two[index]) for index in sorted(one)]


def _labels(lines: Mapping[int, Mapping[str, Any]]) -> dict[int, Any]:
    return {index: line.get("label") for index, line in lines.items()}
