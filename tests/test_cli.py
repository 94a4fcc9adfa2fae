"""The command line: help fits a screen, an error is one line and exit code 1."""

import json
import os
import subprocess
import sys
from pathlib import Path

import numpy as np
import pyarrow.parquet as pq
import pytest

from bitdistill_core.engine.model import Engine
from tests.command_line import run
from tests.conftest import ROOT
from tests.core.classifiers import write_classifier

BITDISTILL = Path(sys.executable).with_name("bitdistill")
COMMANDS = [
    "convert",
    "stage",
    "track",
    "classify",
    "generate",
    "bench",
    "inspect",
    "report",
    "tables",
    "cell",
    "estimate",
]


def test_help_names_every_command_and_fits_a_screen() -> None:
    code, out, _ = run("--help")
    assert code == 0
    assert all(command in out for command in COMMANDS)
    assert len(out.splitlines()) < 40


@pytest.mark.parametrize("command", COMMANDS)
def test_every_command_has_help(command: str) -> None:
    code, out, _ = run(command, "--help")
    assert code == 0
    assert len(out.splitlines()) < 40


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["convert", "--set", "distill.lr=1"], "unknown key in override 'distill.lr=1': lr; the keys are"),
        (["convert", "--profile", "none"], "unknown profile=none; the profiles are demo"),
        (
            [
                *("convert", "--set", "base.checkpoint=./none"),
                *("--set", f"data.examples={ROOT / 'data/demo/reviews.parquet'}"),
                *("--set", f"data.corpus={ROOT / 'data/demo/corpus.parquet'}"),
            ],
            "base.checkpoint=./none is no model directory: no config.json",
        ),
        (["convert", "--set", "data.examples=./none.jsonl"], "./none.jsonl"),
        (["convert", "--name", "a/b"], "the name of a run must be one directory name"),
        (["stage", "nothing", "--no-track"], "unknown stage=nothing; the stages are data, base"),
        (
            ["stage", "distill", "--no-track", "--runs-dir", "nowhere"],
            "no finished stage in path=nowhere/demo/pretrain",
        ),
        (["classify", "nowhere", "text"], "no packed model at path=nowhere"),
        (["inspect"], "inspect needs a model or --cpu"),
        (["report", "nowhere"], "no report in run=nowhere"),
        (["tables", "--profile", "none"], "unknown scale=none; "),
        (["tables", "--groups", "table1,table9"], "unknown group=table9; the groups are table1, "),
        (["cell", "none", "sst2", "bitdistill", "0"], "unknown model=none; the models are qwen3-0.5m, "),
        (["cell", "qwen3-0.5m", "none", "bitdistill", "0"], "unknown task=none; the tasks are sst2, "),
        (["cell", "qwen3-0.5m", "sst2", "none", "0"], "unknown method=none; the methods are fp16_sft, "),
        (["estimate", "--profile", "none"], "unknown scale=none; "),
    ],
)
def test_a_mistake_is_one_line_on_stderr(
    arguments: list[str], message: str, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    if arguments[0] in ("convert", "stage"):
        arguments = [*arguments, "--params", str(ROOT / "params.yaml")]
    if arguments[0] in ("tables", "cell", "estimate"):
        arguments = [*arguments, "--params", str(ROOT / "params.yaml"), "--tables", str(ROOT / "tables")]
    monkeypatch.chdir(tmp_path)
    code, out, error = run(*arguments)
    assert code == 1
    assert out == ""
    assert error.startswith("error: ")
    assert message in error
    assert len(error.splitlines()) == 1
    assert not list(tmp_path.iterdir())


def test_inspect_shows_the_kernels_of_this_processor() -> None:
    code, out, _ = run("inspect", "--cpu")
    assert code == 0
    assert '"scalar"' in out


def test_texts_to_classify_may_come_from_stdin(tmp_path: Path) -> None:
    model = tmp_path / "model.bitdistill"
    words = ["bad", "good"]
    write_classifier(model, {"name": "m", "kind": "classification", "prompt": "{text} is", "label_words": words})
    texts = [f"film {i}" for i in range(300)]  # more than are scored at once
    code, out, error = run("classify", str(model), "first", "-", "last", stdin="\n".join([*texts, "", ""]))
    assert code == 0, error
    rows = [line.split("\t") for line in out.splitlines()]
    assert [row[2] for row in rows] == ["first", *texts, "last"]
    alone = run("classify", str(model), "film 299")[1]
    assert alone.rstrip("\n") == out.splitlines()[300]
    assert {row[0] for row in rows} <= set(words)


def test_classify_answers_as_the_packed_model_was_evaluated(finished_run: Path) -> None:
    rows = pq.read_table(finished_run / "data/examples/test.parquet").to_pylist()
    texts = [row["prompt"].removeprefix("Review: ").removesuffix("\nSentiment:") for row in rows]
    code, out, error = run("classify", str(finished_run), *texts)
    assert code == 0, error
    answers = [line.split("\t") for line in out.splitlines()]
    lines = (finished_run / "evaluate/bitdistill_packed/predictions-test.jsonl").read_text().splitlines()
    expected = [["negative", "positive"][json.loads(line)["prediction"]] for line in lines]
    assert [answer[0] for answer in answers] == expected
    scores = Engine.load(finished_run / "pack/bitdistill/model.bitdistill").score(
        [row["prompt"] for row in rows], [" negative", " positive"]
    )
    assert [float(answer[1]) for answer in answers] == pytest.approx(np.exp(scores.max(axis=1)), abs=1e-3)


def test_a_bad_line_of_stdin_is_named_and_those_before_it_are_answered(tmp_path: Path) -> None:
    model = tmp_path / "model.bitdistill"
    prompt = "{a} and {b} and {a}:"
    write_classifier(model, {"name": "m", "kind": "classification", "prompt": prompt, "label_words": ["bad", "good"]})
    good = json.dumps({"a": "x", "b": "y"})
    for wrong, message in {
        '{"a": "x"}': 'error: line 4: this task needs a JSON object with the columns a, b; got \'{"a": "x"}\'',
        '{"a": "x", "b": null}': "error: line 4: ",
        "plain": "error: line 4: this task needs a JSON object with the columns a, b; got 'plain'",
    }.items():
        code, out, error = run("classify", str(model), "-", stdin=f"{good}\n\n{good}\n{wrong}\n{good}\n")
        assert code == 1
        assert error.startswith(message)
        assert len(out.splitlines()) == 2


def test_bytes_that_are_not_utf8_are_one_error(tmp_path: Path) -> None:
    model = tmp_path / "model.bitdistill"
    write_classifier(model, {"name": "m", "kind": "classification", "prompt": "{a}:", "label_words": ["bad", "good"]})
    for command in ("classify", "generate"):
        result = subprocess.run([BITDISTILL, command, model, b"a\xffb"], capture_output=True, text=True, check=False)
        assert result.returncode == 1
        assert result.stderr.startswith("error: ")
        assert len(result.stderr.splitlines()) == 1


def test_a_byte_that_is_not_utf8_is_found_with_its_line(tmp_path: Path) -> None:
    model = tmp_path / "model.bitdistill"
    write_classifier(model, {"name": "m", "kind": "classification", "prompt": "{a}:", "label_words": ["bad", "good"]})
    strict = {**os.environ, "PYTHONUTF8": "0", "PYTHONIOENCODING": "utf-8:strict"}
    result = subprocess.run(
        [BITDISTILL, "classify", model, "-"],
        input=b"\xef\xbb\xbfx\ty\nx\xffy\nz\n",  # a byte order mark, and a tab, which must not make a column
        capture_output=True,
        check=False,
        env=strict,
    )
    assert result.returncode == 1
    assert result.stderr.decode().startswith("error: line 2: a text must be UTF-8; got ")
    assert [line.split("\t")[2] for line in result.stdout.decode().splitlines()] == ["x y"]


def test_what_cannot_be_measured_is_refused_at_once(tmp_path: Path) -> None:
    model = tmp_path / "model.bitdistill"
    write_classifier(model, {"name": "m", "kind": "classification", "prompt": "{a}:", "label_words": ["bad", "good"]})
    code, out, error = run("bench", str(model), "--prompt-tokens", "2000000000")
    assert (code, out) == (1, "")
    assert "must fit the model's window; got prompt_tokens=2000000000" in error
    code, out, error = run("bench", str(model), "--against", str(tmp_path))
    assert (code, out) == (1, "")
    assert "--against needs a checkpoint directory; got no config.json" in error


def test_a_reader_that_has_enough_is_no_error(tmp_path: Path) -> None:
    model = tmp_path / "model.bitdistill"
    write_classifier(model, {"name": "m", "kind": "classification", "prompt": "{a}:", "label_words": ["bad", "good"]})
    command = f"{BITDISTILL} classify {model} --batch-size 1 $(seq 2000) | head -n 1"
    result = subprocess.run(["bash", "-c", command], capture_output=True, text=True, check=True)
    assert result.stderr == ""
    assert len(result.stdout.splitlines()) == 1


def test_of_a_text_longer_than_the_window_the_end_is_classified(tmp_path: Path) -> None:
    model = tmp_path / "model.bitdistill"
    words = ["bad", "good"]
    write_classifier(model, {"name": "m", "kind": "classification", "prompt": "{text} is", "label_words": words})
    long, other = (start + " " + "film " * 1000 + "ends" for start in ("good", "poor"))
    code, out, error = run("classify", str(model), long, other)
    assert code == 0, error
    first, second = (line.split("\t")[:2] for line in out.splitlines())
    assert first == second


def test_generate_puts_the_text_into_the_prompt_of_the_task(tmp_path: Path) -> None:
    model = tmp_path / "model.bitdistill"
    write_classifier(model, {"name": "sum", "kind": "generation", "prompt": "A: {text}\nB:", "label_words": []})
    options = ["--max-new-tokens", "8", "--temperature", "1"]
    whole = run("generate", str(model), "A: a film\nB:", *options)
    assert whole[0] == 0
    assert run("generate", str(model), "a film", "--task", *options) == whole
    assert run("generate", str(model), "a film", *options) != whole
    code, _, error = run("classify", str(model), "a film")
    assert code == 1
    assert "this needs a model for classification; got model=" in error


@pytest.mark.parametrize(
    ("raised", "status", "message"),
    [
        (
            "torch.OutOfMemoryError('CUDA out of memory. Tried to allocate 2 GiB')",
            1,
            "error: the GPU is out of memory: ",
        ),
        ("MemoryError()", 1, "error: out of memory: a smaller batch"),
        ("RuntimeError('DefaultCPUAllocator: can\\'t allocate memory')", 1, "error: out of memory: DefaultCPU"),
        ("os.kill(os.getpid(), signal.SIGTERM)", 130, "interrupted; run the same command to go on from the last"),
    ],
    ids=["gpu", "memory", "torch", "sigterm"],
)
def test_the_end_of_the_machine_s_patience_is_one_line(raised: str, status: int, message: str) -> None:
    code = f"""
import os, signal, time, torch
from bitdistill_core.cli_errors import one_line_errors
try:
    with one_line_errors():
        stop = {raised}
        if stop is not None:
            raise stop
        time.sleep(30)
except BaseException as end:
    assert signal.getsignal(signal.SIGTERM) == signal.SIG_DFL
    raise SystemExit(end.exit_code)
"""
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=False, timeout=60)
    assert (done.returncode, done.stderr.count("\n")) == (status, 1), done.stderr
    assert done.stderr.startswith(message)
