"""Speed and memory as the benchmark stage and `bitdistill bench` report them."""

import json
from pathlib import Path

import pytest

from bitdistill_core.latency import _summary
from tests.command_line import run


def test_speeds_are_medians_of_tokens_by_time() -> None:
    memory = {"peak_rss_mib": 90.0, "before_rss_mib": 40.0, "resident": {"codes": 30 * 2**20}}
    # seconds from the start to each new token: the first is the prompt's, the others are decoding
    timing = _summary([[0.5, 0.6, 0.8], [0.4, 0.5, 0.6], [1.0, 1.4, 1.8]], 100, memory)
    assert timing.prefill_tokens_per_second == pytest.approx(200)
    assert timing.decode_tokens_per_second == pytest.approx(2 / 0.3)
    assert timing.ttft_ms == pytest.approx(500)
    assert timing.tpot_ms == pytest.approx(150)
    assert timing.prefill_spread == pytest.approx((100, 250))
    assert timing.decode_spread == pytest.approx((2.5, 10))
    assert timing.added_rss_mib == 50
    assert timing.resident_mib == {"codes": 30, "cache_and_buffers": 20}


def test_bench_puts_the_packed_student_beside_its_teacher(finished_run: Path) -> None:
    options = ["--prompt-tokens", "16", "--new-tokens", "4", "--rounds", "2", "--num-threads", "1"]
    code, out, error = run("bench", str(finished_run), "--against", str(finished_run / "teacher"), *options)
    assert code == 0, error
    found = json.loads(out)
    assert set(found) == {"packed", "pytorch", "info"}
    for engine in ("packed", "pytorch"):
        assert found[engine]["decode_tokens_per_second"] > 0
        assert 0 < found[engine]["added_rss_mib"] < found[engine]["peak_rss_mib"]
    parts = found["packed"]["resident_mib"]
    assert parts["ternary_weights"] > 0
    assert sum(parts.values()) == pytest.approx(found["packed"]["added_rss_mib"])


def test_report_prints_the_report(finished_run: Path) -> None:
    code, out, error = run("report", str(finished_run))
    assert code == 0
    assert out.strip() == (finished_run / "report/report.md").read_text().strip()
    assert error.strip() == f"report: {finished_run / 'report/index.html'}"
