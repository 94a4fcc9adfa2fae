"""Stage `base`: the full-precision causal LM to convert, as a checkpoint directory of safetensors.

Loads `base.checkpoint`, or trains a small model with its own BPE tokenizer on the corpus when that is null.
"""

import json
from dataclasses import dataclass, field
from pathlib import Path

import torch
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
from transformers import (
    AutoConfig,
    AutoModelForCausalLM,
    PretrainedConfig,
    PreTrainedModel,
    PreTrainedTokenizerBase,
    PreTrainedTokenizerFast,
)

from bitdistill_core import checkpoint
from bitdistill_core.config import BaseConfig, ScratchConfig
from bitdistill_core.corpus import iter_texts
from bitdistill_core.manifest import Metrics, Report
from bitdistill_core.stages import training
from bitdistill_core.stages.training import Context

END = "<|endoftext|>"


@dataclass(frozen=True)
class Inputs:
    """Stage directories."""

    data: Path = field(metadata={"reads": ("corpus/",)})


def sources(config: BaseConfig) -> list[Path]:
    """The local files that the stage reads."""
    return checkpoint.local_files(config.checkpoint) if config.checkpoint is not None else []


def run(
    config: BaseConfig, inputs: Inputs, *, out_dir: Path, work_dir: Path, report: Report, device: torch.device
) -> Metrics:
    """Writes config.json, model.safetensors and the tokenizer; source.json with the commit of a model from the hub.

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
        if source := checkpoint.hub_source(config.checkpoint):
            (out_dir / "source.json").write_text(json.dumps(source) + "\n")
    if config.num_layers:
        keep_first_layers(model, config.num_layers)
    checkpoint.save_model(model, tokenizer, out_dir)
    metrics["base/num_parameters"] = sum(p.numel() for p in model.parameters())
    report({"base/num_parameters": metrics["base/num_parameters"]}, 0)
    return metrics


def keep_first_layers(model: PreTrainedModel, num_layers: int) -> None:
    """Drops every block after the first `num_layers`. Raises ValueError if the model has fewer."""
    decoder = model.get_decoder()
    depth = len(decoder.layers)
    if num_layers > depth:
        raise ValueError(f"base.num_layers must not exceed the model's; got num_layers={num_layers}, depth={depth}")
    decoder.layers = decoder.layers[:num_layers]
    model.config.num_hidden_layers = num_layers
    if getattr(model.config, "layer_types", None):
        model.config.layer_types = model.config.layer_types[:num_layers]


def _train_scratch(
    config: ScratchConfig, inputs: Inputs, work_dir: Path, report: Report, device: torch.device
) -> tuple[PreTrainedModel, PreTrainedTokenizerFast, Metrics]:
    tokenizer = train_tokenizer(inputs.data / "corpus", vocab_size=config.vocab_size)
    torch.manual_seed(config.seed)
    model = AutoModelForCausalLM.from_config(_scratch_config(config, tokenizer))
    metrics = training.train_on_corpus(model, tokenizer, config, inputs.data, Context("base", work_dir, report, device))
    return model, tokenizer, metrics


def _scratch_config(config: ScratchConfig, tokenizer: PreTrainedTokenizerFast) -> PretrainedConfig:
    own = {"query_pre_attn_scalar": config.head_dim} if config.architecture == "gemma3_text" else {}
    settings: PretrainedConfig = AutoConfig.for_model(
        config.architecture,
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
        **own,
    )
    return settings


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
