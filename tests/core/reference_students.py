"""Transformers' own models in fp32, their linear layers made ternary, and the packed files they are compared with."""

from pathlib import Path
from typing import Any

import numpy as np
import torch
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, processors
from torch import nn
from transformers import AutoConfig, AutoModelForCausalLM, PreTrainedModel

from bitdistill_core.choices import Encoding
from bitdistill_core.engine.config import engine_config
from bitdistill_core.packing import Int8Rows, TernaryLinear, write_student
from tests.core.architectures import ARCHITECTURES, BOS, COMMON

EPS = 0.01  # of SubLN, far from the models' own
BLOCK = 16  # weights that share a scale, where blocks do


class ReferenceBitLinear(nn.Module):
    """Ternary or binary weights, INT8 activations: the equations, nothing else."""

    def __init__(self, linear: nn.Linear, has_input_norm: bool, grid: str, granularity: str) -> None:
        super().__init__()
        shape = {"tensor": (1, 1, -1), "row": (linear.out_features, 1, -1), "block": (linear.out_features, -1, BLOCK)}
        weight = linear.weight.reshape(shape[granularity])  # the last axis shares a scale
        scale = weight.abs().mean(dim=-1).clamp(min=1e-5)
        ternary = (weight / scale[..., None]).round().clamp(-1, 1)
        binary = torch.where(weight > weight.mean(dim=-1, keepdim=True), 1.0, -1.0)
        self.w_ternary = (ternary if grid == "ternary" else binary).reshape(linear.weight.shape)
        self.weight_scale = {"tensor": scale[0, 0], "row": scale[:, 0], "block": scale}[granularity]
        self.block_scale = scale  # (N or 1, blocks)
        self.bias = linear.bias
        self.input_norm = nn.Parameter(1 + 0.3 * torch.randn(linear.in_features)) if has_input_norm else None

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        if self.input_norm is not None:
            x = self.input_norm * (x / (x.square().mean(-1, keepdim=True) + EPS).sqrt())
        absmax = x.abs().amax(-1, keepdim=True).clamp(min=1e-5)
        scaled = x * (127 / absmax)
        self.nearest_tie = float((scaled - scaled.floor() - 0.5).abs().min())
        x_int8 = scaled.round().clamp(-128, 127)
        sizes = (self.block_scale.shape[1], -1)
        sums = torch.einsum("...gk,ngk->...ng", x_int8.unflatten(-1, sizes), self.w_ternary.unflatten(-1, sizes))
        y = (sums * (absmax[..., None] / 127 * self.block_scale)).sum(-1)
        return y if self.bias is None else y + self.bias


def tokenizer_json() -> bytes:
    """One token a byte, with a BOS put in front when special tokens are asked for."""
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    tokenizer = Tokenizer(models.BPE(vocab={character: i for i, character in enumerate(alphabet)}, merges=[]))
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
    tokenizer.decoder = decoders.ByteLevel()
    tokenizer.add_special_tokens(["<bos>", "<eos>"])
    tokenizer.post_processor = processors.TemplateProcessing(single="<bos> $A", special_tokens=[("<bos>", BOS)])
    return tokenizer.to_str().encode()


def round_rows(weight: torch.Tensor) -> Int8Rows:
    """Rows of a grid with a mean and column scales, and `weight` rounded to it."""
    mean = 0.02 * torch.randn(weight.shape[1])
    column_scale = 2.0 ** torch.randint(-2, 3, (weight.shape[1],))
    rows = (weight - mean) / column_scale
    scale = rows.abs().amax(dim=1, keepdim=True) / 127
    codes = (rows / scale).round()
    weight.copy_(codes * scale * column_scale + mean)
    return Int8Rows(codes.to(torch.int8).numpy(), scale[:, 0].numpy(), column_scale.numpy(), mean.numpy())


