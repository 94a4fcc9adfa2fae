"""What a base model must have, refused before anything is trained."""

import json
import shutil
from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from transformers import AutoTokenizer

from bitdistill_core.config import Params
from bitdistill_core.params import load_params
from bitdistill_core.stages.fit import require_fit
from tests.conftest import ROOT


@pytest.mark.parametrize(
    ("override", "message"),
    [
        ("teacher.max_length=600", "got teacher.max_length=600, window=256; lower teacher.max_length"),
        ("distill.max_length=600", "got distill.max_length=600"),
        ("bitnet_sft.max_length=600", "got bitnet_sft.max_length=600"),
        ("pretrain.block_size=600", "got pretrain.block_size=600"),
        ("benchmark.prompt_tokens=500", "benchmark.prompt_tokens \\+ new_tokens=5"),
        (
            "surgery.weight_granularity=block surgery.weight_block_size=80",
            "must divide every layer's input width; got layer=q_proj, width=",
        ),
        ("surgery.subln_gain=preserve surgery.calibration_length=600", "got surgery.calibration_length=600"),
        ("data.task=cnn_dailymail evaluate.max_new_tokens=256", "got evaluate.max_new_tokens \\+ 1=257"),
        ("distill.distill_layers=[9]", "distill.distill_layers must name layers of a model with num_layers=2; got 9"),
        ("distill.max_length=2", "got distill.max_length=2, tokens="),
        ("surgery.subln_gain=preserve surgery.calibration_sequences=1000000", "lower surgery.calibration_sequences"),
        ("distill.num_relation_heads=7", "distill.num_relation_heads must divide the query width"),
    ],
)
def test_what_the_base_model_does_not_have_is_refused(
    finished_run: Path, tiny_overrides: list[str], override: str, message: str
) -> None:
    def params(*more: str) -> Params:
        return load_params(ROOT / "params.yaml", overrides=[*tiny_overrides, *more])

    require_fit(params(), finished_run / "base", data_dir=finished_run / "data")
    with pytest.raises(ValueError, match=message):
        require_fit(params(*override.split()), finished_run / "base", data_dir=finished_run / "data")


def test_a_teacher_that_cannot_teach_is_refused(finished_run: Path, tiny_overrides: list[str], tmp_path: Path) -> None:
    def params(*more: str) -> Params:
        return load_params(ROOT / "params.yaml", overrides=[*tiny_overrides, *more])

    def require(*more: str) -> None:
        require_fit(params(*more), finished_run / "base", data_dir=finished_run / "data", teacher_dir=teacher)

    teacher = Path(shutil.copytree(finished_run / "base", tmp_path / "teacher"))
    blockwise = "distill.blockwise.num_epochs=1"
    require(blockwise)
    config = json.loads((teacher / "config.json").read_text())
    (teacher / "config.json").write_text(json.dumps(config | {"num_hidden_layers": 3, "layer_types": None}))
    require()
    with pytest.raises(ValueError, match=r"same depth and width; got student=\(2, 32\), teacher=\(3, 32\)"):
        require(blockwise)
    tokenizer = json.loads((teacher / "tokenizer.json").read_text())
    words = tokenizer["model"]["vocab"]
    words["another"] = len(words) + len(tokenizer["added_tokens"])
    (teacher / "tokenizer.json").write_text(json.dumps(tokenizer))
    with pytest.raises(ValueError, match="teacher and student must share a vocabulary"):
        require()


def custom(*words: str, kind: str = "classification") -> list[str]:
    fields = [f"kind: {kind}", 'prompt: "{sentence}:"', f"label_words: [{', '.join(words)}]", "answer_column: label"]
    return ["data.task=custom", f"data.template={{{', '.join(fields)}}}"]


def test_a_label_word_that_begins_another_is_refused(finished_run: Path, tiny_overrides: list[str]) -> None:
    def params(*words: str) -> Params:
        return load_params(ROOT / "params.yaml", overrides=[*tiny_overrides, *custom(*words)])

    require_fit(params("film good", "good film"), finished_run / "base", data_dir=finished_run / "data")
    for words in (("good", "good film"), ("bad", "good film", "good")):
        with pytest.raises(ValueError, match="got label_words='good' and 'good film', tokens="):
            require_fit(params(*words), finished_run / "base", data_dir=finished_run / "data")


def test_a_tokenizer_larger_than_the_embedding_is_refused(
    finished_run: Path, tiny_params: Params, tmp_path: Path
) -> None:
    base = tmp_path / "base"
    shutil.copytree(finished_run / "base", base)
    config = json.loads((base / "config.json").read_text())
    (base / "config.json").write_text(json.dumps(config | {"vocab_size": config["vocab_size"] - 1}))
    with pytest.raises(ValueError, match=r"an embedding for every token; got tokenizer.vocab_size=\d+, vocab_size=\d+"):
        require_fit(tiny_params, base, data_dir=finished_run / "data")


def test_a_text_with_a_token_that_has_no_embedding_is_refused(
    finished_run: Path, tiny_params: Params, tmp_path: Path
) -> None:
    base, data = tmp_path / "base", tmp_path / "data"
    shutil.copytree(finished_run / "base", base)
    shutil.copytree(finished_run / "data", data)
    tokenizer = AutoTokenizer.from_pretrained(base)
    tokenizer.add_tokens(["<ticket>"])
    tokenizer.save_pretrained(base)
    require_fit(tiny_params, base, data_dir=data)  # no text has it
    path = data / "examples/validation.parquet"
    table = pq.read_table(path)
    for place, column in enumerate(("prompt", "answer")):
        texts = ["a <ticket> 7", *table[column].to_pylist()[1:]]
        pq.write_table(table.set_column(place, column, pa.array(texts)), path)
        with pytest.raises(ValueError, match="got token='<ticket>' without one in validation, text='a <ticket> 7'"):
            require_fit(tiny_params, base, data_dir=data)


def test_a_tokenizer_without_an_end_of_text_is_refused(finished_run: Path, tiny_params: Params, tmp_path: Path) -> None:
    base = tmp_path / "base"
    shutil.copytree(finished_run / "base", base)
    tokenizer = json.loads((base / "tokenizer_config.json").read_text())
    (base / "tokenizer_config.json").write_text(json.dumps(tokenizer | {"eos_token": None}))
    with pytest.raises(ValueError, match="the tokenizer's eos_token is None; set it in"):
        require_fit(tiny_params, base, data_dir=finished_run / "data")


def test_a_corpus_smaller_than_a_block_is_refused(finished_run: Path, tiny_params: Params, tmp_path: Path) -> None:
    (tmp_path / "corpus").mkdir()
    pq.write_table(pa.table({"text": ["a film"]}), tmp_path / "corpus/00000.parquet")
    with pytest.raises(ValueError, match=r"the corpus must hold at least one block; got num_tokens=\d+, pretrain"):
        require_fit(tiny_params, finished_run / "base", data_dir=tmp_path)
