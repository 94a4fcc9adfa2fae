"""The report stage on a small synthetic run: numbers, escaping, self-containedness, schema, generation, gaps."""

import csv
import json
import re
from html.parser import HTMLParser
from itertools import pairwise
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import save_file

from bitdistill_core.config import ReportConfig
from bitdistill_core.manifest import discard
from bitdistill_core.report.paired import mcnemar_p
from bitdistill_core.report.verdict import verdict
from bitdistill_core.stages import report
from tests.core.report_runs import (
    METHODS,
    MODULES,
    make_run,
    write_json,
)

TITLE = "A <b>title</b> & more"


def make_report(inputs: report.Inputs, out_dir: Path) -> Path:
    """Runs the stage, and writes metrics.json as `manifest.execute` does."""
    out_dir.mkdir(parents=True)
    config, device = ReportConfig(title=TITLE, loss_smoothing=0.5), torch.device("cpu")
    metrics = report.run(config, inputs, out_dir=out_dir, work_dir=out_dir, report=discard, device=device)
    write_json(out_dir / "metrics.json", metrics)
    return out_dir


@pytest.fixture(scope="module")
def finished(tmp_path_factory: pytest.TempPathFactory) -> Path:
    run = tmp_path_factory.mktemp("runs") / "demo-seed7"
    return make_report(make_run(run), run / "report")


def results_of(out_dir: Path) -> Any:
    return json.loads((out_dir / "results.json").read_text())


class Reader(HTMLParser):
    """Collects what a browser would fetch, the ids, and whether tags close in order."""

    VOID = ("meta", "br", "link", "img")

    def __init__(self) -> None:
        super().__init__()
        self.tags: list[str] = []
        self.open: list[str] = []
        self.ids: list[str] = []
        self.references: list[str] = []

    def handle_starttag(self, tag: str, attributes: list[tuple[str, str | None]]) -> None:
        self.tags.append(tag)
        self.open += [] if tag in self.VOID else [tag]
        for name, value in attributes:
            self.ids += [value or ""] if name == "id" else []
            self.references += [value or ""] if name in ("src", "href", "xlink:href", "srcset") else []

    def handle_startendtag(self, tag: str, attributes: list[tuple[str, str | None]]) -> None:
        self.handle_starttag(tag, attributes)
        if tag not in self.VOID:
            self.open.pop()

    def handle_endtag(self, tag: str) -> None:
        assert self.open.pop() == tag


def test_results_json_and_metrics_hold_the_run_s_numbers(finished: Path) -> None:
    results, metrics = results_of(finished), json.loads((finished / "metrics.json").read_text())
    rows = {row["method"]: row for row in results["rows"]}
    assert list(rows) == list(METHODS)
    assert set(rows["bitdistill"]) == {
        "method", "accuracy", "ci_low", "ci_high", "num_examples", "file_mib", "peak_rss_mib",
        "prefill_tokens_per_second", "decode_tokens_per_second",
    }  # fmt: skip
    assert (results["profile"], results["seed"]) == ("demo", 7)
    # data 1, surgery 0.5, five trainings of 60, two packings of 2, five evaluations of 5, benchmark 30
    assert results["minutes"] == pytest.approx((1 + 0.5 + 5 * 60 + 2 * 2 + 5 * 5 + 30) / 60)
    assert [rows[m]["accuracy"] for m in METHODS] == pytest.approx([0.9, 0.7, 0.87])
    assert metrics["report/accuracy_bitdistill"] == pytest.approx(0.87)
    assert metrics["report/difference_to_fp16_sft"] == pytest.approx(-0.03)
    assert rows["bitdistill"]["file_mib"] == 25.0
    assert results["floors"] == {"majority_accuracy": 0.5, "naive_bayes_accuracy": 0.75}
    assert results["packed_agreement"]["bitdistill"] == {"test": 1.0, "validation": 1.0}
    assert results["packed_agreement"]["bitnet_sft"]["test"] == pytest.approx(199 / 200)
    assert results["splits"]["validation"]["bitnet_sft_packed"]["metrics"]["accuracy"] == pytest.approx(139 / 200)


def test_results_json_pairs_predictions(finished: Path) -> None:
    paired = results_of(finished)["paired"]
    # wrong: teacher 0-19, BitDistill 10-35; so BitDistill alone is right on 0-9, the teacher alone on 20-35
    teacher = paired["bitdistill_vs_fp16_sft"]
    assert (teacher["only_first_correct"], teacher["only_second_correct"]) == (10, 16)
    assert teacher["difference"] == pytest.approx(-0.03)
    assert teacher["mcnemar_p"] == pytest.approx(mcnemar_p(10, 16))
    assert paired["bitdistill_vs_bitnet_sft"]["ci_low"] > 0


