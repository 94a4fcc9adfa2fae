"""Templates, examples, batches and corpus blocks."""

import json
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import torch
from tokenizers.processors import TemplateProcessing

from bitdistill_core import data
from bitdistill_core.contained import drop_contained
from bitdistill_core.corpus import BlockBatches, sample_sequences, tokenize_corpus
from bitdistill_core.data import Example, ExampleBatches, collate, encode_prompt, encode_prompts, load_examples
from bitdistill_core.losses import Totals
from bitdistill_core.naive_bayes import fit_predict
from bitdistill_core.sources import locate, read_rows
from bitdistill_core.stages.base import train_tokenizer
from bitdistill_core.stages.data import _require_every_label, _sample, read_eval_splits, read_task
from bitdistill_core.templates import TEMPLATES, Template
from tests.core.conftest import Workshop


@pytest.mark.parametrize("task", sorted(TEMPLATES))
def test_builtin_templates_render(task: str) -> None:
    template = TEMPLATES[task]
    row = {
        "sentence": "a\n b",
        "premise": "p",
        "hypothesis": "h",
        "question": "q",
        "article": "x",
        "label": 1,
        "highlights": "s",
    }
    assert "\n b" not in template.render_prompt(row)
    assert template.render_answer(row).startswith(" ")


@pytest.mark.parametrize("label", [-1, 2, "2", "1.0", 0.5, 2.0, True])
def test_a_label_outside_the_template_is_an_error(label: object) -> None:
    with pytest.raises(ValueError, match="a label must be one of 0, 1, 'negative', 'positive'; got label="):
        TEMPLATES["sst2"].render_answer({"sentence": "x", "label": label})


def test_a_missing_column_is_named() -> None:
    with pytest.raises(ValueError, match="needs column sentence; the columns are text, label"):
        TEMPLATES["sst2"].render_prompt({"text": "x", "label": 0})


@pytest.mark.parametrize("missing", [None, float("nan")])
def test_a_missing_value_is_no_text(missing: object) -> None:
    with pytest.raises(ValueError, match=r"a value where the template needs it; got sentence=(None|nan)"):
        TEMPLATES["sst2"].render_prompt({"sentence": missing, "label": 0})
    with pytest.raises(ValueError, match=r"got label=(None|nan)"):
        TEMPLATES["sst2"].render_answer({"sentence": "x", "label": missing})
    with pytest.raises(ValueError, match=r"got highlights=(None|nan)"):
        TEMPLATES["cnn_dailymail"].render_answer({"article": "x", "highlights": missing})
    with pytest.raises(ValueError, match="an answer must not be empty; got highlights=''"):
        TEMPLATES["cnn_dailymail"].render_answer({"article": "x", "highlights": " "})
    assert TEMPLATES["sst2"].render_prompt({"sentence": "x", "note": missing}) == "Review: x\nSentiment:"


@pytest.mark.parametrize(
    ("values", "labels"),
    [
        ([], [0, 1]),
        ([], ["0", "1"]),  # from CSV
        ([-1, 1], ["-1", " 1"]),
        ([False, True], ["False", "True"]),
        ([], ["no", " yes "]),
        (["spam", "ham"], ["spam", "ham "]),
        ([False, True], [False, True]),
        ([-1, 1], [-1, 1]),
        ([], [0.0, 1.0]),  # integers of a column that lacks one, read by pandas
        ([-1, 1], [-1.0, 1.0]),
    ],
)
def test_labels_may_be_numbers_the_words_or_the_data_s_own(values: list[object], labels: list[object]) -> None:
    fields = {"kind": "classification", "prompt": "{a}:", "label_words": ["no", "yes"], "label_values": values}
    template = Template.model_validate({**fields, "answer_column": "label"})
    assert [template.label({"label": label}) for label in labels] == [0, 1]
    assert template.render_answer({"label": labels[1]}) == " yes"
    with pytest.raises(ValueError, match=r"got label='perhaps'; set label_values in data\.template"):
        template.label({"label": "perhaps"})


