"""What the data stage draws, requires and reads back."""

import json
from pathlib import Path

import pyarrow as pa
import pytest

from bitdistill_core.stages.data import _require_every_label, _sample, read_eval_splits, read_task


def test_examples_of_an_earlier_version_say_so(tmp_path: Path) -> None:
    fields = {"name": "sst2", "kind": "classification", "eval_splits": ["test"], "prompt": "{a}:", "label_words": []}
    (tmp_path / "task.json").write_text(json.dumps(fields))
    for read in (read_task, read_eval_splits):
        with pytest.raises(ValueError, match="made by an earlier version; run the stage data again"):
            read(tmp_path)


def test_a_limit_draws_from_the_whole_split() -> None:
    rows = [{"label": i // 50} for i in range(100)]
    sample = _sample(rows, 20)
    assert len(sample) == 20
    assert 5 <= sum(row["label"] for row in sample) <= 15
    assert sample == _sample(rows, 20)
    assert _sample(rows, 0) == rows


def test_a_label_word_that_no_training_example_has_is_an_error() -> None:
    train = pa.table({"label": [0, 2, 2, 0]})
    with pytest.raises(ValueError, match=r"none of 'maybe' among num_examples=4 of split=train"):
        _require_every_label(train, ["no", "maybe", "yes"], "train")
    _require_every_label(pa.table({"label": [1, 0]}), ["no", "yes"], "train")
