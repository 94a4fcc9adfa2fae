"""The surgery and base stages by their options: what is calibrated on what, and which blocks are kept."""

import json
from pathlib import Path
from typing import get_args

import pytest
import torch
from transformers import PreTrainedModel

from bitdistill_core import checkpoint
from bitdistill_core.bitlinear import BitLinear
from bitdistill_core.calibration import calibrate
from bitdistill_core.choices import ModelType
from bitdistill_core.corpus import sample_sequences
from bitdistill_core.params import load_params
from bitdistill_core.quantize.weight import WeightQuantizer
from bitdistill_core.stages import base, surgery
from bitdistill_core.stages.base import keep_first_layers
from bitdistill_core.surgery import operate
from tests.core.conftest import CONFIGS, Finished, Workshop, build, section

PARAMS = Path(__file__).parents[2] / "params.yaml"


def operated(workshop: Workshop, name: str = "student", **changes: object) -> Finished:
    if not (workshop.root / "base").is_dir():
        workshop.model("base")
    inputs = {"model": workshop.root / "base", "data": workshop.data}
    return workshop.run(surgery, section("surgery", **changes), inputs, name)


def bit_linears(model: PreTrainedModel) -> list[BitLinear]:
    return [module for module in model.modules() if isinstance(module, BitLinear)]


def same_weights(one: PreTrainedModel, other: PreTrainedModel) -> bool:
    return all(torch.equal(p, other.get_parameter(name)) for name, p in one.named_parameters())


@pytest.mark.parametrize("grid", ["ternary", "binary"])
@pytest.mark.parametrize(("granularity", "block_size"), [("tensor", 0), ("row", 0), ("block", 16)])
def test_the_quantiser_survives_saving(workshop: Workshop, grid: str, granularity: str, block_size: int) -> None:
    finished = operated(workshop, weight_grid=grid, weight_granularity=granularity)
    expected = WeightQuantizer(grid, granularity, block_size)  # type: ignore[arg-type]
    assert {layer.quantizer for layer in bit_linears(finished.model())} == {expected}
    assert finished.metrics["surgery/num_bit_linears"] == 14
    assert finished.metrics["surgery/num_sub_norms"] == 4
    assert len(json.loads((finished.path / "surgery.json").read_text())) == 14
    assert not (finished.path / "calibration.json").exists()


def test_the_scale_rule_survives_saving(workshop: Workshop) -> None:
    layers = bit_linears(operated(workshop, weight_scale="least_squares").model())
    assert {layer.quantizer.scale_rule for layer in layers} == {"least_squares"}


def test_blocks_that_do_not_divide_a_layer_are_refused(workshop: Workshop) -> None:
    message = r"weight_block_size must divide every layer's input width; got layer=layers.0.self_attn.q_proj, width=32"
    with pytest.raises(ValueError, match=message):
        operated(workshop, weight_granularity="block", weight_block_size=48)


@pytest.mark.parametrize("calibration", ["corpus", "examples"])
def test_calibration_sees_the_texts_that_were_asked_for(workshop: Workshop, calibration: str) -> None:
    finished = operated(workshop, initializer="gptq", subln_gain="preserve", calibration=calibration, seed=3)
    source, column = {
        "corpus": (workshop.data / "corpus", "text"),
        "examples": (workshop.data / "examples" / "train.parquet", "prompt"),
    }[calibration]
    ids = sample_sequences(source, column, workshop.tokenizer, num_sequences=4, length=24, seed=3)
    by_hand, _ = checkpoint.load_model(workshop.root / "base")
    operate(by_hand, subln="output", sub_norm_eps=1e-6)
    errors = calibrate(by_hand, ids, subln_gain="preserve", initializer="gptq")
    assert same_weights(by_hand, finished.model())
    lines = json.loads((finished.path / "calibration.json").read_text())
    assert [line["module"] for line in lines] == [error.module for error in errors]
    mean = sum(error.relative_error_after for error in errors) / len(errors)
    assert finished.metrics["surgery/relative_error_after"] == pytest.approx(mean)
    assert finished.metrics["surgery/relative_error_before"] > mean


