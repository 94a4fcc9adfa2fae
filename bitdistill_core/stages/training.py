"""What all training stages share: a section of params.yaml turned into batches and a call of `train.fit`."""

import logging
from collections.abc import Callable
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass
from pathlib import Path
from string import Formatter
from typing import Any

import pyarrow.parquet as pq
import torch
from torch import nn
from transformers import PretrainedConfig, PreTrainedModel, PreTrainedTokenizerBase

from bitdistill_core import losses, train
from bitdistill_core.config import BlocksSection, TaskSection, TrainSection
from bitdistill_core.contained import drop_contained
from bitdistill_core.corpus import BlockBatches, tokenize_corpus
from bitdistill_core.data import ExampleBatches, leading_mark, load_examples
from bitdistill_core.manifest import Metrics, Report
from bitdistill_core.quantize.rows import round_rows
from bitdistill_core.replay import length_multiple, replayed_decoder
from bitdistill_core.stages.data import examples_path, read_task

log = logging.getLogger(__name__)


@dataclass(frozen=True)
class Context:
    """Where a stage trains, and whom it tells."""

    name: str  # of the stage, before its metrics
    work_dir: Path
    report: Report
    device: torch.device


def train_on_corpus(
    model: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase,
    config: BlocksSection,
    data: Path,
    context: Context,
    *,
    loss_fn: train.LossFn | None = None,
    on_step: Callable[[int, int], None] | None = None,
) -> Metrics:
    """Trains `model` in place on packed blocks of the corpus; `loss_fn` None is cross-entropy (BitDistill Eq. 7)."""
    name = context.name
    require_window(model.config, config.block_size, f"{name}.block_size")
    num_steps = corpus_steps(config, config.num_tokens)
    if num_steps == 0:
        return {}
    add_dropout(model, config.dropout)
    batches = corpus_batches(tokenizer, config, data, num_tokens=config.num_tokens, out=context.work_dir / "tokens.bin")
    num_epochs = num_steps * config.batch_size / batches.num_blocks
    context.report({f"{name}/corpus_epochs": num_epochs}, 0)
    with _replayed(model, context.device, on_step):
        metrics = train.fit(
            model,
            batches,
            loss_fn if loss_fn is not None else _task_loss_fn(model),
            num_steps=num_steps,
            on_step=on_step,
            **options(config, context),
        )
    return {**metrics, f"{name}/corpus_epochs": num_epochs}


def train_on_task(
    model: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase,
    config: TaskSection,
    data: Path,
    context: Context,
    *,
    loss_fn: train.LossFn | None = None,
    on_step: Callable[[int, int], None] | None = None,
    grad_norm_every: int = 0,
    balance_grad_norms: float = 0.0,
) -> Metrics:
    """Fine-tuning on the answers of the task's examples; `loss_fn` None is cross-entropy alone (Eq. 14)."""
    name = context.name
    add_dropout(model, config.dropout)
    batches = task_batches(model, tokenizer, config, data)
    cut_share = sum(example.is_cut for example in batches.examples) / len(batches.examples)
    context.report({f"{name}/cut_share": cut_share}, 0)
    if cut_share:
        log.warning("%s: %.1f%% of the examples are cut at max_length=%d", name, 100 * cut_share, config.max_length)
    with _replayed(model, context.device, on_step):
        metrics = train.fit(
            model,
            lambda step: [batch.padded(length_multiple(context.device)) for batch in batches(step)],
            loss_fn if loss_fn is not None else _task_loss_fn(model),
            num_steps=max(1, round(config.num_epochs * batches.steps_per_epoch)),
            grad_norm_every=grad_norm_every,
            balance_grad_norms=balance_grad_norms,
            on_step=on_step,
            **options(config, context),
        )
    return {**metrics, f"{name}/cut_share": cut_share}


def corpus_steps(config: BlocksSection, num_tokens: int, batch_size: int = 0) -> int:
    """Optimiser steps that so many tokens of packed blocks make; batch_size 0 is the section's."""
    return num_tokens // (config.block_size * (batch_size or config.batch_size))


