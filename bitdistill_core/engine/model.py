"""Engine: load a packed student, then score, generate or embed on the CPU. No PyTorch.

An engine holds no state between calls and every call releases the GIL, so one engine may serve several threads: one
call at a time is spread over the engine's threads, the others run on their own. What a sequence gets does not depend
on what is computed beside it or on the number of threads, to the last bit.
"""

from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any, Literal

import numpy as np
from numpy.typing import NDArray

from bitdistill_core.engine.batching import batches
from bitdistill_core.engine.config import linear_layers
from bitdistill_core.engine.decoder import Decoder, Floats, require_finite
from bitdistill_core.engine.kernels import resolve_kernel, resolve_num_threads, streams_base3
from bitdistill_core.engine.memory import bytes_by_part, resident_by_part
from bitdistill_core.engine.sampling import Sampling, choose_token, log_softmax
from bitdistill_core.engine.tensors import TOKENIZER
from bitdistill_core.engine.tokenizer import EngineTokenizer, keep_end, leave_out_middle, until_stop
from bitdistill_core.packing import PackedModel, read_packed

Ids = NDArray[np.int32]

PREFILL_TOKENS = 192  # of a prompt at once
BRANCH_SLOTS = 32768  # positions whose keys and values the continuations of one context may take at once
LOGIT_ROWS = 16  # rows of logits over the whole vocabulary at once


