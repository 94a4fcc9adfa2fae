"""results.json for MLflow and for people."""

from tasks.results import headline_metrics, results_table


def test_headline_metrics_are_the_numbers_of_the_rows() -> None:
    rows = [{"method": "bitdistill", "accuracy": 0.5, "num_examples": 16, "rougeL": None, "engine": "avx2", "ok": True}]
    assert headline_metrics({"rows": rows}) == {"bitdistill/accuracy": 0.5, "bitdistill/num_examples": 16.0}


def test_the_results_table_leaves_out_what_no_row_has() -> None:
    rows = [
        {"method": "fp16_sft", "accuracy": None, "rougeL": 0.25, "file_mib": 1234.5678},
        {"method": "bitdistill", "accuracy": None, "rougeL": None, "file_mib": 100},
    ]
    assert results_table({"rows": rows}).splitlines() == [
        "| method | rougeL | file_mib |",
        "| --- | --- | --- |",
        "| fp16_sft | 0.25 | 1235 |",
        "| bitdistill |  | 100 |",
    ]
