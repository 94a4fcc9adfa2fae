"""Model directories: safetensors weights, config.json, tokenizer. Students and dense models alike.

A student's config.json carries a `bitdistill` entry with its surgery. Loading rebuilds the model, operates on it, and
only then loads the weights, strictly: a lenient load is how learned SubLN gains get lost.
"""

import json
import shutil
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import torch
from huggingface_hub import try_to_load_from_cache
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from transformers import (
    AutoConfig,
    AutoModelForCausalLM,
    AutoTokenizer,
    PretrainedConfig,
    PreTrainedModel,
    PreTrainedTokenizerBase,
)

from bitdistill_core.errors import one_line
from bitdistill_core.quantize.weight import WeightQuantizer
from bitdistill_core.sources import hub_parts
from bitdistill_core.surgery import operate, require_supported

WEIGHTS = "model.safetensors"


def save_model(model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase, directory: Path) -> None:
    """Writes `directory`/{config.json, model.safetensors, tokenizer files}. Latent weights are kept in fp32."""
    directory.mkdir(parents=True, exist_ok=True)
    tied = bool(model.config.tie_word_embeddings)
    state = {
        name: tensor.detach().to("cpu", torch.float32).contiguous()
        for name, tensor in model.state_dict().items()
        if not (tied and name == "lm_head.weight")
    }
    save_file(state, directory / WEIGHTS, metadata={"format": "pt"})
    model.config.save_pretrained(directory)
    shutil.copymode(directory / "config.json", directory / WEIGHTS)  # safetensors makes it its owner's alone
    tokenizer.save_pretrained(directory)


def surgery_record(config: Any) -> dict[str, Any] | None:
    """The `bitdistill` entry of a model's config, what `surgery.operate` takes; None for a dense model."""
    record = getattr(config, "bitdistill", None)
    return dict(record) if record is not None else None


def read_config(directory: Path) -> PretrainedConfig:
    """The config of the model that `save_model` wrote."""
    config: PretrainedConfig = _load_config(str(directory))
    return config


def saved_quantizer(directory: Path) -> WeightQuantizer:
    """How the weights of a student's checkpoint become codes. Raises ValueError for a dense model."""
    record = json.loads((directory / "config.json").read_text()).get("bitdistill")
    if record is None:
        raise ValueError(f"a quantiser is a student's; got a dense model in path={directory}")
    return WeightQuantizer(**record["quantizer"])


def load_model(directory: Path) -> tuple[PreTrainedModel, PreTrainedTokenizerBase]:
    """The fp32 model and tokenizer that `save_model` wrote.

    Raises:
        ValueError: a missing or unreadable file, or tensors that do not fit the architecture.
    """
    for name in ("config.json", WEIGHTS):
        if not (directory / name).is_file():
            raise ValueError(f"a checkpoint directory needs {name}; not found in path={directory}")
    config = _load_config(str(directory))
    model = AutoModelForCausalLM.from_config(config, dtype=torch.float32, attn_implementation="sdpa")
    record = surgery_record(config)
    if record is not None:
        quantizer = WeightQuantizer(**record["quantizer"])
        operate(model, subln=record["subln"], sub_norm_eps=record["sub_norm_eps"], quantizer=quantizer)
    try:
        state = load_file(directory / WEIGHTS)
    except (SafetensorError, OSError) as error:
        raise ValueError(f"unreadable checkpoint path={directory / WEIGHTS}: {error}; copy or make it again") from None
    if config.tie_word_embeddings and "model.embed_tokens.weight" in state:
        state["lm_head.weight"] = state["model.embed_tokens.weight"]
    try:
        model.load_state_dict(state, strict=True)
    except RuntimeError as error:
        raise ValueError(f"checkpoint path={directory} does not fit its config.json: {one_line(error, 600)}") from None
    return model.eval(), load_tokenizer(directory)


def load_tokenizer(directory: Path) -> PreTrainedTokenizerBase:
    """The tokenizer of a checkpoint directory."""
    try:
        tokenizer: PreTrainedTokenizerBase = AutoTokenizer.from_pretrained(
            directory, local_files_only=True, trust_remote_code=False
        )
    except (OSError, ValueError) as error:
        raise ValueError(f"no readable tokenizer in path={directory}: {one_line(error)}") from None
    return tokenizer


