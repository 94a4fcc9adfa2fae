"""Tables and pictures of measured results: `python -m benchmarks.report result.json [more.json ...] --out docs`.

Reads what `python -m benchmarks.engine --json` wrote and measures nothing. Writes engine-results.md, and
images/engine-roofline.png and images/engine-speed.png of the 0.6B result, or of the first one without it.
"""

import argparse
import json
import math
import re
import sys
import textwrap
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from itertools import product
from pathlib import Path
from statistics import median
from typing import Any

import matplotlib
from gguf.constants import GGML_QUANT_SIZES, GGMLQuantizationType
from matplotlib.axes import Axes
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure
from matplotlib.text import Text
from matplotlib.ticker import NullLocator, StrMethodFormatter
from matplotlib.transforms import Bbox

from benchmarks import shapes
from benchmarks.engine import ALL_TESTS, DECODE, ENGINE, KERNELS, MIB, PREFILL_512, QUIET_SHARE, ratios
from benchmarks.worker import GEMM_TOKENS
from bitdistill_core.engine.config import linear_layers
from bitdistill_core.report.plots import BLUE, GREEN, INK, STYLE, VERMILION

Result = Mapping[str, Any]  # the JSON file of one shape

PICTURED, GREY = "qwen3-0.6b", "#9aa4ae"
DPI, WIDTH = 160, 7.5  # 1200 pixels
CODES_PER_BYTE, SCAN_BITS = 4, 5  # of the body; of a head weight, those that the engine reads for each token
TESTS = {"prefill128": "prefill 128", "prefill512": "prefill 512", "decode": "decode", "classify_b32": "classify 32x64"}
GGUF = {f"llamacpp_{key}": gguf_type for key, gguf_type in shapes.GGUF_TYPES.items()}
LABELS = {ENGINE: "engine"}
LABELS |= {
    key: f"llama.cpp {kind.body}" + (f" + {kind.head} head" if kind.head != kind.body else "")
    for key, kind in GGUF.items()
}
LABELS |= {"torch_f32": "PyTorch float32", "torch_bf16": "PyTorch bfloat16"}
FIRST_TOKEN = "load_to_first_token_seconds"
OTHERS = {
    "gemm_vs_ceiling": "AVX2 matrix product / multiply-add ceiling of AVX2",
    "gemv_vs_bandwidth": "bytes/s of the one-token product / read bandwidth",
    "classify_rss_vs_f16_size": "memory added to classify / size in F16",
    "generate_rss_vs_f16_size": "memory added to generate / size in F16",
    FIRST_TOKEN: "load to first token, s",
}
GOALS = {
    "prefill512_vs_llamacpp_f16": 3.0,
    "prefill512_vs_llamacpp_tq2_0": 2.5,
    "prefill512_vs_torch_f32": 4.0,
    "decode_vs_llamacpp_f16": 6.0,
    "decode_vs_llamacpp_tq2_0": 1.5,
    "decode_vs_torch_f32": 18.0,
    "classify_b32_vs_llamacpp_f16": 3.3,
    "gemm_vs_ceiling": 0.85,
    "gemv_vs_bandwidth": 0.85,
    "classify_rss_vs_f16_size": 0.1,
    "generate_rss_vs_f16_size": 0.2,
    FIRST_TOKEN: 0.3,
}
SMALLER_IS_BETTER = ("f16_size", "seconds")  # ends of names