def test_page_tells_the_numbers_and_the_verdict(finished: Path) -> None:
    page = (finished / "index.html").read_text()
    assert "not distinguishable from its FP16 teacher (difference -3.0, 95% interval -" in page
    assert "17.0 points above BitNet-SFT" in page
    assert "not above the floor" not in page
    assert "its file is 0.25x the size and it decodes at 2.50x the speed" in page
    assert "99.50%<small>199 of 200</small>" in page
    assert "naive Bayes on words 75.0%. Not above the higher floor: BitNet-SFT." in page
    assert "prefers-color-scheme: dark" in page


BELOW = "On test BitDistill is 3.0 points below its FP16 teacher (95% interval -5.0 to -1.0"
UNCLEAR = "is not distinguishable from its FP16 teacher (difference -3.0, 95% interval -7.0 to +1.0"


@pytest.mark.parametrize(("low", "high", "expected"), [(-0.05, -0.01, BELOW), (-0.07, 0.01, UNCLEAR)])
def test_verdict_is_honest_about_a_loss(finished: Path, low: float, high: float, expected: str) -> None:
    results = results_of(finished)
    results["paired"]["bitdistill_vs_fp16_sft"].update(ci_low=low, ci_high=high)
    results["rows"][2].update(decode_tokens_per_second=20.0, accuracy=0.75)
    assert expected in verdict(results)
    assert "at 75.0% it is not above the floor of 75.0%" in verdict(results)
    assert verdict(results).endswith("it decodes at 0.40x the speed.")


def test_page_is_self_contained_and_well_formed(finished: Path) -> None:
    page = (finished / "index.html").read_text()
    reader = Reader()
    reader.feed(page)
    assert reader.open == []
    assert not {"script", "link", "iframe", "object", "img"} & set(reader.tags)
    assert all(reference.startswith("#") for reference in reader.references)
    assert {reference[1:] for reference in reader.references} <= set(reader.ids)
    assert len(reader.ids) == len(set(reader.ids))
    assert "#ffffff" not in page.partition("</style>")[2]
    assert not re.search(r"https?://|//cdn|@import|src=", page)
    assert all(target.startswith("#") for target in re.findall(r"url\(([^)]*)", page))


def test_page_escapes_all_text(finished: Path) -> None:
    page = (finished / "index.html").read_text()
    assert "<b>title" not in page
    assert "<script" not in page
    assert page.count("A &lt;b&gt;title&lt;/b&gt; &amp; more") == 2
    assert "&lt;script&gt;alert(1)&lt;/script&gt;" in page


def test_directories_of_this_machine_are_not_shown(tmp_path: Path) -> None:
    inputs = make_run(tmp_path / "runs/demo")
    path = inputs.data / "manifest.json"
    manifest = json.loads(path.read_text())
    manifest["config"] |= {
        "examples": "/home/someone/reviews.parquet",
        "nested": {"corpus": "https://me:secret@host/x"},
    }
    path.write_text(json.dumps(manifest))
    out = make_report(inputs, tmp_path / "report")
    for page in ((out / "index.html").read_text(), (out / "report.md").read_text()):
        assert ".../reviews.parquet" in page
        assert "https://host/x" in page
        assert "someone" not in page
        assert "secret" not in page


def test_markdown_has_the_same_tables_and_its_images_exist(finished: Path) -> None:
    text = (finished / "report.md").read_text()
    assert "87.0% (81.0 to 91.0)" in text
    assert "\\<script\\>" in text
    images = re.findall(r"!\[[^]]*\]\(([^)]*)\)", text)
    names = {"accuracy", "gradient-norms", "weights", "time"} | {
        f"loss-{stage}" for stage in ("base", "teacher", "pretrain", "distill", "bitnet-sft")
    }
    assert {Path(image).stem for image in images} == names
    for image in images:
        assert (finished / image).read_bytes().startswith(b"\x89PNG")
    rows = [line for line in text.splitlines() if line.startswith("|")]
    for line, below in pairwise(text.splitlines()):
        if line in rows and below in rows:
            assert len(re.findall(r"(?<!\\)\|", line)) == len(re.findall(r"(?<!\\)\|", below))


def test_losses_csv_holds_every_reported_loss_as_it_was(finished: Path) -> None:
    with (finished / "plots" / "losses.csv").open(newline="") as file:
        rows = list(csv.DictReader(file))
    assert list(rows[0]) == ["stage", "step", "part", "value"]
    assert {row["stage"] for row in rows} == {"base", "teacher", "pretrain", "distill", "bitnet_sft"}
    log = (finished.parent / "distill" / "metrics.jsonl").read_text().splitlines()
    expected = {line["step"]: line["distill/logits_kd"] for line in map(json.loads, log) if "distill/loss" in line}
    found = {int(r["step"]): float(r["value"]) for r in rows if (r["stage"], r["part"]) == ("distill", "logits_kd")}
    assert found == expected
    assert {r["part"] for r in rows if r["stage"] == "distill"} == {"loss", "task_loss", "logits_kd", "attention_kd"}


def test_same_inputs_give_the_same_bytes(finished: Path, tmp_path: Path) -> None:
    again = make_report(make_run(tmp_path / "demo-seed7"), tmp_path / "report")
    for path in sorted(finished.rglob("*.*")):
        assert (again / path.relative_to(finished)).read_bytes() == path.read_bytes(), path.name


