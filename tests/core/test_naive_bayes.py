"""Naive Bayes on words."""

import numpy as np

from bitdistill_core.naive_bayes import fit_predict


def test_naive_bayes_learns_words() -> None:
    labels = np.array([0, 1] * 10)
    texts = ["bad film", "good film"] * 10
    assert fit_predict(texts, labels, ["a good one", "BAD!"]).tolist() == [1, 0]
