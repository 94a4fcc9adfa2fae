"""Calibration on every architecture: what it reports is recomputed from plain forward passes of the student."""

import copy
from collections.abc import Callable

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from transformers import PreTrainedModel

from bitdistill_core.bitlinear import BitLinear
from bitdistill_core.calibration import _groups, calibrate, preserving_gain
from bitdistill_core.quantize.awq import channel_scale, fold
from bitdistill_core.quantize.gptq import gptq
from bitdistill_core.quantize.weight import WeightQuantizer, fake_quantize_weight, quantize_weight
from bitdistill_core.surgery import operate
from tests.core.conftest import CONFIGS, build
from tests.core.students import student_of

# longer than Gemma's sliding window of 16; the last batch of two is smaller
INPUT_IDS = torch.randint(3, 97, (5, 20), generator=torch.Generator().manual_seed(0))
PROJECTIONS = {"q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj"}
QUANTIZERS = [
    WeightQuantizer(grid=grid, granularity=granularity, block_size=16 if granularity == "block" else 0)
    for grid in ("ternary", "binary")
    for granularity in ("tensor", "row", "block")
]


def with_outliers(model: PreTrainedModel) -> None:
    """Every ninth input behind a norm large and its weights small, as trained models have it."""
    for block in model.get_decoder().layers:
        for norm in ("input_layernorm", "pre_feedforward_layernorm", "post_attention_layernorm"):
            if hasattr(block, norm):
                block.get_submodule(norm).weight[::9] += 6
        for name, module in block.named_modules():
            if isinstance(module, nn.Linear) and not name.endswith(("o_proj", "down_proj")):
                module.weight[:, ::9] *= 0.2


def bit_linears(student: PreTrainedModel) -> dict[str, BitLinear]:
    return {name: module for name, module in student.named_modules() if isinstance(module, BitLinear)}


@torch.no_grad()
def logits(model: PreTrainedModel, hardness: float = 1.0) -> Tensor:
    for layer in bit_linears(model).values():
        layer.hardness = hardness
    out = model(INPUT_IDS).logits
    for layer in bit_linears(model).values():
        layer.hardness = 1.0
    return out


@torch.no_grad()
def inputs(student: PreTrainedModel) -> dict[str, Tensor]:
    """What every BitLinear gets in one forward pass of all sequences, (tokens, K)."""
    seen: dict[str, Tensor] = {}

    def keep(name: str) -> Callable[..., None]:
        return lambda module, args: seen.__setitem__(name, args[0].flatten(0, 1))

    handles = [layer.register_forward_pre_hook(keep(name)) for name, layer in bit_linears(student).items()]
    student(INPUT_IDS)
    for handle in handles:
        handle.remove()
    return seen


def relative_error(layer: BitLinear, x: Tensor, dense: Tensor, weight: Tensor) -> float:
    """From its definition, on activations: `weight` is quantised, `dense` is not."""
    exact = x if layer.input_norm is None else layer.input_norm(x)
    output = exact @ dense.T
    quantized = layer.quantized_input(x) @ fake_quantize_weight(weight, layer.quantizer).T
    return float((output - quantized).square().sum() / output.square().sum())


@pytest.mark.parametrize("subln", ["none", "output", "all"])
@torch.no_grad()
def test_gptq_reports_the_errors_that_a_forward_pass_shows(any_model: PreTrainedModel, subln: str) -> None:
    student = student_of(any_model, subln)
    errors = calibrate(student, INPUT_IDS, subln_gain="preserve", initializer="gptq", batch_size=2)
    layers, seen = bit_linears(student), inputs(student)
    assert sorted(error.module for error in errors) == sorted(layers)
    for error in errors:
        layer, dense = layers[error.module], any_model.get_parameter(f"{error.module}.weight")
        x = seen[error.module]
        assert error.relative_error_before == pytest.approx(relative_error(layer, x, dense, dense), rel=1e-3)
        assert error.relative_error_after == pytest.approx(relative_error(layer, x, dense, layer.weight), rel=1e-3)
        assert error.relative_error_after < error.relative_error_before


@pytest.mark.parametrize("quantizer", QUANTIZERS, ids=str)
@torch.no_grad()
def test_the_student_quantises_to_the_codes_and_scale_of_gptq(quantizer: WeightQuantizer) -> None:
    model = build("llama")
    student = student_of(model, "output", quantizer)
    calibrate(student, INPUT_IDS, subln_gain="preserve", initializer="gptq")
    seen = inputs(student)
    for name, layer in bit_linears(student).items():
        x = layer.quantized_input(seen[name])
        codes, scale = gptq(model.get_parameter(f"{name}.weight"), x.T @ x, quantizer)
        found_codes, found_scale = quantize_weight(layer.weight, quantizer)
        assert (found_codes != codes).float().mean() < 0.01  # the order of fp32 sums may flip a tie
        assert torch.allclose(found_scale, scale, rtol=1e-5)


