"""Stage `data`: the task's examples as prompts and answers, the general corpus, and a bag-of-words floor.

Writes examples/SPLIT.parquet (prompt, answer, choices, label, reference), corpus/*.parquet (text), task.json and
eval_splits.json, a file of its own so that another split to evaluate on leaves what was trained up to date.
"""

import json
import os
import shutil
from collections.abc import Iterable, Mapping
from dataclasses import asdict, dataclass
from itertools import islice
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import torch

from bitdistill_core import naive_bayes
from bitdistill_core import sources as data_sources
from bitdistill_core.config import DataConfig
from bitdistill_core.manifest import Metrics, Report, read_lines, write_lines
from bitdistill_core.progress import progress_bar
from bitdistill_core.templates import Template

DOCUMENTS_A_SHARD = 100_000


@dataclass(frozen=True)
class Inputs:
    """The first stage: no inputs."""


@dataclass(frozen=True)
class Task:
    """task.json: what later stages need to know about the task."""

    name: str
    kind: str  # classification | generation
    prompt: str
    label_words: list[str]


def read_task(directory: Path) -> Task:
    """The task that a finished `data` stage describes."""
    try:
        return Task(**json.loads((directory / "task.json").read_text()))
    except TypeError:
        raise ValueError(_of_an_earlier_version(directory)) from None


def read_eval_splits(directory: Path) -> list[str]:
    """The splits to evaluate on; the first one gives the headline."""
    path = directory / "eval_splits.json"
    if not path.is_file():
        raise ValueError(_of_an_earlier_version(directory))
    splits: list[str] = json.loads(path.read_text())
    return splits


def _of_an_earlier_version(directory: Path) -> str:
    return f"path={directory} was made by an earlier version; run the stage data again, then those behind it"


def examples_path(directory: Path, split: str) -> Path:
    """The examples of a split in a finished `data` stage."""
    return directory / "examples" / f"{split}.parquet"


def sources(config: DataConfig) -> list[Path]:
    """The local files that the stage reads."""
    examples = data_sources.locate(config.examples, config.examples_config, config.data_root)
    corpus = data_sources.locate(config.corpus, None, config.data_root)
    files: list[Path] = []
    if isinstance(examples, Path):
        for split in (config.train_split, *config.eval_splits):
            files += data_sources.split_files(examples, split)
    if isinstance(corpus, Path):
        files += data_sources.split_files(corpus, None)
    return sorted(set(files))


def run(
    config: DataConfig, inputs: Inputs, *, out_dir: Path, work_dir: Path, report: Report, device: torch.device
) -> Metrics:
    """Renders every example through the task's template.

    Raises:
        ValueError: data not found, an empty split, a label outside the template.
    """
    template = config.resolved_template
    source = data_sources.locate(config.examples, config.examples_config, config.data_root)
    metrics: Metrics = {}
    tables: dict[str, pa.Table] = {}
    for split in dict.fromkeys((config.train_split, *config.eval_splits)):
        limit = config.max_train_examples if split == config.train_split else config.max_eval_examples
        rows = _sample(list(data_sources.read_rows(source, split, config.examples_config)), limit)
        tables[split] = _render(rows, template, split)
        path = examples_path(out_dir, split)
        path.parent.mkdir(exist_ok=True)
        pq.write_table(tables[split], path, compression="zstd")
        metrics[f"data/num_examples_{split}"] = tables[split].num_rows
    train_path = examples_path(out_dir, config.train_split)
    if config.train_split != "train":
        train_path.rename(examples_path(out_dir, "train"))
    if template.kind == "classification":
        _require_every_label(tables[config.train_split], template.label_words, config.train_split)
        metrics.update(_floors(tables[config.train_split], tables[config.eval_splits[0]]))
    corpus = data_sources.locate(config.corpus, None, config.data_root)
    metrics["data/num_documents"] = _write_corpus(corpus, config, work_dir, out_dir / "corpus")
    task = Task(config.task, template.kind, template.prompt, template.label_words)
    (out_dir / "task.json").write_text(json.dumps(asdict(task), indent=1) + "\n")
    (out_dir / "eval_splits.json").write_text(json.dumps(config.eval_splits) + "\n")
    report(metrics, 0)
    return metrics


