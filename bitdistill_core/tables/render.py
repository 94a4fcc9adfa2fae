"""The tables and figures of a scale as files: CSV and Markdown for tables, CSV and PNG for figures.

RESULTS/table1.csv, .md, ... figure1.csv, .png, ..., paired.csv, and README.md, which shows everything in one place.
"""

from collections.abc import Sequence
from pathlib import Path
from typing import Any

from bitdistill_core.tables import figures, speed
from bitdistill_core.tables.plan import Cell, Plan
from bitdistill_core.tables.results import (
    COLUMNS,
    PAIRED_COLUMNS,
    Results,
    Row,
    collect,
    compare,
    read_paper,
    table_rows,
    write_rows,
)

REFERENCES = ("fp16_sft", "bitnet_sft", "bitdistill")  # what every method is compared with


def render(plan: Plan, results: Path, paper_file: Path) -> list[str]:
    """Writes every table and figure of the plan that has results; returns the cells that are missing."""
    found = collect(plan, results)
    paper = read_paper(paper_file)
    missing = [str(cell) for cell in plan.cells() if cell not in found]
    rows = {group: table_rows(plan, group, found, paper) for group in plan.scale.groups}
    parts = [f"# {plan.scale.description}", _progress(plan, found, missing)]
    parts += _floors(plan, found)
    for group, table in rows.items():
        write_rows(results / f"{group}.csv", COLUMNS, [row.values() for row in table])
        text = _markdown(plan, table)
        (results / f"{group}.md").write_text(f"# {plan.title(group)}\n\n{text}\n")
        parts += [f"## {plan.title(group)}", text]
    parts += _speed(results)
    paired = _comparisons(plan, found)
    write_rows(results / "paired.csv", PAIRED_COLUMNS, [[_short(row[key]) for key in PAIRED_COLUMNS] for row in paired])
    parts += ["## Paired comparisons", _paired_markdown(plan, paired)]
    parts.append("## Figures")
    parts += [f"![{name}]({name}.png)" for name in figures.draw(plan, rows, found, results)]
    if missing:
        parts += ["## Missing cells", "\n".join(f"- {cell}" for cell in missing)]
    (results / "README.md").write_text("\n\n".join(parts) + "\n")
    return missing


def _floors(plan: Plan, found: Results) -> list[str]:
    """What the commonest label and naive Bayes on words reach on each task."""
    by_task = {cell.task: result["floors"] for cell, result in found.items() if result.get("floors")}
    texts = [
        f"{plan.scale.tasks[task].label} {100 * floors['data/majority_accuracy']:.1f} and "
        f"{100 * floors['data/naive_bayes_accuracy']:.1f}"
        for task, floors in by_task.items()
    ]
    return [f"Without a language model, commonest label and naive Bayes on words: {'; '.join(texts)}."] if texts else []


def _speed(results: Path) -> list[str]:
    """The speed and memory columns of table 1, where they were measured."""
    measured = speed.read_speed(results)
    if not measured:
        return []
    rows = speed.speed_rows(measured)
    write_rows(results / "speed.csv", speed.COLUMNS, rows)
    lines = [
        "| model | engine | prefill, tokens/s | decode, tokens/s | prefill ratio | decode ratio | file, MiB "
        "| memory added, MiB | weights at 16 bits, MiB |",
        "|---|---|---|---|---|---|---|---|---|",
        *(f"| {' | '.join(map(str, row))} |" for row in rows),
    ]
    parts = ["## Table 1: speed and memory, ratios to PyTorch in the same rounds", "\n".join(lines)]
    older = [name for name, figures in measured.items() if "made_from" not in figures]
    if older:
        parts.append(
            "Measured with an earlier engine, beside a PyTorch whose threads slept at every wait, which makes the "
            f"ratios too large: {', '.join(older)}. `bitdistill tables` measures anew where it has the base models."
        )
    return parts


def _progress(plan: Plan, found: Results, missing: Sequence[str]) -> str:
    seconds = sum(sum(result["seconds"].values()) for result in found.values())
    devices = ", ".join(sorted({str(result["device"]) for result in found.values()})) or "none yet"
    return (
        f"{len(found)} of {len(found) + len(missing)} cells are there (device: {devices}; the stages took "
        f"{seconds / 3600:.1f} hours, shared ones counted for each cell). Accuracy and ROUGE in percent. Intervals are "
        "95%: Wilson's for the accuracy of one seed, which says nothing of other seeds, else bootstrapped over "
        "examples and seeds; a comparison in which no example differs has none. Spread is the standard deviation over "
        "seeds. `paper` is what the paper reports for the model in brackets: a far larger model on all of the data, so "
        "compare the differences between methods, not the levels."
    )


def _markdown(plan: Plan, rows: Sequence[Row]) -> str:
    lines = [
        "| method | model | task | metric | seeds | mean | spread | 95% interval | paper |",
        "|---|---|---|---|---|---|---|---|---|",
    ]
    for row in rows:
        model = plan.scale.models[row.model]
        name = f"{model.label} [{model.stands_for}]" if row.paper is not None else model.label
        mean = "missing" if row.mean is None else f"{row.mean:.2f}"
        interval = "" if row.ci_low is None else f"{row.ci_low:.1f} to {row.ci_high:.1f}"
        seeds = " ".join(map(str, row.seeds)) + (f" (missing {' '.join(map(str, row.missing))})" if row.missing else "")
        cells = (
            plan.methods[row.method].label,
            name,
            plan.scale.tasks[row.task].label,
            row.metric,
            seeds,
            mean,
            "" if row.spread is None else f"{row.spread:.2f}",
            interval,
            "" if row.paper is None else f"{row.paper:.2f}",
        )
        lines.append(f"| {' | '.join(cells)} |")
    return "\n".join(lines)


def _comparisons(plan: Plan, found: Results) -> list[dict[str, Any]]:
    """Every method against the references on its model and task, each pair once."""
    out: dict[tuple[str, ...], dict[str, Any]] = {}
    for cell in found:
        for reference in REFERENCES:
            key = (cell.method, reference, cell.model, cell.task)
            if cell.method == reference or key in out or (reference, cell.method, *key[2:]) in out:
                continue
            pair = compare(found, cell, Cell(cell.model, cell.task, reference, cell.seed), _seeds(found, cell))
            if pair is not None:
                out[key] = pair
    return list(out.values())


def _seeds(found: Results, cell: Cell) -> list[int]:
    same = (cell.model, cell.task, cell.method)
    return sorted(other.seed for other in found if (other.model, other.task, other.method) == same)


def _paired_markdown(plan: Plan, paired: Sequence[dict[str, Any]]) -> str:
    lines = [
        "| first | minus second | model | task | seeds | examples | points | 95% interval | McNemar p, first seed |",
        "|---|---|---|---|---|---|---|---|---|",
    ]
    for row in paired:
        p = "" if row["mcnemar_p"] is None else f"{row['mcnemar_p']:.3g}"
        interval = "" if row["ci_low"] is None else f"{row['ci_low']:+.1f} to {row['ci_high']:+.1f}"
        lines.append(
            f"| {plan.methods[row['first']].label} | {plan.methods[row['second']].label} "
            f"| {plan.scale.models[row['model']].label} | {plan.scale.tasks[row['task']].label} | {row['seeds']} "
            f"| {row['num_examples']} | {row['difference']:+.2f} | {interval} | {p} |"
        )
    return "\n".join(lines)


def _short(value: Any) -> Any:
    return "" if value is None else f"{value:.4g}" if isinstance(value, float) else value
