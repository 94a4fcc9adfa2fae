"""Rows and comparisons against direct computation: exact distributions of small bootstraps, binomial sums."""

import csv
from collections.abc import Callable, Iterable, Sequence
from dataclasses import replace
from itertools import product
from math import comb
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from bitdistill_core.tables.plan import Cell, Plan
from bitdistill_core.tables.results import COLUMNS, Row, collect, compare, read_paper, table_rows, write_rows
from tests.conftest import ROOT
from tests.core.tables.conftest import SCALE

TEACHER = Cell("small", "reviews", "fp16_sft", 0)
STUDENT = Cell("small", "reviews", "bitdistill", 0)
ONE = {"models": ["small"], "tasks": ["reviews"], "methods": ["fp16_sft", "bitdistill"]}


def classified(correct: Sequence[bool]) -> dict[str, Any]:
    """A result with these examples right."""
    labels = [index % 2 for index in range(len(correct))]
    predictions = [label if is_right else 1 - label for label, is_right in zip(labels, correct, strict=True)]
    metrics = {"accuracy": sum(correct) / len(correct)}
    return {"labels": labels, "predictions": predictions, "metrics": metrics}


def generated(rouge: Sequence[float], bleu: float) -> dict[str, Any]:
    """A result with this ROUGE-1 an example, and ROUGE-L ten points below."""
    metrics = {"rouge1": float(np.mean(rouge)), "rougeL": float(np.mean(rouge)) - 10, "bleu": bleu}
    return {"scores": [{"rouge1": value, "rougeL": value - 10} for value in rouge], "metrics": metrics}


def exact_interval(scores: Sequence[Sequence[float]]) -> tuple[float, float]:
    """The 95% percentile interval over all equally likely resamples of seeds, then of examples.

    Seeds deviate from their mean by n / (n - 1) more in the variance than resampled ones.
    """
    seeds, examples = range(len(scores)), range(len(scores[0]))
    widening = (len(scores) / (len(scores) - 1)) ** 0.5 if len(scores) > 1 else 0.0

    def mean(some: Iterable[int], chosen: Sequence[int]) -> float:
        return float(np.mean([[scores[s][e] for e in chosen] for s in some]))

    means = [
        mean(seeds, chosen) + widening * (mean(some, chosen) - mean(seeds, chosen))
        for some in product(seeds, repeat=len(scores))
        for chosen in product(examples, repeat=len(scores[0]))
    ]
    low, high = np.quantile(means, [0.025, 0.975]).clip(np.min(scores), np.max(scores))
    return float(low), float(high)


def rows_of(plan: Plan, results: dict[Cell, dict[str, Any]], paper: dict[tuple[str, ...], float]) -> list[Row]:
    return table_rows(plan, "table1", results, paper)


def test_a_row_of_three_seeds(make_plan: Callable[..., Plan]) -> None:
    plan = make_plan(seeds=[0, 1, 2], groups={"table1": ONE})
    correct = [[True, True, False, True], [True, False, False, True], [True, True, True, True]]
    results = {replace(TEACHER, seed=seed): classified(values) for seed, values in enumerate(correct)}
    paper = {("table1", "fp16_sft", "qwen3-0.6b", "reviews", "accuracy"): 91.5}
    row = rows_of(plan, results, paper)[0]
    assert (row.method, row.model, row.task, row.metric) == ("fp16_sft", "small", "reviews", "accuracy")
    assert (row.seeds, row.missing, row.paper) == ((0, 1, 2), (), 91.5)
    assert row.mean == pytest.approx((75 + 50 + 100) / 3)
    assert row.spread == pytest.approx(25.0)  # n - 1
    exact = exact_interval([[100.0 * value for value in values] for values in correct])
    assert (row.ci_low, row.ci_high) == (pytest.approx(exact[0], abs=5), pytest.approx(exact[1], abs=1))


def test_the_interval_of_one_seed_is_that_of_a_binomial(make_plan: Callable[..., Plan]) -> None:
    correct = [index % 10 < 7 for index in range(100)]
    row = rows_of(make_plan(groups={"table1": ONE}), {TEACHER: classified(correct)}, {})[0]
    assert (row.mean, row.spread, row.paper) == (pytest.approx(70.0), None, None)
    below = np.cumsum([comb(100, k) * 0.7**k * 0.3 ** (100 - k) for k in range(101)])
    exact = [int(np.searchsorted(below, share)) for share in (0.025, 0.975)]
    assert row.ci_low == pytest.approx(exact[0], abs=1)
    assert row.ci_high == pytest.approx(exact[1], abs=1)


