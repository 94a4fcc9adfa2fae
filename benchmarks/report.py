"""Tables and pictures of measured results: `python -m benchmarks.report result.json [more.json ...] --out docs`.

Reads what `python -m benchmarks.engine --json` wrote and measures nothing. Writes engine-results.md, and
images/engine-roofline.png and images/engine-speed.png of the 0.6B result, or of the first one without it.
"""

import argparse
import json
import re
import sys
import textwrap
from collections.abc import Mapping, Sequence
from itertools import product
from pathlib import Path
from statistics import median
from typing import Any, NamedTuple

import matplotlib
import numpy as np
from gguf.constants import GGML_QUANT_SIZES, GGMLQuantizationType
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.transforms import Bbox, IdentityTransform

from benchmarks import shapes
from benchmarks.engine import (
    ALL_TESTS,
    DECODE,
    ENGINE,
    FIRST_TOKEN,
    KERNELS,
    MIB,
    PREFILL_512,
    QUIET_SHARE,
    UNWARMED_FIRST_TOKEN,
    ratios,
)
from benchmarks.worker import GEMM_TOKENS, GEMV_2BIT
from bitdistill_core.engine.config import linear_layers
from bitdistill_core.packing import FORMAT_VERSION
from bitdistill_core.report.plots import BLUE, GREEN, INK, STYLE, VERMILION

Result = Mapping[str, Any]  # the JSON file of one shape

PICTURED, GREY = "qwen3-0.6b", "#9aa4ae"
DPI, WIDTH = 160, 7.5  # 1200 pixels
SCAN_BITS = 5  # of a head weight: those that the engine reads for each token
TESTS = {"prefill128": "prefill 128", "prefill512": "prefill 512", "decode": "decode", "classify_b32": "classify 32x64"}
GGUF = {f"llamacpp_{key}": gguf_type for key, gguf_type in shapes.GGUF_TYPES.items()}
LABELS = {ENGINE: "engine"}
LABELS |= {key: f"llama.cpp {t.body} + {t.head} head".replace(f" + {t.body} head", "") for key, t in GGUF.items()}
LABELS |= {"torch_f32": "PyTorch float32", "torch_bf16": "PyTorch bfloat16"}
GOALS = {  # at least, for shapes of Qwen3-0.6B
    "prefill512": {"llamacpp_f16": 3.0, "llamacpp_tq2_0": 2.5, "torch_f32": 4.0},
    "decode": {"llamacpp_f16": 6.0, "llamacpp_tq2_0": 1.5, "torch_f32": 18.0},
    "classify_b32": {"llamacpp_f16": 3.3},
}
OTHER_SHAPES = 0.85  # of these goals for others
OTHERS = {
    "gemm_vs_ceiling": ("AVX2 matrix product / multiply-add ceiling of AVX2", "at least", 0.85),
    "gemv_vs_bandwidth": ("bytes/s of the one-token product / read bandwidth", "at least", 0.85),
    "gemv_2bit_vs_bandwidth": ("the same, with two bits a weight", "at least", 0.85),
    "classify_rss_vs_f16_size": ("memory added to classify / size in F16", "at most", 0.1),
    "generate_rss_vs_f16_size": ("memory added to generate / size in F16", "at most", 0.2),
    FIRST_TOKEN: ("load to first token, s", "at most", 0.3),
    UNWARMED_FIRST_TOKEN: ("the same in the process before it, s", "at most", 0.0),
}
# From a point to its name, times a distance: the first that is free is taken.
DIRECTIONS = ((1, 0.0), (-1, 0.0), (1, -0.4), (1, 0.4), (-1, 0.4), (-1, -0.4), (1, -1.2), (1, 1.2), (-1, 1.2))