def corpus_batches(
    tokenizer: PreTrainedTokenizerBase,
    config: BlocksSection,
    data: Path,
    *,
    num_tokens: int,
    out: Path,
    batch_size: int = 0,
) -> BlockBatches:
    """step -> micro-batches of packed blocks of the corpus, from its first `num_tokens` tokens, kept in `out`."""
    return BlockBatches(
        tokenize_corpus(data / "corpus", tokenizer, max_tokens=num_tokens, out=out),
        begin=leading_mark(tokenizer),
        block_size=config.block_size,
        seed=config.seed,
        **_batching(config, batch_size),
    )


def task_batches(
    model: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase,
    config: TaskSection,
    data: Path,
    *,
    batch_size: int = 0,
    without_contained: bool = False,
) -> ExampleBatches:
    """step -> micro-batches of the task's training examples; all, or those whose text no longer one contains."""
    task, path = read_task(data), examples_path(data, "train")
    examples = load_examples(
        path,
        tokenizer,
        max_length=config.max_length,
        window=int(model.config.max_position_embeddings),
        is_generation=task.kind == "generation",
    )
    if without_contained:
        examples = [examples[i] for i in drop_contained(_prompt_texts(path, task.prompt))]
    return ExampleBatches(examples, seed=config.seed, **_batching(config, batch_size))


def _batching(config: TrainSection, batch_size: int) -> dict[str, int]:
    """The batches of a section, or whole ones of another size."""
    if batch_size:
        return {"batch_size": batch_size, "gradient_accumulation": 1}
    return config.model_dump(include={"batch_size", "gradient_accumulation"})


def _prompt_texts(path: Path, template: str) -> list[str]:
    """The prompts of a file without what the template puts before the first and behind the last column."""
    texts, columns = zip(*((text, column) for text, column, _, _ in Formatter().parse(template)), strict=True)
    shown = [place for place, column in enumerate(columns) if column is not None]  # braces written twice are no column
    head, tail = "".join(texts[: shown[0] + 1]), "".join(texts[shown[-1] + 1 :])
    prompts = pq.read_table(path, columns=["prompt"])["prompt"].to_pylist()
    return [prompt[len(head) : len(prompt) - len(tail)] for prompt in prompts]


def require_window(config: PretrainedConfig, length: int, key: str) -> None:
    """Raises ValueError when sequences of `length` tokens exceed the window of a model of that config."""
    window = int(config.max_position_embeddings)
    if length > window:
        raise ValueError(f"sequences must fit the model's window; got {key}={length}, window={window}; lower {key}")


@torch.no_grad()
def round_embeddings(model: PreTrainedModel) -> None:
    """Rounds embedding and output head to the INT8 grid of the packed file, so that packing loses nothing."""
    modules = (model.get_input_embeddings(), model.get_output_embeddings())
    weights = [module.get_parameter("weight") for module in modules]
    for weight in weights[:1] if weights[0] is weights[1] else weights:
        weight.copy_(round_rows(weight))


def add_dropout(model: PreTrainedModel, probability: float) -> None:
    """Dropout of the hidden states after the embedding and after each block, while training."""
    if not probability:
        return

    def hook(module: nn.Module, inputs: Any, output: Any) -> Any:
        dropped = nn.functional.dropout(
            output[0] if isinstance(output, tuple) else output, probability, module.training
        )
        return (dropped, *output[1:]) if isinstance(output, tuple) else dropped

    for module in (model.get_input_embeddings(), *model.get_decoder().layers):
        module.register_forward_hook(hook)


def _task_loss_fn(model: PreTrainedModel) -> train.LossFn:
    def loss_fn(batch: losses.Batch) -> train.LossParts:
        return {"task_loss": losses.task_loss(model, losses.hidden_states(model, batch), batch)}

    return loss_fn


def _replayed(
    model: PreTrainedModel, device: torch.device, on_step: Callable[[int, int], None] | None
) -> AbstractContextManager[None]:
    """Replays the student's passes on a GPU, unless something changes what is computed from step to step."""
    return replayed_decoder(model, device) if on_step is None else nullcontext()


def options(config: TrainSection, context: Context) -> dict[str, Any]:
    """The fields of a section, and of the context, that `train.fit` takes by the same name."""
    fields = TrainSection.model_fields.keys() - {"batch_size", "gradient_accumulation", "dropout"}
    return {**config.model_dump(include=set(fields)), **vars(context)}
