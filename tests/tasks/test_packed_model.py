"""The packed student as a pyfunc, without MLflow; test_tracking.py loads it through the registry."""

from pathlib import Path

import pandas as pd
import pyarrow.parquet as pq
import pytest

from bitdistill_core.engine.model import Engine
from tasks.packed_model import PackedModel

LABELS = ["negative", "positive"]


@pytest.fixture(scope="module")
def model(finished_run: Path) -> PackedModel:
    return PackedModel(finished_run / "pack/bitdistill/model.bitdistill")


def test_the_labels_are_those_the_engine_prefers_on_the_prompts_of_the_data_stage(
    model: PackedModel, finished_run: Path
) -> None:
    prompts = pq.read_table(finished_run / "data/examples/test.parquet")["prompt"].to_pylist()
    texts = [prompt.removeprefix("Review: ").removesuffix("\nSentiment:") for prompt in prompts]
    scores = Engine.load(finished_run / "pack/bitdistill/model.bitdistill").score(prompts, [" negative", " positive"])
    predicted = model.predict(pd.DataFrame({"text": texts}))
    assert predicted["label"].tolist() == [LABELS[best] for best in scores.argmax(axis=1)]
    assert predicted["probability"].between(0.5, 1.0).all()


def test_the_column_of_the_template_works_like_text_and_the_index_is_kept(model: PackedModel) -> None:
    frame = pd.DataFrame({"sentence": ["good", "bad"]}, index=[7, 3])
    predicted = model.predict(frame)
    assert predicted.index.tolist() == [7, 3]
    assert predicted["label"].tolist() == model.predict(frame.rename(columns={"sentence": "text"}))["label"].tolist()


def test_a_missing_column_is_named(model: PackedModel) -> None:
    with pytest.raises(ValueError, match="needs column sentence; the columns are body"):
        model.predict(pd.DataFrame({"body": ["good"]}))
