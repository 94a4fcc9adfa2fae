"""Write the demo data set, data/demo/*.parquet, from the vaderSentiment 3.3.2 source distribution.

Run `python data/make_demo.py [--sdist FILE]`. The output is the same byte for byte on every run with the
pinned pyarrow. data/demo/README.md describes the columns; the library does not import this file.
"""

import argparse
import hashlib
import html
import io
import itertools
import json
import random
import re
import subprocess
import sys
import tarfile
import tempfile
import unicodedata
from array import array
from collections import Counter, defaultdict
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq

SDIST = "vaderSentiment-3.3.2.tar.gz"
SDIST_SHA256 = "5d7c06e027fc8b99238edb0d53d970cf97066ef97654009890b83703849632f9"
INNER = "vaderSentiment-3.3.2/additional_resources/hutto_ICWSM_2014.tar.gz"
FILES = {
    "movie": "movieReviewSnippets",
    "news": "nytEditorialSnippets",
    "tweets": "tweets",
    "products": "amazonReviewSnippets",
}
SEED = 2014
SPLIT_SIZES = {"test": 2000, "validation": 1000}
MIN_ABS_RATING = 0.5
SHINGLE_WORDS = 3
MIN_JACCARD = 0.5
OUT_DIR = Path(__file__).parent / "demo"


@dataclass(frozen=True)
class Sentence:
    source: str  # a key of FILES
    rating: float  # mean over the raters, in [-4, 4]
    text: str

    @property
    def words(self) -> list[str]:
        return words(self.text)

    @property
    def label(self) -> int | None:
        """1 positive, 0 negative, None where the sentence is not a labelled review."""
        if self.source != "movie" or abs(self.rating) < MIN_ABS_RATING:
            return None
        return int(self.rating > 0)


class Groups:
    """Union-find over sentence positions."""

    def __init__(self, size: int) -> None:
        self.parent = list(range(size))

    def find(self, item: int) -> int:
        while self.parent[item] != item:
            self.parent[item] = self.parent[self.parent[item]]
            item = self.parent[item]
        return item

    def union(self, first: int, second: int) -> None:
        self.parent[self.find(first)] = self.find(second)


def clean(text: str) -> str:
    """NFC text, case kept, with entities, doubled-apostrophe quotes and lost apostrophes restored and spaces single."""
    while (unescaped := html.unescape(text)) != text:  # some entities were escaped twice: &amp;#38;
        text = unescaped
    text = unicodedata.normalize("NFC", text).replace("\u2019", "'").replace("''", '"')
    text = re.sub(r"(?<=[a-z])\?(?=s\b)", "'", text)  # "Cube?s": an apostrophe lost before the file was made
    return " ".join(text.split())


def words(text: str) -> list[str]:
    """Lower-case words of ASCII letters and digits; accents are folded and apostrophes dropped ("don't" is "dont")."""
    folded = unicodedata.normalize("NFKD", text).encode("ascii", "ignore").decode().lower()
    return re.findall(r"[a-z0-9]+", folded.replace("'", ""))


def download(folder: str) -> Path:
    command = ["pip", "download", "--no-deps", "--no-binary", ":all:", "vaderSentiment==3.3.2", "--dest", folder]
    subprocess.run([sys.executable, "-m", *command], check=True, stdout=sys.stderr)
    return Path(folder) / SDIST


def read_sentences(sdist: bytes) -> list[Sentence]:
    """Cleaned sentences of the four files in file order; those without a letter or digit are dropped."""
    digest = hashlib.sha256(sdist).hexdigest()
    if digest != SDIST_SHA256:
        raise ValueError(f"the sdist must have sha256={SDIST_SHA256}; got sha256={digest}; pass {SDIST} from PyPI")
    inner = read_member(sdist, INNER)
    sentences = []
    for source, name in FILES.items():
        lines = read_member(inner, f"hutto_ICWSM_2014/{name}_GroundTruth.txt").decode("utf-8").splitlines()
        for line in lines:
            _, rating, text = line.split("\t")
            sentence = Sentence(source, float(rating), clean(text))
            if sentence.words:
                sentences.append(sentence)
    return sentences


def read_member(archive: bytes, name: str) -> bytes:
    with tarfile.open(fileobj=io.BytesIO(archive), mode="r:gz") as tar:
        member = tar.extractfile(name)
        assert member is not None, name
        return member.read()


def near_duplicate_groups(sentences: list[Sentence]) -> list[int]:
    """Group of each sentence: the transitive closure of the three relations below."""
    groups = Groups(len(sentences))
    tokens = [sentence.words for sentence in sentences]
    for pair in itertools.chain(equal_pairs(tokens), overlapping_pairs(tokens), dropped_word_pairs(tokens)):
        groups.union(*pair)
    return [groups.find(item) for item in range(len(sentences))]


def equal_pairs(tokens: list[list[str]]) -> Iterable[tuple[int, int]]:
    """Pairs with the same letters and digits, wherever the spaces are."""
    first: dict[str, int] = {}
    for item, sentence in enumerate(tokens):
        yield item, first.setdefault("".join(sentence), item)


def overlapping_pairs(tokens: list[list[str]]) -> Iterable[tuple[int, int]]:
    """Pairs whose sets of word 3-shingles have a Jaccard index of at least MIN_JACCARD."""
    holders: dict[tuple[str, ...], list[int]] = defaultdict(list)
    sizes = []
    for item, sentence in enumerate(tokens):
        starts = range(max(1, len(sentence) - SHINGLE_WORDS + 1))
        shingles = {tuple(sentence[start : start + SHINGLE_WORDS]) for start in starts}
        sizes.append(len(shingles))
        shared = Counter(other for shingle in sorted(shingles) for other in holders[shingle])
        for other, count in shared.items():
            if count >= MIN_JACCARD * (sizes[item] + sizes[other] - count):
                yield item, other
        for shingle in shingles:
            holders[shingle].append(item)


