"""Writes tables/dvc.yaml: one stage a cell of scale cpu. Run it after a change of plan.

    python tables/make_dvc.py

DVC has a matrix over models, tasks, methods and seeds, but the cells of a scale are a union of such products, and no
two stages may have the same output: so every cell is listed, under the name that a matrix would give it.
"""

from pathlib import Path

from bitdistill_core.tables.plan import Cell, Plan, read_plan

SCALE = "cpu"
ROOT = Path(__file__).parent.parent
FIGURES = ("figure1", "figure2", "figure3a")  # those that are no group of cells
DRAWN_GROUPS = ("figure3b", "figure3c")
HEADER = f"""\
# The cells of scale {SCALE} of the paper's tables, each a DVC stage. Written by tables/make_dvc.py. From the root:
#   dvc repro tables                                                 all missing cells, then all tables and figures
#   dvc repro tables/dvc.yaml:cell@MODEL-TASK-METHOD-SEED            one cell
# Results are in git, not in DVC's cache; a cell whose result is that of its parameters returns at once. Without the
# hub, set data.data_root in params.yaml: it is no part of what makes a result stale.
stages:
  cell:
    foreach:
"""
STAGES = f"""\
    do:
      wdir: ..
      cmd: bitdistill cell ${{item.model}} ${{item.task}} ${{item.method}} ${{item.seed}} --profile {SCALE}
      deps:
        - bitdistill_core/__init__.py  # the code version
        - params.yaml
        - tables/methods.yaml
        - tables/{SCALE}.yaml
      outs:
        - results/{SCALE}/cells/${{item.model}}/${{item.task}}/${{item.method}}/seed${{item.seed}}.json:
            cache: false
            persist: true
"""


def pipeline(plan: Plan) -> str:
    """The text of tables/dvc.yaml."""
    cells = "".join(f"      {_name(cell)}: {_values(cell)}\n" for cell in plan.cells())
    return HEADER + cells + STAGES


def outputs(plan: Plan) -> list[str]:
    """The files that rendering the whole plan writes: the outputs of stage `tables` in dvc.yaml."""
    groups = [f"{group}.{kind}" for group in plan.scale.groups for kind in ("csv", "md")]
    figures = [f"{figure}.{kind}" for figure in FIGURES for kind in ("csv", "png")]
    drawn = [f"{group}.png" for group in DRAWN_GROUPS if group in plan.scale.groups]
    return sorted([*groups, *figures, *drawn, "paired.csv", "README.md"])


def _name(cell: Cell) -> str:
    return f"{cell.model}-{cell.task}-{cell.method}-{cell.seed}"


def _values(cell: Cell) -> str:
    return f"{{model: {cell.model}, task: {cell.task}, method: {cell.method}, seed: {cell.seed}}}"


if __name__ == "__main__":
    (ROOT / "tables/dvc.yaml").write_text(pipeline(read_plan(ROOT / "tables", SCALE, ROOT / "params.yaml")))
