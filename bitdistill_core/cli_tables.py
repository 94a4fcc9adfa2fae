"""The commands about the paper's tables: tables, cell and estimate. Thin, like cli.py, which has them."""

import json
from pathlib import Path
from typing import Annotated, Any

import typer

from bitdistill_core.cli_errors import one_line_errors

commands = typer.Typer()

Profile = Annotated[str, typer.Option(metavar="NAME", help="A scale, tables/NAME.yaml.")]
Budget = Annotated[float | None, typer.Option(min=0, metavar="N", help="Stop then; the same command goes on.")]
DataRoot = Annotated[str | None, typer.Option(metavar="DIR", help="Read parquet there instead of the hub.")]
Out = Annotated[Path | None, typer.Option(metavar="DIR", help="Results (default: results/PROFILE).")]
Store = Annotated[Path | None, typer.Option(metavar="DIR", help="Checkpoints (default: runs/tables/PROFILE).")]
Keep = Annotated[bool, typer.Option("--keep-checkpoints", help="Even what no other cell needs.")]
Track = Annotated[bool, typer.Option(help="Record finished cells in MLflow.")]
Plans = Annotated[Path, typer.Option("--tables", metavar="DIR", help="The folder of scales.")]
ParamsFile = Annotated[Path, typer.Option("--params", metavar="FILE", help="The parameter file.")]


@commands.command()
def tables(
    profile: Profile = "cpu",
    groups: Annotated[str | None, typer.Option(metavar="LIST", help="Like table5,table6 (default: all).")] = None,
    budget_minutes: Budget = None,
    data_root: DataRoot = None,
    out: Out = None,
    store: Store = None,
    render_only: Annotated[bool, typer.Option("--render-only", help="Run nothing, write what is there.")] = False,
    keep_checkpoints: Keep = False,
    track: Track = True,
    plans: Plans = Path("tables"),
    params_file: ParamsFile = Path("params.yaml"),
) -> None:
    """Run the cells of the paper's tables that are missing, and write tables and figures."""
    with one_line_errors():
        from bitdistill_core.tables.plan import read_plan
        from bitdistill_core.tables.render import render
        from bitdistill_core.tables.speed import measure_speed
        from tasks.tables import run_tables

        plan = read_plan(plans, profile, params_file)
        results, checkpoints = out or plan.default_results, store or plan.default_store
        outcome = run_tables(
            plan,
            store=checkpoints,
            results=results,
            data_root=data_root,
            groups=names_in(groups),
            budget_minutes=budget_minutes,
            keep_checkpoints=keep_checkpoints,
            is_survey=render_only,
            track=track,
            tell=tell,
        )
        if not render_only and not outcome.left:
            measure_speed(plan, store=checkpoints, results=results)
        render(plan, results, plans / "paper.csv")
        tell(f"tables: {results / 'README.md'}")
        finish(outcome, results)


@commands.command()
def cell(
    model: Annotated[str, typer.Argument()],
    task: Annotated[str, typer.Argument()],
    method: Annotated[str, typer.Argument()],
    seed: Annotated[int, typer.Argument(min=0)],
    profile: Profile = "cpu",
    budget_minutes: Budget = None,
    data_root: DataRoot = None,
    out: Out = None,
    store: Store = None,
    keep_checkpoints: Keep = False,
    track: Track = True,
    plans: Plans = Path("tables"),
    params_file: ParamsFile = Path("params.yaml"),
) -> None:
    """Run one cell of the tables, unless its result is there. The last line of stdout is JSON."""
    with one_line_errors():
        from bitdistill_core.tables.plan import read_plan
        from tasks.tables import run_tables

        plan = read_plan(plans, profile, params_file)
        results = out or plan.default_results
        outcome = run_tables(
            plan,
            store=store or plan.default_store,
            results=results,
            data_root=data_root,
            cells=[plan.find(model, task, method, seed)],
            budget_minutes=budget_minutes,
            keep_checkpoints=keep_checkpoints,
            track=track,
            tell=tell,
        )
        finish(outcome, results)


@commands.command()
def estimate(
    profile: Profile = "paper",
    teraflops: Annotated[float, typer.Option(min=1e-3, help="What the machine reaches in training.")] = 150.0,
    plans: Plans = Path("tables"),
    params_file: ParamsFile = Path("params.yaml"),
) -> None:
    """Print what a scale costs: tokens, operations and hours of every training stage."""
    with one_line_errors():
        from bitdistill_core.tables import estimate as cost
        from bitdistill_core.tables.plan import read_plan

        print(cost.estimate(read_plan(plans, profile, params_file), teraflops=teraflops))


def names_in(text: str | None) -> list[str] | None:
    """A comma list; None stays None."""
    return None if text is None else [name.strip() for name in text.split(",")]


def tell(text: str) -> None:
    """Progress goes to stderr."""
    typer.echo(text, err=True)


def finish(outcome: Any, results: Path) -> None:
    """The last line, and exit code 1 when a cell failed."""
    counts = {name: len(getattr(outcome, name)) for name in ("finished", "failed", "left")}
    print(json.dumps({**counts, "directory": str(results)}))
    if outcome.failed:
        raise typer.Exit(1)
