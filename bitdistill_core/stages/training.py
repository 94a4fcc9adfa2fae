"""What the training stages share: a section of params.yaml turned into batches, a loss and a call of `train.fit`."""

import logging
from collections.abc import Callable, Iterator, Sequence
from contextlib import AbstractContextManager, ExitStack, contextmanager, nullcontext
from pathlib import Path
from string import Formatter
from typing import Any

import pyarrow.parquet as pq
import torch
from torch import Tensor, nn
from transformers import PretrainedConfig, PreTrainedModel, PreTrainedTokenizerBase

from bitdistill_core import checkpoint, losses, train
from bitdistill_core.bitlinear import BitLinear
from bitdistill_core.block_outputs import captured_blocks, hidden_kd_loss, require_same_blocks
from bitdistill_core.blockwise import read_block_metrics, take_over_frame, train_blocks
from bitdistill_core.choices import LossVariant
from bitdistill_core.config import BlocksSection, DistillConfig, PretrainConfig, TaskSection, TrainSection
from bitdistill_core.contained import drop_contained
from bitdistill_core.corpus import BlockBatches, tokenize_corpus
from bitdistill_core.data import ExampleBatches, leading_mark, load_examples
from bitdistill_core.manifest import Metrics, Report
from bitdistill_core.quantize.latent import latent_weight
from bitdistill_core.quantize.rows import round_rows
from bitdistill_core.quantize.weight import quantize_weight
from bitdistill_core.replay import length_multiple, replayed_decoder
from bitdistill_core.stages.data import examples_path, read_task

log = logging.getLogger(__name__)


def train_on_corpus(
    model: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase,
    config: BlocksSection,
    data: Path,
    *,
    name: str,
    work_dir: Path,
    report: Report,
    device: torch.device,
    loss_fn: train.LossFn | None = None,
    on_step: Callable[[int, int], None] | None = None,
) -> Metrics:
    """Trains `model` in place on packed blocks of the corpus; `loss_fn` None is cross-entropy (BitDistill Eq. 7)."""
    require_window(model.config, config.block_size, f"{name}.block_size")
    num_steps = corpus_steps(config, config.num_tokens)
    if num_steps == 0:
        return {}
    add_dropout(model, config.dropout)
    batches = corpus_batches(tokenizer, config, data, num_tokens=config.num_tokens, out=work_dir / "tokens.bin")
    num_epochs = num_steps * config.batch_size / batches.num_blocks
    report({f"{name}/corpus_epochs": num_epochs}, 0)
    with _replayed(model, device, on_step):
        metrics = train.fit(
            model,
            batches,
            loss_fn if loss_fn is not None else _task_loss_fn(model),
            num_steps=num_steps,
            on_step=on_step,
            **_options(config, name=name, work_dir=work_dir, report=report, device=device),
        )
    return {**metrics, f"{name}/corpus_epochs": num_epochs}


