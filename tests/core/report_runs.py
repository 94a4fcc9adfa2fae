"""Finished runs for the report: small and made up."""

import json
import math
from dataclasses import asdict
from pathlib import Path
from typing import Any

import numpy as np
import torch
from safetensors.torch import save_file

from bitdistill_core import pipeline
from bitdistill_core.quantize.weight import WeightQuantizer
from bitdistill_core.stages import report

MODULES = ["model.layers.0.self_attn.q_proj", "model.layers.0.mlp.down_proj"]
RECORD = {"subln": "none", "sub_norm_eps": 1e-6, "quantizer": asdict(WeightQuantizer())}
METHODS = ("fp16_sft", "bitnet_sft", "bitdistill")
NUM_EXAMPLES = 200


def write_json(path: Path, value: Any) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(json.dumps(value))


def write_lines(path: Path, lines: list[dict[str, Any]]) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text("".join(json.dumps(line) + "\n" for line in lines))


def finish(directory: Path, seconds: float, metrics: dict[str, float], **config: Any) -> None:
    write_json(directory / "metrics.json", metrics)
    write_json(directory / "manifest.json", {"config": config, "seconds": seconds, "started": 1.7e9, "outputs": {}})


def wrong_examples(method: str) -> set[int]:
    """Which examples a method gets wrong. The packed BitNet-SFT errs on one more than its student."""
    wrong = {"fp16_sft": range(20), "bitnet_sft": range(60), "bitdistill": range(10, 36)}
    return set(wrong[method.removesuffix("_packed")]) | ({150} if method == "bitnet_sft_packed" else set())


def write_evaluation(directory: Path, method: str) -> None:
    wrong = wrong_examples(method)
    accuracy = 1 - len(wrong) / NUM_EXAMPLES
    interval = {"ci_low": accuracy - 0.06, "ci_high": accuracy + 0.04}
    numbers = {"metrics": {"accuracy": accuracy}, "num_examples": NUM_EXAMPLES, **interval}
    splits = ["test", "validation"]
    content = {"task": "sst2", "split_order": splits, "splits": dict.fromkeys(splits, numbers)}
    write_json(directory / "results.json", content)
    lines = [{"index": i, "label": i % 2, "prediction": (i + (i in wrong)) % 2} for i in range(NUM_EXAMPLES)]
    for split in splits:
        write_lines(directory / f"predictions-{split}.jsonl", lines)
    finish(directory, 5.0, {}, batch_size=32)


def write_generation(directory: Path, method: str) -> None:
    base = {"fp16_sft": 40.0, "bitnet_sft": 30.0, "bitdistill": 39.0}[method.removesuffix("_packed")]
    metrics = {"rouge1": base, "rouge2": base / 2, "rougeL": base * 0.7, "rougeLsum": base * 0.9, "bleu": base / 3}
    numbers = {"metrics": metrics, "num_examples": 2, "ci_low": None, "ci_high": None}
    content = {"task": "cnn_dailymail", "split_order": ["test"], "splits": {"test": numbers}}
    write_json(directory / "results.json", content)
    texts = ("a", "b <i>" if method == "bitdistill_packed" else "b")
    lines = [{"index": i, "prediction": text, "reference": "a"} for i, text in enumerate(texts)]
    write_lines(directory / "predictions-test.jsonl", lines)
    finish(directory, 5.0, {}, batch_size=32)


def write_training(run: Path, stage: str, parts: tuple[str, ...], num_steps: int = 60) -> None:
    random = np.random.default_rng(len(stage))
    lines = []
    for step in range(10, num_steps + 1, 10):
        values = {part: (1 + i) * math.exp(-step / 40) + 0.1 * random.random() for i, part in enumerate(parts)}
        values = {"loss": sum(values.values()), **values, "learning_rate": 1e-3, "grad_norm": 1.0}
        lines.append({"step": step, "time": 1.7e9 + step, **{f"{stage}/{k}": v for k, v in values.items()}})
        if len(parts) > 1:
            norms = {f"{stage}/grad_norm_{part}": 0.5 + i for i, part in enumerate(parts)}
            lines.append({"step": step, "time": 1.7e9 + step, **norms})
    write_lines(run / stage / "metrics.jsonl", lines)
    finish(run / stage, 60.0, {f"{stage}/loss": 0.5}, seed=7)


def write_weights(directory: Path, spread: float) -> None:
    torch.manual_seed(0)
    weights = {f"{module}.weight": torch.randn(32, 16) * spread + 0.02 for module in MODULES}
    directory.mkdir(parents=True, exist_ok=True)
    save_file({**weights, "model.embed_tokens.weight": torch.zeros(4, 4)}, directory / "model.safetensors")
    (directory / "config.json").write_text(json.dumps({"bitdistill": RECORD}))


def write_benchmark(directory: Path) -> None:
    rows = []
    for method in METHODS:
        is_packed = method != "fp16_sft"
        size, speed = (25.0, 125.0) if is_packed else (100.0, 50.0)
        memory = {"file_mib": size, "peak_rss_mib": 2 * size, "added_rss_mib": 1.5 * size}
        speeds = {"prefill_tokens_per_second": 10 * speed, "decode_tokens_per_second": speed, "ttft_ms": 12.5}
        spread = {"prefill_spread": [400.0, 1300.0], "decode_spread": [45.0, 130.0]}
        engine = "bitdistill avx2" if is_packed else "pytorch float32"
        rows.append({"method": method, "engine": engine, **memory, **speeds, **spread})
    environment = {"cpu": "Some CPU <script>alert(1)</script>", "num_threads": 2, "kernel": "avx2"}
    write_json(directory / "benchmark.json", {"environment": environment, "prompt_tokens": 128, "rows": rows})
    finish(directory, 30.0, {}, prompt_tokens=128)


def make_run(run: Path, *, is_generation: bool = False, has_pretrain: bool = True) -> report.Inputs:
    """A finished run's directories, small and made up."""
    floors = {} if is_generation else {"data/majority_accuracy": 0.5, "data/naive_bayes_accuracy": 0.75}
    finish(run / "data", 1.0, {"data/num_examples_train": 1000.0, "data/num_documents": 50.0, **floors}, task="sst2")
    for stage in ("base", "teacher", "bitnet_sft"):
        write_training(run, stage, ("task_loss",))
    write_json(run / "base/metrics.json", {"base/num_parameters": 1234567.0})
    write_training(run, "distill", ("task_loss", "logits_kd", "attention_kd"))
    finish(run / "surgery", 0.5, {"surgery/num_ternary_weights": 1024.0}, subln="output")
    changes = [{"module": m, "in_features": 16, "out_features": 32, "has_sub_norm": False} for m in MODULES]
    write_json(run / "surgery/surgery.json", changes)
    finish(run / "pretrain", 60.0, {}, num_tokens=0)
    write_lines(run / "pretrain/metrics.jsonl", [])
    if has_pretrain:
        write_training(run, "pretrain", ("task_loss",))
    for stage, spread in (("surgery", 0.02), ("pretrain", 0.05), ("distill", 0.06)):
        write_weights(run / stage, spread)
    for method in (*METHODS, "bitnet_sft_packed", "bitdistill_packed"):
        (write_generation if is_generation else write_evaluation)(run / "evaluate" / method, method)
    for method in ("bitnet_sft", "bitdistill"):
        finish(run / "pack" / method, 2.0, {"pack/file_mib": 25.0})
    write_benchmark(run / "benchmark")
    nodes = {node.name: node for node in pipeline.NODES}
    return report.Inputs(**{f: nodes[n].directory(run) for f, n in nodes["report"].inputs.items()})
