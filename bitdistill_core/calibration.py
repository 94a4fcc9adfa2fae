"""Calibration: a student's SubLN gains and latent weights before any training, from a few sequences of text.

Gains first, in the float network. Then the weights, decoder block after decoder block, so that each is calibrated on
what the quantised ones before it put out; in a block first query, key and value, then the attention's output, gate and
up, down. It starts a student, or ends one as post-training quantisation.
"""

from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass, replace
from typing import Literal, assert_never

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from transformers import PreTrainedModel

from bitdistill_core.bitlinear import BitLinear
from bitdistill_core.choices import Initializer, SublnGain
from bitdistill_core.passage import Passage
from bitdistill_core.quantize.awq import channel_scale, clipped_codes, fold
from bitdistill_core.quantize.gptq import gptq
from bitdistill_core.quantize.latent import latent_weight
from bitdistill_core.quantize.weight import fake_quantize_weight

# Linears of a decoder block that read the same tensor, in the order of the computation.
GROUPS = (
    ("self_attn.q_proj", "self_attn.k_proj", "self_attn.v_proj"),
    ("self_attn.o_proj",),
    ("mlp.gate_proj", "mlp.up_proj"),
    ("mlp.down_proj",),
)


@dataclass(frozen=True)
class LayerError:
    """Relative error of a layer's output, ||X W^T - Xq Wq^T||^2 / ||X W^T||^2 over the calibration tokens.

    X is the layer's input after its SubLN, Xq that input in INT8, both behind the quantised blocks before.
    """

    module: str  # its name in the model
    relative_error_before: float  # Wq by absmean from the dense W, after the gain is set
    relative_error_after: float


@torch.no_grad()
def calibrate(
    student: PreTrainedModel,
    input_ids: Tensor,
    *,
    subln_gain: SublnGain,
    initializer: Initializer,
    batch_size: int = 8,
) -> list[LayerError]:
    """Sets a student's SubLN gains and latent weights in place; returns each layer's error before and after.

    `preserve` gives every SubLN the gain that changes its input least (`preserving_gain`) while nothing is quantised:
    with gain 1 it is no identity, since it rescales what it norms. (In Gemma3 a norm behind each output projection
    undoes that, and gain 1 keeps the function of `subln: output` exactly.) Without SubLN there is no gain to set.

    `gptq` moves the latent weights to where they quantise to GPTQ's codes and scale. `awq` scales input channels and
    folds the inverse into the norm before: a projection's own SubLN, else the block's norm before attention or MLP, in
    common for all projections behind it. `o_proj` and `down_proj` without SubLN follow no norm and are not scaled. Then
    it moves each latent weight to AWQ's clipped codes and scale, if that leaves less error than absmean.

    Args:
        student: after `surgery.operate`, gains 1 and latent weights those of the dense model, fp32, on any device.
        input_ids: (S, T) int64, sequences of one length without padding.
    Returns:
        one for each BitLinear in the order of the computation; none with the initializer `none`.
    Raises:
        ValueError: `input_ids` of another shape or dtype, or empty.
    """
    if subln_gain == "one" and initializer == "none":
        return []
    if input_ids.dim() != 2 or input_ids.dtype != torch.int64 or not input_ids.numel():
        raise ValueError(
            "calibration needs token ids (sequences, tokens) in int64; got "
            f"shape={tuple(input_ids.shape)}, dtype={input_ids.dtype}; stack sequences of one length"
        )
    batches = input_ids.to(student.device).split(batch_size)
    was_training = student.training
    student.eval()
    try:
        if subln_gain == "preserve":
            _set_gains(student, batches)
        return [] if initializer == "none" else _initialize(student, batches, initializer)
    finally:
        student.train(was_training)


def preserving_gain(inputs: Iterable[Tensor], eps: float) -> Tensor:
    """The gain (K,) with which RMSNorm changes its input least, in least squares over the tokens of `inputs`.

    g_c = E[x_c n_c] / E[n_c^2], n = x / sqrt(mean(x^2) + eps). A channel that is always zero gets the mean gain of the
    others, or 1 if all are.

    Args:
        inputs: batches (tokens, K).
    """
    product, square = torch.zeros(()), torch.zeros(())
    for x in inputs:
        x = x.float()
        normed = F.rms_norm(x, x.shape[-1:], eps=eps)
        product = product.to(x.device) + (x * normed).double().sum(dim=0)
        square = square.to(x.device) + normed.double().square().sum(dim=0)
    alive = square > 0
    gain = product / square.clamp(min=torch.finfo(torch.float64).tiny)
    others = gain[alive].mean() if alive.any() else torch.ones_like(gain[0])
    return torch.where(alive, gain, others).float()


@dataclass(frozen=True)
class _Group:
    """Linears of a block that are treated together, with the norm whose output only they read."""

    linears: dict[str, BitLinear]  # by name in the block
    norm: nn.Module | None
    norm_offset: float  # the norm multiplies by norm_offset + weight


def _norm_offset(student: PreTrainedModel) -> float:
    """What the family's own norms add to their weight."""
    return 1.0 if student.config.model_type == "gemma3_text" else 0.0


