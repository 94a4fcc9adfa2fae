"""Surgery on every architecture: what changes, what does not, and what is refused."""

import pytest
import torch
from torch import nn
from transformers import AutoConfig, PreTrainedModel

from bitdistill_core.bitlinear import BitLinear
from bitdistill_core.quantize.activation import quantize_activation
from bitdistill_core.quantize.weight import WeightQuantizer, quantize_weight
from bitdistill_core.surgery import operate
from tests.core.conftest import build

PROJECTIONS = {"q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj"}


@pytest.mark.parametrize(
    ("subln", "normed"), [("none", set()), ("output", {"o_proj", "down_proj"}), ("all", PROJECTIONS)]
)
def test_every_projection_changes_and_nothing_else(any_model: PreTrainedModel, subln: str, normed: set[str]) -> None:
    embedding, head = any_model.get_input_embeddings(), any_model.get_output_embeddings()
    changes = operate(any_model, subln=subln, sub_norm_eps=1e-6)
    assert {c.module for c in changes} == {
        f"model.layers.{i}.{'mlp' if p[0] in 'gud' else 'self_attn'}.{p}" for i in range(2) for p in PROJECTIONS
    }
    assert {c.module.rsplit(".", 1)[1] for c in changes if c.has_sub_norm} == normed
    assert any_model.get_input_embeddings() is embedding
    assert type(any_model.get_output_embeddings()) is nn.Linear
    assert any_model.get_output_embeddings() is head
    for change in changes:
        module = any_model.get_submodule(change.module)
        assert isinstance(module, BitLinear)
        assert (module.input_norm is not None) == change.has_sub_norm


def test_bit_linear_computes_the_integer_product() -> None:
    generator = torch.Generator().manual_seed(0)
    weight, bias = torch.randn(6, 10, generator=generator), torch.randn(6, generator=generator)
    x = torch.randn(4, 10, generator=generator)
    layer = BitLinear(nn.Parameter(weight), nn.Parameter(bias), sub_norm_eps=1e-6)
    assert layer.input_norm is not None
    with torch.no_grad():
        layer.input_norm.weight.copy_(torch.rand(10, generator=generator) + 0.5)
    normed = x / (x.square().mean(-1, keepdim=True) + 1e-6).sqrt() * layer.input_norm.weight
    x_int8, x_scale = quantize_activation(normed)
    w_ternary, w_scale = quantize_weight(weight, WeightQuantizer())
    expected = (x_int8.long() @ w_ternary.long().T) * x_scale * w_scale + bias
    assert torch.allclose(layer(x), expected, atol=1e-5)


def test_subln_output_norms_what_enters_the_projection() -> None:
    model = build("qwen3")
    operate(model, subln="output", sub_norm_eps=1e-6)
    o_proj = model.get_submodule("model.layers.0.self_attn.o_proj")
    seen: list[torch.Tensor] = []
    o_proj.input_norm.register_forward_hook(lambda module, inputs, output: seen.append(output))
    model(torch.arange(5)[None])
    assert torch.allclose(seen[0].square().mean(-1), torch.ones(1, 5), atol=1e-3)


def test_operating_twice_is_an_error() -> None:
    model = build("qwen2")
    operate(model, subln="output", sub_norm_eps=1e-6)
    with pytest.raises(ValueError, match="surgery changed no module"):
        operate(model, subln="output", sub_norm_eps=1e-6)


def test_an_unsupported_architecture_names_the_supported_ones() -> None:
    from transformers import AutoModelForCausalLM

    config = AutoConfig.for_model("gpt2", n_layer=1, n_embd=8, n_head=1, vocab_size=11, n_positions=8)
    with pytest.raises(ValueError, match=r"model_type=gpt2; supported are qwen3 .*gemma3_text"):
        operate(AutoModelForCausalLM.from_config(config), subln="output", sub_norm_eps=1e-6)
