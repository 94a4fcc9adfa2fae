"""Tiny random models of every supported architecture, and a folder of what the stages read."""

import json
import random
from collections.abc import Mapping
from dataclasses import asdict, dataclass
from pathlib import Path
from types import ModuleType
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import torch
from pydantic import BaseModel
from tokenizers.processors import TemplateProcessing
from transformers import (
    AutoModelForCausalLM,
    Gemma3TextConfig,
    LlamaConfig,
    MistralConfig,
    PreTrainedModel,
    PreTrainedTokenizerFast,
    Qwen2Config,
    Qwen3Config,
)

from bitdistill_core import checkpoint
from bitdistill_core.config import Params
from bitdistill_core.params import read_yaml, validated
from bitdistill_core.stages.base import train_tokenizer
from bitdistill_core.stages.data import Task

SIZES = {
    "vocab_size": 97,
    "hidden_size": 32,
    "intermediate_size": 48,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "max_position_embeddings": 64,
    "pad_token_id": 0,
    "bos_token_id": 1,
    "eos_token_id": 2,
}
CONFIGS = {
    "qwen3": Qwen3Config(**SIZES, head_dim=8, tie_word_embeddings=True),
    "qwen2": Qwen2Config(**SIZES, tie_word_embeddings=True),
    "llama": LlamaConfig(**SIZES, tie_word_embeddings=False),
    "mistral": MistralConfig(**SIZES, tie_word_embeddings=False, sliding_window=None),
    "gemma3_text": Gemma3TextConfig(**SIZES, head_dim=8, query_pre_attn_scalar=8, sliding_window=16),
}


def build(model_type: str, seed: int = 0, **changes: object) -> PreTrainedModel:
    """A tiny model with weights large enough that every part of it matters."""
    torch.manual_seed(seed)
    values = {**CONFIGS[model_type].to_dict(), **changes}
    model = AutoModelForCausalLM.from_config(type(CONFIGS[model_type])(**values), attn_implementation="sdpa")
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if parameter.dim() > 1:
                parameter.normal_(0, 0.3)
            elif name.endswith(".bias"):
                parameter.normal_(0, 0.1)
            else:
                parameter.add_(0.1 * torch.randn_like(parameter))
    return model.float().eval()


@pytest.fixture(params=sorted(CONFIGS))
def any_model(request: pytest.FixtureRequest) -> PreTrainedModel:
    """Each architecture in turn."""
    return build(request.param)


def add_bos(tokenizer: PreTrainedTokenizerFast) -> int:
    """Has prompts begin with a mark of their own, as Gemma's and Llama 3's do; its id."""
    tokenizer.add_special_tokens({"bos_token": "<s>"})
    bos: int = tokenizer.bos_token_id
    tokenizer.backend_tokenizer.post_processor = TemplateProcessing(single="<s> $A", special_tokens=[("<s>", bos)])
    return bos


@dataclass(frozen=True)
class Workshop:
    """A folder of what stages read: models of one tokenizer, a corpus and examples."""

    root: Path
    tokenizer: PreTrainedTokenizerFast

    @property
    def data(self) -> Path:
        return self.root / "data"

    def model(self, name: str, model_type: str = "qwen3", seed: int = 0, **changes: object) -> Path:
        """A dense checkpoint with random weights."""
        end = self.tokenizer.eos_token_id
        size = {"vocab_size": len(self.tokenizer), "eos_token_id": end, "pad_token_id": end, "bos_token_id": None}
        checkpoint.save_model(build(model_type, seed, **{**size, **changes}), self.tokenizer, self.root / name)
        return self.root / name

    def run(self, stage: ModuleType, config: BaseModel, inputs: Mapping[str, Path], name: str) -> "Finished":
        """Runs a stage in folder NAME and keeps what it reported."""
        out, log = self.root / name, []
        out.mkdir()
        metrics = stage.run(
            config,
            stage.Inputs(**inputs),
            out_dir=out,
            work_dir=self.root / ".work" / name,
            report=lambda metrics, step: log.append((step, metrics)),
            device=torch.device("cpu"),
        )
        return Finished(out, metrics, log)


@dataclass(frozen=True)
class Finished:
    """What a stage left."""

    path: Path
    metrics: dict[str, float]
    log: list[tuple[int, dict[str, float]]]

    def model(self) -> PreTrainedModel:
        return checkpoint.load_model(self.path)[0]


NOUNS, VERBS = ["cat", "dog", "film", "plot", "story", "end"], ["sat", "ran", "was slow", "kept the mat warm"]


@pytest.fixture
def workshop(tmp_path: Path) -> Workshop:
    """Models of up to 64 tokens, 32 labelled sentences, 60 documents."""
    rng = random.Random(0)
    documents = [f"the {rng.choice(NOUNS)} of the {rng.choice(NOUNS)} {rng.choice(VERBS)}" for _ in range(60)]
    (tmp_path / "data" / "corpus").mkdir(parents=True)
    (tmp_path / "data" / "examples").mkdir()
    pq.write_table(pa.table({"text": documents}), tmp_path / "data" / "corpus" / "00000.parquet")
    labels = [i % 2 for i in range(32)]
    prompts = [f"Review: {documents[i]} {('bad', 'good')[label]}\nSentiment:" for i, label in enumerate(labels)]
    rows = {
        "prompt": prompts,
        "answer": [(" negative", " positive")[label] for label in labels],
        "choices": [[" negative", " positive"]] * 32,
        "label": labels,
        "reference": documents[:32],
    }
    for split in ("train", "test"):
        pq.write_table(pa.table(rows), tmp_path / "data" / "examples" / f"{split}.parquet")
    task = Task("review_sentiment", "classification", "Review: {sentence}\nSentiment:", ["negative", "positive"])
    (tmp_path / "data" / "task.json").write_text(json.dumps(asdict(task)))
    (tmp_path / "data" / "eval_splits.json").write_text('["test"]')
    return Workshop(tmp_path, train_tokenizer(tmp_path / "data" / "corpus", vocab_size=300))


@pytest.fixture
def corpus(tmp_path: Path) -> Path:
    """Three short documents as a corpus directory."""
    directory = tmp_path / "corpus"
    directory.mkdir()
    texts = ["the cat sat on the mat", "a dog ran", "the end of the story"] * 20
    pq.write_table(pa.table({"text": texts}), directory / "00000.parquet")
    return directory


SHORT: dict[str, dict[str, object]] = {  # for models of 64 tokens; two steps of training
    "surgery": {"calibration_sequences": 4, "calibration_length": 24, "weight_block_size": 16},
    "pretrain": {"num_tokens": 2 * 4 * 32, "block_size": 32, "batch_size": 4, "report_every": 1},
    "distill": {"num_epochs": 0.5, "max_length": 64, "batch_size": 8, "report_every": 1, "num_relation_heads": 4},
}


def section(name: str, **changes: object) -> Any:
    """A section of params.yaml as the workshop's models need it, with changes."""
    values = read_yaml(Path(__file__).parents[2] / "params.yaml")
    values["pretrain"]["num_tokens"] *= name == "pretrain"  # no stage before this one rules its values out
    return getattr(validated(Params, {**values, name: {**values[name], **SHORT.get(name, {}), **changes}}), name)
