"""The demo data set in data/demo: schema, sizes, balance, and no sentence shared between splits or with the corpus."""

import re
import subprocess
import sys
import unicodedata
from collections import Counter, defaultdict
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq
import pytest

DATA = Path(__file__).parents[2] / "data"
DEMO = DATA / "demo"


def letters_and_digits(text: str) -> str:
    folded = unicodedata.normalize("NFKD", text).encode("ascii", "ignore").decode()
    return re.sub(r"[^a-z0-9]", "", folded.lower())


def words(text: str) -> list[str]:
    folded = unicodedata.normalize("NFKD", text).encode("ascii", "ignore").decode()
    return re.findall(r"[a-z0-9]+", folded.lower().replace("'", ""))


def with_one_word_dropped(text: str) -> set[tuple[str, ...]]:
    """The sentence and, from four words on, the sentence without each of its words."""
    tokens = tuple(words(text))
    dropped = {tokens[:i] + tokens[i + 1 :] for i in range(len(tokens))} if len(tokens) >= 4 else set()
    return dropped | {tokens}


def shingles(text: str) -> frozenset[tuple[str, ...]]:
    tokens = words(text)
    return frozenset(tuple(tokens[i : i + 3]) for i in range(max(1, len(tokens) - 2)))


def near_duplicates(queries: list[str], texts: list[str]) -> list[tuple[str, str]]:
    """Pairs (query, text) whose sets of word 3-shingles have a Jaccard index of at least 0.5."""
    shingled = [shingles(text) for text in texts]
    holders: dict[tuple[str, ...], list[int]] = defaultdict(list)
    for item, parts in enumerate(shingled):
        for part in parts:
            holders[part].append(item)
    pairs = []
    for query in queries:
        parts = shingles(query)
        shared = Counter(item for part in parts for item in holders.get(part, []))
        pairs += [(query, texts[i]) for i, n in shared.items() if n / (len(parts) + len(shingled[i]) - n) >= 0.5]
    return pairs


@pytest.fixture(scope="module")
def reviews() -> pa.Table:
    return pq.read_table(DEMO / "reviews.parquet")


@pytest.fixture(scope="module")
def corpus() -> pa.Table:
    return pq.read_table(DEMO / "corpus.parquet")


@pytest.fixture(scope="module")
def rows(reviews: pa.Table) -> dict[str, list[dict[str, Any]]]:
    by_split: dict[str, list[dict[str, Any]]] = defaultdict(list)
    for row in reviews.to_pylist():
        by_split[row["split"]].append(row)
    return by_split


def sentences(rows: dict[str, list[dict[str, Any]]], *splits: str) -> list[str]:
    return [row["sentence"] for split in splits for row in rows[split]]


def test_columns_and_types(reviews: pa.Table, corpus: pa.Table) -> None:
    assert reviews.schema.names == ["sentence", "label", "rating", "split", "idx"]
    assert reviews.schema.types == [pa.string(), pa.int64(), pa.float32(), pa.string(), pa.int64()]
    assert corpus.schema.names == ["text", "source"]
    assert corpus.schema.types == [pa.string(), pa.string()]
    assert all(column.null_count == 0 for table in (reviews, corpus) for column in table.columns)


def test_split_sizes(rows: dict[str, list[dict[str, Any]]]) -> None:
    assert {split: len(part) for split, part in rows.items()} == {"train": 7072, "validation": 1000, "test": 2000}


def test_idx_is_the_row_number(reviews: pa.Table) -> None:
    assert reviews["idx"].to_pylist() == list(range(reviews.num_rows))


def test_labels_are_balanced_alike_in_every_split(rows: dict[str, list[dict[str, Any]]]) -> None:
    for split, part in rows.items():
        assert {row["label"] for row in part} == {0, 1}
        assert sum(row["label"] for row in part) / len(part) == pytest.approx(0.496, abs=0.001), split


def test_ratings_agree_with_labels(reviews: pa.Table) -> None:
    for rating, label in zip(reviews["rating"].to_pylist(), reviews["label"].to_pylist(), strict=True):
        assert 0.5 <= abs(rating) <= 4
        assert label == int(rating > 0)


def test_text_is_clean(reviews: pa.Table, corpus: pa.Table) -> None:
    for text in reviews["sentence"].to_pylist() + corpus["text"].to_pylist():
        assert letters_and_digits(text)
        assert text == " ".join(text.split())
        assert text == unicodedata.normalize("NFC", text)
        assert not re.search(r"&(amp|lt|gt|quot|#\d+);|''|\ufffd|\u00c3|\u00e2\u20ac", text), text


def test_case_is_kept(reviews: pa.Table) -> None:
    assert sum(text != text.lower() for text in reviews["sentence"].to_pylist()) > reviews.num_rows / 2


def test_no_normalised_sentence_is_in_two_splits(rows: dict[str, list[dict[str, Any]]]) -> None:
    train, validation, test = (
        {letters_and_digits(text) for text in sentences(rows, split)} for split in ("train", "validation", "test")
    )
    assert not train & validation
    assert not train & test
    assert not validation & test


def test_no_near_duplicate_is_in_two_splits(rows: dict[str, list[dict[str, Any]]]) -> None:
    assert near_duplicates(sentences(rows, "validation"), sentences(rows, "test")) == []
    assert near_duplicates(sentences(rows, "validation", "test"), sentences(rows, "train")) == []


def test_corpus_sources(corpus: pa.Table) -> None:
    expected = {"movie_train", "movie_unlabelled", "news", "tweets", "products"}
    assert set(corpus["source"].to_pylist()) == expected


def test_corpus_holds_exactly_the_training_sentences(corpus: pa.Table, rows: dict[str, list[dict[str, Any]]]) -> None:
    of_train = [row["text"] for row in corpus.to_pylist() if row["source"] == "movie_train"]
    assert sorted(of_train) == sorted(sentences(rows, "train"))


def test_no_validation_or_test_sentence_is_in_the_corpus(
    corpus: pa.Table, rows: dict[str, list[dict[str, Any]]]
) -> None:
    held_out = sentences(rows, "validation", "test")
    texts = corpus["text"].to_pylist()
    assert not {letters_and_digits(text) for text in held_out} & {letters_and_digits(text) for text in texts}
    assert near_duplicates(held_out, texts) == []


def test_the_near_duplicate_check_finds_a_changed_word() -> None:
    text = "one of the best films of the year and a fine debut"
    assert near_duplicates([text.replace("fine", "good")], [text, "a dull film that goes nowhere"]) == [
        (text.replace("fine", "good"), text)
    ]


def test_no_held_out_sentence_differs_from_the_corpus_by_one_word_of_each(
    corpus: pa.Table, rows: dict[str, list[dict[str, Any]]]
) -> None:
    held_out = set().union(*(with_one_word_dropped(text) for text in sentences(rows, "validation", "test")))
    assert [text for text in corpus["text"].to_pylist() if with_one_word_dropped(text) & held_out] == []


def test_make_demo_refuses_another_file(tmp_path: Path) -> None:
    other = tmp_path / "other.tar.gz"
    other.write_bytes(b"not the sdist")
    command = [sys.executable, str(DATA / "make_demo.py"), "--sdist", str(other)]
    result = subprocess.run(command, check=False, capture_output=True, text=True)
    assert result.returncode != 0
    assert re.search(r"ValueError: the sdist must have sha256=\w{64}; got sha256=\w{64}; pass vader", result.stderr)
