"""What lm-eval is told of a task: one configuration for each kind, with ROUGE and BLEU for generation.

Rows are those of the `data` stage: prompt, choices (with their leading space) and label, or prompt and reference.
"""

from collections.abc import Mapping, Sequence
from functools import cache
from typing import Any

import sacrebleu
from rouge_score import rouge_scorer

ROUGE = ("rouge1", "rouge2", "rougeL", "rougeLsum")


def lm_eval_task(name: str, *, is_generation: bool) -> dict[str, Any]:
    """The configuration of a task, without its data.

    `doc_to_text` names the column: of a template that renders to digits lm-eval would make a number.
    """
    if is_generation:
        means = [{"metric": metric, "aggregation": "mean", "higher_is_better": True} for metric in ROUGE]
        return {
            "task": name,
            "output_type": "generate_until",
            "doc_to_text": "prompt",
            "doc_to_target": "reference",
            "process_results": summary_scores,
            "generation_kwargs": {"do_sample": False, "until": []},
            "metric_list": [*means, {"metric": "bleu", "aggregation": corpus_bleu, "higher_is_better": True}],
        }
    return {
        "task": name,
        "output_type": "multiple_choice",
        "doc_to_text": "prompt",
        "doc_to_choice": "choices",
        "doc_to_target": "label",
        "target_delimiter": "",
        "metric_list": [{"metric": "acc", "aggregation": "mean", "higher_is_better": True}],
    }


@cache
def _scorer() -> rouge_scorer.RougeScorer:
    return rouge_scorer.RougeScorer(ROUGE, use_stemmer=True)


def summary_scores(doc: Mapping[str, Any], results: Sequence[str]) -> dict[str, Any]:
    """Metrics of one summary, in percent. ROUGE is the F-measure with stemming; Lsum takes a sentence a line."""
    reference, prediction = doc["reference"], results[0].strip()
    scores = _scorer().score(_sentence_lines(reference), _sentence_lines(prediction))
    return {**{name: 100 * scores[name].fmeasure for name in ROUGE}, "bleu": (reference, prediction)}


def corpus_bleu(items: Sequence[tuple[str, str]]) -> float:
    """SacreBLEU over all (reference, prediction) pairs."""
    references, predictions = zip(*items, strict=True)
    return float(sacrebleu.corpus_bleu(list(predictions), [list(references)]).score)


def _sentence_lines(text: str) -> str:
    return text if "\n" in text else text.replace(". ", ".\n")