def load_pretrained(checkpoint: str) -> tuple[PreTrainedModel, PreTrainedTokenizerBase]:
    """A full-precision causal LM in fp32 from a directory, a GGUF file, `package:MODULE/file.gguf`, or a hub id.

    A hub id may name a branch, tag or commit: `Qwen/Qwen3-0.6B@REVISION`.

    Raises:
        ValueError: not found, unreadable, or an unsupported architecture.
    """
    source: dict[str, Any] = {}
    path = _local_model(checkpoint)
    if path is not None and path.suffix == ".gguf":
        source, checkpoint = {"gguf_file": path.name}, str(path.parent)
    elif path is not None:
        checkpoint = str(path)
    else:
        checkpoint, source["revision"] = hub_parts(checkpoint)
    config = _load_config(checkpoint, **source)
    require_supported(config)
    if surgery_record(config) is not None:
        raise ValueError(
            f"base.checkpoint must be a full-precision model; got a student in base.checkpoint={checkpoint}; take the "
            "model that it was made of"
        )
    if "gguf_file" not in source and getattr(config, "quantization_config", None) is not None:
        raise ValueError(
            f"base.checkpoint must be a full-precision model; got quantised weights in base.checkpoint={checkpoint}; "
            "take the model that it was made of"
        )
    options: dict[str, Any] = {"trust_remote_code": False}
    loaded: Any
    if "gguf_file" in source:
        from transformers import GgufConfig

        options["quantization_config"] = GgufConfig(dequantize=True)
    try:
        loaded = AutoModelForCausalLM.from_pretrained(
            checkpoint, dtype=torch.float32, output_loading_info=True, **source, **options
        )
        tokenizer = AutoTokenizer.from_pretrained(checkpoint, trust_remote_code=False, **source)
    except MemoryError:
        raise
    except Exception as error:  # what a broken file makes transformers raise has many types
        raise ValueError(f"cannot load base.checkpoint={checkpoint}: {one_line(error)}") from None
    if not tokenizer.encode("a word", add_special_tokens=False):  # made from nothing, where its files are missing
        raise ValueError(
            f"base.checkpoint={checkpoint} has no tokenizer that knows words; put the model's tokenizer.json and "
            "tokenizer_config.json beside its weights"
        )
    model, missing = loaded[0], sorted(loaded[1]["missing_keys"])
    if missing:
        raise ValueError(
            f"a base model has every weight of its architecture; got missing={len(missing)} in base.checkpoint="
            f"{checkpoint}, the first {missing[0]}; take a causal language model, not a classifier or an adapter"
        )
    broken = next((name for name, value in model.named_parameters() if not torch.isfinite(value).all()), None)
    if broken is not None:
        raise ValueError(
            f"a base model's weights must be finite; got NaN or infinity in tensor={broken} of {checkpoint}"
        )
    if hasattr(model.config, "quantization_config"):
        del model.config.quantization_config
    # a file that holds a head of its own, whatever its config says: `save_model` must keep it
    embedding, head = model.get_input_embeddings(), model.get_output_embeddings()
    model.config.tie_word_embeddings = head.weight is embedding.weight
    return model.eval(), tokenizer


def local_files(checkpoint: str) -> list[Path]:
    """The files of a checkpoint that lies on this machine; none for a hub id. Raises ValueError where it has none."""
    path = _local_model(checkpoint)
    if path is None:
        return []
    return [path] if path.is_file() else sorted(p for p in path.glob("*") if p.is_file())


def hub_source(checkpoint: str) -> dict[str, str] | None:
    """Repository and commit that `load_pretrained` got for a hub id; None for what lies on this machine."""
    if _local_path(checkpoint) is not None:
        return None
    repository, revision = hub_parts(checkpoint)
    cached = try_to_load_from_cache(repository, "config.json", revision=revision)
    return {"repository": repository, "commit": Path(cached).parent.name} if isinstance(cached, str) else None


def _local_model(checkpoint: str) -> Path | None:
    """The GGUF file or directory that a checkpoint on this machine is; None for a hub id."""
    path = _local_path(checkpoint)
    if path is None:
        return None
    if path.suffix == ".gguf":
        if not path.is_file():
            raise ValueError(f"no GGUF file at base.checkpoint={checkpoint}")
    elif not (path / "config.json").is_file():
        raise ValueError(f"base.checkpoint={checkpoint} is no model directory: no config.json in it")
    return path


def _local_path(checkpoint: str) -> Path | None:
    if checkpoint.startswith("package:"):
        return _package_file(checkpoint.removeprefix("package:"))
    looks_local = checkpoint.endswith(".gguf") or checkpoint.startswith((".", "/", "~"))
    looks_local = looks_local or hub_parts(checkpoint)[0].count("/") > 1
    path = Path(checkpoint).expanduser()
    return path if looks_local or path.exists() else None


def _load_config(source: str, **options: Any) -> Any:
    try:
        return AutoConfig.from_pretrained(source, trust_remote_code=False, **options)
    except Exception as error:  # what a broken file makes transformers raise has many types
        raise ValueError(f"cannot read a model configuration from {source}: {one_line(error)}") from None


def _package_file(name: str) -> Path:
    module, _, file = name.partition("/")
    if not module.isidentifier():  # of a dotted name the package in front would be imported
        raise ValueError(f"base.checkpoint must be package:MODULE/file.gguf; got package:{name}")
    spec = find_spec(module)  # finds the package without running its code
    if spec is None or spec.origin is None:
        raise ValueError(f"base.checkpoint needs the Python package that holds module={module}; pip install it")
    path = Path(spec.origin).parent / file
    if not path.is_file():
        raise ValueError(f"no file={file} in the installed package module={module}")
    return path
