"""The files that a scale's results become: documented columns, every figure an image, what is missing named."""

import csv
import json
import random
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from matplotlib.image import imread

from bitdistill_core.report.paired import mcnemar_p
from bitdistill_core.report.weights import NUM_BINS
from bitdistill_core.tables import speed
from bitdistill_core.tables.cell import chain, result_path
from bitdistill_core.tables.plan import Cell, Plan
from bitdistill_core.tables.render import render
from bitdistill_core.tables.results import COLUMNS, PAIRED_COLUMNS
from tests.conftest import ROOT
from tests.core.tables.conftest import SCALE, tiny_plan

NUM_EXAMPLES = 60
METHODS = {
    "subln_none": {"label": "without SubLN", "params": {"surgery": {"subln": "none"}}},
    "layer_1": {"label": "1", "params": {"distill": {"distill_layers": [0]}}},
    "layer_2": {"label": "2", "params": {"distill": {"distill_layers": [1]}}},
    "larger": {"label": "Large", "teacher_model": "large"},
}
SMALL = {"models": ["small"], "tasks": ["reviews"]}
GROUPS = {
    "table1": {"models": ["small", "large"], "tasks": ["reviews"], "methods": ["fp16_sft", "bitnet_sft", "bitdistill"]},
    "table2": {"models": ["small"], "tasks": ["news"], "methods": ["fp16_sft", "bitdistill"]},
    "figure3b": {**SMALL, "methods": ["layer_1", "layer_2"]},
    "figure3c": {**SMALL, "methods": ["bitdistill", "larger"]},
    "options": {**SMALL, "methods": ["subln_none", "bitdistill"], "seeds": [0]},
}
FIGURES = ["figure1", "figure2", "figure3a", "figure3b", "figure3c"]


@pytest.fixture(scope="module")
def plan(tmp_path_factory: pytest.TempPathFactory) -> Plan:
    """Every table and figure, two seeds, a task of each kind."""
    tasks = {**SCALE["tasks"], "news": {"label": "News", "params": {"data": {"task": "cnn_dailymail"}}}}
    return tiny_plan(tmp_path_factory.mktemp("plan"), seeds=[0, 1], methods=METHODS, tasks=tasks, groups=GROUPS)


