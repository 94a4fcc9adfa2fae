"""Prompts, examples and their batches."""

from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import torch

from bitdistill_core import data
from bitdistill_core.data import (
    Example,
    ExampleBatches,
    collate,
    encode_answer,
    encode_prompt,
    encode_prompts,
    load_examples,
)
from bitdistill_core.losses import Totals
from bitdistill_core.stages.base import train_tokenizer
from tests.core.conftest import Workshop, add_bos


def test_long_prompts_lose_tokens_on_the_left(tmp_path: Path, corpus: Path) -> None:
    tokenizer = train_tokenizer(corpus, vocab_size=300)
    path = tmp_path / "train.parquet"
    pq.write_table(pa.table({"prompt": ["the cat " * 30 + "sat:", "a:"], "answer": [" yes", " no"]}), path)
    long, short = load_examples(path, tokenizer, max_length=12, window=64, is_generation=False)
    longest = max(len(encode_answer(tokenizer, answer, ends=False)) for answer in (" yes", " no"))
    assert len(long.prompt_ids) + longest == 12
    assert tokenizer.decode(long.prompt_ids).endswith("sat:")
    assert tokenizer.decode(short.prompt_ids + short.answer_ids) == "a: no"
    assert (long.is_cut, short.is_cut) == (True, False)


@pytest.mark.parametrize("is_generation", [False, True])
def test_a_cut_prompt_keeps_its_leading_mark(tmp_path: Path, corpus: Path, is_generation: bool) -> None:
    tokenizer = train_tokenizer(corpus, vocab_size=300)
    bos = add_bos(tokenizer)
    path = tmp_path / "train.parquet"
    pq.write_table(pa.table({"prompt": ["the cat " * 30 + "sat:"], "answer": [" yes"]}), path)
    (example,) = load_examples(path, tokenizer, max_length=12, window=64, is_generation=is_generation)
    room, whole = 12 - len(example.answer_ids), encode_prompt(tokenizer, "the cat " * 30 + "sat:")
    assert whole.count(bos) == 1
    num_last = (room - 1) // 2 if is_generation else room - 1
    assert example.prompt_ids == [*whole[: room - num_last], *whole[len(whole) - num_last :]]
    assert example.prompt_ids[0] == bos


def test_a_length_beyond_the_window_is_an_error(tmp_path: Path, corpus: Path) -> None:
    tokenizer = train_tokenizer(corpus, vocab_size=300)
    with pytest.raises(ValueError, match="max_length=65, window=64"):
        load_examples(tmp_path / "none", tokenizer, max_length=65, window=64, is_generation=False)


def test_every_epoch_visits_every_example_once() -> None:
    examples = [Example([i] * (1 + i % 5), [99]) for i in range(3, 43)]
    batches = ExampleBatches(examples, batch_size=8, gradient_accumulation=2, seed=1)
    assert batches.steps_per_epoch == 5
    for epoch in range(2):
        seen = [int(row[0]) for step in range(5) for part in batches(epoch * 5 + step) for row in part.input_ids]
        assert sorted(seen) == list(range(3, 43))
    assert [b.input_ids.tolist() for b in batches(3)] == [
        b.input_ids.tolist() for b in ExampleBatches(examples, batch_size=8, gradient_accumulation=2, seed=1)(3)
    ]


@pytest.mark.parametrize(("num_examples", "batch_size"), [(100, 64), (500, 32), (70, 8)])
def test_few_examples_make_other_batches_each_epoch_and_none_is_left_out(num_examples: int, batch_size: int) -> None:
    examples = [Example([1 + i] * (1 + i), [0]) for i in range(num_examples)]  # each of another length
    batches = ExampleBatches(examples, batch_size=batch_size, gradient_accumulation=1, seed=1)
    drawn = [frozenset(batches(step)[0].input_ids[:, 0].tolist()) for step in range(30 * batches.steps_per_epoch)]
    assert frozenset.union(*drawn) == set(range(1, num_examples + 1))
    assert len(set(drawn)) == len(drawn)


def test_totals_cover_the_whole_step() -> None:
    batches = ExampleBatches(
        [Example([1, 2], [3]), Example([4], [5, 6])], batch_size=2, gradient_accumulation=2, seed=0
    )
    parts = batches(0)
    assert len(parts) == 2
    assert parts[0].totals == parts[1].totals == Totals(num_sequences=2, num_tokens=6, num_targets=3)


def test_collate_labels_only_answers() -> None:
    batch = collate([Example([5, 6], [7]), Example([8], [9])], Totals(2, 5, 2))
    assert batch.input_ids.tolist() == [[5, 6, 7], [8, 9, 0]]
    assert batch.labels.tolist() == [[-100, -100, 7], [-100, 9, -100]]
    assert batch.is_token.tolist() == [[True, True, True], [True, True, False]]


def test_prompts_encoded_together_are_those_encoded_alone(workshop: Workshop, monkeypatch: pytest.MonkeyPatch) -> None:
    texts = ["the cat", "", "a longer text than the others", "42"]
    monkeypatch.setattr(data, "PROMPTS_AT_ONCE", 3)
    assert list(encode_prompts(workshop.tokenizer, texts)) == [encode_prompt(workshop.tokenizer, t) for t in texts]


def test_a_padded_batch_has_the_same_tokens() -> None:
    batch = collate([Example([1, 2, 3], [4]), Example([5], [6])], Totals(2, 6, 2))
    padded = batch.padded(8)
    assert padded.input_ids.shape == padded.labels.shape == (2, 8)
    assert torch.equal(padded.input_ids[:, :4], batch.input_ids)
    assert torch.equal(padded.labels[:, :4], batch.labels)
    assert (padded.labels[:, 4:] == -100).all()
    assert torch.equal(padded.is_token[:, :4], batch.is_token)
    assert not padded.is_token[:, 4:].any()
    assert padded.totals == batch.totals
    assert torch.equal(batch.padded(4).input_ids, batch.input_ids)
