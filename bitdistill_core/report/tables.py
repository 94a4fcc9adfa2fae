"""The report's tables, as text cells."""

from collections.abc import Mapping
from typing import Any

from bitdistill_core.report.document import Table
from bitdistill_core.report.formatting import (
    METHOD_LABELS,
    amount,
    duration,
    interval,
    metric,
    p_value,
    percent,
    points,
    times,
)
from bitdistill_core.report.gather import METHODS, PACKED, TRAINING_STAGES, Run
from bitdistill_core.report.weights import WeightSummary

# key of a benchmark row and its label
MEASUREMENTS = {
    "file_mib": "File, MiB",
    "peak_rss_mib": "Peak memory, MiB",
    "added_rss_mib": "Memory added by the model, MiB",
    "prefill_tokens_per_second": "Prefill, tokens/s",
    "decode_tokens_per_second": "Decode, tokens/s",
    "ttft_ms": "First token, ms",
}


def headline_table(run: Run, results: Mapping[str, Any]) -> Table:
    """Methods as columns, so that it fits a phone. Second lines hold intervals and ratios to FP16-SFT."""
    rows = [[_metric_label(name), *(_score(row, name) for row in results["rows"])] for name in run.metric_names]
    packed = [run.evaluations[method].splits[run.headline] for method in PACKED.values()]
    if run.is_generation:
        for row, name in zip(rows, run.metric_names, strict=True):
            row[2:] = [f"{cell}\npacked {p['metrics'][name]:.2f}" for cell, p in zip(row[2:], packed, strict=True)]
    else:
        rows.append(["Accuracy, packed", "", *(_score({**p, **p["metrics"]}, "accuracy") for p in packed)])
    if results["paired"]:
        differences = [results["paired"][key] for key in ("bitdistill_vs_fp16_sft", "bitdistill_vs_bitnet_sft")]
        rows.append(["BitDistill's difference, points", *(_difference(item) for item in differences), ""])
    measured = [run.benchmark_row(method) for method in METHODS]
    for key, label in MEASUREMENTS.items():
        if any(key in row for row in measured) or key in results["rows"][0]:
            rows.append([label, *_with_ratios([row.get(key) for row in measured])])
    rows.append(["Engine", *(str(row.get("engine", "not measured")) for row in measured)])
    small = "the packed model, and ratios to FP16-SFT" if run.is_generation else "95% intervals, and ratios to FP16-SFT"
    caption = f"Split {run.headline}, {results['rows'][0]['num_examples']:,} examples. Small print: {small}."
    return Table(["", *(METHOD_LABELS[m] for m in METHODS)], rows, caption)


def splits_table(run: Run) -> Table:
    """Every method on every split."""
    shown = [(split, name) for split in run.evaluations["fp16_sft"].split_order for name in run.metric_names]
    rows = []
    for method, evaluation in run.evaluations.items():
        numbers = {split: {**evaluation.splits[split], **evaluation.splits[split]["metrics"]} for split, _ in shown}
        rows.append([METHOD_LABELS[method], *(_score(numbers[split], name) for split, name in shown)])
    examples = {split: numbers["num_examples"] for split, numbers in run.evaluations["fp16_sft"].splits.items()}
    counts = ", ".join(f"{split} {examples[split]:,}" for split in dict.fromkeys(split for split, _ in shown))
    columns = [split if name == "accuracy" else f"{split} {name}" for split, name in shown]
    small = "" if run.is_generation else " Small print: 95% intervals."
    return Table(["", *columns], rows, f"Examples: {counts}.{small}")


def paired_table(results: Mapping[str, Any]) -> Table:
    """BitDistill against the other two on the same examples."""
    rows = [
        [
            f"{METHOD_LABELS[item['first']]} vs {METHOD_LABELS[item['second']]}",
            _difference(item),
            f"{item['only_first_correct']:,}",
            f"{item['only_second_correct']:,}",
            p_value(item["mcnemar_p"]),
        ]
        for item in results["paired"].values()
    ]
    return Table(["", "Difference, points", "Only first right", "Only second right", "McNemar"], rows)


