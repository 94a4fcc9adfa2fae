"""Stage `evaluate`: one model on the task's evaluation splits, through lm-eval.

Works on a dense checkpoint, a student or a packed model, whichever the input directory holds. Writes results.json and
predictions-SPLIT.jsonl.
"""

import json
from dataclasses import dataclass
from pathlib import Path

import torch

from bitdistill_core import checkpoint
from bitdistill_core.config import EvaluateConfig
from bitdistill_core.evaluate import evaluate_split, wilson_interval
from bitdistill_core.manifest import Metrics, Report
from bitdistill_core.packing import PACKED_FILE
from bitdistill_core.scorers import PackedScorer, Scorer, TorchScorer
from bitdistill_core.stages.data import examples_path, read_eval_splits, read_task


@dataclass(frozen=True)
class Inputs:
    """Stage directories."""

    model: Path
    data: Path


def run(
    config: EvaluateConfig, inputs: Inputs, *, out_dir: Path, work_dir: Path, report: Report, device: torch.device
) -> Metrics:
    """Scores every evaluation split. The final metrics are `evaluate/SPLIT/METRIC`."""
    task, eval_splits = read_task(inputs.data), read_eval_splits(inputs.data)
    scorer: Scorer
    if (inputs.model / PACKED_FILE).is_file():
        scorer = PackedScorer(inputs.model / PACKED_FILE)
    else:
        model, tokenizer = checkpoint.load_model(inputs.model)
        scorer = TorchScorer(model, tokenizer, batch_size=config.batch_size, device=device)
    metrics: Metrics = {}
    splits = {}
    for split in eval_splits:
        result = evaluate_split(
            scorer,
            task=task.name,
            is_generation=task.kind == "generation",
            examples=examples_path(inputs.data, split),
            split=split,
            max_new_tokens=config.max_new_tokens,
            kept=work_dir / f"generated-{split}.jsonl",
        )
        low, high = (
            wilson_interval(result.metrics["accuracy"], result.num_examples)
            if "accuracy" in result.metrics
            else (None, None)
        )
        splits[split] = {
            "metrics": result.metrics,
            "num_examples": result.num_examples,
            "ci_low": low,
            "ci_high": high,
        }
        metrics.update({f"evaluate/{split}/{name}": value for name, value in result.metrics.items()})
        lines = (json.dumps(prediction) + "\n" for prediction in result.predictions)
        (out_dir / f"predictions-{split}.jsonl").write_text("".join(lines))
    content = {"task": task.name, "split_order": eval_splits, "splits": splits}
    (out_dir / "results.json").write_text(json.dumps(content, indent=1) + "\n")
    report(metrics, 0)
    return metrics
