"""Evaluation through lm-eval: this project's task files over a PyTorch model or the packed model.

One adapter serves both. Prompts and answers are encoded as in training, not by joining strings, so teacher, student
and packed model see the same tokens. lm_eval and datasets are imported inside the functions that need them.
"""

import json
import logging
from collections.abc import Callable, Iterator, Sequence
from contextlib import nullcontext
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Protocol

import numpy as np
import pyarrow.parquet as pq
import torch
from torch import nn
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from bitdistill_core import losses
from bitdistill_core.bitlinear import BitLinear
from bitdistill_core.data import Example, collate, encode_answer, encode_prompt, end_ids, leading_mark
from bitdistill_core.engine.tokenizer import keep_end
from bitdistill_core.manifest import read_lines, write_lines
from bitdistill_core.progress import progress_bar

TASK_FILES = Path(__file__).parent / "lm_eval_tasks"
CONTEXTS_AT_ONCE = 32  # prompts that the packed model scores between two steps of the progress bar

Request = tuple[list[int], list[int]]  # token ids of a prompt and of an answer


class Scorer(Protocol):
    """A language model as evaluation sees it."""

    def encode_prompt(self, text: str) -> list[int]: ...

    def encode_answer(self, text: str) -> list[int]: ...

    def score(self, requests: Sequence[Request]) -> Iterator[tuple[int, float]]:
        """Yields (index of the request, log-probability of its answer) in any order."""
        ...

    def generate(self, prompts: Sequence[str], max_new_tokens: int) -> Iterator[tuple[int, str]]:
        """Yields (index of the prompt, its greedy continuation up to the end-of-text token) in any order."""
        ...


@dataclass(frozen=True)
class Evaluation:
    """One split of a task on one model."""

    metrics: dict[str, float]
    num_examples: int
    predictions: list[dict[str, Any]]  # index, label, prediction, scores | index, prediction, reference


class TorchScorer:
    """A transformers model, dense or student."""

    def __init__(
        self, model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase, *, batch_size: int, device: torch.device
    ) -> None:
        """Takes the model over: a student's latent weights are replaced by quantised ones."""
        nn.Module.to(model, device)
        for module in model.modules():
            if isinstance(module, BitLinear):
                module.freeze()
        self.model, self.tokenizer = model.eval(), tokenizer
        self.batch_size, self.device = batch_size, device
        self.window = int(model.config.max_position_embeddings)

    def encode_prompt(self, text: str) -> list[int]:
        """Token ids, as in training."""
        return encode_prompt(self.tokenizer, text)

    def encode_answer(self, text: str) -> list[int]:
        """Token ids, as in training."""
        return encode_answer(self.tokenizer, text, ends=False)

    @torch.inference_mode()
    def score(self, requests: Sequence[Request]) -> Iterator[tuple[int, float]]:
        """Log-probabilities of answers. Answers that share all but their last token share one forward pass."""
        rows: dict[tuple[int, ...], list[int]] = {}
        for index, (prompt, answer) in enumerate(
            _cut(requests, self.window, lambda: len(leading_mark(self.tokenizer)))
        ):
            rows.setdefault((*prompt, *answer[:-1]), []).append(index)
        ordered = sorted(rows.items(), key=lambda row: len(row[0]))
        for start in range(0, len(ordered), self.batch_size):
            part = ordered[start : start + self.batch_size]
            batch = collate([Example(list(ids), []) for ids, _ in part], losses.Totals(1, 1, 1))
            batch = batch.to(self.device)
            hidden = losses.hidden_states(self.model, batch)
            for row, (ids, indices) in enumerate(part):
                for index in indices:
                    answer = requests[index][1]
                    at = slice(len(ids) - len(answer), len(ids))
                    log_probs = losses.head_logits(self.model, hidden[row, at]).float()
                    log_probs = log_probs.log_softmax(-1)
                    yield index, float(log_probs[torch.arange(len(answer)), torch.tensor(answer)].sum())

    @torch.inference_mode()
    def generate(self, prompts: Sequence[str], max_new_tokens: int) -> Iterator[tuple[int, str]]:
        """Greedy continuations, in batches of prompts of similar length that are padded on the left."""
        room, leading = self.window - max_new_tokens + 1, len(leading_mark(self.tokenizer))
        encoded = [keep_end(self.encode_prompt(prompt), room, leading) for prompt in prompts]
        order = sorted(range(len(prompts)), key=lambda index: len(encoded[index]), reverse=True)  # the slowest first
        ends = end_ids(self.model, self.tokenizer)
        for start in range(0, len(order), self.batch_size):
            indices = order[start : start + self.batch_size]
            width = len(encoded[indices[0]])
            rows = [[0] * (width - len(encoded[index])) + encoded[index] for index in indices]
            is_token = [[0] * (width - len(encoded[index])) + [1] * len(encoded[index]) for index in indices]
            out = self.model.generate(
                torch.tensor(rows, device=self.device),
                attention_mask=torch.tensor(is_token, device=self.device),
                max_new_tokens=max_new_tokens,
                do_sample=False,
                eos_token_id=ends or None,
                pad_token_id=ends[0] if ends else 0,
            )
            for index, row in zip(indices, out[:, width:].tolist(), strict=True):
                length = next((place for place, token in enumerate(row) if token in ends), len(row))
                yield index, str(self.tokenizer.decode(row[:length], skip_special_tokens=True))