INTRODUCTION = """# Results of the engine

Written by `python -m benchmarks.report` from files of `python -m benchmarks.engine`; do not edit. The models have
random weights: the figures are of speed and added memory, not of quality. In classification the engine computes the
logits of three labels, llama.cpp those of the whole vocabulary. Goals were set in advance for a Zen 3 with two cores;
those of speed beside other engines are 15% lower for other shapes than qwen3-0.6b. Family/model 25/1 is a Zen 3, 25/17
a Zen 4, 26/2 a Zen 5. [How it is measured](../benchmarks/README.md)."""
ELSEWHERE = """## Measured elsewhere: other engines on a Zen 3

The 0.6B shapes with two threads, median tokens/s of another day; ratios are medians over rounds, not quotients of the
columns. Comparable with the tables above only through the ratio to llama.cpp F16, which differs between processors.
bitnet.cpp (tree of 2024) has no norm of queries and keys and ran without it.

| engine | type | head | prefill 512 | decode 64 | prefill / F16 | decode / F16 |
|---|---|---|---:|---:|---:|---:|
| llama.cpp | F16 | F16 | 137 | 17.6 | 1.00 | 1.00 |
| llama.cpp | TQ2_0 | Q4_0 | 147 | 71.3 | 1.01 | 4.20 |
| bitnet.cpp, 2026 kernels | I2_S | Q6_K | 158 | 58.8 | 1.16 | 3.23 |
| bitnet.cpp, October 2024 | TL2 | Q6_K | 92 | 49.5 | 0.65 | 2.74 |
| ik_llama.cpp | IQ2_BN | Q6_K | 239 | 53.6 | 1.47 | 3.06 |
| ik_llama.cpp | IQ2_BN_R4 | Q4_0 | 209 | 67.8 | 1.36 | 3.85 |"""
CAPTION = """Whole models (prompt of 512; 64 tokens decoded): multiply-adds of ternary body and, in decode, output head,
without attention. Bytes: decode reads body and head once a token, at their bits a weight (engine: 1.68, or 2 on
AArch64, and the 5 of 8 bits of the head that it scans); prefill reads the body once for 512 tokens. Kernels alone:
packed weights once, for 1 token (GEMV) or 512 (GEMM). Medians over rounds. """


def load(path: Path) -> Result:
    """The result of one shape; ValueError where the benchmark did not write the file."""
    wanted = {"figures", "environment", "file_bytes", "num_parameters", "rounds", "shapes", "skipped"}
    try:
        result: Any = json.loads(path.read_text())
    except (OSError, ValueError) as error:
        raise ValueError(f"a result is a JSON file; got path={path}: {error}") from error
    if not isinstance(result, dict) or not wanted <= set(result) or result["shapes"] not in shapes.SHAPES:
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
        f"samples disturbed (other processes took more than {QUIET_SHARE:.0%} of the cores meanwhile)."
    )
    packed_format = facts.get("packed_format", "4" if "code_bits" in facts else "3")
    if packed_format != FORMAT_VERSION:
        text += f" An earlier engine, with packed format {packed_format} and keys and values in float32."
    if packed_format == "3":
        text += " Two bits a weight, the head's lower bits read from the file."
    if flags := re.findall(r"(\w+) = 1", facts.get("llamacpp_build", "")):
        text += f" llama.cpp was compiled with {', '.join(flags)}."
    return textwrap.fill(" ".join([text, *(f"Left out: {line}." for line in result["skipped"])]), 120)


def _configurations(result: Result) -> list[tuple[str, Mapping[str, Sequence[float]]]]:
    return [(name, result["figures"][name]) for name in LABELS if name in result["figures"]]


