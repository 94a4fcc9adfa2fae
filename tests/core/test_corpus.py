"""Token shards, blocks and calibration sequences of a corpus."""

from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from bitdistill_core.corpus import BlockBatches, sample_sequences, tokenize_corpus
from bitdistill_core.data import encode_prompt
from bitdistill_core.stages.base import train_tokenizer
from tests.core.conftest import add_bos


def test_blocks_cover_the_corpus(tmp_path: Path, corpus: Path) -> None:
    tokenizer = train_tokenizer(corpus, vocab_size=300)
    tokens = tokenize_corpus(corpus, tokenizer, max_tokens=10**6, out=tmp_path / "tokens.bin")
    text = tokenizer.decode(tokens[:40].tolist())
    assert text.startswith("the cat sat on the mat<|endoftext|>a dog ran")
    batches = BlockBatches(np.arange(64, dtype=np.uint32), block_size=8, batch_size=4, gradient_accumulation=2, seed=0)
    seen = np.concatenate([part.input_ids.numpy().ravel() for step in range(2) for part in batches(step)])
    assert sorted(seen) == list(range(64))


def test_tokenising_stops_at_max_tokens(tmp_path: Path, corpus: Path) -> None:
    tokenizer = train_tokenizer(corpus, vocab_size=300)
    assert len(tokenize_corpus(corpus, tokenizer, max_tokens=17, out=tmp_path / "t.bin")) == 17


@pytest.mark.parametrize("has_mark", [False, True])
def test_documents_blocks_and_calibration_begin_as_prompts_do(tmp_path: Path, corpus: Path, has_mark: bool) -> None:
    tokenizer = train_tokenizer(corpus, vocab_size=300)
    begin = []
    if has_mark:
        begin = [add_bos(tokenizer)]
    assert encode_prompt(tokenizer, "the cat")[: len(begin)] == begin
    tokens = tokenize_corpus(corpus, tokenizer, max_tokens=10**6, out=tmp_path / "tokens.bin")
    documents = ["the cat sat on the mat", "a dog ran", "the end of the story"] * 20
    encoded = [tokenizer.encode(text, add_special_tokens=False) for text in documents]
    assert tokens.tolist() == [i for ids in encoded for i in (*begin, *ids, tokenizer.eos_token_id)]
    options = {"block_size": 7, "batch_size": 4, "gradient_accumulation": 1, "seed": 0}
    plain = BlockBatches(tokens, **options)(0)[0].input_ids
    marked = BlockBatches(tokens, **options, begin=begin)(0)[0].input_ids
    assert marked[:, len(begin) :].equal(plain[:, len(begin) :])
    assert marked[:, : len(begin)].tolist() == [begin] * 4
    sequences = sample_sequences(corpus, "text", tokenizer, num_sequences=3, length=9, seed=0)
    assert sequences[:, : len(begin)].tolist() == [begin] * 3
    assert tokenizer.eos_token_id in sequences


def test_sampled_sequences_are_random_documents_joined_and_cut(tmp_path: Path) -> None:
    texts = [f"{'abcdefgh'[i % 8]} {i} story" for i in range(40)]
    directory = tmp_path / "texts"
    directory.mkdir()
    pq.write_table(pa.table({"text": texts[:25]}), directory / "00000.parquet", row_group_size=5)
    pq.write_table(pa.table({"text": texts[25:]}), directory / "00001.parquet")
    tokenizer = train_tokenizer(directory, vocab_size=300)
    ids: list[int] = []
    for index in np.random.default_rng(7).permutation(40):
        ids += [*tokenizer(texts[index])["input_ids"], tokenizer.eos_token_id]
    found = sample_sequences(directory, "text", tokenizer, num_sequences=6, length=10, seed=7)
    assert found.tolist() == [ids[10 * row : 10 * row + 10] for row in range(6)]
    other = sample_sequences(directory, "text", tokenizer, num_sequences=6, length=10, seed=8)
    assert not found.equal(other)
    whole = len(ids) // 10
    assert sample_sequences(directory, "text", tokenizer, num_sequences=whole, length=10, seed=7).shape == (whole, 10)
    with pytest.raises(ValueError, match=rf"length = {10 * whole + 10} tokens; path=.* has {len(ids)}; lower"):
        sample_sequences(directory, "text", tokenizer, num_sequences=whole + 1, length=10, seed=7)
