"""`bitdistill tables` and `bitdistill cell` at a scale of seconds: what is missing is run, the rest is found."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

from tests.command_line import run
from tests.conftest import ROOT

CELLS = Path("results/tiny/cells/small/reviews")


@pytest.fixture
def options(tiny_scale: Path) -> list[str]:
    return ["--profile", "tiny", "--tables", str(tiny_scale), "--params", str(ROOT / "params.yaml"), "--no-track"]


def test_one_cell_then_all_of_them(options: list[str]) -> None:
    code, out, error = run("cell", "small", "reviews", "fp16_sft", "0", *options)
    assert code == 0, error
    assert json.loads(out.splitlines()[-1]) == {"finished": 1, "failed": 0, "left": 0, "directory": "results/tiny"}
    result = CELLS / "fp16_sft/seed0.json"
    written = result.stat().st_mtime_ns
    assert list(Path("runs/tables/tiny/base").iterdir())
    assert not Path("results/tiny/README.md").exists()

    code, out, error = run("tables", *options)
    assert code == 1
    assert json.loads(out.splitlines()[-1]) == {"finished": 2, "failed": 1, "left": 0, "directory": "results/tiny"}
    assert "failed: small reviews broken seed=0: distill.num_relation_heads must divide" in error
    assert error.splitlines()[-1] == "tables: results/tiny/README.md"
    assert result.stat().st_mtime_ns == written
    assert "2 of 3 cells are there" in Path("results/tiny/README.md").read_text()
    assert "bitnet_sft,small,reviews,accuracy,0," in Path("results/tiny/table1.csv").read_text()

    code, out, error = run("cell", "small", "reviews", "bitnet_sft", "0", *options)
    assert (code, error) == (0, "")  # nothing was run
    assert not Path("mlflow.db").exists()


def test_a_cell_keeps_the_checkpoints_that_other_cells_need(options: list[str], stored_stages: Path) -> None:
    store = stored_stages
    assert len(list(store.glob("distill/*"))) == 1
    assert run("cell", "small", "reviews", "bitnet_sft", "0", *options)[0] == 0
    assert not list(store.glob("distill/*"))
    assert len(list(store.glob("surgery/*"))) == 0  # broken has SubLN: another surgery
    assert run("cell", "small", "reviews", "fp16_sft", "0", *options)[0] == 0
    assert len(list(store.glob("teacher/*"))) == 1  # broken has this teacher
    assert run("cell", "small", "reviews", "fp16_sft", "1", "--keep-checkpoints", *options)[0] == 0
    assert len(list(store.glob("teacher/*"))) == 2


def test_groups_and_budget_leave_the_rest(options: list[str]) -> None:
    code, out, error = run("tables", "--groups", "table1", "--budget-minutes", "0", *options)
    assert code == 0
    assert json.loads(out.splitlines()[-1])["left"] == 2
    assert "the budget of 0.0 minutes is spent" in error


def test_rendering_alone_runs_nothing(options: list[str]) -> None:
    code, out, _ = run("tables", "--render-only", "--out", "elsewhere", *options)
    assert code == 0
    assert json.loads(out.splitlines()[-1]) == {"finished": 0, "failed": 0, "left": 3, "directory": "elsewhere"}
    assert "0 of 3 cells are there" in Path("elsewhere/README.md").read_text()
    assert not Path("runs").exists()


def test_the_module_for_training_alone_has_an_exit_code_for_each_end(tiny_scale: Path, stored_stages: Path) -> None:
    command = [sys.executable, "-m", "bitdistill_core.tables", "--scale", "tiny", "--tables", str(tiny_scale)]
    command += ["--params", str(ROOT / "params.yaml"), "--out", "results", "--store", str(stored_stages)]

    def end(*options: str) -> int:
        environment = {**os.environ, "PYTHONPATH": str(ROOT)}
        return subprocess.run([*command, *options], env=environment, capture_output=True, check=False).returncode

    assert end("--groups", "table1", "--budget-minutes", "0") == 2
    assert end("--groups", "table1") == 0
    assert "2 of 3 cells are there" in Path("results/README.md").read_text()
    assert end() == 1  # a cell that fails
    assert end("--groups", "none") == 1
