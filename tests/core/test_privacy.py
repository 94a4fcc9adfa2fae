"""What is private in a text that leaves the machine."""

from pathlib import Path

import pytest

from bitdistill_core.privacy import without_private


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
