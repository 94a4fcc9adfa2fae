"""Real students, packed: the file holds the weights of their forward pass and the engine repeats their logits."""

from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from torch import Tensor
from transformers import PreTrainedModel

from bitdistill_core import checkpoint
from bitdistill_core.bitlinear import BitLinear
from bitdistill_core.engine.model import Engine
from bitdistill_core.panels import unpack_ternary
from bitdistill_core.quantize.rows import QuantizedRows, quantize_rows, round_rows
from bitdistill_core.quantize.weight import WeightQuantizer
from bitdistill_core.stages import pack, surgery
from bitdistill_core.stages.pack import pack_model
from bitdistill_core.stages.training import round_embeddings
from bitdistill_core.surgery import operate
from tests.core.conftest import CONFIGS, Workshop, build, section
from tests.core.reference_students import relative_error, tokenizer_json
from tests.core.students import student_of

QUANTIZERS = [
    WeightQuantizer("ternary", "tensor"),
    WeightQuantizer("ternary", "row"),
    WeightQuantizer("ternary", "block", 16),
    WeightQuantizer("binary", "tensor"),
    WeightQuantizer("binary", "row"),
    WeightQuantizer("binary", "block", 16),
]
TASK: dict[str, object] = {"name": "mood", "kind": "classification"}


def rounded_student(model_type: str, quantizer: WeightQuantizer) -> PreTrainedModel:
    """A student with random weights, its embeddings on the INT8 grid as distill leaves them."""
    student = student_of(build(model_type), quantizer=quantizer)
    for embedding in {student.get_input_embeddings(), student.get_output_embeddings()}:
        embedding.weight.data.copy_(round_rows(embedding.weight.data))
    return student


@torch.no_grad()
@pytest.mark.parametrize("quantizer", QUANTIZERS, ids=lambda q: f"{q.grid}-{q.granularity}")
@pytest.mark.parametrize("model_type", sorted(CONFIGS))
def test_every_weight_quantizer_of_a_student_is_packed(
    tmp_path: Path, model_type: str, quantizer: WeightQuantizer
) -> None:
    student = rounded_student(model_type, quantizer)
    pack_model(student, tokenizer_json(), tmp_path / "m", task=TASK, encoding="2bit")
    engine = Engine.load(tmp_path / "m", num_threads=1)
    tensors = engine.model.tensors
    for name, layer in student.named_modules():
        if isinstance(layer, BitLinear):
            codes = unpack_ternary(tensors[f"{name}.w_packed"], *layer.weight.shape)
            scale = tensors[f"{name}.weight_scale"]
            by_block = scale.reshape(len(codes), -1) if scale.ndim else scale.reshape(1, 1)
            weight = np.repeat(by_block, codes.shape[1] // by_block.shape[1], axis=1) * codes
            np.testing.assert_array_equal(weight, layer.quantized_weight().numpy())
    ids = [5, 60, 3, 3, 17, 42, 88, 9]
    expected = student(torch.tensor([ids])).logits[0].numpy()
    assert relative_error(engine.logits(ids), expected) < 0.02  # an activation near a tie may round either way


def test_a_packed_model_far_from_its_student_is_refused(workshop: Workshop, monkeypatch: pytest.MonkeyPatch) -> None:
    inputs = {"model": workshop.model("base"), "data": workshop.data}
    inputs = {"student": workshop.run(surgery, section("surgery"), inputs, "student").path, "data": workshop.data}
    finished = workshop.run(pack, section("pack"), inputs, "packed")
    assert finished.metrics["pack/logit_drift"] <= finished.metrics["pack/logit_drift_max"] < 0.1

    def wrong_rows(weight: Tensor) -> QuantizedRows:
        rows = quantize_rows(weight)
        return replace(rows, row_scale=rows.row_scale * torch.linspace(0.5, 2.0, len(weight)))

    monkeypatch.setattr(pack, "quantize_rows", wrong_rows)
    with pytest.raises(ValueError, match=r"drifts from the student: median relative logit error=\d"):
        workshop.run(pack, section("pack"), inputs, "wrong")


def test_a_deep_student_may_drift_as_far_as_float_error_takes_it(
    workshop: Workshop, monkeypatch: pytest.MonkeyPatch
) -> None:
    student = build("qwen3", num_hidden_layers=100, layer_types=None, vocab_size=len(workshop.tokenizer))
    operate(student, subln="none", sub_norm_eps=1e-6, quantizer=WeightQuantizer())
    round_embeddings(student)
    checkpoint.save_model(student, workshop.tokenizer, workshop.root / "student")
    inputs = {"student": workshop.root / "student", "data": workshop.data}
    monkeypatch.setattr(pack, "MAX_DRIFT", 0.0)
    assert workshop.run(pack, section("pack"), inputs, "packed").metrics["pack/logit_drift"] > 0

    true_logits = Engine.logits
    monkeypatch.setattr(Engine, "logits", lambda engine, ids, **options: 1.2 * true_logits(engine, ids, **options))
    with pytest.raises(ValueError, match="drifts from the student"):
        workshop.run(pack, section("pack"), inputs, "wrong")


def test_a_single_prompt_gone_wrong_is_refused(workshop: Workshop, monkeypatch: pytest.MonkeyPatch) -> None:
    inputs = {"model": workshop.model("base"), "data": workshop.data}
    inputs = {"student": workshop.run(surgery, section("surgery"), inputs, "student").path, "data": workshop.data}
    true_logits, calls = Engine.logits, []

    def first_call_wrong(engine: Engine, ids: list[int], **options: bool) -> np.ndarray:
        calls.append(ids)
        return true_logits(engine, ids, **options) * (2.0 if len(calls) == 1 else 1.0)

    monkeypatch.setattr(Engine, "logits", first_call_wrong)
    with pytest.raises(ValueError, match=r"drifts from the student: .* largest=\d"):
        workshop.run(pack, section("pack"), inputs, "wrong")
    assert len(calls) > 2


def test_a_block_that_is_no_multiple_of_16_is_named_with_its_layer(tmp_path: Path) -> None:
    student = rounded_student("qwen3", WeightQuantizer("ternary", "block", 8))
    with pytest.raises(ValueError, match=r"a multiple of 16; got linear=model\.layers\.0\.self_attn\.q_proj .*size=8"):
        pack_model(student, tokenizer_json(), tmp_path / "m", task=TASK, encoding="2bit")
    assert not (tmp_path / "m").exists()
