"""The output head on a real model: `python -m benchmarks.head --help`.

How fast the head finds the largest logit depends on the model's embeddings and hidden states, which random weights do
not have. This packs a model's embeddings, takes its own hidden states over a text, and counts how many rows of the
vocabulary each stage leaves (bitdistill_core/engine/native/head.cpp), the first 16 guesses included, beside the time of
the engine's own whole head in float32. Hidden states are those of the full-precision model.
"""

import argparse
import json
import statistics
import sys
import tempfile
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray

from benchmarks.engine import environment
from bitdistill_core.checkpoint import load_pretrained
from bitdistill_core.engine.model import Engine
from bitdistill_core.panels import GROUP_K
from bitdistill_core.quantize.weight import WeightQuantizer
from bitdistill_core.stages.pack import pack_model
from bitdistill_core.stages.training import round_embeddings
from bitdistill_core.surgery import operate

SKIPPED_TOKENS = 8  # the first hidden states of a text are like no others


def run(checkpoint: str, text: str, *, num_tokens: int, num_rounds: int, num_threads: int) -> dict[str, Any]:
    """Rows left by each stage and the time of a token, over the hidden states of `text`.

    Raises:
        ValueError: a model that cannot be loaded or packed, or a text of too few tokens.
    """
    model, tokenizer = load_pretrained(checkpoint)
    ids = tokenizer(text)["input_ids"][: SKIPPED_TOKENS + num_tokens]
    if len(ids) <= SKIPPED_TOKENS:
        raise ValueError(f"the text needs more than {SKIPPED_TOKENS} tokens; got num_tokens={len(ids)}")
    with torch.inference_mode():
        hidden = model.get_decoder()(input_ids=torch.tensor([ids])).last_hidden_state[0, SKIPPED_TOKENS:].numpy()
    operate(model, subln="none", sub_norm_eps=1e-6, quantizer=WeightQuantizer())
    round_embeddings(model)
    with tempfile.TemporaryDirectory() as directory:
        path = Path(directory, "model.bitdistill")
        pack_model(model, tokenizer.backend_tokenizer.to_str().encode(), path, task={}, encoding="base3")
        decoder = Engine.load(path, num_threads=num_threads)._decoder
    states = np.zeros((len(hidden), -(-hidden.shape[1] // GROUP_K) * GROUP_K), np.float32)
    states[:, : hidden.shape[1]] = hidden
    rows = [states[i : i + 1] for i in range(len(states))]
    counts = np.array([decoder.top_statistics(row, 1) for row in rows])
    for row in rows:
        (best,) = decoder.top(row, 1)
        if best[1] != decoder.logits(row)[0].max():
            raise RuntimeError("the head's search differs from the whole head: a defect")
    search, whole = [], []
    for _ in range(num_rounds):
        search.append(_milliseconds(rows, lambda row: decoder.top(row, 1)))
        whole.append(_milliseconds(rows, lambda row: decoder.logits(row).argmax()))
    return {
        "checkpoint": checkpoint,
        "vocab_size": model.config.vocab_size,
        "hidden_size": model.config.hidden_size,
        "num_tokens": len(rows),
        "next_bit_rows": _spread(counts[:, 0]),
        "whole_rows": _spread(counts[:, 1]),
        "milliseconds": search,
        "whole_head_milliseconds": whole,
        "ratios": {"whole_head_vs_search": statistics.median(w / s for w, s in zip(whole, search, strict=True))},
        "environment": environment(num_threads),
    }


def _milliseconds(rows: Sequence[NDArray[np.float32]], find: Callable[[NDArray[np.float32]], Any]) -> float:
    begin = time.perf_counter()
    for row in rows:
        find(row)
    return 1e3 * (time.perf_counter() - begin) / len(rows)


def _spread(values: NDArray[Any]) -> dict[str, float]:
    return {"mean": float(values.mean()), "median": float(np.median(values)), "max": float(values.max())}


def main(argv: Sequence[str] | None = None) -> None:
    parser = argparse.ArgumentParser(
        prog="python -m benchmarks.head", description="Measures the output head on a real model's hidden states."
    )
    parser.add_argument("checkpoint", help="directory, GGUF file, package:MODULE/file.gguf, or hub id")
    parser.add_argument("--text", type=Path, default=Path("README.md"), help="UTF-8 file (default: %(default)s)")
    parser.add_argument("--tokens", type=int, default=128, help="hidden states (default: %(default)s)")
    parser.add_argument("--rounds", type=int, default=5, help="(default: %(default)s)")
    parser.add_argument("--threads", type=int, default=0, help="default: every core")
    parser.add_argument("--json", type=Path, help="file for every figure")
    arguments = parser.parse_args(argv)
    if min(arguments.tokens, arguments.rounds) < 1 or arguments.threads < 0:
        parser.error("--tokens and --rounds need 1 or more, --threads 0 or more")
    try:
        result = run(
            arguments.checkpoint,
            arguments.text.read_text(encoding="utf-8"),
            num_tokens=arguments.tokens,
            num_rounds=arguments.rounds,
            num_threads=arguments.threads,
        )
    except (ValueError, OSError) as error:
        sys.exit(f"error: {error}")
    if arguments.json:
        arguments.json.write_text(json.dumps(result, indent=1) + "\n")
    for name in ("next_bit_rows", "whole_rows"):
        print(f"{name} of {result['vocab_size']}: " + ", ".join(f"{k} {v:.0f}" for k, v in result[name].items()))
    for name in ("milliseconds", "whole_head_milliseconds"):
        print(f"{name} a token: {statistics.median(result[name]):.2f}")
    print(json.dumps(result["ratios"]))


if __name__ == "__main__":
    main()
