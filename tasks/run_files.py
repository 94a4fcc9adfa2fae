"""The finished stages of a run directory, for whoever copies them elsewhere."""

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from bitdistill_core.config import Params
from bitdistill_core.manifest import MANIFEST, decisive, digest_inputs, read_outputs
from bitdistill_core.pipeline import NODES, Node


def section_of(node: Node, params: Params) -> dict[str, Any]:
    """The parameters of a stage as its manifest holds them."""
    section: dict[str, Any] = getattr(params, node.section).model_dump(mode="json")
    return section


def read_unchecked(directory: Path) -> dict[str, Any]:
    """The manifest of a finished stage, without checking its files."""
    manifest: dict[str, Any] = json.loads((directory / MANIFEST).read_text())
    return manifest


def end_time(manifest: Mapping[str, Any]) -> float:
    """When the stage ended, in seconds since the epoch."""
    return float(manifest["ended"])


def is_finished(node: Node, run_dir: Path) -> bool:
    """Whether the stage has finished, with whatever parameters."""
    return (node.directory(run_dir) / MANIFEST).is_file()


def is_whole(run_dir: Path, params: Params) -> bool:
    """Whether every stage is finished and all belong together."""
    is_there = all(is_finished(node, run_dir) for node in NODES)
    return is_there and len(current_manifests(run_dir, params)) == len(NODES)


def current_manifests(run_dir: Path, params: Params) -> dict[str, dict[str, Any]]:
    """Manifests of the stages that belong together: made with these parameters, from the inputs that are there.

    Raises:
        ValueError: a file of such a stage is missing or changed.
    """
    outputs: dict[str, dict[str, str]] = {}
    current: dict[str, dict[str, Any]] = {}
    for node in NODES:
        directory = node.directory(run_dir)
        if not is_finished(node, run_dir) or not set(node.inputs.values()) <= set(current):
            continue
        manifest = read_unchecked(directory)
        outputs_of = {field: outputs[source] for field, source in node.inputs.items()}
        inputs = digest_inputs(node.stage.Inputs, outputs_of, reads_metrics=node.reads_metrics)
        if manifest["inputs"] == inputs and decisive(manifest["config"]) == decisive(section_of(node, params)):
            current[node.name] = manifest
            outputs[node.name] = read_outputs(directory)
    return current
