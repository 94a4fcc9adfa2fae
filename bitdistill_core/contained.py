"""Texts that lie within other texts: SST-2's 67,349 training phrases are parts of 6,886 sentences."""

from collections import defaultdict
from collections.abc import Sequence


def drop_contained(texts: Sequence[str]) -> list[int]:
    """Indices, ascending, of the texts that no longer text contains, whole words compared; of equal ones the first."""
    kept: list[int] = []
    longer_with: defaultdict[str, list[str]] = defaultdict(list)  # word -> kept texts that have it
    spaced = [f" {' '.join(text.split())} " for text in texts]
    for index in sorted(range(len(texts)), key=lambda i: -len(spaced[i])):
        words = set(spaced[index].split())
        candidates = min((longer_with[word] for word in words), key=len, default=[])
        if any(spaced[index] in other for other in candidates):
            continue
        kept.append(index)
        for word in words:
            longer_with[word].append(spaced[index])
    return sorted(kept)
