"""Stage `pack`: a student's latent weights as ternary codes, in one file that the CPU engine maps into memory.

Writes model.bitdistill and verifies it: the packed model's logits must be the student's, within float error.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import pyarrow.parquet as pq
import torch
from torch import nn
from transformers import PreTrainedModel

from bitdistill_core import __version__, checkpoint
from bitdistill_core.bitlinear import BitLinear
from bitdistill_core.choices import Encoding
from bitdistill_core.config import PackConfig
from bitdistill_core.data import encode_prompt, end_ids
from bitdistill_core.engine.config import engine_config
from bitdistill_core.engine.model import Engine
from bitdistill_core.losses import head_logits
from bitdistill_core.manifest import Metrics, Report
from bitdistill_core.packing import PACKED_FILE, Int8Rows, TernaryLinear, write_student
from bitdistill_core.quantize.rows import quantize_rows
from bitdistill_core.quantize.weight import quantize_weight
from bitdistill_core.stages.data import examples_path, read_eval_splits, read_task

# Activations within float error of a tie between two INT8 values are rounded apart by engine and PyTorch, as by PyTorch
# with another order of summation: behind 30 blocks 0.02 in the median, 0.06 on single prompts, several times as much
# where the student is hardly trained (docs/LOG.md). So beyond these limits the student's own sensitivity to float error
# is measured, and three times that allowed.
FLOAT_ERROR = 1e-7  # relative, float32
MAX_DRIFT, MAX_DRIFT_OF_A_PROMPT = 0.05, 0.2


@dataclass(frozen=True)
class Inputs:
    """Stage directories."""

    student: Path
    data: Path


def run(
    config: PackConfig, inputs: Inputs, *, out_dir: Path, work_dir: Path, report: Report, device: torch.device
) -> Metrics:
    """Packs the student and compares both on prompts of the first evaluation split.

    Raises:
        ValueError: the directory holds no student, or the packed model disagrees with it.
    """
    student, tokenizer = checkpoint.load_model(inputs.student)
    task = read_task(inputs.data)
    pack_model(
        student,
        tokenizer.backend_tokenizer.to_str().encode(),
        out_dir / PACKED_FILE,
        task={"name": task.name, "kind": task.kind, "prompt": task.prompt, "label_words": task.label_words},
        encoding=config.encoding,
        eos_token_ids=end_ids(student, tokenizer),
    )
    engine = Engine.load(out_dir / PACKED_FILE, num_threads=torch.get_num_threads())
    table = pq.read_table(examples_path(inputs.data, read_eval_splits(inputs.data)[0]), columns=["prompt"])
    prompts = table["prompt"].to_pylist()[: config.verify_examples]
    window = int(student.config.max_position_embeddings)
    tokens = [encode_prompt(tokenizer, prompt) for prompt in prompts]
    for prompt, ids in zip(prompts, tokens, strict=True):
        if engine.prompt_ids(prompt) != ids:
            raise ValueError(
                f"the packed tokenizer encodes prompt={prompt[:60]!r} differently from the student's; "
                "save the base model with a fast tokenizer of transformers"
            )
    tokens = [ids[-window:] for ids in tokens]
    expected = _last_logits(student, tokens)
    got = [engine.logits(ids, last=True)[0] for ids in tokens]
    typical, worst = _drift(got, expected)
    limits = MAX_DRIFT, MAX_DRIFT_OF_A_PROMPT
    if not (typical <= limits[0] and worst <= limits[1]):
        own_typical, own_worst = _drift(_last_logits(_nudged(student), tokens), expected)
        limits = max(limits[0], 3 * own_typical), max(limits[1], 3 * own_worst)
    if not (typical <= limits[0] and worst <= limits[1]):
        raise ValueError(
            f"the packed model drifts from the student: median relative logit error={typical:.4f} (the limit is "
            f"{limits[0]:.4f}), largest={worst:.4f} (the limit is {limits[1]:.4f}) on {len(prompts)} prompts; the "
            "student's embeddings must lie on the INT8 grid, as distill leaves them"
        )
    num_same = sum(int(a.argmax() == b.argmax()) for a, b in zip(got, expected, strict=True))
    info = engine.info()
    num_weights = sum(p.numel() for p in student.parameters())
    metrics = {
        "pack/file_mib": info["file_bytes"] / 2**20,
        "pack/fp16_mib": num_weights * 2 / 2**20,
        "pack/compression": num_weights * 2 / info["file_bytes"],
        "pack/logit_drift": typical,
        "pack/logit_drift_max": worst,
        "pack/same_next_token": num_same / len(prompts),
    }
    metrics.update({f"pack/{part}_mib": size / 2**20 for part, size in info["bytes"].items()})
    report(metrics, 0)
    return metrics


def pack_model(
    student: PreTrainedModel,
    tokenizer_json: bytes,
    path: Path,
    *,
    task: dict[str, object],
    encoding: Encoding,
    eos_token_ids: list[int] | None = None,
) -> None:
    """Quantises the latent weights of `student` and writes the packed file at `path`.

    Args:
        eos_token_ids: tokens that end a generation; None takes those of the student's config.
    Raises:
        ValueError: a dense model, an architecture or option the engine lacks, NaN or infinity in a tensor.
    """
    record = checkpoint.surgery_record(student.config)
    if record is None:
        raise ValueError("packing needs a student; this checkpoint had no surgery; run the surgery stage first")
    linears = {name: _ternary(name, m) for name, m in student.named_modules() if isinstance(m, BitLinear)}
    embeddings = {"model.embed_tokens": _int8(student.get_input_embeddings())}
    if not student.config.tie_word_embeddings:
        embeddings["lm_head"] = _int8(student.get_output_embeddings())
    owned = {id(p) for m in student.modules() if isinstance(m, BitLinear | nn.Embedding) for p in m.parameters()}
    norms = {
        name.removesuffix(".weight"): parameter.detach().float().numpy()
        for name, parameter in student.named_parameters()
        if id(parameter) not in owned and not name.startswith("lm_head.")
    }
    write_student(
        path,
        config=engine_config(student.config.to_dict(), eos_token_ids=eos_token_ids),
        linears=linears,
        embeddings=embeddings,
        norms=norms,
        tokenizer_json=tokenizer_json,
        task=task,
        encoding=encoding,
        created_by=f"bitdistill {__version__}",
    )


def _ternary(name: str, layer: BitLinear) -> TernaryLinear:
    if not torch.isfinite(layer.weight).all():
        raise ValueError(f"a packed model holds finite numbers only; got NaN or infinity in tensor={name}.weight")
    w_ternary, scale = quantize_weight(layer.weight.detach(), layer.quantizer)
    if layer.quantizer.granularity == "row":
        scale = scale.squeeze(1)
    return TernaryLinear(
        w_ternary.numpy(),
        scale.numpy(),
        bias=None if layer.bias is None else layer.bias.detach().float().numpy(),
        input_norm=None if layer.input_norm is None else layer.input_norm.weight.detach().float().numpy(),
    )


def _int8(module: nn.Module) -> Int8Rows:
    weight = module.get_parameter("weight").detach()
    if not torch.isfinite(weight).all():
        raise ValueError("a packed model holds finite numbers only; got NaN or infinity in an embedding")
    rows = quantize_rows(weight)
    parts = (rows.w_int8, rows.row_scale, rows.column_scale, rows.mean)
    return Int8Rows(*(part.numpy() for part in parts))


@torch.no_grad()
def _nudged(student: PreTrainedModel) -> PreTrainedModel:
    """The student itself, the gain of every norm moved by a float error: what another order of summation may do."""
    generator = torch.Generator().manual_seed(0)
    for name, gain in student.named_parameters():
        if gain.dim() == 1 and name.endswith("norm.weight"):
            gain.mul_(1 + FLOAT_ERROR * torch.randn(gain.shape, generator=generator))
    return student


@torch.inference_mode()
def _last_logits(student: PreTrainedModel, prompts: Sequence[list[int]]) -> list[np.ndarray]:
    """The last token's logits (V,) of each prompt, one prompt at a time."""
    hidden = [student.get_decoder()(input_ids=torch.tensor([ids]), use_cache=False)[0][0, -1] for ids in prompts]
    return [head_logits(student, last).numpy() for last in hidden]


def _drift(logits: Sequence[np.ndarray], expected: Sequence[np.ndarray]) -> tuple[float, float]:
    """Relative error of the logits, |a - b| / |b|: its median over the prompts and the largest."""
    norms = [max(float(np.linalg.norm(b)), 1e-9) for b in expected]
    errors = [float(np.linalg.norm(a - b)) / n for a, b, n in zip(logits, expected, norms, strict=True)]
    return float(np.median(errors)), max(errors)
