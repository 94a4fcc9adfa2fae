"""The speed and memory columns of table 1: each model in PyTorch float32 beside its packed student, on this CPU.

Speed depends on shapes, not on what was learnt, so the student is the base after surgery, packed.
"""

import json
import os
from collections.abc import Mapping
from dataclasses import asdict
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import torch

from bitdistill_core import checkpoint, latency
from bitdistill_core.disk import write_text
from bitdistill_core.stages.training import round_embeddings
from bitdistill_core.surgery import operate
from bitdistill_core.tables.cell import chain
from bitdistill_core.tables.plan import Cell, Plan

SPEED = "speed.json"
COLUMNS = (
    "model", "engine", "prefill_tokens_per_second", "decode_tokens_per_second", "prefill_ratio", "decode_ratio",
    "file_mib", "memory_mib", "fp16_mib",
)  # fmt: skip


def measure_speed(plan: Plan, *, store: Path, results: Path) -> dict[str, dict[str, Any]]:
    """Measures the models of group table1 that results/speed.json lacks, or has of another base or setting. By model.

    Models whose base is not in the store stay as they are. Rounds of the two engines are interleaved.
    """
    from bitdistill_core.packing import FORMAT_VERSION  # a machine that only trains has no native extension

    path, found = results / SPEED, read_speed(results)
    group = plan.scale.groups.get("table1")
    if group is None:
        return found
    for name in group.models:
        last = chain(plan, Cell(name, group.tasks[0], "bitdistill", plan.scale.seeds[0]))
        step = next(step for step in last.before() if step.name == "base")
        base = step.directory(store)
        settings = {**plan.defaults["benchmark"], "encoding": plan.defaults["pack"]["encoding"]}
        made_from = {"base": step.recipe, "format": FORMAT_VERSION, **settings}
        if found.get(name, {}).get("made_from") != made_from and (base / checkpoint.WEIGHTS).is_file():
            found[name] = {**_measure(plan, base), "made_from": made_from}
            results.mkdir(parents=True, exist_ok=True)
            write_text(path, json.dumps(found, indent=1) + "\n")
    return found


def read_speed(results: Path) -> dict[str, dict[str, Any]]:
    """What results/speed.json holds, by model; nothing where it is not there. Raises ValueError if it is unreadable."""
    path = results / SPEED
    try:
        found: dict[str, dict[str, Any]] = json.loads(path.read_text()) if path.is_file() else {}
    except ValueError as error:
        raise ValueError(f"unreadable result path={path}: {error}; delete it, speed is measured again") from None
    return found


def speed_rows(found: Mapping[str, Mapping[str, Any]]) -> list[list[Any]]:
    """One row a model and engine, as in COLUMNS; ratios are to PyTorch in the same rounds."""
    rows = []
    for model, measured in found.items():
        dense = measured["pytorch"]
        for engine in ("pytorch", "packed"):
            own = measured[engine]
            prefill, decode = own["prefill_tokens_per_second"], own["decode_tokens_per_second"]
            rows.append([
                model,
                "PyTorch float32" if engine == "pytorch" else f"BitDistill {measured['kernel']}",
                round(prefill),
                round(decode),
                f"{prefill / dense['prefill_tokens_per_second']:.1f}",
                f"{decode / dense['decode_tokens_per_second']:.1f}",
                f"{own['file_mib']:.2f}",
                f"{own['added_rss_mib']:.1f}",
                f"{measured['fp16_mib']:.2f}",
            ])  # fmt: skip
    return rows


def _measure(plan: Plan, base: Path) -> dict[str, Any]:
    from bitdistill_core.engine.model import Engine
    from bitdistill_core.packing import PACKED_FILE
    from bitdistill_core.stages.pack import pack_model

    model, tokenizer = checkpoint.load_model(base)
    fp16_mib = sum(p.numel() for p in model.parameters()) * 2 / 2**20
    window = int(model.config.max_position_embeddings)
    operate(model, subln="output", sub_norm_eps=1e-6)
    round_embeddings(model)
    settings = plan.defaults["benchmark"]
    prompt_tokens = min(settings["prompt_tokens"], window - settings["new_tokens"])
    with TemporaryDirectory() as directory:
        packed = Path(directory) / PACKED_FILE
        tokenizer_json, encoding = tokenizer.backend_tokenizer.to_str().encode(), plan.defaults["pack"]["encoding"]
        pack_model(model, tokenizer_json, packed, task={"name": "none"}, encoding=encoding)
        del model
        threads = torch.get_num_threads()
        timings = latency.measure(
            {"pytorch": base, "packed": packed},
            prompt_ids=[i % 1000 + 10 for i in range(prompt_tokens)],
            new_tokens=settings["new_tokens"],
            num_rounds=settings["num_rounds"],
            warmup_rounds=settings["warmup_rounds"],
            num_threads=threads,
        )
        file_mib = packed.stat().st_size / 2**20
        kernel = Engine.load(packed, num_threads=threads).kernel
    return {
        "pytorch": {**asdict(timings["pytorch"]), "file_mib": (base / checkpoint.WEIGHTS).stat().st_size / 2**20},
        "packed": {**asdict(timings["packed"]), "file_mib": file_mib},
        "fp16_mib": fp16_mib,
        "kernel": kernel,
        "prompt_tokens": prompt_tokens,
        "num_threads": threads,
        "load_average": os.getloadavg()[0],
    }