def dropped_word_pairs(tokens: list[list[str]]) -> Iterable[tuple[int, int]]:
    """Pairs that become equal when at most two words, and at most a quarter of them, are dropped from each.

    Every way to drop words is hashed to 64 bits (tuples of ints hash alike in every run) and equal hashes are paired.
    """
    ids: dict[str, int] = {}
    hashes, owners = array("q"), array("q")
    for item, sentence in enumerate(tokens):
        codes = tuple(ids.setdefault(word, len(ids)) for word in sentence)
        for num_dropped in range(min(2, len(codes) // 4) + 1):
            for kept in itertools.combinations(codes, len(codes) - num_dropped):
                hashes.append(hash(kept))
                owners.append(item)
    hash_array, owner_array = np.asarray(hashes), np.asarray(owners)
    order = np.argsort(hash_array, kind="stable")
    same = hash_array[order][1:] == hash_array[order][:-1]
    owner_array = owner_array[order]
    yield from zip(owner_array[:-1][same].tolist(), owner_array[1:][same].tolist(), strict=True)


def assign_splits(sentences: list[Sentence], groups: list[int]) -> dict[int, str]:
    """Split of each group with a labelled review: exact sizes, each label in its overall share, groups kept whole."""
    members: dict[int, list[int]] = defaultdict(list)
    for sentence, group in zip(sentences, groups, strict=True):
        if sentence.label is not None:
            members[group].append(sentence.label)
    labels = [label for group_labels in members.values() for label in group_labels]
    share = sum(labels) / len(labels)
    room = {}
    for split, size in SPLIT_SIZES.items():
        positives = round(size * share)
        room[split] = [size - positives, positives]
    order = list(members)
    random.Random(SEED).shuffle(order)
    split_of = {}
    for group in order:
        counts = [members[group].count(0), members[group].count(1)]
        fits = [split for split, left in room.items() if counts[0] <= left[0] and counts[1] <= left[1]]
        split_of[group] = fits[0] if fits else "train"
        if fits:
            room[fits[0]] = [left - count for left, count in zip(room[fits[0]], counts, strict=True)]
    assert all(left == [0, 0] for left in room.values()), room
    return split_of


def reviews_table(sentences: list[Sentence], groups: list[int], split_of: dict[int, str]) -> pa.Table:
    """Labelled reviews: train, validation, test, each in seeded random order."""
    rows = [(s, split_of[group]) for s, group in zip(sentences, groups, strict=True) if s.label is not None]
    random.Random(SEED).shuffle(rows)
    rows.sort(key=lambda row: ("train", "validation", "test").index(row[1]))
    columns = {
        "sentence": pa.array([s.text for s, _ in rows], pa.string()),
        "label": pa.array([s.label for s, _ in rows], pa.int64()),
        "rating": pa.array([s.rating for s, _ in rows], pa.float32()),
        "split": pa.array([split for _, split in rows], pa.string()),
        "idx": pa.array(range(len(rows)), pa.int64()),
    }
    return pa.table(columns)


def corpus_table(sentences: list[Sentence], groups: list[int], split_of: dict[int, str]) -> pa.Table:
    """Every sentence, in file order, that is in no group with a validation or test review."""
    texts, sources = [], []
    for sentence, group in zip(sentences, groups, strict=True):
        if split_of.get(group, "train") == "train":
            source = sentence.source
            if source == "movie":
                source = "movie_unlabelled" if sentence.label is None else "movie_train"
            texts.append(sentence.text)
            sources.append(source)
    return pa.table({"text": pa.array(texts, pa.string()), "source": pa.array(sources, pa.string())})


def main() -> None:
    parser = argparse.ArgumentParser(description="Write data/demo/*.parquet.")
    parser.add_argument("--sdist", type=Path, help=f"{SDIST}; downloaded with pip when absent")
    arguments = parser.parse_args()
    with tempfile.TemporaryDirectory() as folder:
        sentences = read_sentences((arguments.sdist or download(folder)).read_bytes())
    groups = near_duplicate_groups(sentences)
    split_of = assign_splits(sentences, groups)
    reviews, corpus = reviews_table(sentences, groups, split_of), corpus_table(sentences, groups, split_of)
    OUT_DIR.mkdir(exist_ok=True)
    for name, table, columns in (("reviews", reviews, ["split"]), ("corpus", corpus, ["source"])):
        path = OUT_DIR / f"{name}.parquet"
        pq.write_table(table, path, compression="zstd", compression_level=19, use_dictionary=columns)
    labelled = Counter(group for s, group in zip(sentences, groups, strict=True) if s.label is not None)
    summary = {
        "sentences": Counter(s.source for s in sentences),
        "reviews": Counter(f"{row['split']}/{row['label']}" for row in reviews.select(["split", "label"]).to_pylist()),
        "corpus": Counter(corpus["source"].to_pylist()),
        "review_groups_of_two_or_more": sum(size > 1 for size in labelled.values()),
        "reviews_in_them": sum(size for size in labelled.values() if size > 1),
        "all_groups_of_two_or_more": sum(size > 1 for size in Counter(groups).values()),
    }
    print(json.dumps(summary))


if __name__ == "__main__":
    main()