@pytest.mark.parametrize("subln", ["none", "output", "all"])
@torch.no_grad()
def test_folding_into_every_norm_leaves_the_float_function(any_model: PreTrainedModel, subln: str) -> None:
    student = any_model
    operate(student, subln=subln, sub_norm_eps=1e-6)
    before = logits(student, hardness=0.0)
    generator = torch.Generator().manual_seed(1)
    folded = set()
    for block in student.get_decoder().layers:
        for group in _groups(block, 1.0 if student.config.model_type == "gemma3_text" else 0.0):
            if group.norm is not None:
                s = 2 * torch.rand(next(iter(group.linears.values())).in_features, generator=generator) + 0.2
                fold(s, group.linears.values(), group.norm, norm_offset=group.norm_offset)
                folded |= {name.rsplit(".", 1)[1] for name in group.linears}
    after = logits(student, hardness=0.0)
    assert (after - before).norm() < 1e-4 * before.norm()
    assert folded == PROJECTIONS - ({"o_proj", "down_proj"} if subln == "none" else set())


@pytest.mark.parametrize("subln", ["none", "output", "all"])
@torch.no_grad()
def test_awq_reports_the_errors_that_a_forward_pass_shows(any_model: PreTrainedModel, subln: str) -> None:
    with_outliers(any_model)
    student = student_of(any_model, subln)
    errors = calibrate(student, INPUT_IDS, subln_gain="preserve", initializer="awq", batch_size=2)
    gains = student_of(any_model, subln)
    calibrate(gains, INPUT_IDS, subln_gain="preserve", initializer="none", batch_size=2)
    layers, seen = bit_linears(student), inputs(student)
    scaled = set()
    for error in errors:
        layer, dense = layers[error.module], any_model.get_parameter(f"{error.module}.weight")
        old, new = (norm_before(model, error.module) for model in (gains, student))
        s = old / new if old is not None and new is not None else torch.ones(dense.shape[1])
        if not torch.allclose(s, torch.ones_like(s), rtol=1e-4):
            scaled.add(error.module.rsplit(".", 1)[1])
        expected = relative_error(layer, seen[error.module], dense * s, layer.weight)
        assert error.relative_error_after == pytest.approx(expected, rel=1e-3)
        assert error.relative_error_after < error.relative_error_before
    assert {"q_proj", "k_proj", "v_proj", "gate_proj", "up_proj"} <= scaled


@torch.no_grad()
def test_awq_searches_on_the_products_of_channels_too() -> None:
    model = build("llama")
    with_outliers(model)
    model.get_input_embeddings().weight.add_(torch.randn(32, generator=torch.Generator().manual_seed(1)))  # correlated
    student = student_of(model, "none")
    calibrate(student, INPUT_IDS, subln_gain="one", initializer="awq")
    block, calibrated = (m.get_decoder().layers[0] for m in (model, student))
    x = block.input_layernorm(model.get_input_embeddings()(INPUT_IDS)).flatten(0, 1)
    weights = [block.self_attn.get_submodule(f"{name}_proj").weight for name in "qkv"]
    gram, magnitude = x.T @ x, x.abs().mean(dim=0)
    expected = channel_scale(weights, gram, magnitude, QUANTIZERS[0])
    of_channels_alone = channel_scale(weights, torch.diag(gram.diagonal()), magnitude, QUANTIZERS[0])
    found = block.input_layernorm.weight / calibrated.input_layernorm.weight
    torch.testing.assert_close(found, expected, rtol=1e-4, atol=0)
    assert not torch.allclose(of_channels_alone, expected, rtol=1e-2)


def norm_before(student: PreTrainedModel, name: str) -> Tensor | None:
    """The factor (K,) of the norm in front of a projection, None where there is none."""
    norm = bit_linears(student)[name].input_norm
    if norm is not None:
        return norm.weight
    block = student.get_submodule(name.rsplit(".", 2)[0])
    is_gemma = student.config.model_type == "gemma3_text"
    mlp_norm = "pre_feedforward_layernorm" if is_gemma else "post_attention_layernorm"
    norms = dict.fromkeys(("q_proj", "k_proj", "v_proj"), "input_layernorm")
    norms |= dict.fromkeys(("gate_proj", "up_proj"), mlp_norm)
    child = name.rsplit(".", 1)[1]
    return block.get_submodule(norms[child]).weight + float(is_gemma) if child in norms else None


