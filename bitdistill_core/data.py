"""Task examples: prompts and answers as tokens, and the batches of a training step."""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path

import numpy as np
import pyarrow.parquet as pq
import torch
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from bitdistill_core.engine.tokenizer import keep_end, leave_out_middle
from bitdistill_core.losses import Batch, Totals


@dataclass(frozen=True)
class Example:
    """Token ids of one example; the answer is what is supervised."""

    prompt_ids: list[int]
    answer_ids: list[int]
    is_cut: bool = False  # whether it was longer


PROMPTS_AT_ONCE = 4096  # that a fast tokenizer encodes side by side


def encode_prompt(tokenizer: PreTrainedTokenizerBase, prompt: str) -> list[int]:
    """Token ids of a prompt, with the tokenizer's own leading special tokens if it has any, and none behind it."""
    return next(encode_prompts(tokenizer, [prompt]))


def encode_prompts(tokenizer: PreTrainedTokenizerBase, prompts: Sequence[str]) -> Iterator[list[int]]:
    """`encode_prompt` of each, many times faster."""
    marked, plain = (tokenizer("x", add_special_tokens=marks)["input_ids"] for marks in (True, False))
    num_trailing = len(marked) - len(plain) - int(marked[:1] != plain[:1])  # some append the end
    for start in range(0, len(prompts), PROMPTS_AT_ONCE):
        for ids in tokenizer(list(prompts[start : start + PROMPTS_AT_ONCE]), add_special_tokens=True)["input_ids"]:
            yield ids[: len(ids) - num_trailing]


def leading_mark(tokenizer: PreTrainedTokenizerBase) -> list[int]:
    """What `encode_prompt` puts before a text: a BOS or nothing."""
    first = encode_prompt(tokenizer, "x")[:1]
    return first if first == [tokenizer.bos_token_id] else []


def encode_answer(tokenizer: PreTrainedTokenizerBase, answer: str, *, ends: bool) -> list[int]:
    """Token ids of an answer; `ends` appends the end-of-text token, which generation needs to stop."""
    ids: list[int] = tokenizer(answer, add_special_tokens=False)["input_ids"]
    if ends and tokenizer.eos_token_id is not None:
        ids = [*ids, int(tokenizer.eos_token_id)]
    return ids


def end_ids(model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase) -> list[int]:
    """Tokens that end a generation: the model's own, and the tokenizer's, which training teaches."""
    own = model.config.eos_token_id
    if model.generation_config is not None and model.generation_config.eos_token_id is not None:
        own = model.generation_config.eos_token_id
    ids = [own] if isinstance(own, int) else list(own or [])
    return sorted({*ids, *([] if tokenizer.eos_token_id is None else [int(tokenizer.eos_token_id)])})


