"""The engine against llama.cpp and PyTorch on this CPU: `python -m benchmarks.engine --help`.

One model with random weights runs in every engine, each in a process of its own. A round measures all of them, one
after another, in an order that rotates; a ratio is the median over rounds of this engine's figure divided by the
peer's figure of the same round, because the speed of a machine drifts by more than the engines differ.
README.md says what each figure means.
"""

import argparse
import importlib.metadata
import importlib.util
import json
import os
import platform
import statistics
import sys
from collections.abc import Mapping, Sequence
from contextlib import ExitStack
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from tqdm import tqdm

from benchmarks import shapes
from benchmarks.worker import CEILING_KERNEL, GEMM_SHAPES, GEMV_2BIT, GENERATOR, Worker, gemm_metric
from bitdistill_core.engine.kernels import available_kernels, resolve_kernel
from bitdistill_core.packing import FORMAT_VERSION

ENGINE, KERNELS = "engine", "kernels"
PEERS = {"torch": "torch", "llamacpp": "llama_cpp"}  # name to module
GEMM_USES = dict(zip(GEMM_SHAPES, (2, 1, 1), strict=True))  # a layer of Qwen3-0.6B: gate and up; down; q
QUIET_SHARE = 0.06  # of all cores, taken by other processes
MIB = 1024 * 1024
FIRST_TOKEN, UNWARMED_FIRST_TOKEN = "load_to_first_token_seconds", "unwarmed_load_to_first_token_seconds"

Figures = dict[str, dict[str, list[float]]]  # configuration, metric, values by round


@dataclass(frozen=True)
class Test:
    """One timed task."""

    task: str
    sequences: int
    tokens: int
    name: str

    @property
    def metric(self) -> str:
        return f"{self.name}_tokens_per_second"


PREFILL_128 = Test("prefill", 1, 128, "prefill128")
PREFILL_512 = Test("prefill", 1, 512, "prefill512")
DECODE = Test("generate", 1, 64, "decode")
CLASSIFY = Test("classify", 32, 64, "classify_b32")
ALL_TESTS = (PREFILL_128, PREFILL_512, DECODE, CLASSIFY)


@dataclass(frozen=True)
class Configuration:
    """One engine with one model: a worker process and what it is asked for."""

    name: str
    kind: str  # of worker
    source: str
    tests: tuple[Test, ...]
    max_rounds: int | None = None  # of a peer too slow for all of them
    is_file: bool = True

    def fresh_tests(self, number: int) -> tuple[Test, ...]:
        """What to run in new processes in round `number`, for memory and time to first token; peers do it once."""
        if not self.is_file or (number > 0 and self.name != ENGINE):
            return ()
        return tuple(test for test in (DECODE, CLASSIFY) if test in self.tests)


def configurations(name: str, peers: Sequence[str], cache_dir: Path, num_threads: int) -> list[Configuration]:
    """The engine and the peers asked for, with their files written."""
    found = [Configuration(ENGINE, "engine", str(shapes.packed_file(cache_dir, name)), ALL_TESTS)]
    found.append(Configuration(KERNELS, "kernels", "-", (), is_file=False))
    if "llamacpp" in peers:
        for gguf_type in _gguf_types(name):
            tests = ALL_TESTS if gguf_type in ("f16", "tq2_0") else (PREFILL_128, PREFILL_512, DECODE)
            path = shapes.gguf_file(cache_dir, name, gguf_type, num_threads)
            found.append(Configuration(f"llamacpp_{gguf_type}", "llamacpp", str(path), tests))
    if "torch" in peers:
        tests = (PREFILL_128, PREFILL_512, DECODE)
        found.append(Configuration("torch_f32", "torch", f"{name}:float32", tests, is_file=False))
        short = (PREFILL_128, Test("generate", 1, 16, DECODE.name))
        found.append(Configuration("torch_bf16", "torch", f"{name}:bfloat16", short, 1, is_file=False))
    return found


def _gguf_types(name: str) -> list[str]:
    sizes = (shapes.SHAPES[name]["hidden_size"], shapes.SHAPES[name]["intermediate_size"])
    fits = all(size % shapes.SUPER_BLOCK == 0 for size in sizes)
    return [key for key, gguf_type in shapes.GGUF_TYPES.items() if fits or not gguf_type.needs_super_blocks]


