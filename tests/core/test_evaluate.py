"""Evaluation through lm-eval against scores computed by hand."""

from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any, ClassVar

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import torch

from bitdistill_core import scorers
from bitdistill_core.checkpoint import load_model
from bitdistill_core.data import end_ids
from bitdistill_core.evaluate import evaluate_split, score_examples, wilson_interval
from bitdistill_core.packing import PACKED_FILE
from bitdistill_core.scorers import PackedScorer, Request, Scorer, TorchScorer
from bitdistill_core.stages.base import train_tokenizer
from bitdistill_core.surgery import operate
from tests.core.conftest import add_bos, build


@pytest.mark.parametrize("model_type", ["qwen3", "gemma3_text"])
def test_scores_are_log_probabilities_of_answers(model_type: str) -> None:
    model = build(model_type)
    scorer = TorchScorer(model, None, batch_size=3, device=torch.device("cpu"))  # type: ignore[arg-type]
    requests: list[Request] = [([5, 6, 7], [8]), ([5, 6, 7], [9, 10]), ([11], [12]), ([5, 6, 7], [9, 13])]
    scores = dict(scorer.score(requests))
    for index, (prompt, answer) in enumerate(requests):
        with torch.no_grad():
            log_probs = model(torch.tensor([prompt + answer])).logits[0].log_softmax(-1)
        expected = sum(float(log_probs[len(prompt) - 1 + i, token]) for i, token in enumerate(answer))
        assert scores[index] == pytest.approx(expected, abs=1e-4)


class Oracle:
    """A scorer that knows its answers by their text."""

    def __init__(self, good: set[tuple[str, str]], text: str = "") -> None:
        self.good, self.text = good, text
        self.seen: dict[tuple[int, ...], str] = {}

    def _encode(self, text: str) -> list[int]:
        ids = list(text.encode())
        self.seen[tuple(ids)] = text
        return ids

    encode_prompt = encode_answer = _encode

    def score(self, requests: Sequence[Request]) -> Iterator[tuple[int, float]]:
        for index, (prompt, answer) in enumerate(requests):
            yield index, 0.0 if (self.seen[tuple(prompt)], self.seen[tuple(answer)]) in self.good else -1.0

    def generate(self, prompts: Sequence[str], max_new_tokens: int) -> Iterator[tuple[int, str]]:
        yield from enumerate([self.text] * len(prompts))