def _sample(rows: list[Mapping[str, Any]], limit: int) -> list[Mapping[str, Any]]:
    """`limit` rows drawn at random, always the same ones, in their order (0: all). Files are often sorted by label."""
    if not limit or limit >= len(rows):
        return rows
    chosen = np.random.default_rng(0).permutation(len(rows))[:limit]
    return [rows[i] for i in sorted(chosen)]


def _render(rows: Iterable[Mapping[str, Any]], template: Template, split: str) -> pa.Table:
    choices = [" " + word for word in template.label_words]
    columns: dict[str, list[Any]] = {"prompt": [], "answer": [], "choices": [], "label": [], "reference": []}
    for number, row in enumerate(rows):
        try:
            prompt, answer = template.render_prompt(row), template.render_answer(row)
            (prompt + answer).encode()  # half a character, as JSON may hold it, is no text
        except ValueError as error:
            raise ValueError(f"split={split}, row={number}: {error}") from None
        columns["prompt"].append(prompt)
        columns["answer"].append(answer)
        columns["choices"].append(choices)
        columns["label"].append(template.label(row) if choices else -1)
        columns["reference"].append(answer.strip())
    if not columns["prompt"]:
        raise ValueError(f"the data set is empty: split={split} has no rows; check data.examples and the split's name")
    return pa.table(columns, schema=pa.schema({
        "prompt": pa.string(),
        "answer": pa.string(),
        "choices": pa.list_(pa.string()),
        "label": pa.int64(),
        "reference": pa.string(),
    }))  # fmt: skip


def _require_every_label(train: pa.Table, label_words: list[str], split: str) -> None:
    absent = sorted(set(range(len(label_words))) - set(train["label"].to_pylist()))
    if absent:
        raise ValueError(
            f"every label word must occur in the training split; got none of {label_words[absent[0]]!r} among "
            f"num_examples={train.num_rows} of split={split}; check label_words and label_values, or take more examples"
        )


def _write_corpus(source: data_sources.Source, config: DataConfig, work_dir: Path, out: Path) -> int:
    """Writes the corpus in shards, behind those of an interrupted attempt, and returns the number of documents."""
    directory, place_path = work_dir / "corpus", work_dir / "corpus-place.jsonl"
    places = read_lines(place_path)  # one for each whole shard
    if not places:
        shutil.rmtree(directory, ignore_errors=True)
    directory.mkdir(exist_ok=True)
    place = places[-1] if places else None
    texts = data_sources.Corpus(source, config.corpus_column, limit=config.corpus_documents, place=place)
    total = config.corpus_documents or None
    with progress_bar("corpus", total=total, initial=texts.num_documents, unit="document") as bar:
        while documents := list(islice(texts, DOCUMENTS_A_SHARD)):
            shard = directory / f"{len(places):05d}.parquet"
            pq.write_table(pa.table({"text": documents}), shard, compression="zstd")
            places.append(texts.place())
            write_lines(place_path, places)
            bar.update(len(documents))
    if not texts.num_documents:
        raise ValueError("the corpus is empty; check data.corpus and data.corpus_column")
    place_path.unlink()
    os.replace(directory, out)
    return texts.num_documents


def _floors(train: pa.Table, test: pa.Table) -> Metrics:
    """What needs no language model: always the commonest label, and naive Bayes on words."""
    train_labels, test_labels = train["label"].to_numpy(), test["label"].to_numpy()
    majority = np.bincount(train_labels).argmax()
    predicted = naive_bayes.fit_predict(train["prompt"].to_pylist(), train_labels, test["prompt"].to_pylist())
    return {
        "data/majority_accuracy": float((test_labels == majority).mean()),
        "data/naive_bayes_accuracy": float((test_labels == predicted).mean()),
    }