def test_all_right_is_an_interval_and_no_difference_is_none(make_plan: Callable[..., Plan]) -> None:
    results = {TEACHER: classified([True] * 40), STUDENT: classified([True] * 40)}
    row = rows_of(make_plan(groups={"table1": ONE}), results, {})[0]
    assert (row.ci_low, row.ci_high) == (pytest.approx(91.24, abs=0.01), pytest.approx(100))
    found = compare(results, STUDENT, TEACHER, [0])
    assert found is not None
    assert (found["difference"], found["ci_low"], found["ci_high"], found["mcnemar_p"]) == (0.0, None, None, 1.0)


def test_seeds_widen_the_interval(make_plan: Callable[..., Plan]) -> None:
    plan = make_plan(seeds=[0, 1], groups={"table1": ONE})
    correct = [[index < 80 for index in range(100)], [index < 40 for index in range(100)]]
    results = {replace(TEACHER, seed=seed): classified(values) for seed, values in enumerate(correct)}
    row = rows_of(plan, results, {})[0]
    assert row.ci_low is not None
    assert row.ci_high is not None
    assert (row.mean, row.spread) == (pytest.approx(60.0), pytest.approx(40 / 2**0.5))
    assert row.ci_low < 45
    assert row.ci_high > 75


def test_missing_cells_show(make_plan: Callable[..., Plan]) -> None:
    plan = make_plan(seeds=[0, 1], groups={"table1": ONE})
    results = {replace(TEACHER, seed=1): classified([True, False])}
    teacher, student = rows_of(plan, results, {("table1", "bitdistill", "qwen3-0.6b", "reviews", "accuracy"): 88.0})
    assert (teacher.seeds, teacher.missing, teacher.mean, teacher.spread) == ((1,), (0,), 50.0, None)
    assert (student.seeds, student.missing, student.mean, student.paper) == ((), (0, 1), None, 88.0)
    assert student.values() == ["bitdistill", "small", "reviews", "accuracy", "", "", "", "", "", "88.00"]
    assert teacher.values()[4:6] == ["1", "50.00"]


def summaries(make_plan: Callable[..., Plan]) -> Plan:
    tasks = {"reviews": {"label": "News", "params": {"data": {"task": "cnn_dailymail"}}}}
    return make_plan(tasks=tasks, groups={"table1": ONE})


def test_every_metric_of_a_generation_task_is_a_row(make_plan: Callable[..., Plan]) -> None:
    rouge = [10.0, 30.0, 50.0, 20.0]
    rows = {row.metric: row for row in rows_of(summaries(make_plan), {TEACHER: generated(rouge, bleu=7.5)}, {})[:3]}
    assert (rows["rouge1"].mean, rows["rougeL"].mean, rows["bleu"].mean) == (27.5, 17.5, 7.5)
    low, high = exact_interval([rouge])
    assert (rows["rouge1"].ci_low, rows["rouge1"].ci_high) == (pytest.approx(low, abs=1), pytest.approx(high, abs=1))
    assert rows["rougeL"].ci_low == pytest.approx(rows["rouge1"].ci_low - 10)
    assert (rows["bleu"].ci_low, rows["bleu"].ci_high) == (None, None)  # of the whole corpus


def test_a_missing_summary_is_missing_by_its_own_metrics(make_plan: Callable[..., Plan]) -> None:
    rows = [row for row in rows_of(summaries(make_plan), {}, {}) if row.method == "bitdistill"]
    assert [row.metric for row in rows] == ["rouge1", "rouge2", "rougeL", "rougeLsum", "bleu"]
    assert all(row.mean is None for row in rows)


def test_rows_keep_the_order_of_the_plan(make_plan: Callable[..., Plan]) -> None:
    tasks = {"b": SCALE["tasks"]["reviews"], "a": SCALE["tasks"]["reviews"]}
    group = {"models": ["small", "large"], "tasks": ["b", "a"], "methods": ["ptq", "fp16_sft"]}
    rows = rows_of(make_plan(tasks=tasks, groups={"table1": group}), {}, {})
    assert [(row.task, row.model, row.method) for row in rows] == list(
        product(["b", "a"], ["small", "large"], ["ptq", "fp16_sft"])
    )


