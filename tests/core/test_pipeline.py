"""What the graph of a conversion refuses before anything is trained."""

from pathlib import Path

import pytest

from bitdistill_core.config import Params, load_params
from bitdistill_core.pipeline import require_fit
from tests.conftest import ROOT


@pytest.mark.parametrize(
    ("override", "message"),
    [
        ("teacher.max_length=600", "got teacher.max_length=600, window=256; lower teacher.max_length"),
        ("distill.max_length=600", "got distill.max_length=600"),
        ("bitnet_sft.max_length=600", "got bitnet_sft.max_length=600"),
        ("pretrain.block_size=600", "got pretrain.block_size=600"),
        ("benchmark.prompt_tokens=500", "benchmark.prompt_tokens \\+ new_tokens=5"),
        (
            "surgery.weight_granularity=block surgery.weight_block_size=80",
            "must divide every layer's input width; got layer=q_proj, width=",
        ),
        ("surgery.subln_gain=preserve surgery.calibration_length=600", "got surgery.calibration_length=600"),
        ("data.task=cnn_dailymail evaluate.max_new_tokens=256", "got evaluate.max_new_tokens \\+ 1=257"),
        ("distill.distill_layers=[9]", "distill.distill_layers must name layers of a model with num_layers=2; got 9"),
        ("distill.num_relation_heads=7", "distill.num_relation_heads must divide the query width"),
    ],
)
def test_what_the_base_model_does_not_have_is_refused(
    finished_run: Path, tiny_overrides: list[str], override: str, message: str
) -> None:
    def params(*more: str) -> Params:
        return load_params(ROOT / "params.yaml", overrides=[*tiny_overrides, *more])

    require_fit(params(), finished_run / "base")
    with pytest.raises(ValueError, match=message):
        require_fit(params(*override.split()), finished_run / "base")
