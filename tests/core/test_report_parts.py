"""What the report computes: paired tests, summaries of weights, smoothed curves, escaped cells."""

import math
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from safetensors.torch import load_file

from bitdistill_core.quantize.weight import WeightQuantizer, quantize_weight
from bitdistill_core.report.curves import smoothed
from bitdistill_core.report.markdown import escaped
from bitdistill_core.report.paired import bootstrap_interval, mcnemar_p
from bitdistill_core.report.weights import summarize
from tests.core.report_runs import MODULES, write_weights


@pytest.mark.parametrize(("first", "second"), [(0, 0), (3, 3), (1, 9), (10, 2), (0, 40), (300, 260)])
def test_mcnemar_p_is_the_two_sided_binomial_test(first: int, second: int) -> None:
    n, k = first + second, min(first, second)
    expected = min(1.0, 2 * sum(math.comb(n, i) for i in range(k + 1)) / 2**n)
    assert mcnemar_p(first, second) == pytest.approx(expected, rel=1e-12)


def test_bootstrap_interval_agrees_with_resampling_examples() -> None:
    differences = np.array([1] * 30 + [-1] * 12 + [0] * 158)
    random = np.random.default_rng(1)
    means = [differences[random.integers(0, 200, 200)].mean() for _ in range(4000)]
    assert bootstrap_interval(30, 12, 200) == pytest.approx(np.quantile(means, [0.025, 0.975]), abs=0.01)


def test_weight_summary_matches_the_formula(tmp_path: Path) -> None:
    write_weights(tmp_path, 0.05)
    summary = summarize(tmp_path / "model.safetensors", MODULES, WeightQuantizer())
    torch.manual_seed(0)
    tensors = [torch.randn(32, 16) * 0.05 + 0.02 for _ in MODULES]
    relative = torch.cat([(t / t.abs().mean()).flatten() for t in tensors])
    codes = relative.round().clamp(-1, 1)
    assert summary.num_weights == 1024
    assert summary.code_shares == pytest.approx([float((codes == c).float().mean()) for c in (-1, 0, 1)])
    assert summary.near_share == pytest.approx(float((relative.abs() - 0.5).abs().le(0.05).float().mean()))
    assert sum(summary.density) * 0.05 == pytest.approx(float(relative.abs().le(3).float().mean()))


@pytest.mark.parametrize("grid", ["ternary", "binary"])
@pytest.mark.parametrize(
    ("granularity", "rule"), [("row", "absmean"), ("block", "absmean"), ("tensor", "least_squares")]
)
def test_weights_are_summarised_as_the_student_quantises_them(
    tmp_path: Path, grid: Any, granularity: Any, rule: Any
) -> None:
    write_weights(tmp_path, 0.05)
    quantizer = WeightQuantizer(grid, granularity, 8, rule)
    summary = summarize(tmp_path / "model.safetensors", MODULES, quantizer)
    weights = [load_file(tmp_path / "model.safetensors")[f"{module}.weight"] for module in MODULES]
    codes = torch.cat([quantize_weight(weight, quantizer)[0].flatten() for weight in weights])
    assert summary.code_shares == pytest.approx([float((codes == c).float().mean()) for c in (-1, 0, 1)])
    assert summary.threshold == {"binary": 0.0}.get(grid, 0.7 if rule == "least_squares" else 0.5)
    # codes change where the histogram says so
    edges = np.linspace(-3, 3, len(summary.density) + 1)[:-1] + 1e-6
    within = sum(d for d, edge in zip(summary.density, edges, strict=True) if abs(edge + 0.025) < summary.threshold)
    assert within * 0.05 == pytest.approx(summary.code_shares[1], abs=0.005)


def test_smoothed_is_a_weighted_average_and_factor_zero_changes_nothing() -> None:
    values = [4.0, 1.0, 3.0]
    assert smoothed(values, 0.0) == values
    assert smoothed(values, 0.5)[2] == pytest.approx((0.25 * 4 + 0.5 * 1 + 3) / 1.75)
    assert smoothed([2.0] * 5, 0.9) == pytest.approx([2.0] * 5)


def test_markdown_escape_keeps_a_cell_a_cell() -> None:
    assert escaped("a|b\nc <i> _d_ e_f & `g`") == "a\\|b c \\<i\\> \\_d\\_ e_f &amp; \\`g\\`"
