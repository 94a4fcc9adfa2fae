"""A whole conversion of a summariser with a task of its own, from the data to the registered model's answers."""

import json
from pathlib import Path

import pandas as pd
import pyarrow.parquet as pq
import pytest

from bitdistill_core.engine.model import Engine
from bitdistill_core.packing import PACKED_FILE
from bitdistill_core.params import load_params
from bitdistill_core.pipeline import NODES, run_node
from tasks.packed_model import PackedModel
from tests.conftest import ROOT


@pytest.fixture(scope="module")
def summariser(tiny_overrides: list[str], tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The run directory. A summary is a text's first two words."""
    folder = tmp_path_factory.mktemp("summariser")
    texts = pq.read_table(ROOT / "data/demo/reviews.parquet")["sentence"].to_pylist()
    texts = [text for text in texts if len(text.split()) >= 4][:80]
    for split, part in (("train", texts[:64]), ("test", texts[64:])):
        rows = [json.dumps({"text": text, "title": " ".join(text.split()[:2])}) for text in part]
        (folder / f"{split}.jsonl").write_text("\n".join(rows))
    template = '{kind: generation, prompt: "Text: {text}\\nTitle:", answer_column: title}'
    overrides = ["data.task=custom", f"data.template={template}", f"data.examples={folder}", "data.eval_splits=[test]"]
    params = load_params(ROOT / "params.yaml", overrides=[*tiny_overrides, *overrides, "evaluate.max_new_tokens=8"])
    for node in NODES:
        run_node(node, params, folder / "runs/titles")
    return folder / "runs/titles"


def test_texts_and_scores_of_student_and_packed_model_agree(summariser: Path) -> None:
    results = json.loads((summariser / "report/results.json").read_text())
    assert [row["method"] for row in results["rows"]] == ["fp16_sft", "bitnet_sft", "bitdistill"]
    for row in results["rows"]:
        assert row["accuracy"] is None
        assert all(0 <= row[name] <= 1 for name in ("rouge1", "rougeLsum", "bleu"))

    def texts(method: str) -> list[str]:
        lines = (summariser / f"evaluate/{method}/predictions-test.jsonl").read_text().splitlines()
        return [json.loads(line)["prediction"] for line in lines]

    assert len(texts("bitdistill")) == 16
    same = [one == other for one, other in zip(texts("bitdistill"), texts("bitdistill_packed"), strict=True)]
    assert sum(same) >= 12  # ties of INT8 rounding


def test_the_registered_model_writes_as_many_tokens_as_it_is_asked(summariser: Path) -> None:
    path = summariser / "pack/bitdistill" / PACKED_FILE
    frame = pd.DataFrame({"text": ["a fine film about a long war", "two hours of nothing"]})
    predicted = PackedModel(path).predict(frame, {"max_new_tokens": 3})["text"].tolist()
    engine = Engine.load(path)
    prompts = [f"Text: {text}\nTitle:" for text in frame["text"]]
    assert predicted == ["".join(engine.generate(prompt, 3)).strip() for prompt in prompts]
