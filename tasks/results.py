"""results.json of the report stage as flat numbers and as a Markdown table."""

from collections.abc import Mapping
from typing import Any


def headline_metrics(results: Mapping[str, Any]) -> dict[str, float]:
    """METHOD/NAME of every number in the rows."""
    return {
        f"{row['method']}/{key}": float(value)
        for row in results["rows"]
        for key, value in row.items()
        if isinstance(value, (int, float)) and not isinstance(value, bool)
    }


def packed_score(results: Mapping[str, Any]) -> float:
    """What the packed student scores on the headline split: accuracy, or the ROUGE-Lsum of generated texts."""
    metrics = results["splits"][results["headline_split"]]["bitdistill_packed"]["metrics"]
    return float(metrics["accuracy"] if "accuracy" in metrics else metrics["rougeLsum"])


def results_table(results: Mapping[str, Any]) -> str:
    """The rows as a Markdown table, without the columns in which no row has a value."""
    rows = results["rows"]
    columns = [key for key in rows[0] if key != "method" and any(row.get(key) is not None for row in rows)]
    lines = [["method", *columns], ["---"] * (len(columns) + 1)]
    lines += [[row["method"], *(_cell(row.get(key)) for key in columns)] for row in rows]
    return "\n".join(f"| {' | '.join(line)} |" for line in lines)


def _cell(value: Any) -> str:
    return "" if value is None else f"{value:.4g}" if isinstance(value, float) else str(value)
