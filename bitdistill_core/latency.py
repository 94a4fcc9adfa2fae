"""Speed and memory of a model on this CPU, measured in a process of its own.

Prefill (the prompt) is bound by arithmetic, decode (one token at a time) by memory, so they are measured apart; time
to first token is a prefill and the choice of one token. Each model lives in a worker process that loads it, warms up,
and then does one round at a time when asked: the caller interleaves rounds of all models, so a drift of the machine
meets them alike. `python -m bitdistill_core.latency` is such a worker. Peak memory is the process's own high-water
mark (VmHWM), libraries included; `added_rss_mib` leaves out what the process held before it loaded the model.
"""

import argparse
import json
import statistics
import subprocess
import sys
import time
from collections.abc import Callable, Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from bitdistill_core import openmp

Generate = Callable[[list[int], int], list[float]]  # prompt ids, new tokens -> time of each new token since the start
Resident = Callable[[], dict[str, int]]  # bytes of each part of a model's file that are in memory


@dataclass(frozen=True)
class Timing:
    """Medians over the rounds."""

    prefill_tokens_per_second: float
    decode_tokens_per_second: float
    ttft_ms: float
    tpot_ms: float
    peak_rss_mib: float
    added_rss_mib: float
    prefill_spread: tuple[float, float]  # lowest and highest round
    decode_spread: tuple[float, float]
    resident_mib: dict[str, float]  # of added_rss_mib, for a packed model: pages of its file by part, and the rest


def measure(
    models: Mapping[str, Path],
    *,
    prompt_ids: Sequence[int],
    new_tokens: int,
    num_rounds: int,
    warmup_rounds: int,
    num_threads: int,
    on_round: Callable[[], None] = lambda: None,
) -> dict[str, Timing]:
    """Interleaved rounds of each model, by name: a checkpoint directory runs in PyTorch, a packed file in the engine.

    Raises:
        ValueError: a worker failed; its last line of error is part of the message.
    """
    workers = {name: _Worker(path, num_threads) for name, path in models.items()}
    rounds: dict[str, list[list[float]]] = {name: [] for name in models}
    request = {"prompt_ids": list(prompt_ids), "new_tokens": new_tokens}
    try:
        for number in range(warmup_rounds + num_rounds):
            names = list(workers)
            shift = number % len(names)
            for name in names[shift:] + names[:shift]:
                times = workers[name].ask(request)["times"]
                if number >= warmup_rounds:
                    rounds[name].append(times)
            on_round()
        memory = {name: worker.ask({"memory": True}) for name, worker in workers.items()}
    finally:
        for worker in workers.values():
            worker.close()
    return {name: _summary(rounds[name], len(prompt_ids), memory[name]) for name in models}


def _summary(rounds: list[list[float]], prompt_tokens: int, memory: Mapping[str, Any]) -> Timing:
    added = memory["peak_rss_mib"] - memory["before_rss_mib"]
    resident = {part: size / 2**20 for part, size in memory["resident"].items()}
    if resident:
        resident["cache_and_buffers"] = added - sum(resident.values())
    prefill = [prompt_tokens / times[0] for times in rounds]
    decode = [(len(times) - 1) / (times[-1] - times[0]) for times in rounds]
    return Timing(
        prefill_tokens_per_second=statistics.median(prefill),
        decode_tokens_per_second=statistics.median(decode),
        ttft_ms=1000 * statistics.median(times[0] for times in rounds),
        tpot_ms=1000 / statistics.median(decode),
        peak_rss_mib=memory["peak_rss_mib"],
        added_rss_mib=added,
        prefill_spread=(min(prefill), max(prefill)),
        decode_spread=(min(decode), max(decode)),
        resident_mib=resident,
    )


