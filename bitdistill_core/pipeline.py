"""The graph of a conversion: which stage feeds which. `bitdistill stage`, the Prefect flow and dvc.yaml all follow it.

Not for deciding what is up to date (manifest.py) or when to run (flows/).
"""

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from types import ModuleType
from typing import Any

import torch

from bitdistill_core import checkpoint
from bitdistill_core.config import Params
from bitdistill_core.engine.config import engine_config
from bitdistill_core.manifest import Report, Result, discard, execute
from bitdistill_core.packing import FORMAT_VERSION
from bitdistill_core.runtime import prepare_runtime
from bitdistill_core.stages import (
    base,
    benchmark,
    bitnet_sft,
    data,
    distill,
    evaluate,
    pack,
    pretrain,
    report,
    stage_sources,
    surgery,
    teacher,
)
from bitdistill_core.stages.fit import require_fit


@dataclass(frozen=True)
class Node:
    """One run of a stage. `inputs` maps a field of the stage's Inputs to the node that makes it."""

    name: str  # STAGE or STAGE@METHOD
    stage: ModuleType
    inputs: Mapping[str, str]

    @property
    def section(self) -> str:
        """The section of params.yaml that the stage reads."""
        return self.name.partition("@")[0]

    @property
    def reads_metrics(self) -> bool:
        """Whether the stage reads what others reported, not only what they wrote."""
        return self.name == "report"

    def directory(self, run_dir: Path) -> Path:
        """Where its result lies: STAGE/ or STAGE/METHOD/ below the run."""
        return run_dir / self.name.replace("@", "/")


NODES = (
    Node("data", data, {}),
    Node("base", base, {"data": "data"}),
    Node("teacher", teacher, {"model": "base", "data": "data"}),
    Node("surgery", surgery, {"model": "base", "data": "data"}),
    Node("pretrain", pretrain, {"student": "surgery", "base": "base", "data": "data"}),
    Node("distill", distill, {"student": "pretrain", "teacher": "teacher", "data": "data"}),
    Node("bitnet_sft", bitnet_sft, {"model": "base", "data": "data"}),
    Node("pack@bitnet_sft", pack, {"student": "bitnet_sft", "data": "data"}),
    Node("pack@bitdistill", pack, {"student": "distill", "data": "data"}),
    Node("evaluate@fp16_sft", evaluate, {"model": "teacher", "data": "data"}),
    Node("evaluate@bitnet_sft", evaluate, {"model": "bitnet_sft", "data": "data"}),
    Node("evaluate@bitdistill", evaluate, {"model": "distill", "data": "data"}),
    Node("evaluate@bitnet_sft_packed", evaluate, {"model": "pack@bitnet_sft", "data": "data"}),
    Node("evaluate@bitdistill_packed", evaluate, {"model": "pack@bitdistill", "data": "data"}),
    Node(
        "benchmark",
        benchmark,
        {"teacher": "teacher", "bitnet_sft": "pack@bitnet_sft", "bitdistill": "pack@bitdistill", "data": "data"},
    ),
    Node(
        "report",
        report,
        {
            "data": "data",
            "base": "base",
            "teacher": "teacher",
            "surgery": "surgery",
            "pretrain": "pretrain",
            "distill": "distill",
            "bitnet_sft": "bitnet_sft",
            "pack_bitnet_sft": "pack@bitnet_sft",
            "pack_bitdistill": "pack@bitdistill",
            "evaluate_fp16_sft": "evaluate@fp16_sft",
            "evaluate_bitnet_sft": "evaluate@bitnet_sft",
            "evaluate_bitdistill": "evaluate@bitdistill",
            "evaluate_bitnet_sft_packed": "evaluate@bitnet_sft_packed",
            "evaluate_bitdistill_packed": "evaluate@bitdistill_packed",
            "benchmark": "benchmark",
        },
    ),
)


def find_node(name: str) -> Node:
    """The node of that name. Raises ValueError that lists all names."""
    for node in NODES:
        if node.name == name:
            return node
    raise ValueError(f"unknown stage={name}; the stages are {', '.join(node.name for node in NODES)}")


def require_sources(params: Params) -> None:
    """Raises ValueError for files of the data or of the base model that are not there."""
    for node in NODES:
        stage_sources(node.stage, getattr(params, node.section))


def _depends_on(node: Node) -> dict[str, Any]:
    """What else than parameters, inputs and version makes another result of a stage."""
    if node.stage is pack:
        return {"format_version": FORMAT_VERSION}
    return {"num_threads": torch.get_num_threads()} if node.stage is benchmark else {}


def run_node(node: Node, params: Params, run_dir: Path, *, report: Report = discard) -> Result:
    """Runs one stage of a run, or finds it up to date. Its inputs must be finished."""
    by_name = {other.name: other for other in NODES}
    inputs = node.stage.Inputs(**{field: by_name[source].directory(run_dir) for field, source in node.inputs.items()})
    config = getattr(params, node.section)
    device = prepare_runtime(params.runtime)
    result = execute(
        node.name,
        node.stage.run,
        config,
        inputs,
        directory=node.directory(run_dir),
        work_root=run_dir / ".work" / node.name,
        input_roots=[run_dir / ".work" / source for source in node.inputs.values()],
        sources=stage_sources(node.stage, config),
        reads_metrics=node.reads_metrics,
        depends_on=_depends_on(node),
        report=report,
        device=device,
    )
    if node.stage is base:
        require_fit(params, result.directory, data_dir=inputs.data)
        require_packable(params, result.directory)
    return result


def require_packable(params: Params, base_dir: Path) -> None:
    """Raises ValueError for a base model whose student the engine cannot run."""
    record = {"subln": params.surgery.subln, "sub_norm_eps": params.surgery.sub_norm_eps}
    engine_config(checkpoint.read_config(base_dir).to_dict() | {"bitdistill": record})
