"""A PyTorch model and a packed model as evaluation sees them: they score answers and generate texts.

Prompts and answers are encoded as in training, not by joining strings, so teacher, student and packed model see the
same tokens.
"""

from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Protocol, TypeVar

import torch
from torch import nn
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from bitdistill_core import losses
from bitdistill_core.bitlinear import BitLinear
from bitdistill_core.data import Example, collate, encode_answer, encode_prompt, end_ids, leading_mark
from bitdistill_core.engine.tokenizer import keep_end, leave_out_middle

TOKENS_AT_ONCE = 16384  # of a batch in PyTorch, padding and new ones counted; one text that has more goes alone
CONTEXTS_AT_ONCE = 32  # prompts that the packed model scores between two steps of the progress bar

Item = TypeVar("Item")
Request = tuple[list[int], list[int]]  # token ids of a prompt and of an answer


class Scorer(Protocol):
    """A language model as evaluation sees it."""

    def encode_prompt(self, text: str) -> list[int]: ...

    def encode_answer(self, text: str) -> list[int]: ...

    def score(self, requests: Sequence[Request]) -> Iterator[tuple[int, float]]:
        """Yields (index of the request, log-probability of its answer) in any order."""
        ...

    def generate(self, prompts: Sequence[str], max_new_tokens: int) -> Iterator[tuple[int, str]]:
        """Yields (index of the prompt, its greedy continuation up to the end-of-text token) in any order."""
        ...


class TorchScorer:
    """A transformers model, dense or student."""

    def __init__(
        self, model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase, *, batch_size: int, device: torch.device
    ) -> None:
        """Takes the model over: a student's latent weights are replaced by quantised ones."""
        nn.Module.to(model, device)
        for module in model.modules():
            if isinstance(module, BitLinear):
                module.freeze()
        self.model, self.tokenizer = model.eval(), tokenizer
        self.batch_size, self.device = batch_size, device
        self.window = int(model.config.max_position_embeddings)

    def encode_prompt(self, text: str) -> list[int]:
        """Token ids, as in training."""
        return encode_prompt(self.tokenizer, text)

    def encode_answer(self, text: str) -> list[int]:
        """Token ids, as in training."""
        return encode_answer(self.tokenizer, text, ends=False)

    @torch.inference_mode()
    def score(self, requests: Sequence[Request]) -> Iterator[tuple[int, float]]:
        """Log-probabilities of answers. Answers that share all but their last token share one forward pass."""
        rows: dict[tuple[int, ...], list[int]] = {}
        for index, (prompt, answer) in enumerate(
            _cut(requests, self.window, lambda: len(leading_mark(self.tokenizer)))
        ):
            rows.setdefault((*prompt, *answer[:-1]), []).append(index)
        ordered = sorted(rows.items(), key=lambda row: len(row[0]))
        for part in _batches(ordered, [len(ids) for ids, _ in ordered], self.batch_size):
            batch = collate([Example(list(ids), []) for ids, _ in part], losses.Totals(1, 1, 1))
            batch = batch.to(self.device)
            hidden = losses.hidden_states(self.model, batch)
            for row, (ids, indices) in enumerate(part):
                for index in indices:
                    answer = requests[index][1]
                    at = slice(len(ids) - len(answer), len(ids))
                    log_probs = losses.head_logits(self.model, hidden[row, at]).float()
                    log_probs = log_probs.log_softmax(-1)
                    yield index, float(log_probs[torch.arange(len(answer)), torch.tensor(answer)].sum())

    @torch.inference_mode()
    def generate(self, prompts: Sequence[str], max_new_tokens: int) -> Iterator[tuple[int, str]]:
        """Greedy continuations, in batches of prompts of similar length that are padded on the left."""
        room, leading = self.window - max_new_tokens + 1, len(leading_mark(self.tokenizer))
        encoded = [leave_out_middle(self.encode_prompt(prompt), room, leading) for prompt in prompts]
        order = sorted(range(len(prompts)), key=lambda index: len(encoded[index]), reverse=True)  # the slowest first
        ends = end_ids(self.model, self.tokenizer)
        lengths = [len(encoded[index]) + max_new_tokens for index in order]
        for indices in _batches(order, lengths, self.batch_size):
            width = len(encoded[indices[0]])
            rows = [[0] * (width - len(encoded[index])) + encoded[index] for index in indices]
            is_token = [[0] * (width - len(encoded[index])) + [1] * len(encoded[index]) for index in indices]
            out = self.model.generate(
                torch.tensor(rows, device=self.device),
                attention_mask=torch.tensor(is_token, device=self.device),
                max_new_tokens=max_new_tokens,
                do_sample=False,
                eos_token_id=ends or None,
                pad_token_id=ends[0] if ends else 0,
            )
            for index, row in zip(indices, out[:, width:].tolist(), strict=True):
                length = next((place for place, token in enumerate(row) if token in ends), len(row))
                yield index, str(self.tokenizer.decode(row[:length], skip_special_tokens=True))


class PackedScorer:
    """A packed model in the CPU engine."""

    def __init__(self, path: Path) -> None:
        from bitdistill_core.engine.model import Engine

        self.engine = Engine.load(path, num_threads=torch.get_num_threads())
        self.window = self.engine.config.max_position_embeddings

    def encode_prompt(self, text: str) -> list[int]:
        """Token ids, as in training."""
        return self.engine.prompt_ids(text)

    def encode_answer(self, text: str) -> list[int]:
        """Token ids, as in training."""
        return self.engine.tokenizer.encode(text, add_special_tokens=False)

    def score(self, requests: Sequence[Request]) -> Iterator[tuple[int, float]]:
        """Log-probabilities of answers."""
        requests = _cut(requests, self.window, lambda: self.engine.tokenizer.num_leading)
        contexts: dict[tuple[int, ...], list[int]] = {}
        for index, (prompt, _) in enumerate(requests):
            contexts.setdefault(tuple(prompt), []).append(index)
        groups = list(contexts.values())
        for begin in range(0, len(groups), CONTEXTS_AT_ONCE):
            indices = [index for group in groups[begin : begin + CONTEXTS_AT_ONCE] for index in group]
            scores = self.engine.score_ids([requests[i] for i in indices])
            for index, (log_probability, _) in zip(indices, scores, strict=True):
                yield index, log_probability

    def generate(self, prompts: Sequence[str], max_new_tokens: int) -> Iterator[tuple[int, str]]:
        """Greedy continuations, one prompt after the other."""
        for index, prompt in enumerate(prompts):
            yield index, "".join(self.engine.generate(prompt, max_new_tokens=max_new_tokens, truncate=True))


def _batches(items: Sequence[Item], lengths: Sequence[int], batch_size: int) -> Iterator[Sequence[Item]]:
    """Runs of at most `batch_size` items that, padded to the longest, have at most TOKENS_AT_ONCE tokens."""
    begin, longest = 0, 0
    for end, length in enumerate(lengths):
        longest = max(longest, length)
        if end > begin and (end - begin == batch_size or (end - begin + 1) * longest > TOKENS_AT_ONCE):
            yield items[begin:end]
            begin, longest = end, length
    if items:
        yield items[begin:]


def _cut(requests: Sequence[Request], window: int, leading: Callable[[], int]) -> Sequence[Request]:
    """Prompts that do not fit the window beside the longest answer lose their beginning, as in training.

    Args:
        leading: marks before a text, which stay.
    """
    room = window - max((len(answer) for _, answer in requests), default=1) + 1
    if all(len(prompt) <= room for prompt, _ in requests):
        return requests
    marks = leading()
    return [(keep_end(prompt, room, marks), answer) for prompt, answer in requests]
