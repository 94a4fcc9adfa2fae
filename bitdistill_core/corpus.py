"""The general corpus as token blocks: documents that end with the end-of-text token, cut into blocks of equal length.

Where the tokenizer begins prompts with a mark (BOS: Gemma, Llama 3), so do every document and every block: such models
compute something else behind a first token that is not theirs.
"""

from collections.abc import Iterator, Sequence
from pathlib import Path

import numpy as np
import pyarrow.parquet as pq
import torch
from transformers import PreTrainedTokenizerBase

from bitdistill_core.data import leading_mark
from bitdistill_core.losses import Batch, Totals
from bitdistill_core.progress import progress_bar

DOCUMENTS_AT_ONCE = 1024


def iter_texts(directory: Path) -> Iterator[list[str]]:
    """The documents of `directory`/*.parquet (column `text`), in file order, in lists."""
    for path in sorted(directory.glob("*.parquet")):
        with pq.ParquetFile(path) as file:
            for batch in file.iter_batches(DOCUMENTS_AT_ONCE, columns=["text"]):
                yield batch.column(0).to_pylist()


def tokenize_corpus(directory: Path, tokenizer: PreTrainedTokenizerBase, *, max_tokens: int, out: Path) -> np.ndarray:
    """Token ids of the corpus, at most `max_tokens`, as a memory-mapped uint32 file (made once, atomically).

    Each document ends with the end-of-text token, and begins with the tokenizer's leading mark if it has one.

    Raises:
        ValueError: an empty corpus, or a tokenizer without end-of-text token.
    """
    begin = leading_mark(tokenizer)
    end = tokenizer.eos_token_id
    if end is None:
        raise ValueError("continued pre-training needs a tokenizer with an end-of-text token; this one has none")
    if not out.is_file():
        out.parent.mkdir(parents=True, exist_ok=True)
        temporary = out.with_suffix(".saving")
        written = 0
        with temporary.open("wb") as file, progress_bar("tokenize", total=None, unit="token") as bar:
            for texts in iter_texts(directory):
                encoded = tokenizer(texts, add_special_tokens=False)["input_ids"]
                ids = [i for one in encoded for i in (*begin, *one, end)]
                ids = ids[: max_tokens - written]
                file.write(np.asarray(ids, dtype=np.uint32).tobytes())
                written += len(ids)
                bar.update(len(ids))
                if written >= max_tokens:
                    break
        if not written:
            raise ValueError(f"the corpus in path={directory} is empty; check data.corpus and data.corpus_column")
        temporary.replace(out)
    return np.memmap(out, dtype=np.uint32, mode="r")


def sample_sequences(
    source: Path, column: str, tokenizer: PreTrainedTokenizerBase, *, num_sequences: int, length: int, seed: int
) -> torch.Tensor:
    """Token ids (num_sequences, length) int64 of random documents, joined by the end-of-text token and cut.

    Each sequence begins with the tokenizer's leading mark if it has one.

    Args:
        source: a parquet file, or a directory of them; column: where its texts are.
    Raises:
        ValueError: fewer tokens than asked for.
    """
    files = sorted(source.glob("*.parquet")) if source.is_dir() else [source]
    order = np.random.default_rng(seed).permutation(sum(pq.read_metadata(file).num_rows for file in files))
    begin = leading_mark(tokenizer)
    end = [tokenizer.eos_token_id] if tokenizer.eos_token_id is not None else []
    ids: list[int] = []
    for first in range(0, len(order), DOCUMENTS_AT_ONCE):
        for text in _texts_at(files, column, order[first : first + DOCUMENTS_AT_ONCE]):
            ids += begin + tokenizer(text, add_special_tokens=False)["input_ids"] + end
            if len(ids) >= num_sequences * length:
                sequences = torch.tensor(ids[: num_sequences * length]).view(num_sequences, length)
                if begin:
                    sequences[:, 0] = begin[0]
                return sequences
    raise ValueError(
        f"calibration needs num_sequences * length = {num_sequences * length} tokens; path={source} has {len(ids)}; "
        "lower surgery.calibration_sequences"
    )


def _texts_at(files: Sequence[Path], column: str, rows: np.ndarray) -> list[str]:
    """The texts of some rows, counted through all files, in the order of `rows`; a few at a time in memory."""
    found: dict[int, str] = {}
    first = 0
    for path in files:
        with pq.ParquetFile(path) as file:
            for batch in file.iter_batches(DOCUMENTS_AT_ONCE, columns=[column]):
                here = rows[(rows >= first) & (rows < first + batch.num_rows)]
                found.update(zip(here.tolist(), batch.column(0).take(here - first).to_pylist(), strict=True))
                first += batch.num_rows
    return [found[row] for row in rows.tolist()]


class BlockBatches:
    """step -> micro-batches of blocks, shuffled anew each epoch. A pure function of (tokens, seed, step).

    Args:
        begin: what takes the place of the first token of each block; empty: nothing.
    """

    def __init__(
        self,
        tokens: np.ndarray,
        *,
        block_size: int,
        batch_size: int,
        gradient_accumulation: int,
        seed: int,
        begin: Sequence[int] = (),
    ) -> None:
        if len(tokens) < block_size:
            raise ValueError(
                f"the corpus must hold at least one block; got num_tokens={len(tokens)}, block_size={block_size}"
            )
        self.tokens, self.block_size = tokens, block_size
        self.num_blocks = len(tokens) // block_size
        self.batch_size, self.micro_size = batch_size, batch_size // gradient_accumulation
        self.seed, self.begin = seed, begin
        self._epoch, self._shift = -1, 0
        self._order = np.empty(0, dtype=np.int64)

    def __call__(self, step: int) -> list[Batch]:
        first = step * self.batch_size
        blocks = np.stack([self._block(i) for i in range(first, first + self.batch_size)])
        ids = torch.from_numpy(blocks)
        size = self.block_size
        totals = Totals(self.batch_size, self.batch_size * size, self.batch_size * (size - 1))
        return [Batch(part, part, torch.full((len(part),), size), totals) for part in ids.split(self.micro_size)]

    def _block(self, index: int) -> np.ndarray:
        epoch, index = divmod(index, self.num_blocks)
        if epoch != self._epoch:
            rng = np.random.default_rng([self.seed, epoch])
            self._epoch, self._order = epoch, rng.permutation(self.num_blocks)
            # blocks of a later epoch start elsewhere, so sentences are not always cut alike
            self._shift = int(rng.integers(len(self.tokens) - self.num_blocks * self.block_size + 1))
        start = self._shift + int(self._order[index]) * self.block_size
        block = self.tokens[start : start + self.block_size].astype(np.int64)
        block[: len(self.begin)] = self.begin
        return block
