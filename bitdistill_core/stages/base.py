"""Stage `base`: the full-precision causal LM to convert, as a checkpoint directory of safetensors.

Loads `base.checkpoint`, or trains a small Qwen3 with its own BPE tokenizer on the corpus when that is null.
"""

from dataclasses import dataclass
from pathlib import Path

import torch
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
from transformers import (
    PreTrainedModel,
    PreTrainedTokenizerBase,
    PreTrainedTokenizerFast,
    Qwen3Config,
    Qwen3ForCausalLM,
)

from bitdistill_core import checkpoint
from bitdistill_core.config import BaseConfig, ScratchConfig
from bitdistill_core.corpus import iter_texts
from bitdistill_core.manifest import Metrics, Report
from bitdistill_core.stages import training

END = "<|endoftext|>"


@dataclass(frozen=True)
class Inputs:
    """Stage directories."""

    data: Path


def sources(config: BaseConfig) -> list[Path]:
    """The local files that the stage reads."""
    return checkpoint.local_files(config.checkpoint) if config.checkpoint is not None else []


def run(
    config: BaseConfig, inputs: Inputs, *, out_dir: Path, work_dir: Path, report: Report, device: torch.device
) -> Metrics:
    """Writes config.json, model.safetensors and the tokenizer.

    Raises:
        ValueError: a checkpoint that is missing, unreadable or of an unsupported architecture.
    """
    metrics: Metrics = {}
    model: PreTrainedModel
    tokenizer: PreTrainedTokenizerBase
    if config.checkpoint is None:
        model, tokenizer, metrics = _train_scratch(config.scratch, inputs, work_dir, report, device)
    else:
        model, tokenizer = checkpoint.load_pretrained(config.checkpoint)
    checkpoint.save_model(model, tokenizer, out_dir)
    metrics["base/num_parameters"] = sum(p.numel() for p in model.parameters())
    report({"base/num_parameters": metrics["base/num_parameters"]}, 0)
    return metrics


def _train_scratch(
    config: ScratchConfig, inputs: Inputs, work_dir: Path, report: Report, device: torch.device
) -> tuple[Qwen3ForCausalLM, PreTrainedTokenizerFast, Metrics]:
    tokenizer = train_tokenizer(inputs.data / "corpus", vocab_size=config.vocab_size)
    torch.manual_seed(config.seed)
    model = Qwen3ForCausalLM(
        Qwen3Config(
            vocab_size=len(tokenizer),
            hidden_size=config.hidden_size,
            intermediate_size=config.intermediate_size,
            num_hidden_layers=config.num_layers,
            num_attention_heads=config.num_heads,
            num_key_value_heads=config.num_kv_heads,
            head_dim=config.head_dim,
            max_position_embeddings=config.max_position_embeddings,
            tie_word_embeddings=True,
            eos_token_id=tokenizer.eos_token_id,
            pad_token_id=tokenizer.eos_token_id,
            bos_token_id=None,
        )
    )
    metrics = training.train_on_corpus(
        model, tokenizer, config, inputs.data, name="base", work_dir=work_dir, report=report, device=device
    )
    return model, tokenizer, metrics


def train_tokenizer(corpus: Path, *, vocab_size: int) -> PreTrainedTokenizerFast:
    """A byte-level BPE tokenizer of the corpus in `corpus`/*.parquet; any text encodes and decodes exactly."""
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=vocab_size,
        special_tokens=[END],
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    tokenizer.train_from_iterator(iter_texts(corpus), trainer)
    return PreTrainedTokenizerFast(tokenizer_object=tokenizer, eos_token=END, pad_token=END)