def _speeds(result: Result) -> str:
    metrics = [test.metric for test in ALL_TESTS]
    metrics += ["generate_added_rss_mib", "classify_added_rss_mib", "process_start_to_first_token_seconds"]
    title = f"| median tokens/s | {' | '.join(TESTS.values())} | file, MiB | added to generate, MiB "
    rows = [f"{title}| added to classify, MiB | process start to first token, s |", "|---|" + 8 * "---:|"]
    for name, values in _configurations(result):
        cells = [_number(median(values[metric])) if metric in values else "-" for metric in metrics]
        cells.insert(len(TESTS), _number(result["file_bytes"][name] / MIB) if name in result["file_bytes"] else "-")
        rows.append(f"| {'**engine**' if name == ENGINE else LABELS[name]} | {' | '.join(cells)} |")
    return "\n".join(rows)


def _number(value: float) -> str:
    return f"{value:.{3 - sum(value >= limit for limit in (1, 10, 100))}f}"


def _comparison(result: Result) -> str:
    rows = ["Ratios within a round, and their medians over rounds, by which a goal is judged:", ""]
    rows += ["| figure | median | min to max over rounds | goal | goal is |", "|---|---:|---:|---:|---|"]
    for key, values in by_round(result).items():
        test, _, peer = key.partition("_vs_")
        least = GOALS.get(test, {}).get(peer, 0.0) * (1 if result["shapes"] == PICTURED else OTHER_SHAPES)
        speed = (f"{TESTS.get(test)} / {LABELS.get(peer)}", "at least", least)
        (label, direction, goal), value = OTHERS.get(key, speed), median(values)
        spread = f"{_number(min(values))} to {_number(max(values))}" if len(values) > 1 else "one round"
        is_met = value <= goal if direction == "at most" else value >= goal
        judged = f"{direction} {goal:g} | {'met' if is_met else 'not met'}" if goal else " | "
        rows.append(f"| {label} | {_number(value)} | {spread} | {judged} |")
    return "\n".join(rows)


def by_round(result: Result) -> dict[str, list[float]]:
    """Every ratio, and the seconds to a first token: a value a round, fewer for peers with fewer rounds.

    Files from before there were two processes have the seconds of one, which nothing warmed.
    """
    found: dict[str, list[float]] = {}
    for number in range(result["rounds"]):
        figures = {
            name: {metric: list(rounds[number : number + 1]) for metric, rounds in values.items() if rounds[number:]}
            for name, values in result["figures"].items()
        }
        for key, value in ratios(figures, result["num_parameters"]).items():
            found.setdefault(key, []).append(value)
    engine = result["figures"][ENGINE]
    return found | {metric: engine[metric] for metric in (FIRST_TOKEN, UNWARMED_FIRST_TOKEN) if metric in engine}


class Point(NamedTuple):
    """A measured speed in the roofline."""

    label: str
    intensity: float  # multiply-adds per byte
    speed: float  # GMAC/s
    colour: str


def points(result: Result) -> list[Point]:
    """Kernels alone, then whole models; `CAPTION` says what is counted."""
    found, active = [], result["environment"]["kernel"]
    code_bits = result["environment"].get("code_bits", 2.0)  # results of older versions have none
    for metric, values in result["figures"][KERNELS].items():
        if parts := re.fullmatch(r"gemm_(.+)_(\d+x\d+)_gmac_per_second", metric):
            label = f"GEMM {parts[2]}, {parts[1]}"
            bits = code_bits if parts[1] == active else 2
            found.append(Point(label, 8 / bits * GEMM_TOKENS, median(values), GREEN))
        elif metric == "gemv_gb_per_second":
            found.append(Point(f"GEMV, {active}", 8 / code_bits, 8 / code_bits * median(values), GREEN))
        elif metric == GEMV_2BIT:
            found.append(Point(f"GEMV of two bits, {active}", 4.0, 4.0 * median(values), GREEN))
    config = shapes.student_config(result["shapes"])
    body = sum(layer.n * layer.k for layer in linear_layers(config).values())
    head = config.vocab_size * config.hidden_size
    bits = {ENGINE: (code_bits, SCAN_BITS)} | {key: (_bits(t.body), _bits(t.head)) for key, t in GGUF.items()}
    for name, values in _configurations(result):
        if name in bits:
            label, colour = LABELS[name].removesuffix(" head"), BLUE if name == ENGINE else VERMILION
            intensity = (body + head) * 8 / (body * bits[name][0] + head * bits[name][1])
            speed = (body + head) * median(values[DECODE.metric]) / 1e9
            found.append(Point(f"{label}, decode", intensity, speed, colour))
            speed = body * median(values[PREFILL_512.metric]) / 1e9
            found.append(Point(f"{label}, prefill", PREFILL_512.tokens * 8 / bits[name][0], speed, colour))
    return found