class PackedScorer:
    """A packed model in the CPU engine."""

    def __init__(self, path: Path) -> None:
        from bitdistill_core.engine.model import Engine

        self.engine = Engine.load(path, num_threads=torch.get_num_threads())
        self.window = self.engine.config.max_position_embeddings

    def encode_prompt(self, text: str) -> list[int]:
        """Token ids, as in training."""
        return self.engine.prompt_ids(text)

    def encode_answer(self, text: str) -> list[int]:
        """Token ids, as in training."""
        return self.engine.tokenizer.encode(text, add_special_tokens=False)

    def score(self, requests: Sequence[Request]) -> Iterator[tuple[int, float]]:
        """Log-probabilities of answers."""
        requests = _cut(requests, self.window, lambda: self.engine.tokenizer.num_leading)
        contexts: dict[tuple[int, ...], list[int]] = {}
        for index, (prompt, _) in enumerate(requests):
            contexts.setdefault(tuple(prompt), []).append(index)
        groups = list(contexts.values())
        for begin in range(0, len(groups), CONTEXTS_AT_ONCE):
            indices = [index for group in groups[begin : begin + CONTEXTS_AT_ONCE] for index in group]
            scores = self.engine.score_ids([requests[i] for i in indices])
            for index, (log_probability, _) in zip(indices, scores, strict=True):
                yield index, log_probability

    def generate(self, prompts: Sequence[str], max_new_tokens: int) -> Iterator[tuple[int, str]]:
        """Greedy continuations, one prompt after the other."""
        for index, prompt in enumerate(prompts):
            yield index, "".join(self.engine.generate(prompt, max_new_tokens=max_new_tokens, truncate=True))


def _cut(requests: Sequence[Request], window: int, leading: Callable[[], int]) -> Sequence[Request]:
    """Prompts that do not fit the window beside their answer lose their beginning; training cuts at max_length already.

    Args:
        leading: marks before a text, which stay.
    """
    rooms = [window - len(answer) + 1 for _, answer in requests]
    if all(len(prompt) <= room for (prompt, _), room in zip(requests, rooms, strict=True)):
        return requests
    marks = leading()
    return [(keep_end(prompt, room, marks), answer) for (prompt, answer), room in zip(requests, rooms, strict=True)]


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
        task: a file in lm_eval_tasks/, or `custom` for the template in the parameters.
        examples: parquet written by the `data` stage.
        kept: a file of generated texts, for an evaluation that is interrupted.
    """
    import datasets
    from lm_eval.evaluator import simple_evaluate
    from lm_eval.tasks import TaskManager
    from lm_eval.tasks._yaml_loader import load_yaml

    custom = "custom_generation" if is_generation else "custom_classification"
    name = f"bitdistill_{custom if task == 'custom' else task}"
    logging.getLogger("lm_eval").setLevel(logging.ERROR)  # its hints are about its own command line
    rows = pq.read_table(examples).to_pylist()
    dataset = {split: datasets.Dataset.from_list(rows)}
    # without the task files that lm-eval ships, which take many seconds to parse
    manager = TaskManager(include_path=TASK_FILES, include_defaults=False)
    config = {**load_yaml(manager.task_index[name].yaml_path), "test_split": split}
    results = simple_evaluate(
        model=_adapter(scorer, max_new_tokens, f"{task} {split}", kept),
        tasks=[{**config, "custom_dataset": lambda **_: dataset}],
        task_manager=manager,
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
    predictions: list[dict[str, Any]] = []
    begin = 0
    for index, row in enumerate(rows):
        own = scores[begin : begin + len(row["choices"])]
        begin += len(row["choices"])
        predictions.append({
            "index": index,
            "label": row["label"],
            "prediction": int(np.argmax(own)),
            "scores": [round(float(score), 5) for score in own],
        })  # fmt: skip
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
    from bitdistill_core.lm_eval_tasks import summarisation

    predictions: list[dict[str, Any]] = []
    pairs = []
    for index, (row, text) in enumerate(zip(rows, texts, strict=True)):
        scores = summarisation.process_results(row, [text])
        pairs.append(scores.pop("bleu"))
        predictions.append({"index": index, "prediction": text.strip(), "scores": scores})
    metrics = {key: float(np.mean([line["scores"][key] for line in predictions])) for key in summarisation.ROUGE}
    return Evaluation({**metrics, "bleu": summarisation.corpus_bleu(pairs)}, len(rows), predictions)


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
    scores = [float(response[0]) for response in sample["filtered_resps"]]
    return {
        "index": sample["doc_id"],
        "label": sample["doc"]["label"],
        "prediction": int(np.argmax(scores)),
        "scores": [round(score, 5) for score in scores],
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
