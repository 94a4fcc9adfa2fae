"""Which pages of a packed model are resident in this process, by part of the model. Linux."""

import os
from collections.abc import Mapping
from pathlib import Path

import numpy as np

PAGEMAP = Path("/proc/self/pagemap")
PRESENT = np.uint64(1 << 63)


def part_of(name: str) -> str:
    """The part of a model that a tensor belongs to."""
    if name.endswith((".w_packed", ".w_base3")):
        return "ternary_weights"
    if name.startswith(("model.embed_tokens.", "lm_head.")):
        return "embedding" if name.startswith("model.") else "lm_head"
    return "tokenizer" if name == "tokenizer.json" else "norms_biases_scales"


def bytes_by_part(tensors: Mapping[str, np.ndarray]) -> dict[str, int]:
    """Bytes of each part in the file."""
    parts = dict.fromkeys(("ternary_weights", "embedding", "lm_head", "tokenizer", "norms_biases_scales"), 0)
    for name, tensor in tensors.items():
        parts[part_of(name)] += tensor.nbytes
    return parts


def resident_by_part(tensors: Mapping[str, np.ndarray]) -> dict[str, int]:
    """Bytes of each part in this process's memory now; empty where the system does not tell."""
    if not PAGEMAP.exists():
        return {}
    page, parts = os.sysconf("SC_PAGE_SIZE"), dict.fromkeys(bytes_by_part({}), 0)
    with open(PAGEMAP, "rb") as file:
        for name, tensor in tensors.items():
            begin, end = tensor.ctypes.data, tensor.ctypes.data + tensor.nbytes
            first, last = begin // page, -(-end // page)
            file.seek(first * 8)
            entries = np.frombuffer(file.read((last - first) * 8), np.uint64)
            present = np.flatnonzero(entries & PRESENT) + first
            overlaps = np.minimum((present + 1) * page, end) - np.maximum(present * page, begin)
            parts[part_of(name)] += int(overlaps.sum())
    return parts
