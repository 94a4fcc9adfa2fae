"""Stage `benchmark`: the packed models against the teacher in PyTorch, same prompt and threads.

Writes benchmark.json.
"""

import json
import os
import platform
from dataclasses import asdict, dataclass
from pathlib import Path

import pyarrow.parquet as pq
import torch
import transformers

from bitdistill_core import checkpoint, latency
from bitdistill_core.config import BenchmarkConfig
from bitdistill_core.data import encode_prompt
from bitdistill_core.engine.model import Engine
from bitdistill_core.manifest import Metrics, Report
from bitdistill_core.packing import PACKED_FILE
from bitdistill_core.progress import progress_bar
from bitdistill_core.stages.data import examples_path, read_eval_splits


@dataclass(frozen=True)
class Inputs:
    """Stage directories."""

    teacher: Path
    bitnet_sft: Path
    bitdistill: Path
    data: Path


def run(
    config: BenchmarkConfig, inputs: Inputs, *, out_dir: Path, work_dir: Path, report: Report, device: torch.device
) -> Metrics:
    """Measures on the CPU whatever `device` is. Threads are those that PyTorch was given."""
    num_threads = torch.get_num_threads()
    packed = {"bitnet_sft": inputs.bitnet_sft / PACKED_FILE, "bitdistill": inputs.bitdistill / PACKED_FILE}
    load_before = os.getloadavg()[0]
    with progress_bar("benchmark", total=config.warmup_rounds + config.num_rounds, unit="round") as bar:
        timings = latency.measure(
            {"fp16_sft": inputs.teacher, **packed},
            prompt_ids=_prompt(inputs, config.prompt_tokens, config.new_tokens),
            new_tokens=config.new_tokens,
            num_rounds=config.num_rounds,
            warmup_rounds=config.warmup_rounds,
            num_threads=num_threads,
            on_round=bar.update,
        )
    engine = Engine.load(packed["bitdistill"], num_threads=num_threads)
    rows = []
    for method, timing in timings.items():
        is_packed = method in packed
        size = packed[method].stat().st_size if is_packed else _fp16_bytes(inputs.teacher)
        engine_name = f"bitdistill {engine.kernel}" if is_packed else "pytorch float32"
        rows.append({"method": method, "engine": engine_name, "file_mib": size / 2**20, **asdict(timing)})
    environment = {
        "cpu": _cpu_name(),
        "num_threads": num_threads,
        "num_cores": os.cpu_count(),
        "kernel": engine.kernel,
        "torch": torch.__version__,
        "transformers": transformers.__version__,
        "python": platform.python_version(),
        "load_average_before": round(load_before, 2),
    }
    content = {
        "environment": environment,
        "prompt_tokens": config.prompt_tokens,
        "new_tokens": config.new_tokens,
        "num_rounds": config.num_rounds,
        "rows": rows,
    }
    (out_dir / "benchmark.json").write_text(json.dumps(content, indent=1) + "\n")
    metrics = {
        f"benchmark/{row['method']}/{name}": float(row[name])
        for row in rows
        for name in ("prefill_tokens_per_second", "decode_tokens_per_second", "ttft_ms", "peak_rss_mib", "file_mib")
    }
    report(metrics, 0)
    return metrics


def _prompt(inputs: Inputs, num_tokens: int, new_tokens: int) -> list[int]:
    """Token ids of real prompts, joined until there are `num_tokens`."""
    tokenizer = checkpoint.load_tokenizer(inputs.teacher)
    config = json.loads((inputs.teacher / "config.json").read_text())
    if num_tokens + new_tokens > config["max_position_embeddings"]:
        raise ValueError(
            "benchmark.prompt_tokens and new_tokens must fit the model's window; got "
            f"prompt_tokens={num_tokens}, new_tokens={new_tokens}, window={config['max_position_embeddings']}"
        )
    split = read_eval_splits(inputs.data)[0]
    prompts = pq.read_table(examples_path(inputs.data, split), columns=["prompt"])["prompt"].to_pylist()
    ids: list[int] = []
    while len(ids) < num_tokens:
        for prompt in prompts:
            ids += encode_prompt(tokenizer, prompt)
            if len(ids) >= num_tokens:
                break
    return ids[:num_tokens]


def _fp16_bytes(checkpoint_dir: Path) -> int:
    """Size of the weights at 16 bits; the checkpoint holds 32."""
    return (checkpoint_dir / checkpoint.WEIGHTS).stat().st_size // 2


def _cpu_name() -> str:
    for line in Path("/proc/cpuinfo").read_text().splitlines():
        if line.startswith("model name"):
            return line.partition(":")[2].strip()
    return platform.processor()