def train_on_task(
    model: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase,
    config: TaskSection,
    data: Path,
    *,
    name: str,
    work_dir: Path,
    report: Report,
    device: torch.device,
    loss_fn: train.LossFn | None = None,
    on_step: Callable[[int, int], None] | None = None,
    grad_norm_every: int = 0,
    balance_grad_norms: float = 0.0,
) -> Metrics:
    """Fine-tuning on the answers of the task's examples; `loss_fn` None is cross-entropy alone (Eq. 14)."""
    add_dropout(model, config.dropout)
    batches = task_batches(model, tokenizer, config, data)
    cut_share = sum(example.is_cut for example in batches.examples) / len(batches.examples)
    report({f"{name}/cut_share": cut_share}, 0)
    if cut_share:
        log.warning("%s: %.1f%% of the examples are cut at max_length=%d", name, 100 * cut_share, config.max_length)
    with _replayed(model, device, on_step):
        metrics = train.fit(
            model,
            lambda step: [batch.padded(length_multiple(device)) for batch in batches(step)],
            loss_fn if loss_fn is not None else _task_loss_fn(model),
            num_steps=max(1, round(config.num_epochs * batches.steps_per_epoch)),
            grad_norm_every=grad_norm_every,
            balance_grad_norms=balance_grad_norms,
            on_step=on_step,
            **_options(config, name=name, work_dir=work_dir, report=report, device=device),
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
    parts = list(Formatter().parse(template))
    head, tail = parts[0][0], parts[-1][0] if parts[-1][1] is None else ""
    prompts = pq.read_table(path, columns=["prompt"])["prompt"].to_pylist()
    return [prompt[len(head) : len(prompt) - len(tail)] for prompt in prompts]


def train_blockwise(
    student: PreTrainedModel,
    teacher: PreTrainedModel,
    config: PretrainConfig | DistillConfig,
    batches: Callable[[int], Sequence[losses.Batch]],
    *,
    num_steps: int,
    name: str,
    work_dir: Path,
    report: Report,
    device: torch.device,
) -> Metrics:
    """Every block of the student on its teacher's output, in place, before the student is trained as a whole.

    Takes the first steps of `batches`, at most `num_steps` and `blockwise.num_tokens`; at least one.
    """
    if train.has_checkpoint(work_dir):  # the training that follows has begun
        return read_block_metrics(work_dir / "blockwise")
    steps: list[Sequence[losses.Batch]] = []
    num_tokens = 0
    for step in range(num_steps):
        micro_batches = batches(step)
        num_tokens += micro_batches[0].totals.num_tokens
        if steps and num_tokens > config.blockwise.num_tokens:
            break
        steps.append(micro_batches)
    options = _options(config, name=f"{name}.blockwise", work_dir=work_dir / "blockwise", report=report, device=device)
    options.update(config.blockwise.model_dump(include={"num_epochs", "learning_rate", "channel_weights"}))
    if config.blockwise.batch_size:  # as many sequences between two reports, and two checkpoints, as in the stage
        for key in ("report_every", "checkpoint_every"):
            options[key] = max(1, options[key] * config.batch_size // config.blockwise.batch_size)
    return train_blocks(student, teacher, steps, **options)


def require_window(config: PretrainedConfig, length: int, key: str) -> None:
    """Raises ValueError when sequences of `length` tokens exceed the window of a model of that config."""
    window = int(config.max_position_embeddings)
    if length > window:
        raise ValueError(f"sequences must fit the model's window; got {key}={length}, window={window}; lower {key}")


def require_same_vocabulary(student: PreTrainedTokenizerBase, teacher: PreTrainedTokenizerBase) -> None:
    """Raises ValueError where a student cannot learn the teacher's next tokens."""
    if student.get_vocab() != teacher.get_vocab():
        raise ValueError(
            f"teacher and student must share a vocabulary; got sizes {len(teacher)} and {len(student)}; take a teacher "
            "of the same family"
        )


@torch.no_grad()
def round_embeddings(model: PreTrainedModel) -> None:
    """Rounds embedding and output head to the INT8 grid of the packed file, so that packing loses nothing."""
    modules = (model.get_input_embeddings(), model.get_output_embeddings())
    weights = [module.get_parameter("weight") for module in modules]
    for weight in weights[:1] if weights[0] is weights[1] else weights:
        weight.copy_(round_rows(weight))


@torch.no_grad()
def clear_thresholds(model: PreTrainedModel, margin: float) -> None:
    """Moves the latent weights of every BitLinear `margin` scales away from the thresholds; codes and scales stay.

    Training leaves weights piled up at the thresholds (oscillation: arXiv 2203.11086), where the first step of a fresh
    optimiser, of the same length for all, turns thousands of codes at once.

    Raises:
        ValueError: another scale than absmean.
    """
    for layer in (module for module in model.modules() if isinstance(module, BitLinear)):
        quantizer = layer.quantizer
        if quantizer.scale_rule != "absmean":
            raise ValueError(
                f"threshold_margin needs scale_rule=absmean; got scale_rule={quantizer.scale_rule}; set it to 0"
            )
        codes, scale = quantize_weight(layer.weight, quantizer)
        layer.weight.copy_(latent_weight(layer.weight, codes, scale, quantizer, margin=margin))


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


@contextmanager
def quantization_warmup(model: PreTrainedModel, share: float) -> Iterator[Callable[[int, int], None] | None]:
    """A callback for `train.fit` that raises the hardness of every BitLinear from 0 to 1 over `share` of the steps.

    The lambda warm-up W + lambda (Q(W) - W). Afterwards the model is fully quantised. None where `share` is 0.
    """
    layers = [module for module in model.modules() if isinstance(module, BitLinear)]

    def on_step(step: int, num_steps: int) -> None:
        hardness = min(1.0, (step + 1) / max(1, round(share * num_steps)))
        for layer in layers:
            layer.hardness = hardness

    try:
        yield on_step if share else None
    finally:
        for layer in layers:
            layer.hardness = 1.0


def load_teacher(
    directory: Path,
    student: PreTrainedModel,
    config: PretrainConfig | DistillConfig,
    *,
    name: str,
    device: torch.device,
    stack: ExitStack,
) -> tuple[PreTrainedModel, PreTrainedTokenizerBase]:
    """A model that teaches until `stack` closes: on the device, its weights in the stage's precision, no gradients.

    Where it teaches block by block, the student has its embeddings, final norm and head from here on. Buffers stay in
    float32: in bfloat16 the frequencies of rotary positions would be off by up to 0.4%.
    """
    teacher, tokenizer = checkpoint.load_model(directory)
    if config.blockwise.num_epochs:
        require_same_blocks(student.config, teacher.config, f"{name}.blockwise")
        take_over_frame(student, teacher)
    for parameter in teacher.parameters():
        parameter.data = parameter.data.to(train.compute_dtype(config.precision))
    nn.Module.to(teacher.requires_grad_(False), device)
    stack.enter_context(replayed_decoder(teacher, device))
    return teacher, tokenizer


def taught_loss_fn(
    student: PreTrainedModel,
    teacher: PreTrainedModel,
    config: PretrainConfig | DistillConfig,
    stack: ExitStack,
    *,
    task_loss_weight: float = 1.0,
    variant: LossVariant,
    attention_kd: Callable[[losses.Batch], Tensor] | None = None,
) -> train.LossFn:
    """Cross-entropy, logits and block outputs by the weights in `config`, and `attention_kd` as it comes.

    What is captured of both models is captured until `stack` closes.
    """
    if config.hidden_kd_weight:
        require_same_blocks(student.config, teacher.config, "hidden_kd_weight")
        ours, theirs = stack.enter_context(captured_blocks(student)), stack.enter_context(captured_blocks(teacher))

    def loss_fn(batch: losses.Batch) -> train.LossParts:
        with torch.no_grad():
            teacher_hidden = losses.hidden_states(teacher, batch)
        hidden = losses.hidden_states(student, batch)
        parts = {}
        if task_loss_weight:
            parts["task_loss"] = task_loss_weight * losses.task_loss(student, hidden, batch)
        if config.logits_kd_weight:
            parts["logits_kd"] = config.logits_kd_weight * losses.logits_kd_loss(
                student, hidden, teacher, teacher_hidden, batch, kd_temperature=config.kd_temperature, variant=variant
            )
        if attention_kd is not None:
            parts["attention_kd"] = attention_kd(batch)
        if config.hidden_kd_weight:
            parts["hidden_kd"] = config.hidden_kd_weight * hidden_kd_loss(ours, theirs, batch)
        return parts

    return loss_fn


def _task_loss_fn(model: PreTrainedModel) -> train.LossFn:
    def loss_fn(batch: losses.Batch) -> train.LossParts:
        return {"task_loss": losses.task_loss(model, losses.hidden_states(model, batch), batch)}

    return loss_fn


def _replayed(
    model: PreTrainedModel, device: torch.device, on_step: Callable[[int, int], None] | None
) -> AbstractContextManager[None]:
    """Replays the student's passes on a GPU, unless something changes what is computed from step to step."""
    return replayed_decoder(model, device) if on_step is None else nullcontext()


def _options(config: TrainSection, **context: Any) -> dict[str, Any]:
    """The fields of a section that `train.fit` takes by the same name."""
    fields = TrainSection.model_fields.keys() - {"batch_size", "gradient_accumulation", "dropout"}
    return {**config.model_dump(include=set(fields)), **context}