def test_a_comparison_is_paired_by_example() -> None:
    first = [True] * 60 + [False] * 20 + [True] * 15 + [False] * 5
    second = [True] * 60 + [True] * 20 + [False] * 15 + [False] * 5
    found = compare({STUDENT: classified(first), TEACHER: classified(second)}, STUDENT, TEACHER, [0])
    assert found is not None
    assert (found["first"], found["second"], found["seeds"], found["num_examples"]) == (
        "bitdistill",
        "fp16_sft",
        1,
        100,
    )
    assert found["difference"] == pytest.approx(-5.0)
    p = 2 * sum(comb(35, k) for k in range(16)) / 2**35
    assert found["mcnemar_p"] == pytest.approx(p)
    rng = np.random.default_rng(5)  # by resampling pairs, one after the other
    paired = 100 * (np.array(first, dtype=float) - np.array(second, dtype=float))
    means = [paired[rng.integers(100, size=100)].mean() for _ in range(20000)]
    low, high = np.quantile(means, [0.025, 0.975])
    assert (found["ci_low"], found["ci_high"]) == (pytest.approx(low, abs=1), pytest.approx(high, abs=1))
    back = compare({STUDENT: classified(first), TEACHER: classified(second)}, TEACHER, STUDENT, [0])
    assert back is not None
    assert back["difference"] == pytest.approx(5.0)


def test_a_comparison_takes_the_seeds_that_both_have() -> None:
    results = {
        STUDENT: classified([True, True, False, False]),
        replace(STUDENT, seed=1): classified([True, True, True, False]),
        replace(STUDENT, seed=2): classified([False] * 4),
        TEACHER: classified([True, False, False, False]),
        replace(TEACHER, seed=1): classified([True, False, False, False]),
    }
    found = compare(results, STUDENT, TEACHER, [0, 1, 2])
    assert found is not None
    assert found["seeds"] == 2
    assert found["difference"] == pytest.approx((25 + 50) / 2)
    assert found["mcnemar_p"] == 1.0  # of the first seed: one pair differs


def test_summaries_are_compared_by_rouge_l_without_mcnemar() -> None:
    results = {STUDENT: generated([20.0, 30.0], 1.0), TEACHER: generated([25.0, 45.0], 2.0)}
    found = compare(results, STUDENT, TEACHER, [0])
    assert found is not None
    assert found["mcnemar_p"] is None
    assert (found["difference"], found["ci_low"], found["ci_high"]) == (-10.0, -15.0, -5.0)


@pytest.mark.parametrize(
    "other",
    [
        classified([True, False, True]),
        {**classified([True, False]), "labels": [1, 0]},
        generated([20.0, 30.0], 1.0),
    ],
    ids=["number", "labels", "kind"],
)
def test_different_examples_are_not_compared(other: dict[str, Any]) -> None:
    results = {STUDENT: classified([True, False]), TEACHER: other}
    assert compare(results, STUDENT, TEACHER, [0]) is None
    assert compare(results, TEACHER, STUDENT, [0]) is None


def test_nothing_to_compare_is_none() -> None:
    assert compare({STUDENT: classified([True])}, STUDENT, TEACHER, [0]) is None


def test_only_results_of_the_plan_are_collected(make_plan: Callable[..., Plan], tmp_path: Path) -> None:
    plan = make_plan(groups={"table1": ONE})
    assert collect(plan, tmp_path) == {}
    path = tmp_path / "cells" / STUDENT.path
    path.parent.mkdir(parents=True)
    path.write_text('{"recipe": "of another plan"}')
    assert collect(plan, tmp_path) == {}


def test_the_papers_numbers_are_keyed_by_what_they_are_of() -> None:
    paper = read_paper(ROOT / "tables/paper.csv")
    assert paper["table1", "fp16_sft", "qwen3-0.6b", "mnli", "accuracy"] == 88.01
    with (ROOT / "tables/paper.csv").open(newline="") as file:
        assert len(paper) == len(list(csv.reader(file))) - 1  # no number twice


def test_rows_are_written_with_the_documented_columns(tmp_path: Path) -> None:
    assert COLUMNS == (
        "method", "model", "task", "metric", "seeds", "mean", "spread", "ci_low", "ci_high", "paper",
    )  # fmt: skip
    row = Row("ptq", "small", "reviews", "accuracy", (0, 2), (), 51.234, 1.0, 40.0, 60.016, None)
    write_rows(tmp_path / "new" / "t.csv", COLUMNS, [row.values()])
    lines = (tmp_path / "new" / "t.csv").read_text().splitlines()
    assert lines == [",".join(COLUMNS), "ptq,small,reviews,accuracy,0 2,51.23,1.00,40.00,60.02,"]