def agreement_table(run: Run, results: Mapping[str, Any]) -> Table:
    """Share of examples on which the packed model repeats its student, with counts."""

    def cell(method: str, split: str) -> str:
        share = results["packed_agreement"][method][split]
        total = run.evaluations[method].splits[split]["num_examples"]
        return f"{percent(share, 2)}\n{round(share * total):,} of {total:,}"

    splits = run.evaluations["fp16_sft"].split_order
    rows = [[split, *(cell(method, split) for method in PACKED)] for split in splits]
    return Table(["Split", *(METHOD_LABELS[method] for method in PACKED)], rows)


def weights_table(summaries: Mapping[str, WeightSummary]) -> Table:
    """Shares of codes and of weights near a threshold, by checkpoint."""
    rows = [
        [name, *(percent(share) for share in summary.code_shares), percent(summary.near_share, 2)]
        for name, summary in summaries.items()
    ]
    return Table(["Latent weights", "-1", "0", "+1", "Within 0.05 of a threshold"], rows)


def time_table(run: Run) -> Table:
    """What each stage took."""
    seconds = run.seconds()
    total = sum(seconds.values())
    rows = [[name, duration(value), percent(value / total if total else 0.0)] for name, value in seconds.items()]
    return Table(["Stage", "Time", "Share"], [*rows, ["total", duration(total), ""]])


def model_table(run: Run) -> Table:
    """Sizes of model and data."""
    counts = {**run.metrics["base"], **run.metrics["surgery"], **run.metrics["data"]}
    labels = {
        "base/num_parameters": "Parameters",
        "surgery/num_ternary_weights": "Ternary weights",
        "surgery/num_bit_linears": "BitLinear layers",
        "surgery/num_sub_norms": "Sub-norms inserted",
        "data/num_documents": "Documents of general text",
    }
    prefix = "data/num_examples_"
    labels.update({name: f"Examples, {name.removeprefix(prefix)}" for name in counts if name.startswith(prefix)})
    rows = [[label, f"{counts[name]:,.0f}"] for name, label in labels.items() if name in counts]
    for stage in TRAINING_STAGES:
        if share := run.metrics[stage].get(f"{stage}/cut_share"):
            rows.append([f"Examples cut at {stage}.max_length", percent(share)])
    if (epochs := run.metrics["pretrain"].get("pretrain/corpus_epochs", 0)) > 1:
        rows.append(["Times that pre-training read the corpus", f"{epochs:.1f}"])
    return Table(["What", "Count"], rows)


def environment_table(run: Run) -> Table:
    """The machine of the benchmark and its settings."""
    settings = {key: value for key, value in run.benchmark.items() if isinstance(value, str | int | float)}
    values = {**run.benchmark.get("environment", {}), **settings}
    return Table(["Benchmark", "Value"], [[name.replace("_", " "), str(value)] for name, value in values.items()])


def spread_table(run: Run) -> Table:
    """Lowest and highest round of the speeds; no rows where the benchmark recorded none."""
    rows = []
    for method in METHODS:
        row = run.benchmark_row(method)
        found = [row.get(key) for key in ("prefill_spread", "decode_spread")]
        if any(found):
            rows.append([METHOD_LABELS[method], *(f"{f[0]:,.0f} to {f[1]:,.0f}" if f else "" for f in found)])
    return Table(["Lowest to highest round", "Prefill, tokens/s", "Decode, tokens/s"], rows)


def _metric_label(name: str) -> str:
    return "Accuracy" if name == "accuracy" else name


def _score(numbers: Mapping[str, Any], name: str) -> str:
    text = interval(numbers.get("ci_low"), numbers.get("ci_high")) if name == "accuracy" else ""
    return metric(name, numbers.get(name)) + (f"\n{text}" if text else "")


def _difference(paired: Mapping[str, Any]) -> str:
    return f"{points(paired['difference'])}\n{points(paired['ci_low'])} to {points(paired['ci_high'])}"


def _with_ratios(values: list[float | None]) -> list[str]:
    """Amounts, and below each its ratio to the first."""
    first = values[0]
    cells = [amount(value) for value in values]
    for index, value in enumerate(values):
        if index and value is not None and first:
            cells[index] += f"\n{times(value / first)}"
    return cells
