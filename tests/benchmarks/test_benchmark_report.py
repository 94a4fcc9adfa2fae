"""The report of the benchmark: its figures from measurements written out here, its pictures only for being drawn."""

import copy
import json
import statistics
from pathlib import Path
from typing import Any

import matplotlib
import pytest
from matplotlib.figure import Figure
from matplotlib.image import imread

from benchmarks import engine, report
from benchmarks.worker import GEMM_SHAPES, gemm_metric

BODY, HEAD = 28 * (2048 + 1024 + 1024 + 2048 + 3 * 3072) * 1024, 151936 * 1024  # Qwen3-0.6B
RESULT: dict[str, Any] = {
    "shapes": "qwen3-0.6b",
    "num_parameters": 2**29,  # 1024 MiB in F16
    "rounds": 3,
    "skipped": ["torch bf16 was not asked for"],
    "file_bytes": {"engine": 256 * 2**20, "llamacpp_f16": 1137 * 2**20},
    "environment": {
        "cpu": "Some CPU",
        "cpu_family_model": "25/1",
        "cpu_flags": ["avx2", "fma"],
        "threads": 2,
        "cores": 4,
        "kernel": "avx512-vnni",
        "system": "some system",
        "python": "3.11.7",
        "packages": {"bitdistill": "0.1.0", "numpy": "2.4.6"},
        "llamacpp_build": "CPU : AVX2 = 1 | AVX512 = 0 | OPENMP = 1 |",
    },
    "figures": {
        "engine": {
            "prefill128_tokens_per_second": [400.0, 500.0, 600.0],
            "prefill512_tokens_per_second": [320.0, 450.0, 480.0],
            "decode_tokens_per_second": [90.0, 100.0, 80.0],
            "classify_b32_tokens_per_second": [500.0, 510.0, 490.0],
            "load_to_first_token_seconds": [0.29, 0.31, 0.2],
            "unwarmed_load_to_first_token_seconds": [0.5, 0.31, 0.4],
            "process_start_to_first_token_seconds": [0.6, 0.5, 0.7],
            "generate_added_rss_mib": [228.0, 227.0, 229.0],
            "classify_added_rss_mib": [102.4, 102.4, 102.4],
            "other_cpu_share": [0.0, 0.07, 0.01],
        },
        "llamacpp_f16": {
            "prefill512_tokens_per_second": [100.0, 150.0, 150.0],
            "decode_tokens_per_second": [15.0, 20.0, 16.0],
            "generate_added_rss_mib": [1211.0],
            "other_cpu_share": [0.0, 0.5, 0.0],
        },
        "llamacpp_tq2_0": {
            "prefill512_tokens_per_second": [160.0, 150.0, 120.0],
            "decode_tokens_per_second": [60.0, 70.0, 50.0],
            "other_cpu_share": [0.0, 0.0, 0.0],
        },
        "torch_bf16": {"decode_tokens_per_second": [8.0], "other_cpu_share": [0.0]},
        "kernels": {
            "read_bandwidth_gb_per_second": [30.0, 32.0, 28.0],
            "gemv_gb_per_second": [27.0, 24.0, 21.0],
            "gemv_2bit_gb_per_second": [27.0, 30.4, 25.2],
            "multiply_add_ceiling_gmac_per_second": [300.0, 310.0, 290.0],
            "other_cpu_share": [0.0, 0.0, 0.0],
            **{gemm_metric("avx512-vnni", n, k): [500.0, 510.0, 490.0] for n, k in GEMM_SHAPES},
            **{gemm_metric("avx2", n, k): [270.0, 279.0, 261.0] for n, k in GEMM_SHAPES},
        },
    },
}


def row(page: str, begin: str) -> list[str]:
    """Cells of the only row whose first cell is `begin`."""
    (line,) = [line for line in page.splitlines() if line.startswith(f"| {begin} |")]
    return [cell.strip() for cell in line.strip("|").split("|")][1:]


@pytest.fixture(scope="module")
def page() -> str:
    return report.markdown([RESULT], "qwen3-0.6b")


def test_medians_over_rounds_are_those_of_the_benchmark() -> None:
    found = {key: statistics.median(values) for key, values in report.by_round(RESULT).items()}
    expected = engine.ratios(RESULT["figures"], RESULT["num_parameters"])
    assert found == pytest.approx(
        expected | {"load_to_first_token_seconds": 0.29, "unwarmed_load_to_first_token_seconds": 0.4}
    )