INTRODUCTION = """# Results of the engine

Written by `python -m benchmarks.report` from the files of `python -m benchmarks.engine`; do not edit.
[benchmarks/README.md](../benchmarks/README.md) says how each figure is measured. The models have random weights: the
figures are of speed and memory, not of quality. In classification the engine computes the logits of three labels,
llama.cpp those of the whole vocabulary."""
ELSEWHERE = """## Measured elsewhere, on a Zen 3 with AVX2 and the same two threads (other run, other day):

The 0.6B shapes, median tokens/s. Not comparable with the tables above except through the ratio to llama.cpp F16, which
itself differs from processor to processor. The 2026 kernels of bitnet.cpp ran in its tree of 2024, which has no norm of
queries and keys: the same shape without it.

| engine | type | head | prefill 512 | decode 64 | prefill / F16 | decode / F16 |
|---|---|---|---:|---:|---:|---:|
| llama.cpp | F16 | F16 | 137 | 17.6 | 1.00 | 1.00 |
| llama.cpp | TQ2_0 | Q4_0 | 147 | 71.3 | 1.01 | 4.20 |
| bitnet.cpp, 2026 kernels | I2_S | Q6_K | 158 | 58.8 | 1.16 | 3.23 |
| bitnet.cpp, October 2024 | TL2 | Q6_K | 92 | 49.5 | 0.65 | 2.74 |
| ik_llama.cpp | IQ2_BN | Q6_K | 239 | 53.6 | 1.47 | 3.06 |
| ik_llama.cpp | IQ2_BN_R4 | Q4_0 | 209 | 67.8 | 1.36 | 3.85 |"""
CAPTION = (
    "Whole models (prompt of 512, 64 tokens decoded): multiply-adds of the ternary body and, in decode, of the head; "
    "attention is left out. Bytes: decode reads body and head once a token, at their bits a weight (engine: 2, and of "
    "the head the 5 of 8 bits that it scans); prefill reads the body once for 512 tokens. Kernels alone: packed weights "
    "once, for 1 token (GEMV) or 512 (GEMM). Medians over rounds. "
)


def load(path: Path) -> Result:
    """The result of one shape; ValueError where the benchmark did not write the file."""
    wanted = {"figures", "environment", "file_bytes", "num_parameters", "rounds", "shapes", "skipped"}
    try:
        result: dict[str, Any] = json.loads(path.read_text())
        is_result = wanted <= set(result) and result["shapes"] in shapes.SHAPES
    except (OSError, ValueError, TypeError) as error:
        raise ValueError(f"a result is a JSON file; got path={path}: {error}") from error
    if not is_result:
        raise ValueError(f"a result is what python -m benchmarks.engine --json writes; path={path} is another file")
    return result


def markdown(results: Sequence[Result], pictured: str) -> str:
    """The page: both pictures, of the shape `pictured`, and the tables of every result."""
    pictures = f"![Tokens/s in prefill and decode, {pictured}](images/engine-speed.png)\n\n"
    blocks = [INTRODUCTION, f"{pictures}![Roofline of kernels and models, {pictured}](images/engine-roofline.png)"]
    for result in results:
        title = f"## {result['shapes']}, {result['environment']['kernel']} kernel"
        blocks += [title, _environment(result), _speeds(result), _comparison(result)]
    return "\n\n".join([*blocks, ELSEWHERE]) + "\n"


def _environment(result: Result) -> str:
    facts = result["environment"]
    shares = [share for values in result["figures"].values() for share in values["other_cpu_share"]]
    versions = ", ".join(f"{name} {version}" for name, version in facts["packages"].items())
    text = (
        f"{facts['cpu']} (family/model {facts['cpu_family_model']}; {', '.join(facts['cpu_flags'])}), "
        f"{facts['threads']} threads on {facts['cores']} cores, kernel {facts['kernel']}; Python {facts['python']}, "
        f"{versions}. {result['rounds']} rounds; {sum(share > QUIET_SHARE for share in shares)} of {len(shares)} "
        f"samples were disturbed: other processes took over {QUIET_SHARE:.0%} of the cores meanwhile."
    )
    if flags := re.findall(r"(\w+) = 1", facts.get("llamacpp_build", "")):
        text += f" llama.cpp was compiled with {', '.join(flags)}."
    return textwrap.fill(" ".join([text, *(f"Left out: {line}." for line in result["skipped"])]), 120)


