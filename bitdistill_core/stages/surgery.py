"""Stage 1 of BitDistill, `surgery`: the base model with SubLN and BitLinear. Writes the student and surgery.json."""

import json
from dataclasses import asdict, dataclass
from pathlib import Path

import torch

from bitdistill_core import checkpoint
from bitdistill_core.config import SurgeryConfig
from bitdistill_core.manifest import Metrics, Report
from bitdistill_core.surgery import operate


@dataclass(frozen=True)
class Inputs:
    """Stage directories."""

    model: Path


def run(
    config: SurgeryConfig, inputs: Inputs, *, out_dir: Path, work_dir: Path, report: Report, device: torch.device
) -> Metrics:
    """Writes a student checkpoint and surgery.json, the list of every module changed."""
    model, tokenizer = checkpoint.load_model(inputs.model)
    changes = operate(model, **config.model_dump())
    model.config.bitdistill = config.model_dump()
    checkpoint.save_model(model, tokenizer, out_dir)
    (out_dir / "surgery.json").write_text(json.dumps([asdict(c) for c in changes], indent=1) + "\n")
    metrics = {
        "surgery/num_bit_linears": float(len(changes)),
        "surgery/num_sub_norms": float(sum(c.has_sub_norm for c in changes)),
        "surgery/num_ternary_weights": float(sum(c.in_features * c.out_features for c in changes)),
    }
    report(metrics, 0)
    return metrics
