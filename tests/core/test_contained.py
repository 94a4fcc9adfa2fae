"""Texts within longer texts, against comparing all pairs."""

import numpy as np

from bitdistill_core.contained import drop_contained


def test_texts_within_longer_texts_are_dropped_by_whole_words() -> None:
    texts = ["a good film", "good film", "this is a good  film indeed", "ood film", "bad", "bad", "", "film good"]
    assert [texts[i] for i in drop_contained(texts)] == [texts[2], "ood film", "bad", "", "film good"]
    assert drop_contained(["bad", "x", "bad"]) == [0, 1]


def test_dropping_agrees_with_comparing_all_pairs() -> None:
    rng = np.random.default_rng(0)
    texts = [" ".join("abc"[i] for i in rng.integers(0, 3, rng.integers(1, 9))) for _ in range(300)]

    def is_contained(i: int) -> bool:
        return any(
            f" {texts[i]} " in f" {other} " and (other != texts[i] or j < i) for j, other in enumerate(texts) if j != i
        )

    assert drop_contained(texts) == [i for i in range(300) if not is_contained(i)]