@torch.no_grad()
def reference_student(
    name: str, subln: str, grid: str, granularity: str, window: int
) -> tuple[PreTrainedModel, dict[str, Any]]:
    """A random transformers model with reference BitLinears, and the dictionary of its config.json."""
    torch.manual_seed(7)
    options = COMMON | ARCHITECTURES[name] | {"max_position_embeddings": window}
    if granularity == "block":
        options["intermediate_size"] = 5 * BLOCK
    config = AutoConfig.for_model(**options)
    model = AutoModelForCausalLM.from_config(config, dtype=torch.float32, attn_implementation="eager").eval()
    for parameter_name, parameter in model.named_parameters():
        if "norm" in parameter_name or "bias" in parameter_name:
            parameter.add_(0.3 * torch.randn_like(parameter))
        elif "_proj" in parameter_name:
            parameter.copy_(0.25 * torch.randn_like(parameter))  # attention spread over several tokens
        else:
            parameter.copy_(0.03 * torch.randn_like(parameter))  # layers, not a tied embedding, decide the output
    for module_name, module in list(model.model.named_modules()):
        if isinstance(module, nn.Linear):
            parent, _, child = module_name.rpartition(".")
            has_norm = subln == "all" or (subln == "output" and child in ("o_proj", "down_proj"))
            reference = ReferenceBitLinear(module, has_norm, grid, granularity)
            setattr(model.model.get_submodule(parent), child, reference)
    return model, config.to_dict() | {"bitdistill": {"subln": subln, "sub_norm_eps": EPS}}


@torch.no_grad()
def write_reference(
    path: Path,
    name: str,
    subln: str = "output",
    *,
    grid: str = "ternary",
    granularity: str = "tensor",
    encoding: Encoding = "2bit",
    with_eos: bool = False,
    window: int = COMMON["max_position_embeddings"],
) -> PreTrainedModel:
    """Packs a reference student at `path`; the returned model has the file's rounded embeddings."""
    model, hf_config = reference_student(name, subln, grid, granularity, window)
    linears, norms, embeddings = {}, {}, {}
    for module_name, module in model.named_modules():
        if isinstance(module, ReferenceBitLinear):
            bias = None if module.bias is None else module.bias.numpy()
            gain = None if module.input_norm is None else module.input_norm.numpy()
            w_ternary = module.w_ternary.to(torch.int8).numpy()
            linears[module_name] = TernaryLinear(w_ternary, module.weight_scale.numpy(), bias, gain)
        elif module_name.endswith("norm"):
            norms[module_name] = module.weight.numpy()
    for module_name in ("model.embed_tokens", "lm_head"):
        if module_name == "model.embed_tokens" or not model.config.tie_word_embeddings:
            embeddings[module_name] = round_rows(model.get_parameter(f"{module_name}.weight"))
    write_student(
        path,
        config=engine_config(hf_config, eos_token_ids=None if with_eos else []),
        linears=linears,
        embeddings=embeddings,
        norms=norms,
        tokenizer_json=tokenizer_json(),
        encoding=encoding,
        created_by="test 1",
    )
    return model


def reference_logits(model: nn.Module, ids: list[int]) -> np.ndarray:
    with torch.no_grad():
        return model(torch.tensor([ids])).logits[0].numpy()


def relative_error(actual: np.ndarray, expected: np.ndarray) -> float:
    return float(np.abs(actual - expected).max() / np.abs(expected).max())


def random_prompt(seed: int) -> list[int]:
    return [int(i) for i in np.random.default_rng(seed).integers(0, 256, 12)]


def prompt_without_ties(model: nn.Module) -> list[int]:
    """A prompt for which the reference rounds no activation within 1e-4 of a tie.

    INT8 rounding is a step: a value within float error of a tie may round either way, and one step moves logits by
    more than the tolerance. Away from ties engine and reference agree to the last bits.
    """
    references = [module for module in model.modules() if isinstance(module, ReferenceBitLinear)]
    for seed in range(1000):
        prompt = random_prompt(seed)
        reference_logits(model, prompt)
        if min(module.nearest_tie for module in references) > 1e-4:
            return prompt
    raise AssertionError("every prompt has an activation near a tie")