def _bits(gguf_type: str) -> float:
    weights, size = GGML_QUANT_SIZES[GGMLQuantizationType[gguf_type]]
    return 8 * size / weights


def draw_speed(result: Result, path: Path) -> None:
    """Bars of prefill and decode, side by side."""
    found, facts = _configurations(result), result["environment"]
    figure = Figure(figsize=(WIDTH, 1.1 + 0.27 * len(found)), dpi=DPI, layout="constrained", facecolor="white")
    for panel, (test, title) in enumerate({PREFILL_512: "Prefill of 512 tokens", DECODE: "Decode"}.items()):
        axes = figure.add_subplot(1, 2, panel + 1)
        speeds = [median(values.get(test.metric, [0.0])) for _, values in found]
        bars = axes.barh(range(len(found)), speeds, color=[BLUE if name == ENGINE else GREY for name, _ in found])
        texts = axes.bar_label(bars, [_number(speed) if speed else "not measured" for speed in speeds], padding=4)
        texts[0].set_fontweight("bold")
        labels = [LABELS[name] if panel == 0 else "" for name, _ in found]
        axes.set(xticks=[], yticks=range(len(found)), yticklabels=labels, ylim=(len(found) - 0.4, -0.6))
        axes.tick_params(axis="y", length=0)
        axes.spines["bottom"].set_visible(False)
        axes.margins(x=0.2)
        axes.set_title(f"{title}, tokens/s", fontsize=11, loc="left")
    figure.supxlabel(f"{result['shapes']} shapes, {facts['cpu']}, {facts['threads']} threads", fontsize=9)
    figure.savefig(path, metadata={"Software": None})


def draw_roofline(result: Result, path: Path) -> None:
    """Speed by multiply-adds per byte, under the roofs measured in the same run."""
    found, facts = points(result), result["environment"]
    figure, top = Figure(figsize=(WIDTH, 6.0), dpi=DPI, facecolor="white"), 2 * max(p.speed for p in found)
    axes = figure.add_axes((0.095, 0.215, 0.89, 0.765))
    axes.set_yscale("log", subs=(2, 5))
    axes.set(xscale="log", xlim=(0.3, 60000), ylim=(min(p.speed for p in found) / 2, top))
    axes.set(xlabel="multiply-adds per byte of weights read", ylabel="GMAC/s")
    axes.xaxis.set(major_formatter="{x:g}")
    axes.yaxis.set(major_formatter="{x:g}", minor_formatter="{x:g}")
    _draw_roofs(axes, result["figures"][KERNELS], facts["kernel"], top)
    _draw_points(axes, found)
    title = f"{result['shapes']} shapes, {facts['cpu']}, {facts['threads']} threads."
    figure.text(0.02, 0.015, textwrap.fill(CAPTION + title, 132), fontsize=7.5)
    figure.savefig(path, metadata={"Software": None})