def _configurations(result: Result) -> list[tuple[str, Mapping[str, Sequence[float]]]]:
    return [(name, result["figures"][name]) for name in LABELS if name in result["figures"]]


def _speeds(result: Result) -> str:
    metrics = [test.metric for test in ALL_TESTS]
    metrics += ["generate_added_rss_mib", "classify_added_rss_mib", "process_start_to_first_token_seconds"]
    title = f"| median tokens/s | {' | '.join(TESTS.values())} | file, MiB | memory added to generate, MiB "
    rows = [f"{title}| to classify, MiB | process start to first token, s |", "|---|" + 8 * "---:|"]
    for name, values in _configurations(result):
        cells = [_number(median(values[metric])) if metric in values else "-" for metric in metrics]
        size = result["file_bytes"].get(name)
        cells.insert(len(TESTS), _number(size / MIB) if size else "-")
        rows.append(f"| {'**engine**' if name == ENGINE else LABELS[name]} | {' | '.join(cells)} |")
    return "\n".join(rows)


def _number(value: float) -> str:
    return f"{value:.0f}" if value >= 100 else f"{value:.1f}" if value >= 10 else f"{value:.2f}"


def _comparison(result: Result) -> str:
    rows = ["The engine by each peer: medians of the ratios within a round, by which a goal is judged.", ""]
    rows += ["| figure | median | min to max over rounds | goal | goal is |", "|---|---:|---:|---:|---|"]
    for key, values in by_round(result).items():
        test, _, peer = key.partition("_vs_")
        label, value = OTHERS.get(key) or f"{TESTS[test]} / {LABELS[peer]}", median(values)
        spread = f"{min(values):.3g} to {max(values):.3g}" if len(values) > 1 else "one round"
        goal, met = "", ""
        if key in GOALS:
            is_memory_or_time = key.endswith(SMALLER_IS_BETTER)
            goal = f"at {'most' if is_memory_or_time else 'least'} {GOALS[key]:g}"
            met = "met" if (value <= GOALS[key] if is_memory_or_time else value >= GOALS[key]) else "not met"
        rows.append(f"| {label} | {value:.3g} | {spread} | {goal} | {met} |")
    return "\n".join(rows)


def by_round(result: Result) -> dict[str, list[float]]:
    """Every ratio, and the seconds to a first token: a value a round, fewer for peers with fewer rounds."""
    found: dict[str, list[float]] = {}
    for number in range(result["rounds"]):
        figures = {
            name: {metric: list(rounds[number : number + 1]) for metric, rounds in values.items() if rounds[number:]}
            for name, values in result["figures"].items()
        }
        for key, value in ratios(figures, result["num_parameters"]).items():
            found.setdefault(key, []).append(value)
    return found | {FIRST_TOKEN: result["figures"][ENGINE][FIRST_TOKEN]}


@dataclass(frozen=True)
class Point:
    """A measured speed in the roofline."""

    label: str
    intensity: float  # multiply-adds per byte
    speed: float  # GMAC/s
    colour: str


def points(result: Result) -> list[Point]:
    """Kernels alone, then whole models; `CAPTION` says what is counted."""
    found, kernels = [], result["figures"].get(KERNELS, {})
    for metric, values in kernels.items():
        if parts := re.fullmatch(r"gemm_(.+)_(\d+x\d+)_gmac_per_second", metric):
            intensity = CODES_PER_BYTE * GEMM_TOKENS
            found.append(Point(f"GEMM {parts[2]}, {parts[1]}", intensity, median(values), GREEN))
    if kernels:
        speed = CODES_PER_BYTE * median(kernels["gemv_gb_per_second"])
        found.append(Point(f"GEMV, {result['environment']['kernel']}", CODES_PER_BYTE, speed, GREEN))
    config = shapes.student_config(result["shapes"])
    body = sum(layer.n * layer.k for layer in linear_layers(config).values())
    head = config.vocab_size * config.hidden_size
    bits = {ENGINE: (8 / CODES_PER_BYTE, SCAN_BITS)} | {key: (_bits(t.body), _bits(t.head)) for key, t in GGUF.items()}
    for name, values in _configurations(result):
        if name in bits:
            colour = BLUE if name == ENGINE else VERMILION
            intensity = (body + head) * 8 / (body * bits[name][0] + head * bits[name][1])
            speeds = {test: median(values[test.metric]) / 1e9 for test in (DECODE, PREFILL_512)}
            found.append(Point(f"{LABELS[name]}, decode", intensity, speeds[DECODE] * (body + head), colour))
            intensity = PREFILL_512.tokens * 8 / bits[name][0]
            found.append(Point(f"{LABELS[name]}, prefill", intensity, speeds[PREFILL_512] * body, colour))
    return found


