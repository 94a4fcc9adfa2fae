"""Prompt, label words and metric of each task: the only place where a task's wording lives.

The student, its teacher and every evaluation see the same strings. A task of one's own needs no code: set
`data.task: custom` and write the same fields under `data.template`.
"""

import string
from collections.abc import Mapping
from functools import cached_property
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
        if not self.columns:
            raise ValueError(f"a template's prompt must name a column in braces; got prompt={self.prompt!r}")
        if self.answer_column in self.columns:
            raise ValueError(
                f"a template's prompt must not show the answer; got answer_column={self.answer_column!r} in it"
            )
        if self.kind == "classification" and len(self.label_words) < 2:
            raise ValueError(f"classification needs at least 2 different label_words; got {self.label_words}")
        if len(set(self.label_words)) < len(self.label_words):
            raise ValueError(f"label_words must all be different; got {self.label_words}")
        if any(word != word.strip() or not word for word in self.label_words):
            raise ValueError(f"label_words must be words without outer spaces; got {self.label_words}")
        if any(isinstance(value, str) and value != value.strip() for value in self.label_values):
            raise ValueError(
                f"label_values must be without outer spaces, which are cut off labels; got {self.label_values}"
            )
        if self.label_values and len(set(self.label_values)) != len(self.label_words):
            raise ValueError(
                "label_values must be one different value for each of label_words, or none; got "
                f"label_values={self.label_values}, label_words={self.label_words}"
            )
        return self

    @cached_property
    def columns(self) -> list[str]:
        """The columns that the prompt names, each once."""
        try:
            names = [name for _, name, _, _ in string.Formatter().parse(self.prompt) if name is not None]
        except ValueError as error:
            raise ValueError(f"a template's braces must pair up; got prompt={self.prompt!r}: {error}") from None
        for name in names:
            if set(name) & set(".[]"):  # format would look into the value
                raise ValueError(f"a template's columns must have names without . [ ]; got {name!r}; rename the column")
        return list(dict.fromkeys(names))

    def render_prompt(self, row: Mapping[str, Any]) -> str:
        """The prompt of a row. Raises ValueError for a column that the row lacks or leaves empty."""
        return self.prompt.format_map({name: _one_line(self._value(row, name)) for name in self.columns})

    def render_answer(self, row: Mapping[str, Any]) -> str:
        """The answer of a row, with its leading space. Raises ValueError as `label` and `render_prompt` do."""
        if self.kind == "classification":
            return " " + self.label_words[self.label(row)]
        return " " + str(self._value(row, self.answer_column)).strip()

    def label(self, row: Mapping[str, Any]) -> int:
        """Which of `label_words` is the answer of a row. Raises ValueError for a label that stands for none."""
        value = self._value(row, self.answer_column)
        if isinstance(value, str):
            value = value.strip()
        if isinstance(value, float) and value.is_integer():  # a column of integers that once lacked a value
            value = int(value)
        known = [self.label_values] if self.label_values else [range(len(self.label_words)), self.label_words]
        for values in known:
            for index, one in enumerate(values):
                if value == one and type(value) is type(one):  # in Python True == 1 == 1.0
                    return index
        for values in known:  # CSV holds nothing but text
            if values is not self.label_words and any(word.lstrip("-").isdigit() for word in self.label_words):
                continue  # "1" may be a place or a word: then only words and label_values say which
            if value in map(str, values):
                return [str(one) for one in values].index(value)
        wanted = self.label_values or [*range(len(self.label_words)), *self.label_words]
        raise ValueError(
            f"a label must be one of {', '.join(map(repr, wanted))}; got {self.answer_column}={value!r}; set "
            "label_values in data.template to the data's own labels, one for each of label_words, or drop the row"
        )

    def _value(self, row: Mapping[str, Any], column: str) -> Any:
        if column not in row:
            raise ValueError(f"the template needs column {column}; the columns are {', '.join(row)}; fix data.template")
        value = row[column]
        if isinstance(value, bytes):  # a text in parquet without its mark as one
            try:
                value = value.decode()
            except UnicodeDecodeError as error:
                raise ValueError(f"a text must be UTF-8; got {column}={value[:40]!r}: {error}") from None
        is_blank = isinstance(value, str) and not value.strip()
        if value is None or is_blank or value != value:  # CSV and pandas (NaN) write a missing text so
            raise ValueError(
                f"a row must have a value where the template needs it; got {column}={value!r}; drop the row"
            )
        return value


def packed_template(task: Mapping[str, Any]) -> Template:
    """The template in the task.json of a packed file, for prompts alone: it may show any column, an answer too."""
    return Template(kind=task["kind"], prompt=task["prompt"], label_words=task["label_words"], answer_column=".")


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