def _draw_roofs(axes: Axes, kernels: Mapping[str, Sequence[float]], active: str, top: float) -> None:
    bandwidth = median(kernels["read_bandwidth_gb_per_second"])
    axes.plot([0.01, top / bandwidth], [0.01 * bandwidth, top], color=INK, linewidth=1.2)
    axes.text(0.85 * top / bandwidth, 0.75 * top, f"read bandwidth, {bandwidth:.0f} GB/s", fontsize=8.5)
    if ceilings := kernels.get("multiply_add_ceiling_gmac_per_second"):
        ceiling, ridge = median(ceilings), median(ceilings) / bandwidth
        axes.plot([ridge, 1e6], [ceiling, ceiling], color=INK, linewidth=1.2)
        text = f"AVX2 ceiling, {ceiling:.0f} GMAC/s\n(vpmaddubsw + vpaddw)"
        axes.text(1.3 * ridge, 0.96 * ceiling, text, fontsize=8.5, va="top")
        rates = [median(values) for metric, values in kernels.items() if metric.startswith(f"gemm_{active}_")]
        if max(rates) > ceiling:
            how = "sums from tables" if active == "avx2" else "one instruction for the two"
            text = f"{active}: {how},\nits GEMM exceeds the ceiling of AVX2"
            axes.text(50000, 0.95 * top, text, fontsize=8.5, color=GREEN, va="top", ha="right")


def _draw_points(axes: Axes, found: Sequence[Point]) -> None:
    """Each name at the nearest place that is free of points, roofs, names and, if possible, lines to them."""
    spots = {point: axes.transData.transform((point.intensity, point.speed)) for point in found}
    taken = [text.get_window_extent() for text in axes.texts]
    taken += [Bbox.from_bounds(x - 6, y - 6, 12, 12) for x, y in spots.values()]
    taken += [box for roof in axes.lines for box in _boxes(*axes.transData.transform(roof.get_xydata()))]
    for point, (x, y) in sorted(spots.items(), key=lambda item: -item[0].speed):
        axes.plot(*point[1:3], "o", color=point.colour, markersize=5, zorder=2 + (point.colour == BLUE))
        text = axes.text(x, y, point.label, fontsize=8, va="center", transform=IdentityTransform())
        text.set(color=point.colour, fontweight="bold" if point.colour == BLUE else "normal")
        for may_cross, distance, (dx, dy) in product((False, True), range(11, 200, 4), DIRECTIONS):
            end = (x + distance * dx, y + distance * dy)
            text.set(position=end, ha="left" if dx > 0 else "right")
            box, way = text.get_window_extent(), _boxes((x + 9 * dx, y + 9 * dy), end)
            is_free = not any(part.count_overlaps(taken) for part in ([box] if may_cross else [box, *way]))
            if is_free and all(axes.bbox.contains(*corner) for corner in (box.min, box.max)):
                break
        taken += [box, *way]
        if distance > 11 or dy:
            path = ((x, end[0] - 3 * dx), (y, end[1] - 3 * dy))
            axes.plot(*path, color=point.colour, linewidth=0.7, transform=IdentityTransform())


def _boxes(begin: Sequence[float], end: Sequence[float]) -> list[Bbox]:
    return [Bbox.from_bounds(x, y, 1, 1) for x, y in np.linspace(begin, end, 60)]


def main(argv: Sequence[str] | None = None) -> None:
    parser = argparse.ArgumentParser(prog="python -m benchmarks.report", description="Tables and pictures of results.")
    parser.add_argument("results", nargs="+", type=Path, help="JSON files of python -m benchmarks.engine")
    parser.add_argument("--out", type=Path, default=Path("docs"), help="folder (default: %(default)s)")
    arguments = parser.parse_args(argv)
    try:
        results = [load(path) for path in arguments.results]
    except ValueError as error:
        sys.exit(f"error: {error}")
    pictured, images = next((r for r in results if r["shapes"] == PICTURED), results[0]), arguments.out / "images"
    images.mkdir(parents=True, exist_ok=True)
    with matplotlib.rc_context(STYLE):
        draw_speed(pictured, images / "engine-speed.png")
        draw_roofline(pictured, images / "engine-roofline.png")
    (arguments.out / "engine-results.md").write_text(markdown(results, pictured["shapes"]))


if __name__ == "__main__":
    main()
