"""A process that holds one model, and the handle by which the benchmark asks it for one timed task at a time.

Every engine runs in a process of its own, which waits on a pipe between tasks. Each answer also says what the
processor did meanwhile: how much other processes took while the task ran, and how much this one took while it should
have slept (an engine whose threads spin would slow down the others). `python -m benchmarks.worker` is the process.
"""

import argparse
import importlib
import json
import os
import subprocess
import sys
import tempfile
import time
from collections.abc import Mapping, Sequence
from contextlib import suppress
from pathlib import Path
from typing import Any, Protocol

import numpy as np

LABEL_IDS = [0, 1, 2]
GENERATOR = "generator"  # the engine, told when it is loaded that it will generate
LIBRARIES = {
    "engine": ["bitdistill_core.engine.model"],
    GENERATOR: ["bitdistill_core.engine.model"],
    "kernels": ["bitdistill_core.engine.kernels"],
    "llamacpp": ["llama_cpp"],
    "torch": ["torch", "transformers"],
}
# Before each timed task, whose first one is run twice. Decoding always is: a head reads other rows with every token,
# and a system that reclaims what lay idle has dropped them from memory since the last round.
WARM_UP_TOKENS = {"prefill": 32, "classify": 4}
CEILING_KERNEL, CEILING_SECONDS = "avx2", 0.5
KERNEL_PASSES = 8
READ_MEGABYTES = 110  # as the weights of GEMV_SHAPE in two bits
GEMM_SHAPES = ((3072, 1024), (1024, 3072), (2048, 1024))
GEMM_TOKENS, GEMM_REPEATS = 512, 30
GEMV_SHAPE, GEMV_REPEATS = (430080, 1024), 30
GEMV_2BIT = "gemv_2bit_gb_per_second"  # beside that of base 3, where the kernels stream it
ROOT = Path(__file__).parent.parent


class Runner(Protocol):
    """One engine with one model."""

    vocab_size: int

    def prefill(self, ids: list[int]) -> Any:
        """Reads a prompt, as far as the logits after its last token."""

    def generate(self, first_id: int, num_tokens: int) -> Any:
        """Greedy decoding of `num_tokens` tokens after one token, from an empty context."""

    def classify(self, sequences: list[list[int]]) -> Any:
        """The logits after the last token of each sequence, as one batch."""


class PackedEngine:
    """The engine of this project."""

    def __init__(self, path: str, num_threads: int, *, generates: bool) -> None:
        from bitdistill_core.engine.model import Engine

        # keys and values as llama.cpp keeps them
        self.engine = Engine.load(path, num_threads=num_threads, kv_dtype="float16", read_head=generates)
        self.vocab_size = self.engine.config.vocab_size

    def prefill(self, ids: list[int]) -> Any:
        return self.engine.score_tokens([ids], LABEL_IDS[:1])

    def generate(self, first_id: int, num_tokens: int) -> list[int]:
        return list(self.engine.generate_ids([first_id], num_tokens, ignore_eos=True))

    def classify(self, sequences: list[list[int]]) -> Any:
        return self.engine.score_tokens(sequences, LABEL_IDS)


def measure_kernels(num_threads: int) -> dict[str, float]:
    """Ternary kernels alone, and what the processor does at best, in GMAC/s and GB/s (1e9).

    The multiply-add ceiling is that of AVX2, so the AVX2 kernel is measured too where a faster one is active.
    """
    from bitdistill_core.engine import _native
    from bitdistill_core.engine.kernels import available_kernels, resolve_kernel, streams_base3

    active, available = resolve_kernel(None), available_kernels()
    gemv = {"gemv_gb_per_second": streams_base3(active)}
    if streams_base3(active):
        gemv[GEMV_2BIT] = False
    passes: list[dict[str, float]] = []
    for _ in range(KERNEL_PASSES):
        rates = {
            "read_bandwidth_gb_per_second": _native.measure_read_bandwidth(num_threads, READ_MEGABYTES),
        }
        for metric, base3 in gemv.items():
            rates[metric] = _native.measure_gemv(active, *GEMV_SHAPE, num_threads, GEMV_REPEATS, base3)
        if CEILING_KERNEL in available:
            ceiling = _native.measure_multiply_add_ceiling(num_threads, CEILING_SECONDS)
            rates["multiply_add_ceiling_gmac_per_second"] = ceiling
        for kernel in dict.fromkeys([active, *(name for name in available if name == CEILING_KERNEL)]):
            for n, k in GEMM_SHAPES:
                rate = _native.measure_gemm(kernel, n, k, GEMM_TOKENS, num_threads, GEMM_REPEATS)
                rates[gemm_metric(kernel, n, k)] = rate
        passes.append(rates)
    # a neighbour can only lower a rate, of a roof or of a kernel
    return {name: max(rates[name] for rates in passes) for name in passes[0]}


def gemm_metric(kernel: str, n: int, k: int) -> str:
    """Name of the rate of a matrix product of N x K by `GEMM_TOKENS` tokens."""
    return f"gemm_{kernel}_{n}x{k}_gmac_per_second"


