"""Parameters on their way to MLflow."""

from pathlib import Path

import pytest

from tasks.parameters import flatten, without_private


def test_flatten_joins_names_and_keeps_lists() -> None:
    nested = {"base": {"checkpoint": None, "scratch": {"seed": 0}}, "distill": {"distill_layers": [-2]}}
    expected = {"base.checkpoint": None, "base.scratch.seed": 0, "distill.distill_layers": [-2]}
    assert flatten(nested) == expected
    assert flatten(expected) == expected


def test_a_path_outside_loses_its_directories_and_one_inside_becomes_relative() -> None:
    assert without_private("/home/someone/data") == ".../data"
    assert without_private("~/data") == ".../data"
    assert without_private(str(Path.cwd() / "data" / "a.parquet")) == "data/a.parquet"


@pytest.mark.parametrize(
    "text", ["nyu-mll/glue", "data/demo/reviews.parquet", "Review: {sentence}\nSentiment:", "1e-05"]
)
def test_other_values_stay_as_they_are(text: str) -> None:
    assert without_private(text) == text


def test_credentials_in_an_address_are_removed() -> None:
    assert without_private("https://user:secret@example.org/data") == "https://example.org/data"