def write_rows(path: Path, labels: list[int]) -> Path:
    rows = {
        "prompt": [f"p{i}" for i in range(len(labels))],
        "answer": [" no", " yes"] * (len(labels) // 2),
        "choices": [[" no", " yes"]] * len(labels),
        "label": labels,
        "reference": ["the cat sat.\nit slept."] * len(labels),
    }
    pq.write_table(pa.table(rows), path)
    return path


def test_accuracy_and_predictions_per_example(tmp_path: Path) -> None:
    examples = write_rows(tmp_path / "test.parquet", [0, 1, 1, 0])
    oracle = Oracle({("p0", " no"), ("p1", " yes"), ("p2", " no"), ("p3", " no")})
    result = evaluate_split(oracle, task="sst2", is_generation=False, examples=examples, split="test", max_new_tokens=4)
    assert result.metrics == {"accuracy": 0.75}
    assert [p["prediction"] for p in result.predictions] == [0, 1, 0, 0]
    assert [p["label"] for p in result.predictions] == [0, 1, 1, 0]
    assert result.predictions[0]["scores"] == [0.0, -1.0]


def test_summaries_get_rouge_and_bleu(tmp_path: Path) -> None:
    examples = write_rows(tmp_path / "test.parquet", [-1, -1])
    run = {"task": "cnn_dailymail", "is_generation": True, "examples": examples, "split": "test", "max_new_tokens": 4}
    same = evaluate_split(Oracle(set(), "the cat sat.\nit slept."), **run)  # type: ignore[arg-type]
    assert same.metrics == pytest.approx(
        {"rouge1": 100, "rouge2": 100, "rougeL": 100, "rougeLsum": 100, "bleu": 100}, abs=1e-6
    )
    half = evaluate_split(Oracle(set(), "the cat"), **run)  # type: ignore[arg-type]
    assert half.metrics["rouge1"] == pytest.approx(100 * 2 * (2 / 2) * (2 / 5) / (1 + 2 / 5))
    assert half.predictions[1]["reference"].startswith("the cat sat")


def both_ways(scorer: Scorer, examples: Path, task: str, *, is_generation: bool = False) -> tuple[Any, Any]:
    """Through lm-eval, and without it."""
    options = {"is_generation": is_generation, "examples": examples, "max_new_tokens": 8}
    return (
        evaluate_split(scorer, task=task, split="test", **options),  # type: ignore[arg-type]
        score_examples(scorer, name="test", **options),  # type: ignore[arg-type]
    )


@pytest.mark.parametrize("task", ["sst2", "mnli"])
def test_scores_without_lm_eval_are_those_of_lm_eval(tmp_path: Path, corpus: Path, task: str) -> None:
    tokenizer = train_tokenizer(corpus, vocab_size=300)
    model = build("qwen3", vocab_size=len(tokenizer), eos_token_id=None)
    choices = {"sst2": [" a", " t"], "mnli": [" yes", " no", " the cat sat"]}[task]  # of one token, of several
    prompts = ["a dog", "the cat sat on the mat", "a dog", "the end", "story of the end", "dog", "the mat"]
    labels = [0, 1, 1, 0, 1, len(choices) - 1, 0]
    rows = {
        "prompt": prompts,
        "answer": [choices[label] for label in labels],
        "choices": [choices] * 7,
        "label": labels,
        "reference": prompts,
    }
    pq.write_table(pa.table(rows), tmp_path / "test.parquet")
    scorer = TorchScorer(model, tokenizer, batch_size=3, device=torch.device("cpu"))
    through_lm_eval, plain = both_ways(scorer, tmp_path / "test.parquet", task)
    assert plain.metrics == through_lm_eval.metrics
    assert plain.predictions == through_lm_eval.predictions
    assert plain.num_examples == through_lm_eval.num_examples == 7
    assert len({line["prediction"] for line in plain.predictions}) > 1


def test_a_tie_is_the_first_answer_either_way(tmp_path: Path) -> None:
    through_lm_eval, plain = both_ways(Oracle(set()), write_rows(tmp_path / "test.parquet", [0, 1]), "sst2")
    assert plain.metrics == through_lm_eval.metrics == {"accuracy": 0.5}
    assert plain.predictions == through_lm_eval.predictions


@pytest.mark.parametrize("prompts", [["p", "42"], ["42", "p"], ["{{p}}\n", " 7"]])
def test_a_prompt_of_digits_is_a_text(tmp_path: Path, prompts: list[str]) -> None:
    examples = write_rows(tmp_path / "test.parquet", [0, 1])
    table = pq.read_table(examples)
    pq.write_table(table.set_column(0, "prompt", pa.array(prompts)), examples)
    good = {(prompts[0], " no"), (prompts[1], " yes")}
    for found in both_ways(Oracle(good), examples, "sst2"):
        assert found.metrics == {"accuracy": 1.0}


class Echo(Oracle):
    """Writes a different text for each prompt."""

    TEXTS: ClassVar = {"p0": " the cat sat.", "p1": "it slept.\n", "p2": "", "p3": "a Cat; it sleeps <b>now</b>"}

    def generate(self, prompts: Sequence[str], max_new_tokens: int) -> Iterator[tuple[int, str]]:
        for index, prompt in reversed(list(enumerate(prompts))):
            yield index, self.TEXTS[prompt]


def test_summaries_without_lm_eval_are_those_of_lm_eval(tmp_path: Path) -> None:
    examples = write_rows(tmp_path / "test.parquet", [-1] * 4)
    through_lm_eval, plain = both_ways(Echo(set()), examples, "cnn_dailymail", is_generation=True)
    assert plain.metrics == pytest.approx(through_lm_eval.metrics, rel=1e-12)
    assert set(plain.metrics) == {"rouge1", "rouge2", "rougeL", "rougeLsum", "bleu"}
    assert [p["prediction"] for p in plain.predictions] == [p["prediction"] for p in through_lm_eval.predictions]
    for name in ("rouge1", "rougeLsum"):
        mean = sum(line["scores"][name] for line in plain.predictions) / 4
        assert plain.metrics[name] == pytest.approx(mean)


def test_greedy_generation_decodes_new_text_only(corpus: Path) -> None:
    tokenizer = train_tokenizer(corpus, vocab_size=300)
    model = build("qwen3", vocab_size=len(tokenizer), eos_token_id=None)
    scorer = TorchScorer(model, tokenizer, batch_size=2, device=torch.device("cpu"))
    ids = scorer.encode_prompt("the cat")
    for _ in range(3):
        with torch.no_grad():
            ids.append(int(model(torch.tensor([ids])).logits[0, -1].argmax()))
    assert list(scorer.generate(["the cat"], 3)) == [(0, tokenizer.decode(ids[-3:], skip_special_tokens=True))]


@pytest.mark.parametrize("model_type", ["qwen3", "gemma3_text"])
@pytest.mark.parametrize("is_student", [False, True])
def test_texts_of_a_batch_are_those_of_single_prompts(corpus: Path, model_type: str, is_student: bool) -> None:
    tokenizer = train_tokenizer(corpus, vocab_size=300)
    model = build(model_type, vocab_size=len(tokenizer), eos_token_id=None, tie_word_embeddings=False)
    with torch.no_grad():
        model.lm_head.weight.mul_(4)
    if is_student:
        operate(model, subln="output", sub_norm_eps=1e-6)
    prompts = ["a dog", "the cat sat on the mat and the dog ran to the end of the story", "the end", "", "mat"]
    prompts = [prompt + " of the" for prompt in prompts]
    found: list[list[int]] = []
    with torch.no_grad():
        for prompt in prompts:
            ids, new = tokenizer.encode(prompt), []
            for _ in range(12):
                new.append(int(model(torch.tensor([ids + new])).logits[0, -1].argmax()))
            found.append(new)
    end = next(token for new in found for token in new[2:] if token not in new[:2])  # the first text is cut at it
    model.generation_config.eos_token_id = [end]
    ends = end_ids(model, tokenizer)
    lengths = [next((i for i, token in enumerate(new) if token in ends), len(new)) for new in found]
    expected = [tokenizer.decode(new[:length]) for new, length in zip(found, lengths, strict=True)]
    assert 2 <= lengths[0] < 12
    assert len(set(expected)) > 2
    scorer = TorchScorer(model, tokenizer, batch_size=2, device=torch.device("cpu"))
    texts = list(scorer.generate(prompts, 12))
    assert [index for index, _ in texts] != sorted(index for index, _ in texts)
    assert [text for _, text in sorted(texts)] == expected


def test_a_batch_holds_no_more_tokens_than_fit(corpus: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    tokenizer = train_tokenizer(corpus, vocab_size=300)
    scorer = TorchScorer(
        build("qwen3", vocab_size=len(tokenizer), eos_token_id=None),
        tokenizer,
        batch_size=4,
        device=torch.device("cpu"),
    )
    prompts = ["mat", "a dog", "the end of the story", "the cat", "the cat sat on the mat and the dog ran to it", "dog"]
    requests = [(scorer.encode_prompt(prompt), scorer.encode_answer(" end")) for prompt in prompts]
    scores, texts = dict(scorer.score(requests)), dict(scorer.generate(prompts, 5))
    longest = max(len(prompt) for prompt, _ in requests)
    monkeypatch.setattr(scorers, "TOKENS_AT_ONCE", longest - 1)
    shapes: list[tuple[int, int]] = []
    embed = scorer.model.get_input_embeddings()
    embed.register_forward_pre_hook(lambda _, inputs: shapes.append(tuple(inputs[0].shape)))
    assert dict(scorer.score(requests)) == pytest.approx(scores, abs=1e-5)
    assert all(rows == 1 or rows * length < longest for rows, length in shapes)
    assert {rows for rows, _ in shapes} > {1}
    assert len(shapes) < len(prompts)
    monkeypatch.setattr(scorers, "TOKENS_AT_ONCE", 2 * (longest + 5))
    shapes.clear()
    assert dict(scorer.generate(prompts, 5)) == texts
    prefills = [(rows, length) for rows, length in shapes if length > 1]
    assert all(rows * (length + 5) <= 2 * (longest + 5) for rows, length in prefills)
    assert max(rows for rows, _ in prefills) > 1


def test_an_interrupted_evaluation_keeps_its_texts(tmp_path: Path) -> None:
    class Interrupted(Echo):
        def generate(self, prompts: Sequence[str], max_new_tokens: int) -> Iterator[tuple[int, str]]:
            asked.append(list(prompts))
            for count, found in enumerate(super().generate(prompts, max_new_tokens)):
                if count == stop_at:
                    raise KeyboardInterrupt
                yield found

    asked: list[list[str]] = []
    stop_at: int | None = 2
    run: dict[str, Any] = {
        "task": "cnn_dailymail",
        "is_generation": True,
        "examples": write_rows(tmp_path / "test.parquet", [-1] * 4),
        "split": "test",
        "max_new_tokens": 4,
    }
    with pytest.raises(KeyboardInterrupt):
        evaluate_split(Interrupted(set()), **run, kept=tmp_path / "generated-test.jsonl")
    with (tmp_path / "generated-test.jsonl").open("a") as file:
        file.write('{"index": 1, "text": "it s {l}')  # cut short by the end of the process
    stop_at = None
    resumed = evaluate_split(Interrupted(set()), **run, kept=tmp_path / "generated-test.jsonl")
    assert asked == [["p0", "p1", "p2", "p3"], ["p0", "p1"]]
    assert resumed == evaluate_split(Echo(set()), **run)


def test_a_frozen_student_computes_what_it_did() -> None:
    model, ids = build("qwen3"), torch.arange(3, 23)[None]
    operate(model, subln="output", sub_norm_eps=1e-6)
    with torch.no_grad():
        expected = model(ids).logits
        TorchScorer(model, None, batch_size=1, device=torch.device("cpu"))  # type: ignore[arg-type]
        assert torch.equal(model(ids).logits, expected)
    assert not any(parameter.requires_grad for name, parameter in model.named_parameters() if "proj.weight" in name)


def test_both_runtimes_give_the_same_answers(finished_run: Path) -> None:
    model, tokenizer = load_model(finished_run / "distill")
    torch_scorer = TorchScorer(model, tokenizer, batch_size=4, device=torch.device("cpu"))
    packed = PackedScorer(finished_run / "pack" / "bitdistill" / PACKED_FILE)
    rows = pq.read_table(finished_run / "data/examples/test.parquet").to_pylist()
    for row in rows:
        assert torch_scorer.encode_prompt(row["prompt"]) == packed.encode_prompt(row["prompt"])
    answers = [torch_scorer.encode_answer(word) for word in (" negative", " positive", " very good")]
    assert [packed.encode_answer(word) for word in (" negative", " positive", " very good")] == answers
    requests = [(packed.encode_prompt(row["prompt"]), answer) for row in rows for answer in answers]
    expected = dict(torch_scorer.score(requests))
    assert dict(packed.score(requests)) == pytest.approx(expected, abs=0.05)
    assert max(expected.values()) - min(expected.values()) > 1
    prompts = [row["prompt"] for row in rows]
    texts, others = dict(torch_scorer.generate(prompts, 8)), dict(packed.generate(prompts, 8))
    assert sum(texts[index] == others[index] for index in texts) >= 0.8 * len(prompts)  # ties of INT8 rounding


def test_prompts_beyond_the_window_lose_their_beginning_in_both_runtimes(finished_run: Path) -> None:
    model, tokenizer = load_model(finished_run / "distill")
    scorers: list[Any] = [
        TorchScorer(model, tokenizer, batch_size=2, device=torch.device("cpu")),
        PackedScorer(finished_run / "pack" / "bitdistill" / PACKED_FILE),
    ]
    window = model.config.max_position_embeddings
    text = "a film that never ends and " * window
    short = TorchScorer.encode_prompt(scorers[0], text)[-(window - 1) :]
    for scorer in scorers:
        prompt = scorer.encode_prompt(text)
        assert len(prompt) > window
        answers = [scorer.encode_answer(" good"), [*scorer.encode_answer(" bad"), 5]]
        scores = dict(scorer.score([(prompt, answer) for answer in answers]))
        room = window - max(map(len, answers)) + 1
        cut = dict(scorer.score([(short[-room:], answer) for answer in answers]))
        assert scores == pytest.approx(cut, abs=1e-6)
        room = window - 3 + 1  # a summariser's prompt loses its middle
        half = scorer.encode_prompt(text)
        kept = [*half[: room - room // 2], *half[len(half) - room // 2 :]]
        by_hand = kept if isinstance(scorer, PackedScorer) else torch.tensor([kept])
        if isinstance(scorer, PackedScorer):
            new = list(scorer.engine.generate_ids(by_hand, 3))
        else:
            new = scorer.model.generate(by_hand, max_new_tokens=3, do_sample=False)[0, len(kept) :].tolist()
        assert list(scorer.generate([text], 3)) == [(0, tokenizer.decode(new, skip_special_tokens=True))]
    with pytest.raises(ValueError, match="a prompt needs room beside its answer"):
        list(scorers[0].generate([text], window + 2))


def test_wilson_interval_against_a_published_example() -> None:
    # Newcombe 1998, table I: 81 of 263
    low, high = wilson_interval(81 / 263, 263)
    assert (low, high) == (pytest.approx(0.2553, abs=1e-4), pytest.approx(0.3662, abs=1e-4))


def test_a_prompt_beyond_the_window_keeps_its_leading_mark(corpus: Path) -> None:
    tokenizer = train_tokenizer(corpus, vocab_size=300)
    bos = add_bos(tokenizer)
    model = build("qwen3", vocab_size=len(tokenizer), eos_token_id=None)
    scorer = TorchScorer(model, tokenizer, batch_size=2, device=torch.device("cpu"))
    text = "the cat sat on the mat and the dog ran " * 20
    prompt, answer, window = scorer.encode_prompt(text), scorer.encode_answer(" end"), scorer.window
    room = window - len(answer) + 1
    by_hand = [bos, *prompt[len(prompt) - room + 1 :]]
    assert dict(scorer.score([(prompt, answer)])) == pytest.approx(dict(scorer.score([(by_hand, answer)])), abs=1e-6)
    assert scorer.score([(prompt[-room:], answer)]).__next__()[1] != pytest.approx(
        next(scorer.score([(by_hand, answer)]))[1], abs=1e-4
    )
    room, last = window - 3 + 1, (window - 3) // 2
    kept = torch.tensor([[*prompt[: room - last], *prompt[len(prompt) - last :]]])
    new = model.generate(kept, max_new_tokens=3, do_sample=False)[0, room:].tolist()
    assert list(scorer.generate([text], 3)) == [(0, tokenizer.decode(new, skip_special_tokens=True))]