class Engine:
    """A packed model ready to run; make one with `Engine.load`."""

    def __init__(self, model: PackedModel, *, kernel: str, num_threads: int, kv_dtype: str) -> None:
        self.model = model
        self.config = model.config
        self.kernel = kernel
        self.num_threads = num_threads
        self.kv_dtype = kv_dtype
        self.tokenizer = EngineTokenizer(model.tensors[TOKENIZER].tobytes())
        self._decoder = Decoder(model, kernel=kernel, num_threads=num_threads)
        self._decoder.new_cache(1, kv_dtype)  # refuses another dtype

    @classmethod
    def load(
        cls,
        path: str | Path,
        *,
        num_threads: int = 0,
        kernel: str | None = None,
        kv_dtype: str = "float32",
        read_head: bool = False,
    ) -> "Engine":
        """The model at `path`, verified; what is not needed is not read into memory.

        Args:
            num_threads: 0 is every core this process may use.
            kernel: one of `available_kernels()`; None takes the fastest this processor has.
            kv_dtype: float32 or float16, of the keys and values kept while generating. float32 repeats the student's
                tokens; float16 halves the memory and reads a long context faster.
            read_head: the output head comes to memory now, in less time than with the first token that is generated.
                A classifier needs none of it.
        """
        threads, chosen = resolve_num_threads(num_threads), resolve_kernel(kernel)
        model = read_packed(Path(path), read_codes=streams_base3(chosen), read_head=read_head)
        return cls(model, kernel=chosen, num_threads=threads, kv_dtype=kv_dtype)

    def prompt_ids(self, prompt: str) -> list[int]:
        """Token ids of a prompt: with the tokenizer's leading marks, without its end of text."""
        ids = self.tokenizer.encode(prompt, add_special_tokens=True)
        return ids[: len(ids) - self.tokenizer.num_trailing]

    def logits(self, ids: Sequence[int], *, last: bool = False) -> NDArray[np.float32]:
        """(T, V) logits after each token of `ids`; with `last` (1, V), after the last one."""
        tokens = self._checked(ids, "ids")
        hidden = self._decoder.forward([tokens], range(len(tokens) - 1 if last else 0, len(tokens)))
        return np.concatenate(
            [self._decoder.logits(hidden[row : row + LOGIT_ROWS]) for row in range(0, len(hidden), LOGIT_ROWS)]
        )

    def score(self, prompts: Sequence[str], labels: Sequence[str], *, truncate: bool = False) -> NDArray[np.float64]:
        """(B, num_labels) log-probability of each label after each prompt, among the labels: rows sum to 1 as exp.

        A label's probability is the product over its tokens. Prompts are encoded with the tokenizer's special tokens,
        labels without. Where every label is one token, no other row of the vocabulary is computed. A prompt that does
        not fit the window is an error; with `truncate` it loses its beginning, after the leading marks, as trained.
        """
        _require_list(prompts, "prompts")
        _require_list(labels, "labels")
        if not prompts or not labels:
            raise ValueError(
                f"scoring needs a prompt and a label; got num_prompts={len(prompts)} num_labels={len(labels)}"
            )
        label_ids = [self.tokenizer.encode(label) for label in labels]
        longest = max(len(ids) for ids in label_ids)
        prompt_ids = [self.prompt_ids(prompt) for prompt in prompts]
        if truncate:
            room = self.config.max_position_embeddings - longest + 1
            prompt_ids = [keep_end(ids, room, self.tokenizer.num_leading) for ids in prompt_ids]
        if all(len(ids) == 1 for ids in label_ids):
            return log_softmax(self.score_tokens(prompt_ids, [ids[0] for ids in label_ids]))
        pairs = [(prompt, label) for prompt in prompt_ids for label in label_ids]
        scores = np.array([log_probability for log_probability, _ in self.score_ids(pairs)])
        return log_softmax(scores.reshape(len(prompts), len(labels)))

    def score_tokens(self, sequences: Sequence[Sequence[int]], token_ids: Sequence[int]) -> NDArray[np.float32]:
        """(B, len(token_ids)) logits of some tokens after each sequence; other rows of the head are not computed."""
        if not sequences:
            raise ValueError("scoring needs at least one sequence of token ids; got an empty batch")
        tokens = [self._checked(sequence, "prompt") for sequence in sequences]
        rows = self._checked(token_ids, "labels", is_text=False).tolist()
        return np.concatenate([self._decoder.row_logits(hidden, rows) for hidden, _ in self._hidden(tokens)])

    def score_ids(self, pairs: Sequence[tuple[Sequence[int], Sequence[int]]]) -> list[tuple[float, bool]]:
        """For each (context, continuation): the continuation's log-probability, and whether greedy decoding gives it.

        A context that several pairs share is computed once, or once for every BRANCH_SLOTS positions of theirs.
        """
        if not pairs:
            raise ValueError("scoring needs at least one (context_ids, continuation_ids); got an empty batch")
        by_context: dict[tuple[int, ...], list[int]] = {}
        for index, (context, _) in enumerate(pairs):
            by_context.setdefault(tuple(context), []).append(index)
        contexts: list[Ids] = []
        indices_of: list[list[int]] = []
        targets: list[list[Ids]] = []
        for context, indices in by_context.items():
            tokens = self._checked(context, "prompt")
            continuations = [self._checked(pairs[index][1], "continuation") for index in indices]
            length = len(tokens) + max(len(continuation) for continuation in continuations) - 1
            self._check_length(length, "prompt and continuation")
            at_once = max(1, BRANCH_SLOTS // length)  # each holds the keys and values of its context
            for begin in range(0, len(indices), at_once):
                contexts.append(tokens)
                indices_of.append(indices[begin : begin + at_once])
                targets.append(continuations[begin : begin + at_once])
        branches = [[continuation[:-1] for continuation in continuations] for continuations in targets]
        scores: list[tuple[float, bool]] = [(0.0, False)] * len(pairs)
        for hidden, sequences in self._hidden(contexts, branches):
            log_probabilities = self._rows_of_log_probabilities(hidden)
            for order in sequences:
                first = next(log_probabilities)
                for index, continuation in zip(indices_of[order], targets[order], strict=True):
                    rows = [first] + [next(log_probabilities) for _ in continuation[:-1]]
                    total = sum(float(row[token]) for row, token in zip(rows, continuation, strict=True))
                    is_greedy = all(int(row.argmax()) == token for row, token in zip(rows, continuation, strict=True))
                    scores[index] = total, is_greedy
        return scores

    def embed(self, texts: Sequence[str], pooling: Literal["last", "mean"] = "last") -> NDArray[np.float32]:
        """(B, D) final hidden state of each text's last token, or the mean over its tokens."""
        _require_list(texts, "texts")
        if not texts or pooling not in ("last", "mean"):
            raise ValueError(
                f"embedding needs a text and pooling last or mean; got num_texts={len(texts)} pooling={pooling}"
            )
        tokens = [self._checked(self.tokenizer.encode(text, add_special_tokens=True), "text") for text in texts]
        if pooling == "last":
            hidden = np.concatenate([hidden for hidden, _ in self._hidden(tokens)])
        else:
            hidden = np.stack([self._decoder.forward([ids], range(len(ids))).mean(axis=0) for ids in tokens])
        return require_finite(np.ascontiguousarray(hidden[:, : self.config.hidden_size]))

    def generate_ids(
        self,
        ids: Sequence[int],
        max_new_tokens: int,
        *,
        temperature: float = 0.0,
        top_k: int = 0,
        top_p: float = 1.0,
        seed: int = 0,
        ignore_eos: bool = False,
    ) -> Iterator[int]:
        """Up to `max_new_tokens` token ids after `ids`, as they are computed; ends before an end-of-text token.

        `ignore_eos` goes on after it, for timing.
        """
        sampling = Sampling(temperature, top_k, top_p)
        tokens = self._checked(ids, "prompt")
        if max_new_tokens < 1:
            raise ValueError(f"generation needs max_new_tokens of at least 1; got max_new_tokens={max_new_tokens}")
        # The last new token is never fed back, so it needs no position.
        self._check_length(len(tokens) + max_new_tokens - 1, "prompt and new tokens")
        ends = [] if ignore_eos else self.config.eos_token_ids
        return self._generate(tokens, max_new_tokens, sampling, np.random.default_rng(seed), ends)

    def generate(
        self,
        prompt: str,
        max_new_tokens: int,
        *,
        temperature: float = 0.0,
        top_k: int = 0,
        top_p: float = 1.0,
        stop: Sequence[str] = (),
        seed: int = 0,
        truncate: bool = False,
    ) -> Iterator[str]:
        """Text after `prompt` in pieces, as it is computed; ends at end-of-text or before a string of `stop`.

        A prompt that does not fit the window beside the new text is an error; with `truncate` it loses its middle.
        """
        if isinstance(stop, str) or "" in stop:
            raise ValueError(f"stop must be a list of strings that are not empty; got stop={stop!r}")
        ids = self.prompt_ids(prompt)
        if truncate:
            room = self.config.max_position_embeddings - max_new_tokens + 1
            ids = leave_out_middle(ids, room, self.tokenizer.num_leading)
        new_ids = self.generate_ids(ids, max_new_tokens, temperature=temperature, top_k=top_k, top_p=top_p, seed=seed)
        return until_stop(self.tokenizer.stream(ids, new_ids), stop)

    def info(self) -> dict[str, Any]:
        """Architecture, parameters, encoding and bytes of the file by part, kernel and threads."""
        tensors = self.model.tensors
        linears = linear_layers(self.config).values()
        dense = sum(tensor.size for name, tensor in tensors.items() if name.endswith((".weight", ".bias")))
        num_embeddings = 1 if self.config.tie_word_embeddings else 2
        ternary_parameters = sum(layer.n * layer.k for layer in linears)
        embedding_parameters = num_embeddings * self.config.vocab_size * self.config.hidden_size
        return {
            "model_type": self.config.model_type,
            "num_layers": self.config.num_hidden_layers,
            "subln": self.config.subln,
            "encoding": self.model.encoding,
            "num_parameters": ternary_parameters + embedding_parameters + dense,
            "num_ternary_parameters": ternary_parameters,
            "bytes": bytes_by_part(tensors),
            "file_bytes": self.model.path.stat().st_size,
            "created_by": self.model.created_by,
            "kernel": self.kernel,
            "num_threads": self.num_threads,
        }

    def resident(self) -> dict[str, int]:
        """Bytes of each part of the model in this process's memory now."""
        return resident_by_part(self.model.tensors | self._decoder.arrays)

    def _hidden(
        self, sequences: Sequence[Ids], branches: Sequence[Sequence[Ids]] | None = None
    ) -> Iterator[tuple[Floats, range]]:
        """Hidden states that `batches` wants, a batch at a time, and the sequences they belong to."""
        for batch, indices in batches(sequences, branches or [()] * len(sequences)):
            yield self._decoder.forward(batch.segments, batch.outputs, parents=batch.parents), indices

    def _rows_of_log_probabilities(self, hidden: Floats) -> Iterator[NDArray[np.float64]]:
        for row in range(0, len(hidden), LOGIT_ROWS):
            yield from log_softmax(self._decoder.logits(hidden[row : row + LOGIT_ROWS]))

    def _generate(
        self,
        tokens: Ids,
        max_new_tokens: int,
        sampling: Sampling,
        generator: np.random.Generator,
        eos_token_ids: Sequence[int],
    ) -> Iterator[int]:
        cache = self._decoder.new_cache(len(tokens) + max_new_tokens - 1, self.kv_dtype)
        for begin in range(0, len(tokens), PREFILL_TOKENS):
            part = tokens[begin : begin + PREFILL_TOKENS]
            hidden = self._decoder.forward([part], [len(part) - 1], cache=cache)
        is_greedy = sampling.temperature == 0
        count = min(1 if is_greedy else sampling.top_k, self.config.vocab_size)  # 0: every logit
        largest = self._decoder.top(hidden, count) if count else []
        for number in range(max_new_tokens):
            if is_greedy:
                token = largest[0][0]
            elif count:
                columns = zip(*largest, strict=True)
                token = choose_token(np.array(next(columns), np.int64), np.array(next(columns)), sampling, generator)
            else:
                token = choose_token(*self._in_order(hidden), sampling, generator)
            if token in eos_token_ids:
                return
            yield token
            if number + 1 == max_new_tokens:
                return
            if count:
                largest = self._decoder.step(token, cache, count)
            else:
                hidden = self._decoder.forward([np.array([token], np.int32)], [0], cache=cache)

    def _in_order(self, hidden: Floats) -> tuple[NDArray[np.int64], NDArray[np.float64]]:
        """Every token and its logit, largest first; of equals the lowest token first."""
        logits = self._decoder.logits(hidden)[0].astype(np.float64)
        order = np.argsort(-logits, kind="stable")
        return order, logits[order]

    def _checked(self, ids: Sequence[int], what: str, *, is_text: bool = True) -> Ids:
        tokens = np.asarray(ids)
        if tokens.ndim != 1 or tokens.size == 0:
            raise ValueError(f"the {what} must be one list of at least one token id; got shape={tokens.shape}")
        if not np.issubdtype(tokens.dtype, np.integer):
            raise ValueError(f"the {what} must hold integers; got dtype={tokens.dtype}")
        if tokens.min() < 0 or tokens.max() >= self.config.vocab_size:
            wrong = next(int(token) for token in tokens if not 0 <= token < self.config.vocab_size)
            raise ValueError(
                f"token ids must be from 0 to vocab_size - 1 = {self.config.vocab_size - 1}; got token_id={wrong} "
                f"in the {what}"
            )
        if is_text:
            self._check_length(len(tokens), what)
        return tokens.astype(np.int32)

    def _check_length(self, length: int, what: str) -> None:
        if length > self.config.max_position_embeddings:
            raise ValueError(
                f"the {what} must fit max_position_embeddings={self.config.max_position_embeddings}; got "
                f"num_tokens={length}; shorten the prompt"
            )


def _require_list(texts: Sequence[str], what: str) -> None:
    if isinstance(texts, str):  # a sequence of its characters, too
        raise ValueError(f"{what} must be a list of strings; got one string, {texts[:40]!r}; put it in a list")