def test_a_ratio_has_its_median_spread_goal_and_verdict(page: str) -> None:
    assert row(page, "prefill 512 / llama.cpp F16") == ["3.20", "3.00 to 3.20", "at least 3", "met"]
    assert row(page, "decode / llama.cpp F16") == ["5.00", "5.00 to 6.00", "at least 6", "not met"]
    assert row(page, "decode / llama.cpp TQ2_0 + Q4_0 head") == ["1.50", "1.43 to 1.60", "at least 1.5", "met"]
    assert row(page, "decode / PyTorch bfloat16") == ["11.2", "one round", "", ""]
    assert row(page, "AVX2 matrix product / multiply-add ceiling of AVX2")[0::3] == ["0.900", "met"]
    assert row(page, "bytes/s of the one-token product / read bandwidth")[0::3] == ["0.750", "not met"]
    assert row(page, "the same, with two bits a weight")[0::3] == ["0.900", "met"]


def test_other_shapes_have_lower_goals_beside_other_engines_only() -> None:
    other = report.markdown([RESULT | {"shapes": "qwen3-1.7b"}], "qwen3-1.7b")
    assert row(other, "decode / llama.cpp F16")[2:] == ["at least 5.1", "not met"]
    assert row(other, "decode / llama.cpp TQ2_0 + Q4_0 head")[2:] == ["at least 1.275", "met"]
    assert row(other, "bytes/s of the one-token product / read bandwidth")[2] == "at least 0.85"


def test_memory_and_time_meet_a_goal_from_below(page: str) -> None:
    assert row(page, "memory added to classify / size in F16") == ["0.100", "0.100 to 0.100", "at most 0.1", "met"]
    assert row(page, "memory added to generate / size in F16")[2:] == ["at most 0.2", "not met"]
    assert row(page, "load to first token, s") == ["0.290", "0.200 to 0.310", "at most 0.3", "met"]


def test_a_configuration_has_its_medians_and_a_dash_for_what_was_not_measured(page: str) -> None:
    assert row(page, "**engine**") == ["500", "450", "90.0", "500", "256", "228", "102", "0.600"]
    assert row(page, "llama.cpp F16") == ["-", "150", "16.0", "-", "1137", "1211", "-", "-"]
    assert row(page, "PyTorch bfloat16") == ["-", "-", "8.00", "-", "-", "-", "-", "-"]
    for absent in ("Q8_0", "TQ1_0", "PyTorch float32"):
        assert absent not in page


def test_the_surroundings_are_named_and_disturbed_samples_counted(page: str) -> None:
    text = " ".join(page.split())
    assert "Some CPU (family/model 25/1; avx2, fma), 2 threads on 4 cores, kernel avx512-vnni; Python 3.11.7" in text
    # what has no format is that old
    assert "An earlier engine, with packed format 3 and keys and values in float32. Two bits a weight" in text
    assert "3 rounds; 2 of 13 samples disturbed (other processes took more than 6% of the cores" in text
    assert "llama.cpp was compiled with AVX2, OPENMP. Left out: torch bf16 was not asked for." in text


def test_the_table_from_elsewhere_says_what_it_can_be_compared_by(page: str) -> None:
    assert "Comparable with the tables above only through the ratio to llama.cpp F16" in page
    assert "| ik_llama.cpp | IQ2_BN | Q6_K | 239 | 53.6 | 1.47 | 3.06 |" in page


def test_points_of_the_roofline_count_multiply_adds_and_bytes() -> None:
    found = {point.label: (point.intensity, point.speed) for point in report.points(RESULT)}
    assert found["GEMV, avx512-vnni"] == (4, 4 * 24.0)
    assert found["GEMV of two bits, avx512-vnni"] == (4, 4 * 27.0)
    assert found["GEMM 3072x1024, avx2"] == (4 * 512, 270.0)
    assert found["llama.cpp F16, decode"] == pytest.approx((0.5, 16e-9 * (BODY + HEAD)))
    assert found["llama.cpp F16, prefill"] == pytest.approx((256, 150e-9 * BODY))
    engine_bytes, tq2_bytes = BODY / 4 + HEAD * 5 / 8, BODY * 66 / 256 + HEAD * 18 / 32
    assert found["engine, decode"] == pytest.approx(((BODY + HEAD) / engine_bytes, 90e-9 * (BODY + HEAD)))
    assert found["engine, prefill"] == pytest.approx((2048, 450e-9 * BODY))
    assert found["llama.cpp TQ2_0 + Q4_0, decode"][0] == pytest.approx((BODY + HEAD) / tq2_bytes)
    assert not any(label.startswith("PyTorch") for label in found)


