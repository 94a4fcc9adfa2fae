"""The benchmark command, end to end on the tiny shape. No figure is judged here: speed is no test."""

import json
import time
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from benchmarks import engine, shapes
from benchmarks.peers import LlamaCpp, Torch
from benchmarks.worker import Worker, gemm_metric
from bitdistill_core.engine.kernels import streams_base3

LLAMA = {
    "model_type": "llama",
    "vocab_size": 512,
    "hidden_size": 256,
    "intermediate_size": 512,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "head_dim": 64,
    "max_position_embeddings": 512,
    "rms_norm_eps": 1e-5,
    "rope_parameters": {"rope_type": "default", "rope_theta": 1e5},
    "tie_word_embeddings": True,
}
ENGINE_METRICS = {
    "prefill128_tokens_per_second",
    "prefill512_tokens_per_second",
    "decode_tokens_per_second",
    "classify_b32_tokens_per_second",
    "load_to_first_token_seconds",
    "unwarmed_load_to_first_token_seconds",
    "process_start_to_first_token_seconds",
    "generate_added_rss_mib",
    "classify_added_rss_mib",
    "other_cpu_share",
}


@pytest.fixture(scope="module")
def cache_dir(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("models")


def run_command(capsys: pytest.CaptureFixture[str], cache_dir: Path, json_path: Path, *options: str) -> dict[str, Any]:
    engine.main(["--shapes", "tiny", "--threads", "1", "--cache", str(cache_dir), "--json", str(json_path), *options])
    result: dict[str, Any] = json.loads(json_path.read_text())
    last_line = capsys.readouterr().out.splitlines()[-1]
    assert json.loads(last_line) == result["ratios"]
    return result


def test_the_command_measures_the_engine_alone(
    capsys: pytest.CaptureFixture[str], cache_dir: Path, tmp_path: Path
) -> None:
    result = run_command(capsys, cache_dir, tmp_path / "result.json", "--peers", "none", "--rounds", "2")
    ceiling = {"gemm_vs_ceiling"} if "avx2" in result["environment"]["available_kernels"] else set()
    rest = {"gemv_vs_bandwidth", "classify_rss_vs_f16_size", "generate_rss_vs_f16_size"}
    two_bits = {"gemv_2bit_vs_bandwidth"} if streams_base3(result["environment"]["kernel"]) else set()
    assert set(result["ratios"]) == ceiling | two_bits | rest
    assert set(result["figures"]) == {"engine", "kernels"}
    figures = result["figures"]["engine"]
    assert set(figures) == ENGINE_METRICS | {"idle_cpu_share"}
    assert all(
        len(figures[metric]) == 2 and min(figures[metric]) > 0 for metric in ENGINE_METRICS - {"other_cpu_share"}
    )
    assert result["load_to_first_token_seconds"] < result["process_start_to_first_token_seconds"]
    assert result["file_bytes"] == {"engine": shapes.packed_file(cache_dir, "tiny").stat().st_size}
    assert result["f16_bytes"] == 2 * result["num_parameters"]
    assert result["environment"]["threads"] == 1
    assert [line.split()[0] for line in result["skipped"]] == ["torch", "llamacpp"]


@pytest.mark.slow
def test_the_command_measures_every_peer(capsys: pytest.CaptureFixture[str], cache_dir: Path, tmp_path: Path) -> None:
    pytest.importorskip("llama_cpp")
    result = run_command(capsys, cache_dir, tmp_path / "result.json", "--peers", "torch,llamacpp", "--rounds", "1")
    for peer in ("llamacpp_f16", "llamacpp_tq2_0", "torch_f32"):
        assert {f"prefill128_vs_{peer}", f"prefill512_vs_{peer}", f"decode_vs_{peer}"} <= set(result["ratios"])
    assert "classify_b32_vs_llamacpp_f16" in result["ratios"]
    assert min(result["ratios"].values()) > 0
    assert result["skipped"] == []
    assert result["file_bytes"]["llamacpp_tq1_0"] < result["file_bytes"]["llamacpp_tq2_0_q6_k"]


def test_a_peer_that_is_not_installed_is_left_out_with_a_line(
    capsys: pytest.CaptureFixture[str], cache_dir: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setitem(engine.PEERS, "llamacpp", "no_such_module")
    result = run_command(capsys, cache_dir, tmp_path / "result.json", "--peers", "llamacpp", "--rounds", "1")
    assert "llamacpp is not installed: no figures of it" in result["skipped"]
    assert not any("llamacpp" in key for key in result["ratios"])


def test_an_unknown_peer_is_refused(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit):
        engine.main(["--shapes", "tiny", "--peers", "tensorrt"])
    assert "--peers takes torch, llamacpp or none; got tensorrt" in capsys.readouterr().err


def test_a_ratio_is_the_median_of_the_ratios_within_rounds() -> None:
    ours = {"decode_tokens_per_second": [10.0, 40.0, 30.0]}
    memory = {"classify_added_rss_mib": [2.0, 4.0, 3.0], "generate_added_rss_mib": [1.0, 1.0, 1.0]}
    figures = {"engine": ours | memory, "peer": {"decode_tokens_per_second": [5.0, 10.0]}}
    found = engine.ratios(figures, num_parameters=1024 * 1024)
    assert found == {"decode_vs_peer": 3.0, "classify_rss_vs_f16_size": 1.5, "generate_rss_vs_f16_size": 0.5}


def test_gemm_ratio_weighs_shapes_by_the_time_they_take() -> None:
    rates = {(3072, 1024): 100.0, (1024, 3072): 50.0, (2048, 1024): 200.0}
    kernels = {gemm_metric("avx2", n, k): [rate] for (n, k), rate in rates.items()}
    seconds = 2 * 3072 / 100 + 3072 / 50 + 2048 / 200  # times 1024 columns
    assert engine._gemm_rates(kernels, "avx2") == pytest.approx([(3 * 3072 + 2048) / seconds])


@pytest.mark.parametrize("name", ["tiny", "tiny-llama"])
def test_llamacpp_and_torch_hold_the_same_model(name: str, cache_dir: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    pytest.importorskip("llama_cpp")
    monkeypatch.setitem(shapes.SHAPES, "tiny-llama", LLAMA)
    torch_model = Torch(f"{name}:float32", 1)
    llama_model = LlamaCpp(str(shapes.gguf_file(cache_dir, name, "f16", 1)), 1)
    sequences = np.random.default_rng(0).integers(0, 512, (4, 48)).tolist()
    expected = torch_model.classify(sequences)
    tolerance = 0.01 * np.abs(expected).max()  # F16 weights, keys and values
    np.testing.assert_allclose(llama_model.classify(sequences), expected, atol=tolerance)
    np.testing.assert_allclose(llama_model.prefill(sequences[1])[0], expected[1], atol=tolerance)
    for model in (llama_model, torch_model):
        ids = [7]
        for token in model.generate(7, 6):
            logits = torch_model.prefill(ids)[0]
            assert logits[token] >= logits.max() - tolerance
            ids.append(token)


@pytest.mark.parametrize("kind", ["engine", "llamacpp"])
def test_a_worker_sleeps_between_its_tasks(kind: str, cache_dir: Path) -> None:
    if kind == "llamacpp":
        pytest.importorskip("llama_cpp")
        path = shapes.gguf_file(cache_dir, "tiny", "f16", 1)
    else:
        path = shapes.packed_file(cache_dir, "tiny")
    with Worker(kind, str(path), 2) as worker:
        worker.ask("generate", tokens=4)
        time.sleep(1)
        answer = worker.ask("generate", tokens=4)
    assert answer["idle_cpu_share"] < 0.1


def test_a_worker_that_fails_says_why(tmp_path: Path) -> None:
    with (
        Worker("engine", str(tmp_path / "none"), 1) as worker,
        pytest.raises(ValueError, match=r"the worker of engine .* failed: .*a packed model is a file"),
    ):
        worker.ask("generate")