@pytest.mark.parametrize("subln", ["output", "all"])
@torch.no_grad()
def test_preserve_keeps_the_base_model_where_gain_one_does_not(any_model: PreTrainedModel, subln: str) -> None:
    for name, parameter in any_model.named_parameters():
        if "v_proj" in name or "up_proj" in name:
            parameter.mul_(0.2)  # so that the inputs of o_proj and down_proj are far from RMS 1
    base = logits(any_model)
    one, preserve = student_of(any_model, subln), student_of(any_model, subln)
    assert calibrate(preserve, INPUT_IDS, subln_gain="preserve", initializer="none", batch_size=3) == []
    drift_one, drift = (float((logits(s, hardness=0.0) - base).norm() / base.norm()) for s in (one, preserve))
    if any_model.config.model_type == "gemma3_text":
        assert drift < 0.1
        if subln == "output":  # Gemma norms what the projection puts out, so one factor a token makes no difference
            assert drift_one < 1e-5
    else:
        assert drift < 0.5 * drift_one  # what is left is each token's own scale, far from even in random models


@torch.no_grad()
def test_gains_are_the_least_squares_solution_in_the_float_student(any_model: PreTrainedModel) -> None:
    student = student_of(any_model, "all")
    calibrate(student, INPUT_IDS, subln_gain="preserve", initializer="none", batch_size=2)
    layers = bit_linears(student)
    assert all(layer.hardness == 1.0 for layer in layers.values())
    for layer in layers.values():
        layer.hardness = 0.0
    for name, x in inputs(student).items():
        norm = layers[name].input_norm
        assert norm is not None
        normed = x / (x.square().mean(-1, keepdim=True) + 1e-6).sqrt()
        for channel in (0, 17, 31):
            solution = torch.linalg.lstsq(normed[:, channel : channel + 1], x[:, channel : channel + 1]).solution
            assert norm.weight[channel] == pytest.approx(float(solution), rel=1e-3)


def test_a_dead_channel_gets_the_mean_gain() -> None:
    x = torch.randn(50, 6, generator=torch.Generator().manual_seed(1)) * torch.tensor([1.0, 2, 3, 4, 5, 6])
    x[:, 2] = 0
    gain = preserving_gain(x.split(20), eps=1e-6)
    assert gain[2] == pytest.approx(float(gain[[0, 1, 3, 4, 5]].mean()))
    assert (F.rms_norm(x, (6,), eps=1e-6) * gain - x).norm() < 0.5 * x.norm()
    assert torch.equal(preserving_gain([torch.zeros(4, 3)], eps=1e-6), torch.ones(3))


@pytest.mark.parametrize("initializer", ["gptq", "awq"])
def test_the_same_inputs_give_the_same_bits(initializer: str) -> None:
    first, second = student_of(build("qwen3"), "output"), student_of(build("qwen3"), "output")
    errors = [
        calibrate(student, INPUT_IDS, subln_gain="preserve", initializer=initializer, batch_size=2)
        for student in (first, second)
    ]
    assert errors[0] == errors[1]
    for name, tensor in first.state_dict().items():
        assert torch.equal(tensor, second.state_dict()[name])


def test_nothing_asked_for_is_nothing_done() -> None:
    student = student_of(build("qwen2"), "output").train()
    before = copy.deepcopy(student.state_dict())
    assert calibrate(student, INPUT_IDS, subln_gain="one", initializer="none") == []
    assert all(torch.equal(tensor, before[name]) for name, tensor in student.state_dict().items())


@pytest.mark.parametrize("initializer", ["none", "gptq", "awq"])
def test_mode_hooks_and_gradients_are_left_as_they_were(initializer: str) -> None:
    student = student_of(build("mistral"), "output").train()
    calibrate(student, INPUT_IDS, subln_gain="preserve", initializer=initializer)
    assert student.training
    assert not any(module._forward_pre_hooks for module in student.modules())
    student(INPUT_IDS, labels=INPUT_IDS).loss.backward()
    assert all(layer.weight.grad is not None for layer in bit_linears(student).values())


def test_every_architecture_of_the_surgery_is_calibrated_here() -> None:
    from bitdistill_core.surgery import FAMILIES

    assert set(CONFIGS) == set(FAMILIES)


@pytest.mark.parametrize("input_ids", [INPUT_IDS[0], INPUT_IDS.float(), INPUT_IDS[:0]])
def test_token_ids_of_another_kind_are_refused(input_ids: Tensor) -> None:
    with pytest.raises(ValueError, match=r"needs token ids \(sequences, tokens\) in int64; got shape=.* one length"):
        calibrate(student_of(build("llama"), "output"), input_ids, subln_gain="preserve", initializer="none")