def test_gains_alone_are_calibrated_too(workshop: Workshop) -> None:
    plain, gained = operated(workshop, "plain"), operated(workshop, "gained", subln_gain="preserve")
    assert gained.metrics == plain.metrics  # no initializer, no error to report
    assert not (gained.path / "calibration.json").exists()
    for one, other in zip(bit_linears(plain.model()), bit_linears(gained.model()), strict=True):
        assert torch.equal(one.weight, other.weight)
        if one.input_norm is not None:
            assert torch.equal(one.input_norm.weight, torch.ones_like(one.weight[0]))
            assert not torch.equal(other.input_norm.weight, one.input_norm.weight)


def test_the_seed_chooses_the_texts(workshop: Workshop) -> None:
    first, again, other = (
        operated(workshop, name, initializer="gptq", seed=seed).model() for name, seed in (("a", 0), ("b", 0), ("c", 1))
    )
    assert same_weights(first, again)
    assert not same_weights(first, other)


def test_calibration_beyond_the_window_is_refused(workshop: Workshop) -> None:
    with pytest.raises(ValueError, match=r"got surgery\.calibration_length=65, window=64; lower surgery"):
        operated(workshop, initializer="gptq", calibration_length=65)


def test_too_few_texts_are_refused(workshop: Workshop) -> None:
    with pytest.raises(ValueError, match=r"needs num_sequences \* length = 24000 tokens; path=.*corpus has \d+; lower"):
        operated(workshop, initializer="gptq", calibration_sequences=1000)


@pytest.mark.parametrize("model_type", sorted(CONFIGS))
def test_the_first_blocks_alone_give_what_they_gave_in_the_whole(model_type: str) -> None:
    model = build(model_type, num_hidden_layers=3, layer_types=None)
    ids = torch.arange(3, 23)[None]
    with torch.no_grad():
        expected = model.get_decoder()(ids, output_hidden_states=True).hidden_states[2]
        keep_first_layers(model, 2)
        kept = model.get_decoder()(ids).last_hidden_state
        assert torch.allclose(kept, model.get_decoder().norm(expected), atol=1e-6)
    assert model.config.num_hidden_layers == 2


def test_keeping_more_blocks_than_there_are_is_refused() -> None:
    with pytest.raises(ValueError, match=r"must not exceed the model's; got num_layers=3, depth=2"):
        keep_first_layers(build("qwen3"), 3)


@pytest.mark.parametrize("model_type", ["qwen3", "gemma3_text"])
def test_a_base_of_the_first_blocks_reloads(workshop: Workshop, model_type: str) -> None:
    source = workshop.model("source", model_type, num_hidden_layers=3, layer_types=None)
    overrides = [f"base.checkpoint={source}", "base.num_layers=1"]
    config = load_params(PARAMS, overrides=overrides).base
    kept = workshop.run(base, config, {"data": workshop.data}, "base").model()
    whole, _ = checkpoint.load_model(source)
    keep_first_layers(whole, 1)
    assert kept.config.num_hidden_layers == 1
    assert len(kept.get_decoder().layers) == 1
    ids = torch.arange(9)[None]
    with torch.no_grad():
        assert torch.equal(kept(ids).logits, whole(ids).logits)


@pytest.mark.parametrize("architecture", get_args(ModelType))
def test_every_architecture_trains_from_nothing(workshop: Workshop, architecture: str) -> None:
    sizes = {"vocab_size": 300, "hidden_size": 32, "intermediate_size": 48, "num_layers": 2, "head_dim": 16}
    training = {"max_position_embeddings": 64, "block_size": 32, "batch_size": 4, "num_tokens": 512, "report_every": 1}
    overrides = [f"base.scratch.{key}={value}" for key, value in {**sizes, **training}.items()]
    config = load_params(PARAMS, overrides=[*overrides, f"base.scratch.architecture={architecture}"]).base
    finished = workshop.run(base, config, {"data": workshop.data}, "scratch")
    model = finished.model()
    assert model.config.model_type == architecture
    assert len(model.get_decoder().layers) == 2
    assert model.get_decoder().layers[0].self_attn.q_proj.weight.shape == (4 * 16, 32)
    assert model.get_input_embeddings().weight is model.get_output_embeddings().weight
    assert finished.metrics["base/num_parameters"] == sum(p.numel() for p in model.parameters())
    assert 0 < finished.metrics["base/loss"] < 10
