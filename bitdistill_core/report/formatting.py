"""Numbers and names as the report prints them."""

METHOD_LABELS = {
    "fp16_sft": "FP16-SFT",
    "bitnet_sft": "BitNet-SFT",
    "bitdistill": "BitDistill",
    "bitnet_sft_packed": "BitNet-SFT packed",
    "bitdistill_packed": "BitDistill packed",
}
PART_LABELS = {
    "loss": "total",
    "task_loss": "task loss",
    "logits_kd": "logits KD",
    "attention_kd": "attention KD",
    "hidden_kd": "block outputs",
}
NOT_MEASURED = "not measured"


def percent(share: float | None, digits: int = 1) -> str:
    """A share as a percentage."""
    return NOT_MEASURED if share is None else f"{100 * share:.{digits}f}%"


def points(difference: float) -> str:
    """A difference of shares in signed percentage points."""
    return f"{100 * difference:+.1f}"


def metric(name: str, value: float | None) -> str:
    """A task metric: accuracy, a fraction, as a percentage; ROUGE and BLEU, out of 100, as they are."""
    if value is None:
        return NOT_MEASURED
    return percent(value) if name == "accuracy" else f"{value:.2f}"


def interval(low: float | None, high: float | None) -> str:
    """A 95% interval of a share; empty where there is none."""
    return "" if low is None or high is None else f"{100 * low:.1f} to {100 * high:.1f}"


def amount(value: float | None) -> str:
    """A measured amount: three digits below 1000, whole numbers above."""
    if value is None:
        return NOT_MEASURED
    return f"{value:,.0f}" if abs(value) >= 1000 else f"{value:.3g}"


def times(value: float) -> str:
    """A ratio."""
    if value < 0.1:
        return f"{value:.2g}x"
    return f"{value:.2f}x" if value < 10 else f"{value:.0f}x"


def p_value(p: float) -> str:
    """A p value; never a false zero."""
    return "p < 0.001" if p < 0.001 else f"p = {p:.3f}"


def duration(seconds: float) -> str:
    """Seconds as hours, minutes and seconds."""
    whole = round(seconds)
    if whole < 60:
        return f"{seconds:.1f} s"
    minutes, rest = divmod(whole, 60)
    return f"{minutes} min {rest:02d} s" if minutes < 60 else f"{minutes // 60} h {minutes % 60:02d} min"
