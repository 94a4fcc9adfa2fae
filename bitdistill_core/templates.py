"""Prompt, label words and metric of each task: the only place where a task's wording lives.

The student, its teacher and every evaluation see the same strings. A task of one's own needs no code: set
`data.task: custom` and write the same fields under `data.template`.
"""

from collections.abc import Mapping
from typing import Any, Literal

from pydantic import BaseModel, ConfigDict, Field, model_validator


class Template(BaseModel):
    """How one row of a data set becomes a prompt and an answer.

    `prompt` names columns in braces and must not end in a space; the answer begins with one.
    """

    model_config = ConfigDict(frozen=True, extra="forbid")

    kind: Literal["classification", "generation"]
    prompt: str = Field(min_length=1)
    label_words: list[str] = []  # classification: the answer of label 0, 1, ...
    label_values: list[int | bool | str] = []  # what the column holds for each word; none: 0, 1, ... or the word
    answer_column: str  # the label, or the reference text

    @model_validator(mode="after")
    def _consistent(self) -> "Template":
        if self.prompt != self.prompt.rstrip():
            raise ValueError(f"a template's prompt must not end in white space; got prompt={self.prompt!r}")
        if self.kind == "classification" and len(set(self.label_words)) < 2:
            raise ValueError(f"classification needs at least 2 different label_words; got {self.label_words}")
        if any(word != word.strip() or not word for word in self.label_words):
            raise ValueError(f"label_words must be words without outer spaces; got {self.label_words}")
        if self.label_values and len(set(self.label_values)) != len(self.label_words):
            raise ValueError(
                "label_values must be one different value for each of label_words, or none; got "
                f"label_values={self.label_values}, label_words={self.label_words}"
            )
        return self

    def render_prompt(self, row: Mapping[str, Any]) -> str:
        """The prompt of a row. Raises ValueError for a column that the row lacks."""
        try:
            return self.prompt.format_map({key: _one_line(value) for key, value in row.items()})
        except KeyError as error:
            raise ValueError(
                f"the template needs column {error.args[0]}; the columns are {', '.join(row)}; fix data.template"
            ) from None

    def render_answer(self, row: Mapping[str, Any]) -> str:
        """The answer of a row, with its leading space. Raises ValueError as `label` does."""
        if self.kind == "generation":
            return " " + str(self._answer(row)).strip()
        return " " + self.label_words[self.label(row)]

    def label(self, row: Mapping[str, Any]) -> int:
        """Which of `label_words` is the answer of a row. Raises ValueError for a label that stands for none."""
        value = self._answer(row)
        if isinstance(value, str):
            value = value.strip()
        for known in [self.label_values] if self.label_values else [range(len(self.label_words)), self.label_words]:
            for index, one in enumerate(known):
                if value == one and type(value) is type(one):  # in Python True == 1 == 1.0
                    return index
        wanted = self.label_values or [*range(len(self.label_words)), *self.label_words]
        raise ValueError(
            f"a label must be one of {', '.join(map(repr, wanted))}; got {self.answer_column}={value!r}; set "
            "label_values in data.template to the data's own labels, one for each of label_words, or drop the row"
        )

    def _answer(self, row: Mapping[str, Any]) -> Any:
        if self.answer_column not in row:
            raise ValueError(f"the template needs column {self.answer_column}; the columns are {', '.join(row)}")
        return row[self.answer_column]


def _one_line(value: Any) -> Any:
    return " ".join(value.split()) if isinstance(value, str) else value


TEMPLATES: Mapping[str, Template] = {
    "review_sentiment": Template(
        kind="classification",
        prompt="Review: {sentence}\nSentiment:",
        label_words=["negative", "positive"],
        answer_column="label",
    ),
    "sst2": Template(
        kind="classification",
        prompt="Review: {sentence}\nSentiment:",
        label_words=["negative", "positive"],
        answer_column="label",
    ),
    "mnli": Template(
        kind="classification",
        prompt="Premise: {premise}\nHypothesis: {hypothesis}\nThe hypothesis is true, unclear or false:",
        label_words=["true", "unclear", "false"],  # entailment, neutral, contradiction
        answer_column="label",
    ),
    "qnli": Template(
        kind="classification",
        prompt="Question: {question}\nSentence: {sentence}\nDoes the sentence answer the question:",
        label_words=["yes", "no"],  # entailment, not_entailment
        answer_column="label",
    ),
    "cnn_dailymail": Template(
        kind="generation",
        prompt="Article: {article}\nSummary:",
        answer_column="highlights",
    ),
}
