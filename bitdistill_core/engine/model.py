"""Engine: load a packed student, then score or generate on the CPU. No PyTorch.

The ternary layers run in the native kernels on `num_threads` threads; the rest is NumPy, whose BLAS keeps its own
thread setting. An engine holds no state between calls, so one engine may serve several threads.
"""

from collections.abc import Iterator, Sequence
from itertools import groupby
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from bitdistill_core.engine.config import linear_layers
from bitdistill_core.engine.decoder import Decoder, KeyValueCache
from bitdistill_core.engine.kernels import resolve_kernel, resolve_num_threads
from bitdistill_core.engine.sampling import Sampling, choose_token, log_softmax
from bitdistill_core.engine.tokenizer import EngineTokenizer, until_stop
from bitdistill_core.packing import TOKENIZER, PackedModel, read_packed


class Engine:
    """A packed model ready to run; make one with `Engine.load`."""

    def __init__(self, model: PackedModel, *, kernel: str, num_threads: int) -> None:
        self.model = model
        self.config = model.config
        self.kernel = kernel
        self.num_threads = num_threads
        self.tokenizer = EngineTokenizer(model.tensors[TOKENIZER].tobytes())
        self._decoder = Decoder(model, kernel=kernel, num_threads=num_threads)

    @classmethod
    def load(cls, path: str | Path, *, num_threads: int = 0, kernel: str | None = None) -> "Engine":
        """The model at `path`, verified and memory-mapped.

        Args:
            num_threads: for the ternary kernels; 0 is every core this process may use.
            kernel: one of `available_kernels()`; None takes the fastest this processor has.
        """
        threads, chosen = resolve_num_threads(num_threads), resolve_kernel(kernel)
        return cls(read_packed(Path(path)), kernel=chosen, num_threads=threads)

    def logits(self, ids: Sequence[int]) -> NDArray[np.float32]:
        """(T, V) logits after each token of `ids`."""
        tokens = self._checked(ids, "ids")
        return self._decoder.logits(self._decoder.forward(tokens, KeyValueCache(self.config, len(tokens))))

    def score(self, prompts: Sequence[str], labels: Sequence[str]) -> NDArray[np.float64]:
        """(B, num_labels) log-probability of each label after each prompt: the sum over the label's tokens.

        Prompts are encoded with the tokenizer's special tokens, labels without. A prompt is computed once.
        """
        if not prompts or not labels:
            raise ValueError(
                f"scoring needs a prompt and a label; got num_prompts={len(prompts)} num_labels={len(labels)}"
            )
        label_ids = [self.tokenizer.encode(label) for label in labels]
        scores = np.empty((len(prompts), len(labels)), np.float64)
        for row, prompt in enumerate(prompts):
            prompt_ids = self.tokenizer.encode(prompt, add_special_tokens=True)
            scores[row] = [log_probability for log_probability, _ in self._continuations(prompt_ids, label_ids)]
        return scores

    def score_ids(self, pairs: Sequence[tuple[Sequence[int], Sequence[int]]]) -> list[tuple[float, bool]]:
        """For each (context, continuation): the continuation's log-probability, and whether greedy decoding gives it.

        Neighbours with the same context share its computation.
        """
        if not pairs:
            raise ValueError("scoring needs at least one (context_ids, continuation_ids); got an empty batch")
        scores: list[tuple[float, bool]] = []
        for context, group in groupby(pairs, key=lambda pair: tuple(pair[0])):
            scores.extend(self._continuations(context, [continuation for _, continuation in group]))
        return scores

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
    ) -> Iterator[str]:
        """Text after `prompt` in pieces, as it is computed; ends at end-of-text or before a string of `stop`."""
        if isinstance(stop, str) or "" in stop:
            raise ValueError(f"stop must be a list of strings that are not empty; got stop={stop!r}")
        ids = self.tokenizer.encode(prompt, add_special_tokens=True)
        new_ids = self.generate_ids(ids, max_new_tokens, temperature=temperature, top_k=top_k, top_p=top_p, seed=seed)
        return until_stop(self.tokenizer.stream(ids, new_ids), stop)

    def info(self) -> dict[str, Any]:
        """Architecture, parameters, bytes by part, kernel and threads."""
        tensors = self.model.tensors
        rows = {name: tensor.nbytes for name, tensor in tensors.items() if name.endswith((".w_int8", ".row_scale"))}
        ternary = sum(tensor.nbytes for name, tensor in tensors.items() if name.endswith(".w_packed"))
        total = sum(tensor.nbytes for tensor in tensors.values())
        bytes_by_part = {
            "ternary_weights": ternary,
            "embedding": sum(size for name, size in rows.items() if name.startswith("model.embed_tokens.")),
            "lm_head": sum(size for name, size in rows.items() if name.startswith("lm_head.")),
            "tokenizer": tensors[TOKENIZER].nbytes,
        }
        bytes_by_part["norms_biases_scales"] = total - sum(bytes_by_part.values())
        linears = linear_layers(self.config).values()
        dense = [name for name in tensors if name.endswith((".weight", ".bias", ".w_int8"))]
        return {
            "model_type": self.config.model_type,
            "num_layers": self.config.num_hidden_layers,
            "subln": self.config.subln,
            "num_parameters": sum(layer.n * layer.k for layer in linears) + sum(tensors[name].size for name in dense),
            "num_ternary_parameters": sum(layer.n * layer.k for layer in linears),
            "bytes": bytes_by_part,
            "file_bytes": self.model.path.stat().st_size,
            "created_by": self.model.created_by,
            "kernel": self.kernel,
            "num_threads": self.num_threads,
        }

    def _continuations(
        self, context: Sequence[int], continuations: Sequence[Sequence[int]]
    ) -> list[tuple[float, bool]]:
        prompt = self._checked(context, "prompt")
        checked = [self._checked(continuation, "continuation") for continuation in continuations]
        length = len(prompt) + max(len(continuation) for continuation in checked) - 1
        self._check_length(length, "prompt and continuation")
        cache = KeyValueCache(self.config, length)
        first = log_softmax(self._decoder.logits(self._decoder.forward(prompt, cache)[-1:]))
        scores = []
        for continuation in checked:
            rows = first
            if len(continuation) > 1:
                cache.length = len(prompt)
                hidden = self._decoder.forward(continuation[:-1], cache)
                rows = np.concatenate((first, log_softmax(self._decoder.logits(hidden))))
            log_probability = float(rows[np.arange(len(continuation)), continuation].sum())
            scores.append((log_probability, bool((rows.argmax(axis=-1) == continuation).all())))
        return scores

    def _generate(
        self,
        tokens: NDArray[np.int64],
        max_new_tokens: int,
        sampling: Sampling,
        generator: np.random.Generator,
        eos_token_ids: Sequence[int],
    ) -> Iterator[int]:
        cache = KeyValueCache(self.config, len(tokens) + max_new_tokens - 1)
        for _ in range(max_new_tokens):
            hidden = self._decoder.forward(tokens, cache)[-1:]
            token = choose_token(self._decoder.logits(hidden)[0], sampling, generator)
            if token in eos_token_ids:
                return
            yield token
            tokens = np.array([token], np.int64)

    def _checked(self, ids: Sequence[int], what: str) -> NDArray[np.int64]:
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
        self._check_length(len(tokens), what)
        return tokens.astype(np.int64)

    def _check_length(self, length: int, what: str) -> None:
        if length > self.config.max_position_embeddings:
            raise ValueError(
                f"the {what} must fit max_position_embeddings={self.config.max_position_embeddings}; got "
                f"num_tokens={length}; shorten the prompt"
            )
