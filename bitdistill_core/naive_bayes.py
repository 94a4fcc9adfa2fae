"""Multinomial naive Bayes on words: the floor that a fine-tuned language model has to beat."""

import re
from collections import Counter
from collections.abc import Sequence

import numpy as np

_WORD = re.compile(r"[^\W_]+(?:'[a-z]+)?")


def fit_predict(train_texts: Sequence[str], train_labels: np.ndarray, texts: Sequence[str]) -> np.ndarray:
    """Labels of `texts` by unigram naive Bayes with add-one smoothing, lower-cased words."""
    num_labels = int(train_labels.max()) + 1
    counts: list[Counter[str]] = [Counter() for _ in range(num_labels)]
    for text, label in zip(train_texts, train_labels, strict=True):
        counts[label].update(_WORD.findall(text.lower()))
    vocabulary = {word: i for i, word in enumerate(sorted(set().union(*counts)))}
    table = np.ones((num_labels, len(vocabulary)))
    for label, counter in enumerate(counts):
        for word, count in counter.items():
            table[label, vocabulary[word]] += count
    log_word = np.log(table / table.sum(axis=1, keepdims=True))
    log_prior = np.log(np.bincount(train_labels, minlength=num_labels) / len(train_labels))
    scores = [
        log_prior + log_word[:, [vocabulary[w] for w in _WORD.findall(text.lower()) if w in vocabulary]].sum(axis=1)
        for text in texts
    ]
    return np.argmax(np.array(scores), axis=1)
