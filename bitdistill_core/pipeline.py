"""The graph of a conversion: which stage feeds which. `bitdistill stage`, the Prefect flow and dvc.yaml all follow it.

Not for deciding what is up to date (manifest.py) or when to run (flows/).
"""

import ctypes
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from types import ModuleType

import torch

from bitdistill_core.config import Params, RuntimeConfig
from bitdistill_core.manifest import Report, Result, discard, execute
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
    surgery,
    teacher,
)

_M_TRIM_THRESHOLD, _M_MMAP_MAX = -1, -4  # of glibc's malloc.h


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


def run_node(node: Node, params: Params, run_dir: Path, *, report: Report = discard) -> Result:
    """Runs one stage of a run, or finds it up to date. Its inputs must be finished."""
    by_name = {other.name: other for other in NODES}
    inputs = node.stage.Inputs(**{field: by_name[source].directory(run_dir) for field, source in node.inputs.items()})
    config = getattr(params, node.section)
    # only stages that read files from outside the run say which
    sources = node.stage.sources(config) if hasattr(node.stage, "sources") else ()
    device = prepare_runtime(params.runtime)
    return execute(
        node.name,
        node.stage.run,
        config,
        inputs,
        directory=node.directory(run_dir),
        work_root=run_dir / ".work" / node.name,
        sources=sources,
        report=report,
        device=device,
    )


def prepare_runtime(config: RuntimeConfig) -> torch.device:
    """The device to compute on; sets PyTorch's thread count and the C library's way with memory as side effects.

    Raises:
        ValueError: CUDA was asked for and there is none.
    """
    _keep_freed_memory()
    if config.num_threads:
        torch.set_num_threads(config.num_threads)
    if config.device == "cuda" and not torch.cuda.is_available():
        raise ValueError(
            "runtime.device=cuda needs a CUDA GPU that PyTorch sees; found none; set runtime.device to auto"
        )
    use_cuda = config.device == "cuda" or (config.device == "auto" and torch.cuda.is_available())
    return torch.device("cuda" if use_cuda else "cpu")


def _keep_freed_memory() -> None:
    """Tells glibc to keep large freed blocks instead of giving them back to the system.

    A training step frees and allocates the same tensors again; faulting their pages in anew took a third of the time
    of a step on a CPU. Elsewhere than on glibc nothing happens.
    """
    try:
        libc = ctypes.CDLL("libc.so.6")
        mallopt = libc.mallopt
    except (OSError, AttributeError):
        return
    mallopt(_M_MMAP_MAX, 0)
    mallopt(_M_TRIM_THRESHOLD, 2**31 - 1)
