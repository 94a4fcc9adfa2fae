"""Stage 1 of BitDistill, `surgery`: the base model with SubLN and BitLinear, calibrated where that is asked for.

Writes the student, surgery.json and, with an initializer, calibration.json.
"""

import json
from dataclasses import asdict, dataclass, field
from pathlib import Path

import numpy as np
import torch
from torch import Tensor, nn
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from bitdistill_core import checkpoint
from bitdistill_core.calibration import calibrate
from bitdistill_core.config import SurgeryConfig
from bitdistill_core.corpus import sample_sequences
from bitdistill_core.manifest import Metrics, Report
from bitdistill_core.quantize.weight import WeightQuantizer
from bitdistill_core.stages.data import examples_path
from bitdistill_core.stages.training import require_window
from bitdistill_core.surgery import operate


@dataclass(frozen=True)
class Inputs:
    """Stage directories."""

    model: Path
    data: Path = field(metadata={"reads": ("corpus/", "examples/train.parquet")})


def run(
    config: SurgeryConfig, inputs: Inputs, *, out_dir: Path, work_dir: Path, report: Report, device: torch.device
) -> Metrics:
    """Writes a student checkpoint and surgery.json, the list of every module changed."""
    model, tokenizer = checkpoint.load_model(inputs.model)
    record = config.model_dump(include={"subln", "sub_norm_eps"})
    changes = operate(model, **record, quantizer=weight_quantizer(config))
    metrics = {
        "surgery/num_bit_linears": float(len(changes)),
        "surgery/num_sub_norms": float(sum(c.has_sub_norm for c in changes)),
        "surgery/num_ternary_weights": float(sum(c.in_features * c.out_features for c in changes)),
    }
    if config.is_calibrated:
        metrics.update(_calibrate(model, tokenizer, config, inputs.data, out_dir, device))
    checkpoint.save_model(model, tokenizer, out_dir)
    (out_dir / "surgery.json").write_text(json.dumps([asdict(c) for c in changes], indent=1) + "\n")
    report(metrics, 0)
    return metrics


def weight_quantizer(config: SurgeryConfig) -> WeightQuantizer:
    """The quantiser that the section describes."""
    is_block = config.weight_granularity == "block"
    return WeightQuantizer(
        config.weight_grid,
        config.weight_granularity,
        block_size=config.weight_block_size if is_block else 0,
        scale_rule=config.weight_scale,
    )


def calibration_ids(config: SurgeryConfig, data: Path, tokenizer: PreTrainedTokenizerBase) -> Tensor:
    """Token ids (calibration_sequences, calibration_length) int64. Raises ValueError for fewer tokens in the texts."""
    is_corpus = config.calibration == "corpus"
    return sample_sequences(
        data / "corpus" if is_corpus else examples_path(data, "train"),
        "text" if is_corpus else "prompt",
        tokenizer,
        num_sequences=config.calibration_sequences,
        length=config.calibration_length,
        seed=config.seed,
    )


def _calibrate(
    model: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase,
    config: SurgeryConfig,
    data: Path,
    out_dir: Path,
    device: torch.device,
) -> Metrics:
    require_window(model.config, config.calibration_length, "surgery.calibration_length")
    input_ids = calibration_ids(config, data, tokenizer)
    nn.Module.to(model, device)
    errors = calibrate(model, input_ids.to(device), subln_gain=config.subln_gain, initializer=config.initializer)
    if not errors:  # gains alone
        return {}
    (out_dir / "calibration.json").write_text(json.dumps([asdict(e) for e in errors], indent=1) + "\n")
    return {
        "surgery/relative_error_before": float(np.mean([e.relative_error_before for e in errors])),
        "surgery/relative_error_after": float(np.mean([e.relative_error_after for e in errors])),
    }