def _groups(block: nn.Module, norm_offset: float) -> Iterator[_Group]:
    """Linears behind one norm of the block; each alone where it has a norm of its own."""
    before_mlp = (
        "pre_feedforward_layernorm" if hasattr(block, "pre_feedforward_layernorm") else "post_attention_layernorm"
    )
    norms = {"self_attn.q_proj": "input_layernorm", "mlp.gate_proj": before_mlp}
    for names in GROUPS:
        shared: dict[str, BitLinear] = {}
        for name in names:
            linear = block.get_submodule(name)
            assert isinstance(linear, BitLinear)
            if linear.input_norm is None:
                shared[name] = linear
            else:
                yield _Group({name: linear}, linear.input_norm, 0.0)
        if shared:
            is_all = len(shared) == len(names)
            norm = block.get_submodule(norms[names[0]]) if names[0] in norms and is_all else None
            yield _Group(shared, norm, norm_offset)


@dataclass(frozen=True)
class _Statistics:
    """Sums over the calibration tokens of what a BitLinear multiplies: x after its SubLN and xq, x in INT8."""

    exact: Tensor  # (K, K), of x x^T
    cross: Tensor  # (K, K), of x xq^T
    quantized: Tensor  # (K, K), of xq xq^T; GPTQ's Hessian
    mean_magnitude: Tensor  # (K,), mean of |x|

    @classmethod
    def gather(cls, linear: BitLinear, inputs: Iterable[Tensor]) -> "_Statistics":
        shape, device = (linear.in_features, linear.in_features), linear.weight.device
        exact, cross, quantized = (torch.zeros(shape, device=device) for _ in range(3))
        magnitude, num_tokens = torch.zeros(linear.in_features, dtype=torch.float64, device=device), 0
        for x in inputs:
            x_quantized = linear.quantized_input(x).float()
            x = (x if linear.input_norm is None else linear.input_norm(x)).float()
            exact.addmm_(x.T, x)
            cross.addmm_(x.T, x_quantized)
            quantized.addmm_(x_quantized.T, x_quantized)
            magnitude += x.abs().double().sum(dim=0)
            num_tokens += len(x)
        return cls(exact, cross, quantized, (magnitude / num_tokens).float())

    def relative_error(self, weight: Tensor, quantized_weight: Tensor) -> float:
        """||X W^T - Xq Wq^T||^2 / ||X W^T||^2; 0 for an output that is 0."""
        output = ((weight @ self.exact) * weight).sum()
        product = ((weight @ self.cross) * quantized_weight).sum()
        quantized = ((quantized_weight @ self.quantized) * quantized_weight).sum()
        return float((output - 2 * product + quantized) / output) if output > 0 else 0.0


def _set_gains(student: PreTrainedModel, batches: Sequence[Tensor]) -> None:
    """Every SubLN's gain in the order of the computation, with the float weights and inputs of the latent network."""
    layers = [layer for layer in student.modules() if isinstance(layer, BitLinear)]
    hardness = [layer.hardness for layer in layers]
    for layer in layers:
        layer.hardness = 0.0
    try:
        passage = Passage.begin(student, batches)
        for _ in passage.blocks("SubLN gains"):
            for group in _groups(passage.block, _norm_offset(student)):
                for layer in group.linears.values():
                    if layer.input_norm is not None:
                        eps = layer.input_norm.eps
                        assert eps is not None  # surgery sets it
                        layer.input_norm.weight.copy_(preserving_gain(passage.inputs_of(layer), eps))
    finally:
        for layer, value in zip(layers, hardness, strict=True):
            layer.hardness = value


def _initialize(
    student: PreTrainedModel, batches: Sequence[Tensor], initializer: Literal["gptq", "awq"]
) -> list[LayerError]:
    """Every group's latent weights in the order of the computation."""
    passage = Passage.begin(student, batches)
    errors = []
    for index in passage.blocks(initializer):
        for group in _groups(passage.block, _norm_offset(student)):
            for error in _initialize_group(passage, group, initializer):
                errors.append(replace(error, module=f"model.layers.{index}.{error.module}"))
    return errors


def _initialize_group(passage: Passage, group: _Group, initializer: Literal["gptq", "awq"]) -> list[LayerError]:
    """Moves the latent weights of a group; the errors name its layers as the block does."""
    layers = group.linears
    first = next(iter(layers.values()))
    statistics = _Statistics.gather(first, passage.inputs_of(first))
    before = {name: _error(statistics, layer.weight, layer.weight, layer) for name, layer in layers.items()}
    if initializer == "awq" and group.norm is not None:
        weights = [layer.weight for layer in layers.values()]
        s = channel_scale(weights, statistics.exact, statistics.mean_magnitude, first.quantizer)
        fold(s, group.linears.values(), group.norm, norm_offset=group.norm_offset)
        statistics = _Statistics.gather(first, passage.inputs_of(first))
    errors = []
    for name, layer in layers.items():
        dense = layer.weight.clone()
        if initializer == "gptq":
            codes, scale = gptq(dense, statistics.quantized, layer.quantizer)
        elif initializer == "awq":
            codes, scale = clipped_codes(dense, statistics.exact, layer.quantizer)
        else:
            assert_never(initializer)
        latent = latent_weight(dense, codes, scale, layer.quantizer)
        error, absmean_error = (_error(statistics, dense, weight, layer) for weight in (latent, dense))
        if initializer == "gptq" or error < absmean_error:
            layer.weight.copy_(latent)
        errors.append(LayerError(name, before[name], _error(statistics, dense, layer.weight, layer)))
    return errors


def _error(statistics: _Statistics, dense: Tensor, latent: Tensor, layer: BitLinear) -> float:
    return statistics.relative_error(dense, fake_quantize_weight(latent, layer.quantizer))
