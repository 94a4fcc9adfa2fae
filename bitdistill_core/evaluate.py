"""Evaluation of a split: accuracy, or ROUGE and BLEU, through lm-eval or without it, on any scorer.

lm_eval and datasets are imported inside the functions that need them.
"""

import json
import logging
from collections.abc import Sequence
from contextlib import nullcontext
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow.parquet as pq
from numpy.typing import NDArray

from bitdistill_core.manifest import read_lines, write_lines
from bitdistill_core.progress import progress_bar
from bitdistill_core.scorers import Scorer


@dataclass(frozen=True)
class Evaluation:
    """One split of a task on one model."""

    metrics: dict[str, float]
    num_examples: int
    predictions: list[dict[str, Any]]  # index, prediction; label and scores, or reference or scores


def evaluate_split(
    scorer: Scorer,
    *,
    task: str,
    is_generation: bool,
    examples: Path,
    split: str,
    max_new_tokens: int,
    kept: Path | None = None,
) -> Evaluation:
    """Runs one split through lm-eval's evaluator.

    Args:
        task: its name, for the progress bar.
        examples: parquet written by the `data` stage.
        kept: a file of generated texts, for an evaluation that is interrupted.
    """
    import datasets
    from lm_eval.evaluator import simple_evaluate
    from lm_eval.tasks import TaskManager

    from bitdistill_core.lm_eval_tasks import lm_eval_task

    name = f"bitdistill_{task}"
    logging.getLogger("lm_eval").setLevel(logging.ERROR)  # its hints are about its own command line
    rows = pq.read_table(examples).to_pylist()
    dataset = {split: datasets.Dataset.from_list(rows)}
    config = lm_eval_task(name, is_generation=is_generation)
    results = simple_evaluate(
        model=_adapter(scorer, max_new_tokens, f"{task} {split}", kept),
        tasks=[{**config, "test_split": split, "custom_dataset": lambda **_: dataset}],
        task_manager=TaskManager(include_defaults=False),  # the tasks that lm-eval ships take many seconds to parse
        bootstrap_iters=0,
        log_samples=True,
    )
    values, samples = results["results"][name], results["samples"][name]
    names = {"acc,none": "accuracy"}
    metrics = {
        names.get(key, key.removesuffix(",none")): float(value)
        for key, value in values.items()
        if key.endswith(",none") and "stderr" not in key
    }
    samples = sorted(samples, key=lambda sample: sample["doc_id"])
    return Evaluation(metrics, len(samples), [_prediction(sample, is_generation) for sample in samples])


def score_examples(
    scorer: Scorer, *, is_generation: bool, examples: Path, max_new_tokens: int, name: str, kept: Path | None = None
) -> Evaluation:
    """The same figures as `evaluate_split` without lm-eval, for machines that have only what training needs.

    Args:
        examples: parquet written by the `data` stage; name: for the progress bar.
        kept: a file of generated texts, for an evaluation that is interrupted.
    """
    rows = pq.read_table(examples).to_pylist()
    if is_generation:
        return _score_texts(rows, _generate(scorer, [row["prompt"] for row in rows], max_new_tokens, name, kept))
    answers = {choice: scorer.encode_answer(choice) for row in rows for choice in row["choices"]}
    prompts = [scorer.encode_prompt(row["prompt"]) for row in rows]
    requests = [(ids, answers[c]) for ids, row in zip(prompts, rows, strict=True) for c in row["choices"]]
    scores = np.empty(len(requests))
    with progress_bar(f"evaluate {name}", total=len(requests), unit="answer") as bar:
        for index, log_prob in scorer.score(requests):
            scores[index] = log_prob
            bar.update()
    ends = np.cumsum([len(row["choices"]) for row in rows])[:-1]
    per_row = zip(rows, np.split(scores, ends), strict=True)
    predictions = [_choice(index, row["label"], own) for index, (row, own) in enumerate(per_row)]
    accuracy = float(np.mean([line["prediction"] == line["label"] for line in predictions]))
    return Evaluation({"accuracy": accuracy}, len(rows), predictions)


