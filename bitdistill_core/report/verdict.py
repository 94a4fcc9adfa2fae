"""The sentences that the numbers of results.json justify, good or bad."""

from collections.abc import Mapping
from typing import Any

from bitdistill_core.report.formatting import METHOD_LABELS, metric, p_value, percent, points, times


def verdict(results: Mapping[str, Any]) -> str:
    """One sentence: BitDistill against its teacher and against BitNet-SFT, then size and speed."""
    quality = _accuracy_verdict(results) if results["paired"] else _generation_verdict(results)
    return f"{quality}{_floor_clause(results)}{_cost_clause(results)}."


def floors(results: Mapping[str, Any]) -> str:
    """What needs no language model, and who fails to beat it. Empty without floors."""
    known = results["floors"]
    if not known:
        return ""
    names = {"majority_accuracy": "always the commonest label", "naive_bayes_accuracy": "naive Bayes on words"}
    best = max(known.values())
    beaten = [
        METHOD_LABELS[method]
        for method, row in _rows(results).items()
        if row["accuracy"] is not None and row["accuracy"] <= best
    ]
    text = f"Floors on {results['headline_split']}, which need no language model: "
    text += ", ".join(f"{names[name]} {percent(value)}" for name, value in known.items()) + "."
    return text + (f" Not above the higher floor: {', '.join(beaten)}." if beaten else "")


def _accuracy_verdict(results: Mapping[str, Any]) -> str:
    teacher, baseline = results["paired"]["bitdistill_vs_fp16_sft"], results["paired"]["bitdistill_vs_bitnet_sft"]
    return (
        f"On {results['headline_split']} BitDistill is {_comparison(teacher)} its FP16 teacher {_evidence(teacher)} "
        f"and {_comparison(baseline)} BitNet-SFT {_evidence(baseline)}"
    )


def _rows(results: Mapping[str, Any]) -> dict[str, Mapping[str, Any]]:
    return {row["method"]: row for row in results["rows"]}


def _floor_clause(results: Mapping[str, Any]) -> str:
    """Models that learned nothing are not told apart either: that must not read as success."""
    accuracy, best = _rows(results)["bitdistill"]["accuracy"], max(results["floors"].values(), default=None)
    if accuracy is None or best is None or accuracy > best:
        return ""
    return f"; at {percent(accuracy)} it is not above the floor of {percent(best)} that needs no language model"


def _comparison(paired: Mapping[str, Any]) -> str:
    """Words for a difference. An interval that holds zero is said not to tell the two apart."""
    if paired["ci_low"] <= 0 <= paired["ci_high"]:
        return "not distinguishable from"
    return f"{abs(100 * paired['difference']):.1f} points {'below' if paired['difference'] < 0 else 'above'}"


def _evidence(paired: Mapping[str, Any]) -> str:
    if not paired["only_first_correct"] and not paired["only_second_correct"]:
        return f"(right and wrong on the same {paired['num_examples']:,} examples)"
    low, high = points(paired["ci_low"]), points(paired["ci_high"])
    is_unclear = paired["ci_low"] <= 0 <= paired["ci_high"]
    difference = f"difference {points(paired['difference'])}, " if is_unclear else ""
    return f"({difference}95% interval {low} to {high}, McNemar {p_value(paired['mcnemar_p'])})"


def _generation_verdict(results: Mapping[str, Any]) -> str:
    rows = _rows(results)
    teacher, baseline, student = rows["fp16_sft"], rows["bitnet_sft"], rows["bitdistill"]
    split = results["splits"][results["headline_split"]]["fp16_sft"]["metrics"]
    name = "rougeLsum" if "rougeLsum" in split else next(iter(split))
    return (
        f"On {results['headline_split']} BitDistill reaches {name} {metric(name, student[name])}, its FP16 teacher "
        f"{metric(name, teacher[name])} and BitNet-SFT {metric(name, baseline[name])} (no intervals for generated text)"
    )


def _cost_clause(results: Mapping[str, Any]) -> str:
    rows = _rows(results)
    teacher, student = rows["fp16_sft"], rows["bitdistill"]
    parts = []
    if teacher["file_mib"] and student["file_mib"]:
        parts.append(f"its file is {times(student['file_mib'] / teacher['file_mib'])} the size")
    if teacher["decode_tokens_per_second"] and student["decode_tokens_per_second"]:
        ratio = student["decode_tokens_per_second"] / teacher["decode_tokens_per_second"]
        parts.append(f"it decodes at {times(ratio)} the speed")
    return "; against the teacher " + " and ".join(parts) if parts else "; size and speed were not measured"
