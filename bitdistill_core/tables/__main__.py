"""`python -m bitdistill_core.tables`: run a scale's cells and write its tables, with what training alone needs.

Made for a machine without network, Prefect, MLflow or DVC. `bitdistill tables` is the same command with tracking.
"""

import argparse
import sys
from pathlib import Path

from bitdistill_core.errors import one_line
from bitdistill_core.openmp import set_waiting

set_waiting()  # before PyTorch is loaded

from bitdistill_core.tables.plan import Plan, read_plan  # noqa: E402
from bitdistill_core.tables.run import run_plan  # noqa: E402


def main() -> int:
    """Exit code 0 when every cell of the chosen groups is there, 1 when some failed, 2 when time ran out."""
    parser = argparse.ArgumentParser(prog="python -m bitdistill_core.tables", description=__doc__)
    parser.add_argument("--scale", required=True, help="a file of the tables folder: cpu, smollm2, gpu, paper")
    parser.add_argument("--out", type=Path, required=True, help="where results are written")
    parser.add_argument("--store", type=Path, help="where checkpoints are kept (default: OUT/store)")
    parser.add_argument("--budget-minutes", type=float, help="stop after so long; the same command goes on")
    parser.add_argument("--data-root", help="read parquet below this directory instead of the hub")
    parser.add_argument("--groups", help="comma list, like table5,table6 (default: all)")
    parser.add_argument("--tables", type=Path, default=Path("tables"), help="the folder of plans")
    parser.add_argument("--params", type=Path, default=Path("params.yaml"))
    parser.add_argument("--keep-checkpoints", action="store_true", help="keep models that no other cell needs")
    options = parser.parse_args()
    try:
        plan = read_plan(options.tables, options.scale, options.params)
        groups = options.groups.split(",") if options.groups else None
        outcome = run_plan(
            plan,
            store=options.store or options.out / "store",
            results=options.out,
            data_root=options.data_root,
            groups=groups,
            budget_minutes=options.budget_minutes,
            keep_checkpoints=options.keep_checkpoints,
            tell=lambda text: print(text, file=sys.stderr, flush=True),
        )
        _render(plan, options.out, options.tables / "paper.csv")
    except (ValueError, OSError) as error:
        print(f"error: {one_line(error, None)}", file=sys.stderr)
        return 1
    return 1 if outcome.failed else 2 if outcome.left else 0


def _render(plan: Plan, results: Path, paper: Path) -> None:
    try:
        from bitdistill_core.tables.render import render
    except ModuleNotFoundError as error:  # matplotlib, which training does without
        print(
            f"tables are not drawn here: package {error.name} is missing; where it is installed, run "
            f"bitdistill tables --profile {plan.name} --out {results} --render-only",
            file=sys.stderr,
        )
        return
    render(plan, results, paper)


if __name__ == "__main__":
    sys.exit(main())