@pytest.mark.parametrize("values", [["spam"], ["spam", "spam"], ["spam", "ham", "eggs"]])
def test_label_values_must_pair_up_with_label_words(values: list[str]) -> None:
    with pytest.raises(ValueError, match="one different value for each of label_words"):
        Template(
            kind="classification", prompt="{a}:", label_words=["no", "yes"], label_values=values, answer_column="label"
        )


def test_words_that_are_numbers_count_before_their_places() -> None:
    template = Template(kind="classification", prompt="{a}:", label_words=["1", "2", "3"], answer_column="stars")
    assert [template.label({"stars": label}) for label in ("1", "2", "3")] == [0, 1, 2]
    assert [template.label({"stars": label}) for label in (0, 1, 2)] == [0, 1, 2]
    with pytest.raises(ValueError, match=r"got stars='0'; set label_values"):  # the text of a place, or another scale?
        template.label({"stars": "0"})


@pytest.mark.parametrize(
    ("prompt", "message"),
    [("text\nlabel:", "must name a column in braces"), ("{a:", "braces must pair up"), ("{a} ", "white space")],
)
def test_a_prompt_that_shows_no_text_is_refused(prompt: str, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        Template(kind="generation", prompt=prompt, answer_column="x")


def test_a_template_with_one_label_is_refused() -> None:
    with pytest.raises(ValueError, match="at least 2 different label_words"):
        Template(kind="classification", prompt="{a}:", label_words=["x"], answer_column="label")


def test_long_prompts_lose_tokens_on_the_left(tmp_path: Path, corpus: Path) -> None:
    tokenizer = train_tokenizer(corpus, vocab_size=300)
    path = tmp_path / "train.parquet"
    pq.write_table(pa.table({"prompt": ["the cat " * 30 + "sat:", "a:"], "answer": [" yes", " no"]}), path)
    long, short = load_examples(path, tokenizer, max_length=12, window=64, is_generation=False)
    assert len(long.prompt_ids) + len(long.answer_ids) == 12
    assert tokenizer.decode(long.prompt_ids).endswith("sat:")
    assert tokenizer.decode(short.prompt_ids + short.answer_ids) == "a: no"
    assert (long.is_cut, short.is_cut) == (True, False)


def test_a_length_beyond_the_window_is_an_error(tmp_path: Path, corpus: Path) -> None:
    tokenizer = train_tokenizer(corpus, vocab_size=300)
    with pytest.raises(ValueError, match="max_length=65, window=64"):
        load_examples(tmp_path / "none", tokenizer, max_length=65, window=64, is_generation=False)


def test_every_epoch_visits_every_example_once() -> None:
    examples = [Example([i] * (1 + i % 5), [99]) for i in range(3, 43)]
    batches = ExampleBatches(examples, batch_size=8, gradient_accumulation=2, seed=1)
    assert batches.steps_per_epoch == 5
    for epoch in range(2):
        seen = [int(row[0]) for step in range(5) for part in batches(epoch * 5 + step) for row in part.input_ids]
        assert sorted(seen) == list(range(3, 43))
    assert [b.input_ids.tolist() for b in batches(3)] == [
        b.input_ids.tolist() for b in ExampleBatches(examples, batch_size=8, gradient_accumulation=2, seed=1)(3)
    ]


@pytest.mark.parametrize(("num_examples", "batch_size"), [(100, 64), (500, 32), (70, 8)])
def test_few_examples_make_other_batches_each_epoch_and_none_is_left_out(num_examples: int, batch_size: int) -> None:
    examples = [Example([1 + i] * (1 + i), [0]) for i in range(num_examples)]  # each of another length
    batches = ExampleBatches(examples, batch_size=batch_size, gradient_accumulation=1, seed=1)
    drawn = [frozenset(batches(step)[0].input_ids[:, 0].tolist()) for step in range(30 * batches.steps_per_epoch)]
    assert frozenset.union(*drawn) == set(range(1, num_examples + 1))
    assert len(set(drawn)) == len(drawn)


def test_totals_cover_the_whole_step() -> None:
    batches = ExampleBatches(
        [Example([1, 2], [3]), Example([4], [5, 6])], batch_size=2, gradient_accumulation=2, seed=0
    )
    parts = batches(0)
    assert len(parts) == 2
    assert parts[0].totals == parts[1].totals == Totals(num_sequences=2, num_tokens=6, num_targets=3)


def test_collate_labels_only_answers() -> None:
    batch = collate([Example([5, 6], [7]), Example([8], [9])], Totals(2, 5, 2))
    assert batch.input_ids.tolist() == [[5, 6, 7], [8, 9, 0]]
    assert batch.labels.tolist() == [[-100, -100, 7], [-100, 9, -100]]
    assert batch.is_token.tolist() == [[True, True, True], [True, True, False]]


def test_blocks_cover_the_corpus(tmp_path: Path, corpus: Path) -> None:
    tokenizer = train_tokenizer(corpus, vocab_size=300)
    tokens = tokenize_corpus(corpus, tokenizer, max_tokens=10**6, out=tmp_path / "tokens.bin")
    text = tokenizer.decode(tokens[:40].tolist())
    assert text.startswith("the cat sat on the mat<|endoftext|>a dog ran")
    batches = BlockBatches(np.arange(64, dtype=np.uint32), block_size=8, batch_size=4, gradient_accumulation=2, seed=0)
    seen = np.concatenate([part.input_ids.numpy().ravel() for step in range(2) for part in batches(step)])
    assert sorted(seen) == list(range(64))


def test_tokenising_stops_at_max_tokens(tmp_path: Path, corpus: Path) -> None:
    tokenizer = train_tokenizer(corpus, vocab_size=300)
    assert len(tokenize_corpus(corpus, tokenizer, max_tokens=17, out=tmp_path / "t.bin")) == 17


@pytest.mark.parametrize("has_mark", [False, True])
def test_documents_blocks_and_calibration_begin_as_prompts_do(tmp_path: Path, corpus: Path, has_mark: bool) -> None:
    tokenizer = train_tokenizer(corpus, vocab_size=300)
    begin = []
    if has_mark:
        tokenizer.add_special_tokens({"bos_token": "<s>"})
        begin = [tokenizer.bos_token_id]
        tokenizer.backend_tokenizer.post_processor = TemplateProcessing(
            single="<s> $A", special_tokens=[("<s>", *begin)]
        )
    assert encode_prompt(tokenizer, "the cat")[: len(begin)] == begin
    tokens = tokenize_corpus(corpus, tokenizer, max_tokens=10**6, out=tmp_path / "tokens.bin")
    documents = ["the cat sat on the mat", "a dog ran", "the end of the story"] * 20
    encoded = [tokenizer.encode(text, add_special_tokens=False) for text in documents]
    assert tokens.tolist() == [i for ids in encoded for i in (*begin, *ids, tokenizer.eos_token_id)]
    options = {"block_size": 7, "batch_size": 4, "gradient_accumulation": 1, "seed": 0}
    plain = BlockBatches(tokens, **options)(0)[0].input_ids
    marked = BlockBatches(tokens, **options, begin=begin)(0)[0].input_ids
    assert marked[:, len(begin) :].equal(plain[:, len(begin) :])
    assert marked[:, : len(begin)].tolist() == [begin] * 4
    sequences = sample_sequences(corpus, "text", tokenizer, num_sequences=3, length=9, seed=0)
    assert sequences[:, : len(begin)].tolist() == [begin] * 3
    assert tokenizer.eos_token_id in sequences


def test_examples_of_an_earlier_version_say_so(tmp_path: Path) -> None:
    fields = {"name": "sst2", "kind": "classification", "eval_splits": ["test"], "prompt": "{a}:", "label_words": []}
    (tmp_path / "task.json").write_text(json.dumps(fields))
    for read in (read_task, read_eval_splits):
        with pytest.raises(ValueError, match="made by an earlier version; run the stage data again"):
            read(tmp_path)


def test_parquet_sources(tmp_path: Path) -> None:
    (tmp_path / "glue" / "sst2").mkdir(parents=True)
    pq.write_table(pa.table({"sentence": ["x"], "label": [1]}), tmp_path / "glue" / "sst2" / "validation-0.parquet")
    source = locate("nyu-mll/glue", "sst2", str(tmp_path))
    assert list(read_rows(source, "validation", "sst2")) == [{"sentence": "x", "label": 1}]
    with pytest.raises(ValueError, match=r"no file of split=train .* holds validation-0\.parquet"):
        list(read_rows(source, "train", "sst2"))
    with pytest.raises(ValueError, match="holds no data for nyu-mll/other; tried"):
        locate("nyu-mll/other", None, str(tmp_path))
    assert locate("nyu-mll/glue", "sst2", None) == "nyu-mll/glue"
    assert locate("nyu-mll/glue@main", "sst2", str(tmp_path)) == source
    assert locate("nyu-mll/glue@refs/pr/1", "sst2", None) == "nyu-mll/glue@refs/pr/1"
    (tmp_path / "c@2.jsonl").write_text("{}")
    assert locate("c@2.jsonl", None, str(tmp_path)) == tmp_path / "c@2.jsonl"
    file = tmp_path / "glue" / "sst2" / "validation-0.parquet"
    assert locate(str(file), None, str(tmp_path / "glue")) == file


@pytest.mark.parametrize(
    ("name", "content"),
    [
        ("d.jsonl", '{"text": "a, b", "label": 1, "split": "train"}\n\n{"text": "c", "label": 0, "split": "test"}\n'),
        ("d.csv", 'text,label,split\n"a, b",1,train\nc,0,test\n'),
        ("bom.jsonl", '\ufeff{"text": "a, b", "label": 1, "split": "train"}\n'),
        ("bom.csv", '\ufefftext,label,split\n"a, b",1,train\n'),
    ],
)
def test_one_file_with_a_split_column(tmp_path: Path, name: str, content: str) -> None:
    (tmp_path / name).write_text(content)
    (row,) = read_rows(tmp_path / name, "train", None)
    assert {**row, "label": int(row["label"])} == {"text": "a, b", "label": 1, "split": "train"}


def test_one_file_without_a_split_column_is_no_data_set(tmp_path: Path) -> None:
    (tmp_path / "d.jsonl").write_text('{"text": "a", "label": 1}\n')
    with pytest.raises(ValueError, match=r"needs a column split.* with columns text, label; add it, or give a dir"):
        list(read_rows(tmp_path / "d.jsonl", "test", None))


def test_texts_of_a_csv_file_stay_as_they_are(tmp_path: Path) -> None:
    (tmp_path / "train.csv").write_text("text,label\n007,1\n--5,0\n,1\n")
    assert [row["text"] for row in read_rows(tmp_path, "train", None)] == ["007", "--5", ""]


@pytest.mark.parametrize("line", ["a, with a comma,1", "lonely"])
def test_a_ragged_csv_file_is_an_error(tmp_path: Path, line: str) -> None:
    (tmp_path / "train.csv").write_text(f"text,label\nfine,1\n{line}\n")
    with pytest.raises(ValueError, match=r"as many values as there are columns; got line=3 in .*columns=text, label"):
        list(read_rows(tmp_path, "train", None))


def test_unreadable_data_files_are_named(tmp_path: Path) -> None:
    (tmp_path / "a.jsonl").write_text("{no json")
    (tmp_path / "b.parquet").write_bytes(b"PAR1 not really")
    for name in ("a.jsonl", "b.parquet"):
        with pytest.raises(ValueError, match=f"unreadable data file path=.*{name}"):
            list(read_rows(tmp_path / name, "train", None))
    (tmp_path / "c.jsonl").write_text('{"split": "train"}\n[1]\n')
    with pytest.raises(ValueError, match="a line must be one JSON object; got line=2"):
        list(read_rows(tmp_path / "c.jsonl", "train", None))
    with pytest.raises(ValueError, match=r"give a \.parquet, \.jsonl, \.csv file"):
        locate(str(tmp_path / "none.parquet"), None, None)


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


def test_naive_bayes_learns_words() -> None:
    labels = np.array([0, 1] * 10)
    texts = ["bad film", "good film"] * 10
    assert fit_predict(texts, labels, ["a good one", "BAD!"]).tolist() == [1, 0]


def test_the_documentation_prints_every_template() -> None:
    page = (Path(__file__).parents[2] / "docs" / "method.md").read_text()
    for task, template in TEMPLATES.items():
        assert f"`{task}`" in page
        assert template.prompt.replace("\n", "\\n") in page
        assert all(f"`{word}`" in page for word in template.label_words)


def test_sampled_sequences_are_random_documents_joined_and_cut(tmp_path: Path) -> None:
    texts = [f"{'abcdefgh'[i % 8]} {i} story" for i in range(40)]
    directory = tmp_path / "texts"
    directory.mkdir()
    pq.write_table(pa.table({"text": texts[:25]}), directory / "00000.parquet", row_group_size=5)
    pq.write_table(pa.table({"text": texts[25:]}), directory / "00001.parquet")
    tokenizer = train_tokenizer(directory, vocab_size=300)
    ids: list[int] = []
    for index in np.random.default_rng(7).permutation(40):
        ids += [*tokenizer(texts[index])["input_ids"], tokenizer.eos_token_id]
    found = sample_sequences(directory, "text", tokenizer, num_sequences=6, length=10, seed=7)
    assert found.tolist() == [ids[10 * row : 10 * row + 10] for row in range(6)]
    other = sample_sequences(directory, "text", tokenizer, num_sequences=6, length=10, seed=8)
    assert not found.equal(other)
    whole = len(ids) // 10
    assert sample_sequences(directory, "text", tokenizer, num_sequences=whole, length=10, seed=7).shape == (whole, 10)
    with pytest.raises(ValueError, match=rf"length = {10 * whole + 10} tokens; path=.* has {len(ids)}; lower"):
        sample_sequences(directory, "text", tokenizer, num_sequences=whole + 1, length=10, seed=7)


def test_texts_within_longer_texts_are_dropped_by_whole_words() -> None:
    texts = ["a good film", "good film", "this is a good  film indeed", "ood film", "bad", "bad", "", "film good"]
    assert [texts[i] for i in drop_contained(texts)] == [texts[2], "ood film", "bad", "", "film good"]
    assert drop_contained(["bad", "x", "bad"]) == [0, 1]


def test_dropping_agrees_with_comparing_all_pairs() -> None:
    rng = np.random.default_rng(0)
    texts = [" ".join("abc"[i] for i in rng.integers(0, 3, rng.integers(1, 9))) for _ in range(300)]

    def is_contained(i: int) -> bool:
        return any(
            f" {texts[i]} " in f" {other} " and (other != texts[i] or j < i) for j, other in enumerate(texts) if j != i
        )

    assert drop_contained(texts) == [i for i in range(300) if not is_contained(i)]


def test_prompts_encoded_together_are_those_encoded_alone(workshop: Workshop, monkeypatch: pytest.MonkeyPatch) -> None:
    texts = ["the cat", "", "a longer text than the others", "42"]
    monkeypatch.setattr(data, "PROMPTS_AT_ONCE", 3)
    assert list(encode_prompts(workshop.tokenizer, texts)) == [encode_prompt(workshop.tokenizer, t) for t in texts]


def test_a_padded_batch_has_the_same_tokens() -> None:
    batch = collate([Example([1, 2, 3], [4]), Example([5], [6])], Totals(2, 6, 2))
    padded = batch.padded(8)
    assert padded.input_ids.shape == padded.labels.shape == (2, 8)
    assert torch.equal(padded.input_ids[:, :4], batch.input_ids)
    assert torch.equal(padded.labels[:, :4], batch.labels)
    assert (padded.labels[:, 4:] == -100).all()
    assert torch.equal(padded.is_token[:, :4], batch.is_token)
    assert not padded.is_token[:, 4:].any()
    assert padded.totals == batch.totals
    assert torch.equal(batch.padded(4).input_ids, batch.input_ids)
