"""Other engines with the same model: llama.cpp by its C functions, PyTorch by transformers.

Each keeps its own defaults; the benchmark sets the number of threads only. `benchmarks.worker.Runner` says what the
methods do.
"""

from typing import Any

import numpy as np
from numpy.typing import NDArray

from benchmarks.shapes import llama_library, torch_model

MAX_TOKENS = 512  # of one sequence alone
MAX_BATCHED_TOKENS = 256  # of each of several sequences; llama.cpp rounds less up to this


class LlamaCpp:
    """llama.cpp on a GGUF file: memory-mapped, F16 keys and values, n_ubatch 512, flash attention as it chooses."""

    def __init__(self, path: str, num_threads: int) -> None:
        self.llama = llama_library()
        self.num_threads = num_threads
        self.model = self.llama.llama_model_load_from_file(path.encode(), self.llama.llama_model_default_params())
        if not self.model:
            raise ValueError(f"llama.cpp cannot load path={path}; remove the file and try again")
        self.vocab_size: int = self.llama.llama_vocab_n_tokens(self.llama.llama_model_get_vocab(self.model))
        self.contexts: dict[int, Any] = {}  # by number of sequences
        self.batches: dict[int, Any] = {}  # by number of tokens

    def prefill(self, ids: list[int]) -> NDArray[np.float32]:
        """Logits (1, V)."""
        return self.classify([ids])

    def generate(self, first_id: int, num_tokens: int) -> list[int]:
        context, batch, ids = self._empty_context(1), self._batch(1), [first_id]
        for position in range(num_tokens):
            _set_token(batch, 0, ids[-1], position, sequence=0, has_logits=True)
            self._decode(context, batch)
            ids.append(int(self._logits(context, 0).argmax()))
        return ids[1:]

    def classify(self, sequences: list[list[int]]) -> NDArray[np.float32]:
        """Logits (B, V), all from one llama_decode; keys and values apart for each sequence."""
        context, batch = self._empty_context(len(sequences)), self._batch(sum(map(len, sequences)))
        lasts, end = [], 0
        for number, ids in enumerate(sequences):
            for position, token in enumerate(ids):
                _set_token(batch, end + position, token, position, sequence=number, has_logits=False)
            end += len(ids)
            batch.logits[end - 1] = 1
            lasts.append(end - 1)
        self._decode(context, batch)
        return np.stack([self._logits(context, last) for last in lasts])

    def _empty_context(self, num_sequences: int) -> Any:
        if num_sequences not in self.contexts:
            params = self.llama.llama_context_default_params()
            params.n_ctx = MAX_TOKENS if num_sequences == 1 else MAX_BATCHED_TOKENS * num_sequences
            params.n_batch, params.n_seq_max = params.n_ctx, num_sequences
            params.n_threads = params.n_threads_batch = self.num_threads
            self.contexts[num_sequences] = self.llama.llama_init_from_model(self.model, params)
            if not self.contexts[num_sequences]:
                raise ValueError(f"llama.cpp made no context of n_ctx={params.n_ctx}; free some memory")
        context = self.contexts[num_sequences]
        self.llama.llama_memory_clear(self.llama.llama_get_memory(context), False)
        return context

    def _batch(self, num_tokens: int) -> Any:
        if num_tokens not in self.batches:
            self.batches[num_tokens] = self.llama.llama_batch_init(num_tokens, 0, 1)
            self.batches[num_tokens].n_tokens = num_tokens
        return self.batches[num_tokens]

    def _decode(self, context: Any, batch: Any) -> None:
        status = self.llama.llama_decode(context, batch)
        if status:
            raise ValueError(f"llama_decode failed with status={status} for n_tokens={batch.n_tokens}")

    def _logits(self, context: Any, index: int) -> NDArray[np.float32]:
        """A view of the logits (V,) of the batch's token `index`; waits for them."""
        return np.ctypeslib.as_array(self.llama.llama_get_logits_ith(context, index), (self.vocab_size,))


def _set_token(batch: Any, index: int, token: int, position: int, *, sequence: int, has_logits: bool) -> None:
    batch.token[index], batch.pos[index] = token, position
    batch.n_seq_id[index], batch.seq_id[index][0] = 1, sequence
    batch.logits[index] = has_logits


class Torch:
    """transformers on the CPU, not compiled, with its default attention and cache."""

    def __init__(self, source: str, num_threads: int) -> None:
        """Builds the model; `source` is shape:dtype."""
        import torch

        self.torch = torch
        torch.set_num_threads(num_threads)
        name, _, dtype = source.partition(":")
        self.model = torch_model(name, dtype)
        self.vocab_size: int = self.model.config.vocab_size

    def prefill(self, ids: list[int]) -> NDArray[np.float32]:
        """Logits (1, V)."""
        return self.classify([ids])

    def generate(self, first_id: int, num_tokens: int) -> list[int]:
        new_ids: list[int] = []
        ids, past = self.torch.tensor([[first_id]]), None
        with self.torch.inference_mode():
            for _ in range(num_tokens):
                out = self.model(input_ids=ids, past_key_values=past, use_cache=True, logits_to_keep=1)
                ids, past = out.logits[:, -1].argmax(dim=-1, keepdim=True), out.past_key_values
                new_ids.append(int(ids))
        return new_ids

    def classify(self, sequences: list[list[int]]) -> NDArray[np.float32]:
        """Logits (B, V); sequences of one length."""
        with self.torch.inference_mode():
            out = self.model(input_ids=self.torch.tensor(sequences), use_cache=False, logits_to_keep=1)
        logits: NDArray[np.float32] = out.logits[:, -1].float().numpy()
        return logits
