"""ROUGE-1/2/L/Lsum and BLEU for lm-eval, in percent as the paper reports them."""

from collections.abc import Mapping, Sequence
from functools import cache
from typing import Any

import sacrebleu
from rouge_score import rouge_scorer

ROUGE = ("rouge1", "rouge2", "rougeL", "rougeLsum")


@cache
def _scorer() -> rouge_scorer.RougeScorer:
    return rouge_scorer.RougeScorer(ROUGE, use_stemmer=True)


def process_results(doc: Mapping[str, Any], results: Sequence[str]) -> dict[str, Any]:
    """Metrics of one generated summary. ROUGE is the F-measure with stemming; Lsum takes a sentence a line."""
    reference, prediction = doc["reference"], results[0].strip()
    scores = _scorer().score(_sentence_lines(reference), _sentence_lines(prediction))
    return {**{name: 100 * scores[name].fmeasure for name in ROUGE}, "bleu": (reference, prediction)}


def corpus_bleu(items: Sequence[tuple[str, str]]) -> float:
    """SacreBLEU over all (reference, prediction) pairs."""
    references, predictions = zip(*items, strict=True)
    return float(sacrebleu.corpus_bleu(list(predictions), [list(references)]).score)


def _sentence_lines(text: str) -> str:
    return text if "\n" in text else text.replace(". ", ".\n")