def _generate(scorer: Scorer, prompts: Sequence[str], max_new_tokens: int, name: str, kept: Path | None) -> list[str]:
    """A text for each prompt. Texts in the file `kept` are not generated again, new ones are added to it."""
    texts: dict[int, str] = {}
    if kept is not None:
        lines = read_lines(kept)
        write_lines(kept, lines)  # without a line that was cut short
        texts.update((line["index"], line["text"]) for line in lines)
    missing = [index for index in range(len(prompts)) if index not in texts]
    with (
        progress_bar(f"evaluate {name}", total=len(prompts), initial=len(texts), unit="text") as bar,
        kept.open("a") if kept is not None else nullcontext() as file,
    ):
        for place, text in scorer.generate([prompts[index] for index in missing], max_new_tokens):
            texts[missing[place]] = text
            if file is not None:
                file.write(json.dumps({"index": missing[place], "text": text}) + "\n")
                file.flush()
            bar.update()
    return [texts[index] for index in range(len(prompts))]


def _score_texts(rows: Sequence[Any], texts: Sequence[str]) -> Evaluation:
    from bitdistill_core.lm_eval_tasks import ROUGE, corpus_bleu, summary_scores

    predictions: list[dict[str, Any]] = []
    pairs = []
    for index, (row, text) in enumerate(zip(rows, texts, strict=True)):
        scores = summary_scores(row, [text])
        pairs.append(scores.pop("bleu"))
        predictions.append({"index": index, "prediction": text.strip(), "scores": scores})
    metrics = {key: float(np.mean([line["scores"][key] for line in predictions])) for key in ROUGE}
    return Evaluation({**metrics, "bleu": corpus_bleu(pairs)}, len(rows), predictions)


def wilson_interval(accuracy: float, num_examples: int) -> tuple[float, float]:
    """95% Wilson score interval of a share, as fractions."""
    z = 1.959963984540054
    centre = accuracy + z**2 / (2 * num_examples)
    spread = z * ((accuracy * (1 - accuracy) + z**2 / (4 * num_examples)) / num_examples) ** 0.5
    scale = 1 + z**2 / num_examples
    return (centre - spread) / scale, (centre + spread) / scale


def _prediction(sample: dict[str, Any], is_generation: bool) -> dict[str, Any]:
    if is_generation:
        return {
            "index": sample["doc_id"],
            "prediction": sample["filtered_resps"][0].strip(),
            "reference": sample["doc"]["reference"],
        }
    return _choice(sample["doc_id"], sample["doc"]["label"], [response[0] for response in sample["filtered_resps"]])


def _choice(index: int, label: int, scores: Sequence[float] | NDArray[np.float64]) -> dict[str, Any]:
    """A prediction among choices; the first of equals."""
    return {
        "index": index,
        "label": label,
        "prediction": int(np.argmax(scores)),
        "scores": [round(float(score), 5) for score in scores],
    }


def _adapter(scorer: Scorer, max_new_tokens: int, name: str, kept: Path | None) -> Any:
    """The scorer as lm-eval's LM; `kept`: see _generate."""
    from lm_eval.api.model import LM

    class Adapter(LM):
        def loglikelihood(self, requests: Sequence[Any]) -> list[tuple[float, bool]]:
            pairs = [(r.args[0], r.args[1]) for r in requests]
            prompts = {text: scorer.encode_prompt(text) for text in {p for p, _ in pairs}}
            answers = {text: scorer.encode_answer(text) for text in {a for _, a in pairs}}
            encoded = [(prompts[p], answers[a]) for p, a in pairs]
            out = [0.0] * len(pairs)
            with progress_bar(f"evaluate {name}", total=len(pairs), unit="answer") as bar:
                for index, log_prob in scorer.score(encoded):
                    out[index] = log_prob
                    bar.update()
            return [(value, False) for value in out]  # accuracy does not ask whether an answer is greedy

        def loglikelihood_rolling(self, requests: Sequence[Any]) -> list[float]:
            raise ValueError("this project's tasks score answers or generate text; none asks for rolling likelihood")

        def generate_until(self, requests: Sequence[Any]) -> list[str]:
            return _generate(scorer, [request.args[0] for request in requests], max_new_tokens, name, kept)

    return Adapter()