@pytest.mark.parametrize(("kernel", "is_noted"), [("avx512-vnni", True), ("avx2", False)])
def test_a_vnni_kernel_above_the_ceiling_is_marked(kernel: str, is_noted: bool) -> None:
    axes = Figure().add_subplot()
    report._draw_roofs(axes, RESULT["figures"]["kernels"], kernel, 1000.0)
    texts = [text.get_text() for text in axes.texts]
    assert any("AVX2 ceiling, 300 GMAC/s" in text for text in texts)
    assert any("exceeds the ceiling" in text for text in texts) == is_noted


@pytest.mark.parametrize("num_points", [1, 4, 8])
def test_names_of_points_in_one_place_do_not_overlap(num_points: int) -> None:
    points = [report.Point(f"a name of some length {n}", 100.0, 50.0 + n, "k") for n in range(num_points)]
    with matplotlib.rc_context(report.STYLE):
        axes = Figure(figsize=(7.5, 6), dpi=160).add_subplot(xscale="log", yscale="log", xlim=(1, 1e4), ylim=(1, 1e3))
        report._draw_points(axes, points)
        boxes = [text.get_window_extent() for text in axes.texts]
    assert len(boxes) == num_points
    assert all(box.count_overlaps(boxes) == 1 for box in boxes)  # itself
    assert all(axes.bbox.contains(*corner) for box in boxes for corner in (box.min, box.max))


def write(path: Path, result: Any) -> str:
    path.write_text(json.dumps(result))
    return str(path)


def test_a_processor_without_avx2_has_one_roof(tmp_path: Path) -> None:
    result = copy.deepcopy(RESULT)
    result["environment"]["kernel"] = "neon"
    kernels = {metric: result["figures"]["kernels"][metric] for metric in ("read_bandwidth_gb_per_second",)}
    result["figures"]["kernels"] = kernels | {"gemv_gb_per_second": [20.0] * 3, "other_cpu_share": [0.0] * 3}
    report.main([write(tmp_path / "neon.json", result), "--out", str(tmp_path / "docs")])
    assert (tmp_path / "docs/images/engine-roofline.png").is_file()
    assert "ceiling" not in (tmp_path / "docs/engine-results.md").read_text()


def test_the_command_reads_what_the_benchmark_writes(tmp_path: Path) -> None:
    tiny, docs = tmp_path / "tiny.json", tmp_path / "docs"
    options = ["--shapes", "tiny", "--peers", "none", "--threads", "1", "--rounds", "2", "--cache", str(tmp_path)]
    engine.main([*options, "--json", str(tiny)])
    report.main([str(tiny), write(tmp_path / "result.json", RESULT), "--out", str(docs)])
    written = {path.relative_to(docs).as_posix() for path in docs.rglob("*") if path.is_file()}
    assert written == {"engine-results.md", "images/engine-roofline.png", "images/engine-speed.png"}
    page = (docs / "engine-results.md").read_text()
    assert (
        page.index("## tiny, ") < page.index("## qwen3-0.6b, avx512-vnni kernel") < page.index("## Measured elsewhere")
    )
    assert "Roofline of kernels and models, qwen3-0.6b" in page
    for name in ("engine-roofline", "engine-speed"):
        picture = imread(docs / f"images/{name}.png")
        assert picture.shape[1] == 1200
        assert picture[0, 0, :3].min() == 1  # white


@pytest.mark.parametrize(
    ("text", "message"),
    [("{", "a result is a JSON file"), ("[]", "engine --json writes"), ('{"figures": {}}', "engine --json writes")],
)
def test_another_file_is_refused(tmp_path: Path, text: str, message: str) -> None:
    path = tmp_path / "other.json"
    path.write_text(text)
    with pytest.raises(SystemExit, match=rf"error: .*{message}"):
        report.main([str(path), "--out", str(tmp_path)])
    assert not (tmp_path / "engine-results.md").exists()
