"""A plan of seconds: a small model trained from nothing on the demo reviews, and a larger one as its teacher."""

from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import pytest
from ruamel.yaml import YAML

from bitdistill_core.params import merged
from bitdistill_core.tables.plan import Plan, read_plan
from tests.conftest import ROOT, TINY

METHODS: dict[str, Any] = {
    "fp16_sft": {"label": "FP16-SFT", "result": "teacher"},
    "ptq": {"label": "after training", "result": "ptq", "params": {"surgery": {"subln": "none"}}},
    "bitnet_sft": {
        "label": "BitNet-SFT",
        "params": {
            "surgery": {"subln": "none"},
            "pretrain": {"num_tokens": 0},
            "distill": {"logits_kd_weight": 0.0, "attention_kd_weight": 0.0},
        },
    },
    "bitdistill": {"label": "BitDistill"},
}


def nested(overrides: dict[str, object]) -> dict[str, Any]:
    """`section.key` -> value as sections."""
    out: dict[str, Any] = {}
    for name, value in overrides.items():
        for key in reversed(name.split(".")):
            value = {key: value}
        out = merged(out, value)  # type: ignore[arg-type]
    return out


SCALE: dict[str, Any] = {
    "description": "A tiny scale",
    "seeds": [0],
    "params": merged(
        nested(TINY),
        {
            "data": {"eval_splits": ["test"]},
            "base": {"scratch": {"num_tokens": 1024}},
            "teacher": {"num_epochs": 0.5, "report_every": 1},
            "pretrain": {"num_tokens": 1024, "report_every": 1},
            "distill": {"num_epochs": 0.5, "report_every": 1},
            "surgery": {"calibration_sequences": 4, "calibration_length": 32},
        },
    ),
    "models": {
        "small": {"label": "Small", "stands_for": "qwen3-0.6b"},
        "large": {"label": "Large", "params": {"base": {"scratch": {"hidden_size": 48}}}},
    },
    "tasks": {"reviews": {"label": "Reviews", "params": {"data": {"task": "review_sentiment"}}}},
    "methods": {},
    "groups": {"table1": {"models": ["small"], "tasks": ["reviews"], "methods": ["fp16_sft", "ptq", "bitdistill"]}},
}


def write_yaml(path: Path, values: object) -> None:
    with path.open("w") as file:
        YAML(pure=True).dump(values, file)


def write_scale(folder: Path, **changes: object) -> Path:
    """Writes {methods,tiny}.yaml with changes of SCALE; returns the folder."""
    folder.mkdir(exist_ok=True)
    write_yaml(folder / "methods.yaml", {"methods": METHODS})
    write_yaml(folder / "tiny.yaml", {**SCALE, **changes})
    return folder


def tiny_plan(folder: Path, **changes: object) -> Plan:
    """The tiny plan with changes of SCALE."""
    return read_plan(write_scale(folder, **changes), "tiny", ROOT / "params.yaml")


@pytest.fixture
def make_plan(tmp_path: Path) -> Callable[..., Plan]:
    """Makes the tiny plan with changes of SCALE."""
    return partial(tiny_plan, tmp_path / "tables")
