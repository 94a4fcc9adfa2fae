"""Every backbone through every option of every stage, two steps each: any two options meet in at least one run."""

from collections.abc import Sequence
from itertools import combinations, pairwise, product
from pathlib import Path

import pytest
import torch
from torch import Tensor
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from bitdistill_core import checkpoint
from bitdistill_core.bitlinear import BitLinear
from bitdistill_core.stages import distill, pretrain, surgery
from tests.core.conftest import CONFIGS, Workshop, section

FACTORS: dict[str, dict[str, dict[str, object]]] = {
    "backbone": {name: {} for name in sorted(CONFIGS)},
    "grid": {grid: {"weight_grid": grid} for grid in ("ternary", "binary")},
    "scale": {scale: {"weight_granularity": scale} for scale in ("tensor", "row", "block")},
    "subln": {subln: {"subln": subln} for subln in ("none", "output", "all")},
    "start": {
        "dense": {},
        "gptq": {"initializer": "gptq"},
        "awq": {"initializer": "awq", "calibration": "examples"},
        "preserve": {"subln_gain": "preserve"},
        "preserve_gptq": {"subln_gain": "preserve", "initializer": "gptq"},
    },
    "pretrain": {
        "plain": {},
        "taught": {"task_loss_weight": 0.0, "logits_kd_weight": 1.0},
        "blocks": {"task_loss_weight": 0.0, "logits_kd_weight": 1.0, "hidden_kd_weight": 1.0},
        "warm_up": {"quantization_warmup": 0.5, "schedule": "two_stage"},
        "bfloat16": {"precision": "bfloat16", "dropout": 0.1, "hidden_kd_weight": 1.0},
    },
    "distill": {
        "paper": {"loss": "paper"},
        "authors": {"loss": "authors"},
        "all_layers": {"distill_layers": []},
        "hidden": {"hidden_kd_weight": 1.0, "quantization_warmup": 1.0},
        "balanced": {"grad_norm_every": 1, "balance_grad_norms": 1.0, "gradient_accumulation": 2},
    },
}
Pair = tuple[tuple[int, str], tuple[int, str]]


def pairs(row: Sequence[str]) -> set[Pair]:
    return set(combinations(enumerate(row), 2))


def covering_rows() -> list[tuple[str, ...]]:
    """Runs that hold every pair of options, greedily few."""
    everything = [list(options) for options in FACTORS.values()]
    left = {
        ((i, a), (j, b))
        for (i, first), (j, second) in combinations(enumerate(everything), 2)
        for a, b in product(first, second)
    }
    rows = []
    while left:
        (i, a), (j, b) = min(left)
        row = [options[0] for options in everything]
        row[i], row[j] = a, b
        for place in (k for k in range(len(row)) if k not in (i, j)):
            row[place] = max(
                everything[place], key=lambda option: len(pairs([*row[:place], option, *row[place + 1 :]]) & left)
            )
        left -= pairs(row)
        rows.append(tuple(row))
    return rows


ROWS = covering_rows()
IDS = torch.randint(3, 250, (2, 20), generator=torch.Generator().manual_seed(0))


@torch.no_grad()
def logits(model: PreTrainedModel) -> Tensor:
    return model(IDS).logits


def test_any_two_options_meet_in_a_run() -> None:
    assert len(ROWS) <= 40
    met = set().union(*(pairs(row) for row in ROWS))
    for (i, first), (j, second) in combinations(enumerate(FACTORS.values()), 2):
        assert {((i, a), (j, b)) for a, b in product(first, second)} <= met


@pytest.mark.parametrize("row", ROWS, ids="-".join)
def test_a_student_learns_and_reloads(
    workshop: Workshop, monkeypatch: pytest.MonkeyPatch, row: tuple[str, ...]
) -> None:
    chosen = {factor: options[name] for (factor, options), name in zip(FACTORS.items(), row, strict=True)}
    base = workshop.model("base", row[0])
    teacher = workshop.model("teacher", row[0], seed=1)
    saved: dict[Path, Tensor] = {}
    save = checkpoint.save_model

    def save_and_remember(model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase, directory: Path) -> None:
        assert all(layer.hardness == 1.0 for layer in model.modules() if isinstance(layer, BitLinear))
        saved[directory] = logits(model)
        save(model, tokenizer, directory)

    monkeypatch.setattr(checkpoint, "save_model", save_and_remember)
    operated = section("surgery", **chosen["grid"], **chosen["scale"], **chosen["subln"], **chosen["start"])
    student = workshop.run(surgery, operated, {"model": base, "data": workshop.data}, "surgery")
    inputs = {"student": student.path, "base": base, "data": workshop.data}
    trained = workshop.run(pretrain, section("pretrain", **chosen["pretrain"]), inputs, "pretrain")
    inputs = {"student": trained.path, "teacher": teacher, "data": workshop.data}
    distilled = workshop.run(distill, section("distill", **chosen["distill"]), inputs, "distill")
    models = [stage.model() for stage in (student, trained, distilled)]
    for stage, model in zip((student, trained, distilled), models, strict=True):
        assert torch.isfinite(saved[stage.path]).all()
        assert torch.equal(logits(model), saved[stage.path])
        assert all(torch.isfinite(torch.tensor(list(metrics.values()))).all() for _, metrics in stage.log)
    for before, after in pairwise(models):
        layers = {name: layer for name, layer in before.named_modules() if isinstance(layer, BitLinear)}
        assert len(layers) == 14
        for name, layer in layers.items():
            learnt = after.get_submodule(name)
            assert learnt.quantizer == layer.quantizer
            assert not torch.equal(learnt.weight, layer.weight), name
            assert (learnt.bias is None) == (layer.bias is None) == (row[0] != "qwen2" or name[-6] not in "qkv"), name
            if layer.input_norm is not None:
                assert not torch.equal(learnt.input_norm.weight, layer.input_norm.weight), name
