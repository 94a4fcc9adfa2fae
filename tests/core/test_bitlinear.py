"""Hardness of BitLinear: 0 is the dense layer, 1 the quantised one, between them a straight line."""

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from bitdistill_core.bitlinear import BitLinear
from bitdistill_core.quantize.activation import fake_quantize_activation
from bitdistill_core.quantize.weight import WeightQuantizer, fake_quantize_weight

QUANTIZERS = [
    WeightQuantizer(),
    WeightQuantizer("binary", "row"),
    WeightQuantizer("ternary", "block", 16, "least_squares"),
]


def layer_and_input(quantizer: WeightQuantizer, *, normed: bool = True) -> tuple[BitLinear, Tensor]:
    generator = torch.Generator().manual_seed(0)
    weight, bias = torch.randn(6, 32, generator=generator), torch.randn(6, generator=generator)
    layer = BitLinear(
        nn.Parameter(weight), nn.Parameter(bias), sub_norm_eps=1e-6 if normed else None, quantizer=quantizer
    )
    if layer.input_norm is not None:
        with torch.no_grad():
            layer.input_norm.weight.copy_(torch.rand(32, generator=generator) + 0.5)
    return layer, torch.randn(4, 32, generator=generator)


@pytest.mark.parametrize("quantizer", QUANTIZERS, ids=str)
@pytest.mark.parametrize("normed", [True, False])
def test_hardness_0_is_the_dense_layer(quantizer: WeightQuantizer, normed: bool) -> None:
    layer, x = layer_and_input(quantizer, normed=normed)
    layer.hardness = 0.0
    dense = x / (x.square().mean(-1, keepdim=True) + 1e-6).sqrt() * layer.input_norm.weight if normed else x
    assert torch.allclose(layer(x), dense @ layer.weight.T + layer.bias, atol=1e-5)


@pytest.mark.parametrize("quantizer", QUANTIZERS, ids=str)
def test_a_new_layer_is_fully_quantised(quantizer: WeightQuantizer) -> None:
    layer, x = layer_and_input(quantizer)
    assert layer.hardness == 1.0
    expected = F.linear(
        fake_quantize_activation(layer.input_norm(x)), fake_quantize_weight(layer.weight, quantizer), layer.bias
    )
    assert torch.equal(layer(x), expected)


@pytest.mark.parametrize("quantizer", QUANTIZERS, ids=str)
@pytest.mark.parametrize("hardness", [0.25, 0.5, 0.999])
def test_hardness_between_mixes_weights_and_inputs(quantizer: WeightQuantizer, hardness: float) -> None:
    layer, x = layer_and_input(quantizer)
    layer.hardness = hardness
    weight, normed = layer.weight.detach(), layer.input_norm(x).detach()
    mixed_weight = weight + hardness * (fake_quantize_weight(weight, quantizer) - weight)
    mixed_input = normed + hardness * (fake_quantize_activation(normed) - normed)
    assert torch.allclose(layer.quantized_weight(), mixed_weight, atol=1e-6)
    assert torch.allclose(layer.quantized_input(x), mixed_input, atol=1e-6)
    assert torch.allclose(layer(x), mixed_input @ mixed_weight.T + layer.bias, atol=1e-5)


@pytest.mark.parametrize("hardness", [0.0, 0.3, 1.0])
def test_the_weight_gets_the_same_gradient_at_any_hardness(hardness: float) -> None:
    layer, x = layer_and_input(WeightQuantizer(), normed=False)
    layer.hardness = hardness
    upstream = torch.randn(4, 6, generator=torch.Generator().manual_seed(1))
    layer(x).backward(upstream)
    assert torch.allclose(layer.weight.grad, upstream.T @ layer.quantized_input(x), atol=1e-5)


def test_hardness_is_no_part_of_a_checkpoint() -> None:
    layer, _ = layer_and_input(WeightQuantizer())
    assert set(layer.state_dict()) == {"weight", "bias", "input_norm.weight"}