def load_examples(
    path: Path, tokenizer: PreTrainedTokenizerBase, *, max_length: int, window: int, is_generation: bool
) -> list[Example]:
    """Tokenised examples of a parquet file with columns `prompt` and `answer`.

    A prompt that does not fit `max_length` together with its answer loses its beginning, after the leading special
    token; for generation its middle. In classification every prompt has the room that the longest answer leaves: its
    length must not tell the answer. A reference text that does not fit loses its end, down to half of `max_length`.

    Args:
        max_length: tokens of prompt and answer; window: the model's, which max_length must not exceed.
    Raises:
        ValueError: no examples, max_length beyond the window, or an answer that leaves no room for a prompt.
    """
    if max_length > window:
        raise ValueError(f"max_length must not exceed the model's window; got max_length={max_length}, window={window}")
    table = pq.read_table(path, columns=["prompt", "answer"])
    if table.num_rows == 0:
        raise ValueError(f"no examples in path={path}; check data.examples and data.train_split")
    prompts, answers = table["prompt"].to_pylist(), table["answer"].to_pylist()
    unique_answers = {a: encode_answer(tokenizer, a, ends=is_generation) for a in set(answers)}
    longest = max(map(len, unique_answers.values()))
    leading = len(leading_mark(tokenizer))
    examples: list[Example] = []
    for prompt_ids, answer in zip(encode_prompts(tokenizer, prompts), answers, strict=True):
        whole = unique_answers[answer]
        kept = max(1, max_length // 2, max_length - max(2, len(prompt_ids)))
        answer_ids = whole[:kept] if is_generation else whole
        room = max_length - (len(answer_ids) if is_generation else longest)
        if len(prompt_ids) <= leading:
            raise ValueError(
                f"a prompt must have a token; got none in {prompts[len(examples)][:200]!r}, example={len(examples)} of "
                f"path={path}; drop the row, or take a tokenizer that knows its characters"
            )
        if room < 2:
            raise ValueError(
                f"max_length={max_length} leaves no room for a prompt beside an answer of {max_length - room} tokens; "
                "raise max_length"
            )
        is_cut = len(prompt_ids) > room or len(answer_ids) < len(whole)
        shorten = leave_out_middle if is_generation else keep_end
        examples.append(Example(shorten(prompt_ids, room, leading), answer_ids, is_cut))
    return examples


class ExampleBatches:
    """step -> micro-batches, shuffled anew each epoch and grouped by length to save padding.

    A pure function of (examples, seed, step).
    """

    GROUP = 16  # batches among which examples are sorted by length; at most a quarter of an epoch, so that batches vary

    def __init__(self, examples: Sequence[Example], *, batch_size: int, gradient_accumulation: int, seed: int) -> None:
        self.examples = examples
        self.batch_size = min(batch_size, len(examples))
        self.micro_size = max(1, self.batch_size // gradient_accumulation)
        self.seed = seed
        self._epoch = -1
        self._order: list[np.ndarray] = []

    @cached_property
    def _lengths(self) -> np.ndarray:
        return np.array([len(e.prompt_ids) + len(e.answer_ids) for e in self.examples])

    @property
    def steps_per_epoch(self) -> int:
        """Optimiser steps in an epoch; a random rest of the examples, less than a batch, is left out."""
        return len(self.examples) // self.batch_size

    def __call__(self, step: int) -> list[Batch]:
        epoch, index = divmod(step, self.steps_per_epoch)
        if epoch != self._epoch:
            self._epoch, self._order = epoch, self._shuffled(epoch)
        chosen = [self.examples[i] for i in self._order[index]]
        totals = Totals(
            num_sequences=len(chosen),
            num_tokens=sum(len(e.prompt_ids) + len(e.answer_ids) for e in chosen),
            num_targets=sum(len(e.answer_ids) for e in chosen),
        )
        return [collate(chosen[i : i + self.micro_size], totals) for i in range(0, len(chosen), self.micro_size)]

    def _shuffled(self, epoch: int) -> list[np.ndarray]:
        rng = np.random.default_rng([self.seed, epoch])
        order = rng.permutation(len(self.examples))[: self.steps_per_epoch * self.batch_size]
        batches: list[np.ndarray] = []
        size = self.batch_size * min(self.GROUP, max(1, self.steps_per_epoch // 4))
        for start in range(0, len(order), size):
            group = order[start : start + size]
            group = group[np.argsort(self._lengths[group], kind="stable")]
            batches += [group[i : i + self.batch_size] for i in range(0, len(group), self.batch_size)]
        return [batches[i] for i in rng.permutation(len(batches))]


def collate(examples: Sequence[Example], totals: Totals) -> Batch:
    """A right-padded batch; only answers are labelled. Padding is token 0, which nothing sees."""
    lengths = [len(e.prompt_ids) + len(e.answer_ids) for e in examples]
    input_ids = torch.zeros(len(examples), max(lengths), dtype=torch.int64)
    labels = torch.full_like(input_ids, -100)
    for row, example in enumerate(examples):
        input_ids[row, : lengths[row]] = torch.tensor(example.prompt_ids + example.answer_ids)
        labels[row, len(example.prompt_ids) : lengths[row]] = torch.tensor(example.answer_ids)
    return Batch(input_ids, labels, torch.tensor(lengths), totals)
