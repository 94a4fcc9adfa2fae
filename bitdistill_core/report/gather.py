"""What a report needs, read from the stage directories of one run. Computes nothing.

Directories are named as the fields of the report stage's inputs: `distill`, `evaluate_bitdistill_packed`, ...
"""

import json
import re
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from bitdistill_core.report.formatting import PART_LABELS

METHODS = ("fp16_sft", "bitnet_sft", "bitdistill")
PACKED = {"bitnet_sft": "bitnet_sft_packed", "bitdistill": "bitdistill_packed"}
TRAINING_STAGES = ("base", "teacher", "pretrain", "distill", "bitnet_sft")
LOSS_PARTS = tuple(PART_LABELS)

Curve = list[tuple[int, float]]  # (step, value)


@dataclass(frozen=True)
class Evaluation:
    """One method on every split."""

    method: str
    task: str
    split_order: list[str]  # the first one is the headline
    splits: dict[str, dict[str, Any]]  # metrics, num_examples, ci_low, ci_high
    directory: Path

    def predictions(self, split: str) -> dict[int, dict[str, Any]]:
        """The lines of predictions-SPLIT.jsonl by example index."""
        return {int(line["index"]): line for line in _json_lines(self.directory / f"predictions-{split}.jsonl")}


@dataclass(frozen=True)
class Run:
    """Everything that the report shows, as it was written."""

    name: str
    evaluations: dict[str, Evaluation]  # by method, the packed models too
    benchmark: dict[str, Any]
    metrics: dict[str, dict[str, float]]  # final numbers by stage
    losses: dict[str, dict[str, Curve]]  # by training stage and part
    block_errors: dict[str, Curve]  # by stage with block-wise distillation: behind each block, counted from 1
    grad_norms: dict[str, Curve]  # of the distillation loss, by part
    manifests: dict[str, dict[str, Any]]  # by stage, in the order of the inputs
    surgery: list[dict[str, Any]]

    @property
    def profile(self) -> str:
        """The run's name without a trailing -seedN."""
        return re.sub(r"-seed\d+$", "", self.name)

    @property
    def seed(self) -> int:
        """The seed of the distillation."""
        return int(self.manifests["distill"]["config"]["seed"])

    @property
    def headline(self) -> str:
        """The split that the headline numbers come from."""
        return self.evaluations["fp16_sft"].split_order[0]

    @property
    def is_pretrained(self) -> bool:
        """Whether continued pre-training did anything."""
        return bool(self.losses["pretrain"].get("loss")) or "pretrain" in self.block_errors

    @property
    def is_generation(self) -> bool:
        """Whether the task is scored on generated text, not on accuracy."""
        return "accuracy" not in self.evaluations["fp16_sft"].splits[self.headline]["metrics"]

    @property
    def metric_names(self) -> list[str]:
        """The task's metrics: accuracy, or what the generation task reports."""
        metrics = self.evaluations["fp16_sft"].splits[self.headline]["metrics"]
        return list(metrics) if self.is_generation else ["accuracy"]

    def benchmark_row(self, method: str) -> dict[str, Any]:
        """The measured sizes and speeds of a method; empty if it was not measured."""
        rows: list[dict[str, Any]] = self.benchmark.get("rows", [])
        return next((row for row in rows if row.get("method") == method), {})

    def seconds(self) -> dict[str, float]:
        """What each stage took, by stage name."""
        return {name: float(manifest["seconds"]) for name, manifest in self.manifests.items()}


def read_run(directories: Mapping[str, Path]) -> Run:
    """The run that these stage directories belong to.

    Raises:
        ValueError: a missing or unreadable file, or evaluations that do not cover the same splits.
    """
    names = {name: _stage_name(name) for name in directories}
    methods = [name.removeprefix("evaluate_") for name in directories if name.startswith("evaluate_")]
    evaluations = {method: _read_evaluation(directories[f"evaluate_{method}"], method) for method in methods}
    _require_same_splits(evaluations)
    curves = {stage: _read_curves(directories[stage], stage) for stage in TRAINING_STAGES}
    return Run(
        name=directories["data"].resolve().parent.name,
        evaluations=evaluations,
        benchmark=_read_json(directories["benchmark"] / "benchmark.json"),
        metrics={names[name]: _read_json(path / "metrics.json") for name, path in directories.items()},
        losses={stage: {part: curve[part] for part in LOSS_PARTS if part in curve} for stage, curve in curves.items()},
        block_errors={
            stage: [(index + 1, error) for index, (_, error) in enumerate(sorted(dict(errors).items()))]
            for stage in ("pretrain", "distill")
            if (errors := _read_curves(directories[stage], f"{stage}.blockwise").get("block_error"))
        },
        grad_norms={
            part: curves["distill"][f"grad_norm_{part}"]
            for part in LOSS_PARTS
            if f"grad_norm_{part}" in curves["distill"]
        },
        # the digests in a manifest were checked when the stage started; not again for every model
        manifests={names[name]: _read_json(path / "manifest.json") for name, path in directories.items()},
        surgery=_read_json(directories["surgery"] / "surgery.json"),
    )


def _stage_name(field: str) -> str:
    stage, _, method = field.partition("_")
    return f"{stage}@{method}" if stage in ("evaluate", "pack") else field


def _read_evaluation(directory: Path, method: str) -> Evaluation:
    path = directory / "results.json"
    values = _read_json(path)
    missing = [key for key in ("task", "split_order", "splits") if key not in values]
    if missing or not values["split_order"] or set(values["split_order"]) - set(values["splits"]):
        raise ValueError(
            f"an evaluation needs task, split_order and every split's numbers; got missing={missing}, "
            f"split_order={values.get('split_order')} in path={path}; evaluate again"
        )
    return Evaluation(method, values["task"], values["split_order"], values["splits"], directory)


def _require_same_splits(evaluations: Mapping[str, Evaluation]) -> None:
    expected = evaluations["fp16_sft"].split_order
    for method, evaluation in evaluations.items():
        if evaluation.split_order != expected:
            raise ValueError(
                f"every method must be evaluated on the same splits; got {method}={evaluation.split_order}, "
                f"fp16_sft={expected}; evaluate again"
            )


def _read_curves(directory: Path, stage: str) -> dict[str, Curve]:
    """Every metric STAGE/... of metrics.jsonl without its prefix. A stage that reported nothing has none."""
    path = directory / "metrics.jsonl"
    curves: dict[str, Curve] = {}
    for line in _json_lines(path) if path.is_file() else []:
        for name, value in line.items():
            if name.startswith(f"{stage}/"):
                curves.setdefault(name.removeprefix(f"{stage}/"), []).append((int(line["step"]), float(value)))
    return curves


def _read_json(path: Path) -> Any:
    return _parsed(path, _read_text(path))


def _json_lines(path: Path) -> list[dict[str, Any]]:
    return [_parsed(path, line) for line in _read_text(path).splitlines() if line.strip()]


def _read_text(path: Path) -> str:
    try:
        return path.read_text()
    except (OSError, UnicodeDecodeError) as error:
        raise ValueError(f"the report needs path={path}: {type(error).__name__}; run that stage again") from None


def _parsed(path: Path, text: str) -> Any:
    try:
        return json.loads(text)
    except json.JSONDecodeError as error:
        raise ValueError(f"path={path} is not JSON: {error}; run that stage again") from None