def test_generation_task_reports_its_metrics_instead_of_accuracy(tmp_path: Path) -> None:
    out = make_report(make_run(tmp_path / "cnn", is_generation=True), tmp_path / "report")
    results = results_of(out)
    assert results["rows"][2]["accuracy"] is None
    assert results["rows"][2]["rougeLsum"] == pytest.approx(35.1)
    assert (results["paired"], results["floors"]) == ({}, {})
    assert results["packed_agreement"]["bitdistill"]["test"] == 0.5
    page = (out / "index.html").read_text()
    assert "BitDistill reaches rougeLsum 35.10, its FP16 teacher 36.00 and BitNet-SFT 27.00" in page
    assert "bleu" in page
    assert "Accuracy" not in page
    assert "McNemar" not in page


@pytest.fixture(scope="module")
def gaps(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The report of a run without pre-training, benchmark rows or gradient norms."""
    run = tmp_path_factory.mktemp("gaps") / "demo"
    inputs = make_run(run, has_pretrain=False)
    write_json(inputs.benchmark / "benchmark.json", {"environment": {}, "rows": []})
    log = inputs.distill / "metrics.jsonl"
    log.write_text("".join(line + "\n" for line in log.read_text().splitlines() if "grad_norm_" not in line))
    return make_report(inputs, run / "report")


def test_skipped_pretraining_is_said(gaps: Path) -> None:
    page = (gaps / "index.html").read_text()
    assert "Continued pre-training was skipped" in page
    assert not (gaps / "images" / "loss-pretrain.png").exists()
    assert "before distillation" in page
    assert "after pre-training" not in page
    assert "pretrain" not in {line.partition(",")[0] for line in (gaps / "plots/losses.csv").read_text().splitlines()}


def test_the_error_behind_each_block_is_drawn_and_counts_as_pretraining(tmp_path: Path) -> None:
    inputs = make_run(tmp_path / "demo", has_pretrain=False)
    for stage in ("pretrain", "distill"):
        with (tmp_path / "demo" / stage / "metrics.jsonl").open("a") as log:
            for step, error in ((40, 0.05), (80, 0.08), (40, 0.05)):  # a resumed stage reports a block twice
                log.write(json.dumps({"step": step, "time": 1.7e9, f"{stage}.blockwise/block_error": error}) + "\n")
    page = (make_report(inputs, tmp_path / "demo" / "report") / "index.html").read_text()
    for stage in ("pretrain", "distill"):
        assert (tmp_path / "demo" / "report" / "images" / f"block-errors-{stage}.png").is_file()
        assert f"Relative error behind each decoder block after block-wise distillation in {stage}." in page
    assert "Continued pre-training was skipped" not in page
    assert "after pre-training" in page


def test_what_was_cut_or_read_again_is_said(tmp_path: Path) -> None:
    inputs = make_run(tmp_path / "demo")
    for stage, found in (
        ("teacher", {"teacher/cut_share": 0.25}),
        ("distill", {"distill/cut_share": 0.0}),
        ("pretrain", {"pretrain/corpus_epochs": 3.04}),
    ):
        write_json(tmp_path / "demo" / stage / "metrics.json", found)
    text = (make_report(inputs, tmp_path / "demo" / "report") / "report.md").read_text()
    assert "| Examples cut at teacher.max_length | 25.0% |" in text
    assert "distill.max_length" not in text
    assert "| Times that pre-training read the corpus | 3.0 |" in text


def test_what_was_not_measured_is_said_and_null(gaps: Path) -> None:
    assert results_of(gaps)["rows"][0]["file_mib"] is None
    page = (gaps / "index.html").read_text()
    assert "size and speed were not measured" in page
    assert "not measured</td>" in page
    assert "Gradient norms of the loss parts were not measured" in page


def test_predictions_of_other_examples_are_refused(tmp_path: Path) -> None:
    inputs = make_run(tmp_path / "demo")
    path = inputs.evaluate_bitdistill / "predictions-test.jsonl"
    path.write_text("".join(path.read_text().splitlines(keepends=True)[:-1]))
    with pytest.raises(ValueError, match=r"same examples; got split=test, bitdistill=199 .* evaluate both again"):
        make_report(inputs, tmp_path / "demo" / "report")


def test_missing_weight_is_named(tmp_path: Path) -> None:
    inputs = make_run(tmp_path / "demo")
    save_file({f"{MODULES[0]}.weight": torch.ones(2, 2)}, inputs.distill / "model.safetensors")
    with pytest.raises(ValueError, match=rf"missing={MODULES[1]} in path=.*distill"):
        make_report(inputs, tmp_path / "demo" / "report")


def test_missing_evaluation_is_named(tmp_path: Path) -> None:
    inputs = make_run(tmp_path / "demo")
    (inputs.evaluate_fp16_sft / "results.json").unlink()
    with pytest.raises(ValueError, match=r"the report needs path=.*fp16_sft/results.json.*run that stage again"):
        make_report(inputs, tmp_path / "demo" / "report")