class _Worker:
    """A process that holds one model and answers requests, JSON lines in and out."""

    def __init__(self, path: Path, num_threads: int) -> None:
        # threads that wait spin shortly, then sleep: the models take turns on the same cores
        command = [
            "env",
            *(f"{name}={value}" for name, value in openmp.WAITING.items()),
            f"OMP_NUM_THREADS={num_threads}",
        ]
        command += [sys.executable, "-m", "bitdistill_core.latency", str(path), "--num-threads", str(num_threads)]
        self.path = path
        self.process = subprocess.Popen(
            command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True
        )

    def ask(self, request: Mapping[str, object]) -> dict[str, Any]:
        assert self.process.stdin is not None
        assert self.process.stdout is not None
        assert self.process.stderr is not None
        try:
            self.process.stdin.write(json.dumps(request) + "\n")
            self.process.stdin.flush()
            line = self.process.stdout.readline()
        except BrokenPipeError:
            line = ""
        if not line:
            error = self.process.stderr.read().strip().splitlines()
            raise ValueError(f"the benchmark of path={self.path} failed: {error[-1] if error else 'no message'}")
        answer: dict[str, Any] = json.loads(line)
        return answer

    def close(self) -> None:
        if self.process.stdin is not None and not self.process.stdin.closed:
            with suppress(BrokenPipeError):  # the worker may be gone already
                self.process.stdin.close()
        self.process.wait()
        for stream in (self.process.stdout, self.process.stderr):
            if stream is not None:
                stream.close()


def _load_torch(path: Path, num_threads: int) -> tuple[Generate, Resident]:
    import torch

    from bitdistill_core.checkpoint import load_model

    torch.set_num_threads(num_threads)
    model, _ = load_model(path)

    @torch.inference_mode()
    def generate(prompt_ids: list[int], new_tokens: int) -> list[float]:
        ids, cache, times = torch.tensor([prompt_ids]), None, []
        start = time.perf_counter()
        for _ in range(new_tokens):
            out = model(input_ids=ids, past_key_values=cache, use_cache=True, logits_to_keep=1)
            ids, cache = out.logits[:, -1].argmax(dim=-1, keepdim=True), out.past_key_values
            times.append(time.perf_counter() - start)
        return times

    return generate, dict


def _load_packed(path: Path, num_threads: int) -> tuple[Generate, Resident]:
    from bitdistill_core.engine.model import Engine

    engine = Engine.load(path, num_threads=num_threads)

    def generate(prompt_ids: list[int], new_tokens: int) -> list[float]:
        start = time.perf_counter()
        stream = engine.generate_ids(prompt_ids, new_tokens, ignore_eos=True)
        return [time.perf_counter() - start for _ in stream]

    return generate, engine.resident


def _memory_mib(field: str) -> float:
    """A field of /proc/self/status, VmRSS or VmHWM, in MiB."""
    for line in Path("/proc/self/status").read_text().splitlines():
        if line.startswith(f"{field}:"):
            return int(line.split()[1]) / 1024
    raise ValueError(f"no {field} in /proc/self/status; the benchmark needs Linux")


def _serve(path: Path, num_threads: int) -> None:
    if path.is_dir():
        import torch  # noqa: F401  (libraries are not what the model adds)
        import transformers  # noqa: F401

        import bitdistill_core.checkpoint
    else:
        import bitdistill_core.engine.model  # noqa: F401
    before = _memory_mib("VmRSS")
    generate, resident = (_load_torch if path.is_dir() else _load_packed)(path, num_threads)
    for line in sys.stdin:
        request = json.loads(line)
        if "memory" in request:
            peak = _memory_mib("VmHWM")
            answer: dict[str, object] = {"peak_rss_mib": peak, "before_rss_mib": before, "resident": resident()}
        else:
            answer = {"times": generate(request["prompt_ids"], request["new_tokens"])}
        print(json.dumps(answer), flush=True)


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description="Worker of the latency benchmark: JSON lines on stdin and stdout.")
    parser.add_argument("path", type=Path)
    parser.add_argument("--num-threads", type=int, required=True)
    arguments = parser.parse_args()
    _serve(arguments.path, arguments.num_threads)
