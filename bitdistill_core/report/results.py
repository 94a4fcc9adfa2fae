"""results.json: the headline numbers of a run for machines, and the flat metrics of the report stage."""

from typing import Any

from bitdistill_core.report import paired
from bitdistill_core.report.gather import METHODS, PACKED, Run

MEASURED = ("file_mib", "peak_rss_mib", "prefill_tokens_per_second", "decode_tokens_per_second")
FLOORS = ("majority_accuracy", "naive_bayes_accuracy")


def build_results(run: Run) -> dict[str, Any]:
    """The content of results.json. Accuracies are fractions; what was not measured is null.

    A generation task has accuracy null and its own metrics in every row, and no paired comparison.
    """
    seconds = run.seconds()
    return {
        "profile": run.profile,
        "run": run.name,
        "seed": run.seed,
        "task": run.evaluations["fp16_sft"].task,
        "headline_split": run.headline,
        "minutes": sum(seconds.values()) / 60,
        "rows": [_row(run, method) for method in METHODS],
        "splits": {
            split: {method: evaluation.splits[split] for method, evaluation in run.evaluations.items()}
            for split in run.evaluations["fp16_sft"].split_order
        },
        "packed_agreement": {
            method: {
                split: paired.agreement(run.evaluations[method], run.evaluations[packed], split)
                for split in run.evaluations[method].split_order
            }
            for method, packed in PACKED.items()
        },
        "floors": _floors(run),
        "paired": _paired(run),
    }


def flat_metrics(results: dict[str, Any]) -> dict[str, float]:
    """The report's final numbers, names as elsewhere: report/accuracy_bitdistill, report/minutes, ..."""
    metrics = {"report/minutes": float(results["minutes"])}
    split = results["splits"][results["headline_split"]]
    for method in METHODS:
        for name, value in split[method]["metrics"].items():
            metrics[f"report/{name}_{method}"] = float(value)
    for comparison in results["paired"].values():
        metrics[f"report/difference_to_{comparison['second']}"] = comparison["difference"]
    for method, shares in results["packed_agreement"].items():
        metrics[f"report/packed_agreement_{method}"] = shares[results["headline_split"]]
    return metrics


def _row(run: Run, method: str) -> dict[str, Any]:
    numbers = run.evaluations[method].splits[run.headline]
    measured = run.benchmark_row(method)
    row = {
        "method": method,
        "accuracy": numbers["metrics"].get("accuracy"),
        "ci_low": numbers.get("ci_low"),
        "ci_high": numbers.get("ci_high"),
        "num_examples": numbers["num_examples"],
        **{name: measured.get(name) for name in MEASURED},
    }
    return {**row, **(numbers["metrics"] if run.is_generation else {})}


def _floors(run: Run) -> dict[str, float]:
    """What the data stage measured on the headline split; empty for a generation task."""
    metrics = run.metrics["data"]
    return {name: metrics[f"data/{name}"] for name in FLOORS if f"data/{name}" in metrics}


def _paired(run: Run) -> dict[str, Any]:
    if run.is_generation:
        return {}
    student = run.evaluations["bitdistill"]
    return {
        f"bitdistill_vs_{other}": paired.compare(student, run.evaluations[other], run.headline)
        for other in ("fp16_sft", "bitnet_sft")
    }