def measure(found: Sequence[Configuration], *, num_rounds: int, num_threads: int) -> Figures:
    """Interleaved rounds. A worker starts at its first round and ends after its last; it sleeps between."""
    figures: Figures = {configuration.name: {} for configuration in found}
    with ExitStack() as stack, tqdm(total=num_rounds * len(found), unit="run", file=sys.stderr) as progress:
        workers: dict[str, Worker] = {}
        for number in range(num_rounds):
            shift = number % len(found)
            for configuration in (*found[shift:], *found[:shift]):
                progress.set_description(f"round {number + 1}: {configuration.name}")
                last_round = min(num_rounds, configuration.max_rounds or num_rounds) - 1
                if number <= last_round:
                    if configuration.name not in workers:
                        worker = Worker(configuration.kind, configuration.source, num_threads)
                        workers[configuration.name] = stack.enter_context(worker)
                    values = _round(configuration, workers[configuration.name], is_first=number == 0)
                    for test in configuration.fresh_tests(number):
                        values |= _fresh(configuration, test, num_threads)
                    for metric, value in values.items():
                        figures[configuration.name].setdefault(metric, []).append(value)
                if number == last_round:
                    workers[configuration.name].close()
                progress.update()
    return figures


def _round(configuration: Configuration, worker: Worker, *, is_first: bool) -> dict[str, float]:
    if configuration.kind == "kernels":
        answer = worker.ask("kernels")
        shares, values = [answer], dict(answer["rates"])
    else:
        shares, values = [], {}
        for test in configuration.tests:
            answer = worker.ask(test.task, test.sequences, test.tokens)
            values[test.metric] = test.sequences * test.tokens / answer["seconds"]
            shares.append(answer)
    values["other_cpu_share"] = max(answer["other_cpu_share"] for answer in shares)
    if not is_first:  # since the round before
        values["idle_cpu_share"] = shares[0]["idle_cpu_share"]
    return values


def _fresh(configuration: Configuration, test: Test, num_threads: int) -> dict[str, float]:
    """A new process that does one task: memory that the model and the task add, and time to a first token.

    That is of the second of two processes: the first warms the page cache, and takes back memory that a virtual machine
    has lent to others since a process last used it.
    """
    values: dict[str, float] = {}
    kind = GENERATOR if configuration.kind == "engine" and test is DECODE else configuration.kind
    if test is DECODE:
        with Worker(kind, configuration.source, num_threads) as worker:
            values[UNWARMED_FIRST_TOKEN] = worker.ask(test.task, 1, 1, warm_up=False)["since_load_seconds"]
    with Worker(kind, configuration.source, num_threads) as worker:
        if test is DECODE:
            first = worker.ask(test.task, 1, 1, warm_up=False)
            values[FIRST_TOKEN] = first["since_load_seconds"]
            values["process_start_to_first_token_seconds"] = first["since_start_seconds"]
        answer = worker.ask(test.task, test.sequences, test.tokens, warm_up=False)
    return values | {f"{test.task}_added_rss_mib": answer["added_rss_mib"]}


def ratios(figures: Figures, num_parameters: int) -> dict[str, float]:
    """Medians over rounds: this engine's speed by a peer's (above 1 is faster), its memory by the size in F16."""
    engine, found = figures[ENGINE], {}
    for peer, values in figures.items():
        for test in ALL_TESTS:
            if peer not in (ENGINE, KERNELS) and test.metric in values:
                found[f"{test.name}_vs_{peer}"] = _ratio(engine[test.metric], values[test.metric])
    if kernels := figures.get(KERNELS):
        if ceiling := kernels.get("multiply_add_ceiling_gmac_per_second"):
            found["gemm_vs_ceiling"] = _ratio(_gemm_rates(kernels, CEILING_KERNEL), ceiling)
        found["gemv_vs_bandwidth"] = _ratio(kernels["gemv_gb_per_second"], kernels["read_bandwidth_gb_per_second"])
        if GEMV_2BIT in kernels:
            found["gemv_2bit_vs_bandwidth"] = _ratio(kernels[GEMV_2BIT], kernels["read_bandwidth_gb_per_second"])
    f16_mib = 2 * num_parameters / MIB
    for task in ("classify", "generate"):
        found[f"{task}_rss_vs_f16_size"] = statistics.median(engine[f"{task}_added_rss_mib"]) / f16_mib
    return found