class Worker:
    """A worker process; use as a context manager."""

    def __init__(self, kind: str, source: str, num_threads: int) -> None:
        self.title = f"{kind} with {source}"
        # Defaults of the OpenMP runtime, which spins for some milliseconds, then sleeps: passive would slow llama.cpp.
        environment = {name: value for name, value in os.environ.items() if not name.startswith(("OMP_", "GOMP_"))}
        for name in ("OMP_NUM_THREADS", "OPENBLAS_NUM_THREADS", "MKL_NUM_THREADS"):
            environment[name] = str(num_threads)
        self.errors = tempfile.TemporaryFile("w+")  # noqa: SIM115  (closed with the process)
        self.started = time.perf_counter()
        self.process = subprocess.Popen(
            [sys.executable, "-m", "benchmarks.worker", kind, source, "--num-threads", str(num_threads)],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=self.errors,
            text=True,
            cwd=ROOT,
            env=environment,
        )

    def ask(self, task: str, sequences: int = 1, tokens: int = 1, *, warm_up: bool = True) -> dict[str, Any]:
        """Runs one task and returns its answer, with the time since the process was started."""
        assert self.process.stdin is not None
        assert self.process.stdout is not None
        request = {"task": task, "sequences": sequences, "tokens": tokens, "warm_up": warm_up}
        line = ""
        with suppress(BrokenPipeError):
            self.process.stdin.write(json.dumps(request) + "\n")
            self.process.stdin.flush()
            line = self.process.stdout.readline()
        if not line:
            self.errors.seek(0)
            error = self.errors.read().strip().splitlines()
            raise ValueError(f"the worker of {self.title} failed: {error[-1] if error else 'no message'}")
        answer: dict[str, Any] = json.loads(line)
        answer["since_start_seconds"] = time.perf_counter() - self.started
        return answer

    def close(self) -> None:
        """Ends the process."""
        if self.process.stdin is not None:
            with suppress(BrokenPipeError):
                self.process.stdin.close()
        self.process.wait()
        if self.process.stdout is not None:
            self.process.stdout.close()
        self.errors.close()

    def __enter__(self) -> "Worker":
        return self

    def __exit__(self, *error: object) -> None:
        self.close()


def _load(kind: str, source: str, num_threads: int) -> Runner | None:
    if kind in ("engine", GENERATOR):
        return PackedEngine(source, num_threads, generates=kind == GENERATOR)
    if kind == "llamacpp":
        from benchmarks.peers import LlamaCpp

        return LlamaCpp(source, num_threads)
    if kind == "torch":
        from benchmarks.peers import Torch

        return Torch(source, num_threads)
    return None


def _perform(runner: Runner, task: str, batch: list[list[int]]) -> Any:
    if task == "prefill":
        return runner.prefill(batch[0])
    if task == "generate":
        return runner.generate(batch[0][0], len(batch[0]))
    return runner.classify(batch)


def _token_ids(num_sequences: int, num_tokens: int, vocab_size: int) -> list[list[int]]:
    ids: list[list[int]] = (
        np.random.default_rng(num_tokens).integers(0, vocab_size, (num_sequences, num_tokens)).tolist()
    )
    return ids


def _timed(runner: Runner, request: Mapping[str, Any], warm: set[tuple[str, int]]) -> float:
    """Seconds of the task alone, after its warm-up."""
    task, key = request["task"], (request["task"], request["tokens"])
    batch = _token_ids(request["sequences"], request["tokens"], runner.vocab_size)
    if request["warm_up"]:
        _perform(runner, task, [ids[: WARM_UP_TOKENS.get(task)] for ids in batch] if key in warm else batch)
        warm.add(key)
    start = time.perf_counter()
    _perform(runner, task, batch)
    return time.perf_counter() - start


def _memory_mib(field: str) -> float:
    """A field of /proc/self/status, VmRSS or VmHWM, in MiB."""
    for line in Path("/proc/self/status").read_text().splitlines():
        if line.startswith(f"{field}:"):
            return int(line.split()[1]) / 1024
    raise ValueError(f"no {field} in /proc/self/status; the benchmark needs Linux")


def _busy_seconds() -> float:
    """Processor time taken by every process, and by the host from this machine, since boot; steps of 10 ms."""
    user, nice, system, _, _, irq, softirq, steal = map(int, Path("/proc/stat").read_text().split()[1:9])
    return (user + nice + system + irq + softirq + steal) / os.sysconf("SC_CLK_TCK")


def _serve(kind: str, source: str, num_threads: int) -> None:
    for library in LIBRARIES[kind]:
        importlib.import_module(library)
    before_mib, load_start = _memory_mib("VmRSS"), time.perf_counter()
    runner = _load(kind, source, num_threads)
    warm: set[tuple[str, int]] = set()
    idle_start, idle_cpu = time.perf_counter(), time.process_time()
    for line in sys.stdin:
        request = json.loads(line)
        start, cpu, busy = time.perf_counter(), time.process_time(), _busy_seconds()
        answer: dict[str, Any] = {"idle_cpu_share": (cpu - idle_cpu) / (start - idle_start)}
        if runner is None:
            answer["rates"] = measure_kernels(num_threads)
        else:
            answer["seconds"] = _timed(runner, request, warm)
        end = time.perf_counter()
        other = _busy_seconds() - busy - (time.process_time() - cpu)
        answer |= {
            "since_load_seconds": end - load_start,
            "added_rss_mib": _memory_mib("VmHWM") - before_mib,
            "other_cpu_share": max(0.0, other / (end - start) / (os.cpu_count() or 1)),
        }
        print(json.dumps(answer), flush=True)
        idle_start, idle_cpu = time.perf_counter(), time.process_time()


def _arguments(argv: Sequence[str] | None = None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description="Worker of the benchmark: JSON lines on stdin and stdout.")
    parser.add_argument("kind", choices=LIBRARIES)
    parser.add_argument("source")
    parser.add_argument("--num-threads", type=int, required=True)
    return parser.parse_args(argv)


if __name__ == "__main__":
    arguments = _arguments()
    _serve(arguments.kind, arguments.source, arguments.num_threads)