@pytest.fixture(scope="module")
def whole(plan: Plan, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """All of it rendered, no cell missing, with a paper's figure for one cell of table 1 and one of another table."""
    out = tmp_path_factory.mktemp("whole")
    paper = out / "paper.csv"
    paper.write_text(
        "table,method,model,task,metric,value\n"
        "table1,fp16_sft,qwen3-0.6b,reviews,accuracy,88.5\ntable5,bitdistill,qwen3-0.6b,reviews,accuracy,77\n"
    )
    write_results(plan, out, plan.cells())
    assert render(plan, out, paper) == []
    return out


def write_results(plan: Plan, results: Path, cells: Iterable[Cell]) -> None:
    """Results as `run_cell` writes them, of models that are right more or less often."""
    for number, cell in enumerate(cells):
        rng, last = random.Random(str(cell)), chain(plan, cell)
        result: dict[str, Any] = {"recipe": last.recipe, "seconds": {"base": 1800.0}, "device": "cpu"}
        if cell.task == "news":
            scores = [{name: rng.uniform(5, 40) for name in ("rouge1", "rougeL")} for _ in range(NUM_EXAMPLES)]
            means = {name: float(np.mean([line[name] for line in scores])) for name in scores[0]}
            result.update(scores=scores, metrics={**means, "bleu": 3.0 + cell.seed})
        else:
            labels = [index % 2 for index in range(NUM_EXAMPLES)]
            predictions = [label if rng.random() < 0.6 + 0.02 * number else 1 - label for label in labels]
            right = sum(a == b for a, b in zip(labels, predictions, strict=True))
            result.update(labels=labels, predictions=predictions, metrics={"accuracy": right / NUM_EXAMPLES})
        stages = [step.name for step in last.before() if step.name in ("surgery", "pretrain", "distill")]
        result["weights"] = {name: {"density": [rng.random() for _ in range(NUM_BINS)]} for name in stages}
        is_pretrained = cell.method != "bitnet_sft" and "pretrain" in stages
        curve = [(step, 5 - 0.1 * step) for step in range(10)]
        result["curves"] = {"pretrain/loss": curve} if is_pretrained else {}
        path = result_path(results, cell)
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(json.dumps(result))


def read_rows(path: Path) -> tuple[list[str], list[dict[str, str]]]:
    with path.open(newline="") as file:
        reader = csv.DictReader(file)
        return list(reader.fieldnames or []), list(reader)


def accuracy(results: Path, cell: Cell) -> float:
    return 100 * json.loads(result_path(results, cell).read_text())["metrics"]["accuracy"]


def test_every_table_has_the_documented_columns(plan: Plan, whole: Path) -> None:
    for group in GROUPS:
        columns, rows = read_rows(whole / f"{group}.csv")
        assert tuple(columns) == COLUMNS, group
        assert all(row["mean"] and row["seeds"] for row in rows)
        assert (whole / f"{group}.md").read_text().startswith(f"# {plan.title(group)}\n\n| method | model | task |")
    assert len(read_rows(whole / "table1.csv")[1]) == 6
    assert len(read_rows(whole / "table2.csv")[1]) == 2 * 3
    first = read_rows(whole / "table1.csv")[1][0]
    values = [accuracy(whole, Cell("small", "reviews", "fp16_sft", seed)) for seed in (0, 1)]
    assert (first["method"], first["model"], first["seeds"]) == ("fp16_sft", "small", "0 1")
    assert float(first["mean"]) == pytest.approx(np.mean(values), abs=0.005)
    assert float(first["spread"]) == pytest.approx(np.std(values, ddof=1), abs=0.005)
    assert float(first["ci_low"]) < float(first["mean"]) < float(first["ci_high"])
    assert read_rows(whole / "options.csv")[1][0]["spread"] == ""  # one seed
    bleu = read_rows(whole / "table2.csv")[1][2]
    assert [bleu[column] for column in ("metric", "mean", "ci_low", "ci_high")] == ["bleu", "3.50", "", ""]


def test_every_figure_is_an_image_with_its_numbers(whole: Path) -> None:
    page = (whole / "README.md").read_text()
    for name in FIGURES:
        assert (whole / f"{name}.png").read_bytes().startswith(b"\x89PNG\r\n")
        pixels = imread(whole / f"{name}.png")
        assert pixels.shape[0] > 200
        assert pixels.shape[1] > 400
        assert pixels[..., :3].std() > 0.01  # something is drawn
        assert (whole / f"{name}.csv").is_file()
        assert f"![{name}]({name}.png)" in page
    assert read_rows(whole / "figure1.csv") == read_rows(whole / "table1.csv")
    columns, rows = read_rows(whole / "figure2.csv")
    assert columns == ["weight_over_scale", "surgery", "pretrain", "distill"]
    assert len(rows) == NUM_BINS
    assert float(rows[0]["weight_over_scale"]) == pytest.approx(-2.975)
    columns, rows = read_rows(whole / "figure3a.csv")
    assert columns == ["method", "step", "loss"]
    assert [row["method"] for row in rows] == ["bitdistill"] * 10 + ["subln_none"] * 10
    assert float(rows[9]["loss"]) == pytest.approx(4.1)
    assert [row["method"] for row in read_rows(whole / "figure3b.csv")[1]] == ["layer_1", "layer_2"]


def test_every_pair_with_a_reference_is_compared_once(whole: Path) -> None:
    columns, rows = read_rows(whole / "paired.csv")
    assert tuple(columns) == PAIRED_COLUMNS
    pairs = [(row["model"], row["task"], frozenset((row["first"], row["second"]))) for row in rows]
    assert len(pairs) == len(set(pairs))
    reviews = {pair for model, task, pair in pairs if (model, task) == ("small", "reviews")}
    methods = ("layer_1", "layer_2", "larger", "subln_none", "fp16_sft", "bitnet_sft", "bitdistill")
    references = ("fp16_sft", "bitnet_sft", "bitdistill")
    assert reviews == {frozenset((m, r)) for m in methods for r in references if m != r}
    row = next(row for row in rows if row["task"] == "reviews" and row["first"] == "layer_1")
    results = [
        json.loads(result_path(whole, Cell("small", "reviews", row[key], 0)).read_text()) for key in ("first", "second")
    ]
    ours, theirs = (np.equal(result["predictions"], result["labels"]) for result in results)
    p = mcnemar_p(int((ours & ~theirs).sum()), int((theirs & ~ours).sum()))
    assert float(row["mcnemar_p"]) == pytest.approx(p, rel=1e-3)
    assert all(row["mcnemar_p"] == "" for row in rows if row["task"] == "news")


def test_missing_cells_are_named_and_shown(plan: Plan, tmp_path: Path) -> None:
    out = tmp_path / "out"
    there = [cell for cell in plan.cells() if cell.seed == 0 and cell.method != "bitnet_sft"]
    write_results(plan, out, there)
    missing = render(plan, out, ROOT / "tables/paper.csv")
    assert missing == [str(cell) for cell in plan.cells() if cell not in there]
    page = (out / "README.md").read_text()
    assert f"{len(there)} of {len(plan.cells())} cells are there (device: cpu; " in page
    assert "## Missing cells\n\n- " in page
    assert all(f"- {name}\n" in page for name in missing)
    rows = {(row["method"], row["model"]): row for row in read_rows(out / "table1.csv")[1]}
    assert rows["bitnet_sft", "small"]["mean"] == rows["bitnet_sft", "small"]["seeds"] == ""
    assert rows["fp16_sft", "small"]["seeds"] == "0"
    lines = (out / "table1.md").read_text().splitlines()
    assert any("| BitNet-SFT | Small |" in line and "| missing |" in line for line in lines)
    assert any("| FP16-SFT | Small |" in line and "| 0 (missing 1) |" in line for line in lines)


def test_no_results_at_all_are_tables_without_figures(plan: Plan, tmp_path: Path) -> None:
    out = tmp_path / "out"
    out.mkdir()
    assert len(render(plan, out, ROOT / "tables/paper.csv")) == len(plan.cells())
    assert {path.name for path in out.iterdir()} == {
        "README.md", "paired.csv", *(f"{group}.{ending}" for group in GROUPS for ending in ("csv", "md")),
    }  # fmt: skip
    assert "0 of" in (out / "README.md").read_text()


def test_the_papers_figure_stands_beside_its_model(whole: Path) -> None:
    rows = read_rows(whole / "table1.csv")[1]
    assert [row["paper"] for row in rows] == ["88.50", "", "", "", "", ""]  # of the small model; of its table alone
    assert "| FP16-SFT | Small [qwen3-0.6b] | Reviews | accuracy |" in (whole / "table1.md").read_text()
    assert "| FP16-SFT | Large | Reviews | accuracy |" in (whole / "table1.md").read_text()


def test_a_figure_of_methods_shows_one_metric(make_plan: Callable[..., Plan], tmp_path: Path) -> None:
    from bitdistill_core.tables.figures import headline
    from bitdistill_core.tables.results import collect, table_rows

    tasks = {"news": {"label": "News", "params": {"data": {"task": "cnn_dailymail"}}}}
    group = {"models": ["small"], "tasks": ["news"], "methods": ["layer_1", "layer_2"]}
    plan, out = make_plan(methods=METHODS, tasks=tasks, groups={"figure3b": group}), tmp_path / "out"
    write_results(plan, out, plan.cells())
    render(plan, out, ROOT / "tables/paper.csv")
    assert (out / "figure3b.png").is_file()
    rows = table_rows(plan, "figure3b", collect(plan, out), {})
    assert [(row.method, row.metric) for row in headline(rows, "news")] == [
        ("layer_1", "rouge1"),
        ("layer_2", "rouge1"),
    ]


def test_speed_beside_table_1_is_relative_to_pytorch(plan: Plan, tmp_path: Path) -> None:
    out = tmp_path / "out"
    out.mkdir()

    def engine(prefill: float, decode: float, memory: float) -> dict[str, float]:
        speeds = {"prefill_tokens_per_second": prefill, "decode_tokens_per_second": decode}
        return {**speeds, "added_rss_mib": memory, "file_mib": memory / 2}

    measured = {"pytorch": engine(100, 20, 64), "packed": engine(450, 50, 8), "fp16_mib": 16.0, "kernel": "avx2"}
    (out / speed.SPEED).write_text(json.dumps({"small": measured}))
    render(plan, out, ROOT / "tables/paper.csv")
    columns, rows = read_rows(out / "speed.csv")
    assert tuple(columns) == speed.COLUMNS
    assert [list(row.values()) for row in rows] == [
        ["small", "PyTorch float32", "100", "20", "1.0", "1.0", "32.00", "64.0", "16.00"],
        ["small", "BitDistill avx2", "450", "50", "4.5", "2.5", "4.00", "8.0", "16.00"],
    ]
    assert "## Table 1: speed and memory" in (out / "README.md").read_text()
    assert "makes the ratios too large: small." in (out / "README.md").read_text()
    (out / speed.SPEED).write_text(json.dumps({"small": {**measured, "made_from": {}}}))
    render(plan, out, ROOT / "tables/paper.csv")
    assert "too large" not in (out / "README.md").read_text()