def _ratio(ours: Sequence[float], theirs: Sequence[float]) -> float:
    return statistics.median(our / their for our, their in zip(ours, theirs, strict=False))


def _gemm_rates(kernels: Mapping[str, Sequence[float]], kernel: str) -> list[float]:
    """By round: multiply-adds of all uses by the time they take."""
    work = {gemm_metric(kernel, n, k): uses * n * k for (n, k), uses in GEMM_USES.items()}
    rounds = zip(*(kernels[metric] for metric in work), strict=True)
    return [
        sum(work.values()) / sum(w / rate for w, rate in zip(work.values(), rates, strict=True)) for rates in rounds
    ]


def environment(num_threads: int) -> dict[str, Any]:
    """What the figures depend on besides the code."""
    cpu = dict(line.split(":", 1) for line in Path("/proc/cpuinfo").read_text().split("\n\n")[0].splitlines())
    fields = {key.strip(): value.strip() for key, value in cpu.items()}
    avx512 = ("avx512f", "avx512_vnni", "avx512_vbmi", "avx512_bf16")
    wanted = ("avx2", "fma", "f16c", "avx_vnni", *avx512, "amx_int8", "amx_tile")
    flags = set(fields.get("flags", "").split())
    packages = ("bitdistill", "numpy", "torch", "transformers", "llama-cpp-python", "gguf")
    found: dict[str, Any] = {
        "cpu": fields.get("model name", platform.processor()),
        "cpu_family_model": f"{fields.get('cpu family')}/{fields.get('model')}",
        "cpu_flags": [flag for flag in wanted if flag in flags],
        "cores": os.cpu_count(),
        "threads": num_threads,
        "memory_mib": round(os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE") / MIB),
        "load_average_at_start": os.getloadavg()[0],
        "kernel": resolve_kernel(None),
        "available_kernels": available_kernels(),
        "system": f"{platform.system()} {platform.machine()}",
        "python": platform.python_version(),
        "packages": {name: version for name in packages if (version := _version(name))},
    }
    if importlib.util.find_spec("llama_cpp"):
        found["llamacpp_build"] = shapes.llama_library().llama_print_system_info().decode().strip()
    return found


def _version(package: str) -> str | None:
    try:
        return importlib.metadata.version(package)
    except importlib.metadata.PackageNotFoundError:
        return None


def run(name: str, *, peers: Sequence[str], num_rounds: int, num_threads: int, cache_dir: Path) -> dict[str, Any]:
    """Everything the command measures, as it is written to the JSON file."""
    installed = [peer for peer in peers if importlib.util.find_spec(PEERS[peer])]
    skipped = [f"{peer} was not asked for: no figures of it" for peer in PEERS if peer not in peers]
    skipped += [f"{peer} is not installed: no figures of it" for peer in peers if peer not in installed]
    if "llamacpp" in installed and len(_gguf_types(name)) < len(shapes.GGUF_TYPES):
        left_out = ", ".join(key for key in shapes.GGUF_TYPES if key not in _gguf_types(name))
        skipped.append(
            f"llamacpp {left_out} need rows of a multiple of {shapes.SUPER_BLOCK} weights: no figures of them"
        )
    for line in skipped:
        _say(line)
    _say(f"models in {shapes.folder(cache_dir, name)}; the first time they are written, which takes minutes")
    surroundings = environment(num_threads)
    surroundings["packed_format"] = FORMAT_VERSION
    surroundings["code_bits"] = shapes.code_bits(name, surroundings["kernel"])
    found = configurations(name, installed, cache_dir, num_threads)
    files = {configuration.name: Path(configuration.source) for configuration in found if configuration.is_file}
    for path in files.values():
        _read_through(path)
    figures = measure(found, num_rounds=num_rounds, num_threads=num_threads)
    num_parameters = shapes.num_parameters(name)
    medians = {key: statistics.median(values) for key, values in figures[ENGINE].items()}
    return {
        "ratios": ratios(figures, num_parameters),
        FIRST_TOKEN: medians[FIRST_TOKEN],
        UNWARMED_FIRST_TOKEN: medians[UNWARMED_FIRST_TOKEN],
        "process_start_to_first_token_seconds": medians["process_start_to_first_token_seconds"],
        "added_rss_mib": {task: medians[f"{task}_added_rss_mib"] for task in ("classify", "generate")},
        "file_bytes": {key: path.stat().st_size for key, path in files.items()},
        "f16_bytes": 2 * num_parameters,
        "figures": figures,
        "environment": surroundings,
        "shapes": name,
        "num_parameters": num_parameters,
        "rounds": num_rounds,
        "skipped": skipped,
    }


def _read_through(path: Path) -> None:
    """Puts a file into the page cache."""
    with open(path, "rb") as file:
        while file.read(8 * MIB):
            pass


def _say(line: str) -> None:
    print(line, file=sys.stderr, flush=True)


def _table(result: Mapping[str, Any]) -> None:
    _say(f"{'median tokens/s':<20}" + "".join(f"{test.name:>14}" for test in ALL_TESTS) + f"{'file MiB':>12}")
    for name, values in result["figures"].items():
        if name != KERNELS:
            speeds = [statistics.median(values[test.metric]) if test.metric in values else None for test in ALL_TESTS]
            file_mib = result["file_bytes"][name] / MIB if name in result["file_bytes"] else None
            _say(f"{name:<20}" + "".join(f"{_cell(speed):>14}" for speed in speeds) + f"{_cell(file_mib):>12}")
    shares = [share for values in result["figures"].values() for share in values["other_cpu_share"]]
    if noisy := sum(share > QUIET_SHARE for share in shares):
        _say(
            f"{noisy} of {len(shares)} samples ran while other processes took over {QUIET_SHARE:.0%} of the cores; "
            "for figures to quote, measure again on a quiet machine"
        )


def _cell(value: float | None) -> str:
    return "-" if value is None else f"{value:.1f}"


def main(argv: Sequence[str] | None = None) -> None:
    parser = argparse.ArgumentParser(
        prog="python -m benchmarks.engine",
        description="Measures the engine beside llama.cpp and PyTorch on this CPU; benchmarks/README.md explains.",
    )
    cores = len(os.sched_getaffinity(0))
    default_cache = Path("~/.cache/bitdistill/benchmarks").expanduser()
    parser.add_argument("--shapes", choices=shapes.SHAPES, default="qwen3-0.6b", help="model (default: %(default)s)")
    parser.add_argument("--peers", default="torch,llamacpp", help="comma list, or none (default: %(default)s)")
    parser.add_argument("--json", type=Path, help="file for every figure")
    parser.add_argument("--threads", type=int, default=cores, help="of each engine (default: every core, %(default)s)")
    parser.add_argument("--rounds", type=int, default=5, help="(default: %(default)s)")
    parser.add_argument("--cache", type=Path, default=default_cache, help="folder of the models (default: %(default)s)")
    arguments = parser.parse_args(argv)
    peers = [] if arguments.peers == "none" else arguments.peers.split(",")
    if unknown := [peer for peer in peers if peer not in PEERS]:
        parser.error(f"--peers takes {', '.join(PEERS)} or none; got {', '.join(unknown)}")
    if arguments.rounds < 1 or not 1 <= arguments.threads <= cores:
        parser.error(
            f"--rounds needs 1 or more and --threads 1 to {cores}; got {arguments.rounds}, {arguments.threads}"
        )
    try:
        result = run(
            arguments.shapes,
            peers=peers,
            num_rounds=arguments.rounds,
            num_threads=arguments.threads,
            cache_dir=arguments.cache,
        )
    except ValueError as error:
        sys.exit(f"error: {error}")
    if arguments.json:
        arguments.json.write_text(json.dumps(result, indent=1) + "\n")
    _table(result)
    print(json.dumps(result["ratios"]))


if __name__ == "__main__":
    main()