def _bits(gguf_type: str) -> float:
    weights, size = GGML_QUANT_SIZES[GGMLQuantizationType[gguf_type]]
    return 8 * size / weights


def _figure(height: float, layout: str | None = None) -> Figure:
    figure = Figure(figsize=(WIDTH, height), dpi=DPI, facecolor="white", layout=layout)
    FigureCanvasAgg(figure)
    return figure


def draw_speed(result: Result, path: Path) -> None:
    """Bars of prefill and decode, side by side."""
    found, facts = _configurations(result), result["environment"]
    figure = _figure(1.1 + 0.27 * len(found), "constrained")
    for panel, (test, title) in enumerate({PREFILL_512: "Prefill of 512 tokens", DECODE: "Decode"}.items()):
        axes = figure.add_subplot(1, 2, panel + 1)
        for row, (name, values) in enumerate(found):
            colour, weight = (BLUE, "bold") if name == ENGINE else (GREY, "normal")
            speed = median(values.get(test.metric, [0.0]))
            axes.barh(row, speed, color=colour, height=0.72)
            text = _number(speed) if speed else "not measured"
            axes.annotate(text, (speed, row), (4, 0), textcoords="offset points", va="center", weight=weight)
        axes.set_yticks(range(len(found)), [LABELS[name] for name, _ in found] if panel == 0 else len(found) * [""])
        axes.tick_params(axis="y", length=0)
        axes.spines["bottom"].set_visible(False)
        axes.xaxis.set_major_locator(NullLocator())
        axes.margins(x=0.2)
        axes.invert_yaxis()
        axes.set_title(f"{title}, tokens/s", fontsize=11, loc="left")
    figure.supxlabel(f"{result['shapes']} shapes, {facts['cpu']}, {facts['threads']} threads", fontsize=9)
    figure.savefig(path, metadata={"Software": None})


def draw_roofline(result: Result, path: Path) -> None:
    """Speed by multiply-adds per byte, under the roofs measured in the same run."""
    found, kernels = points(result), result["figures"].get(KERNELS, {})
    figure, top = _figure(6.0), 2 * max(point.speed for point in found)
    axes = figure.add_axes((0.08, 0.215, 0.905, 0.765))
    axes.set(xscale="log", yscale="log", xlim=(0.3, 60000), ylim=(min(point.speed for point in found) / 2, top))
    axes.set(xlabel="multiply-adds per byte of weights read", ylabel="GMAC/s")
    for axis in (axes.xaxis, axes.yaxis):
        axis.set_major_formatter(StrMethodFormatter("{x:g}"))
    if kernels:
        _draw_roofs(axes, kernels, result["environment"]["kernel"], top)
    for point in found:
        axes.plot(point.intensity, point.speed, "o", color=point.colour, markersize=5)
    _label(axes, found)
    facts = result["environment"]
    title = f"{result['shapes']} shapes, {facts['cpu']}, {facts['threads']} threads."
    figure.text(0.02, 0.015, textwrap.fill(CAPTION + title, 132), fontsize=7.5)
    figure.savefig(path, metadata={"Software": None})
