"""A GGUF file as base model, by its path and from a Python package, as the profile smollm2-sst2 takes it."""

import json
import sys
from pathlib import Path

import gguf
import numpy as np
import pytest
import torch
from transformers import PreTrainedModel, PreTrainedTokenizerFast

from benchmarks.shapes import GGUF_NAMES, write_hyperparameters
from bitdistill_core import checkpoint
from bitdistill_core.stages.base import train_tokenizer
from tests.core.conftest import build


def write_gguf(path: Path, model: PreTrainedModel, tokenizer: PreTrainedTokenizerFast) -> None:
    """A Llama-style model in float32, with llama.cpp's order of the rows of query and key."""
    config, writer = model.config, gguf.GGUFWriter(path, "llama")
    write_hyperparameters(writer, config, config.rope_parameters["rope_theta"])
    bpe = json.loads(tokenizer.backend_tokenizer.to_str())["model"]
    words = sorted(tokenizer.get_vocab(), key=tokenizer.get_vocab().__getitem__)
    writer.add_tokenizer_model("gpt2")
    writer.add_token_list(words)
    end = tokenizer.eos_token_id
    writer.add_token_types([gguf.TokenType.CONTROL if i == end else gguf.TokenType.NORMAL for i in range(len(words))])
    writer.add_token_merges([merge if isinstance(merge, str) else " ".join(merge) for merge in bpe["merges"]])
    writer.add_bos_token_id(end)
    writer.add_eos_token_id(end)
    for name, weight in model.state_dict().items():
        values = weight.numpy()
        module = name.removesuffix(".weight")
        if module.endswith(("q_proj", "k_proj")):  # neighbours are rotated there, halves here
            values = values.reshape(-1, 2, config.head_dim // 2, values.shape[1]).swapaxes(1, 2).reshape(values.shape)
        if module == "model.embed_tokens":
            writer.add_tensor("token_embd.weight", values)
        elif module == "model.norm":
            writer.add_tensor("output_norm.weight", values)
        elif module == "lm_head":
            writer.add_tensor("output.weight", values)
        else:
            _, _, layer, part = module.split(".", 3)
            writer.add_tensor(f"blk.{layer}.{GGUF_NAMES[part]}.weight", np.ascontiguousarray(values))
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()


@pytest.mark.parametrize("is_package", [False, True])
def test_a_gguf_file_is_the_model_it_was_made_of(
    tmp_path: Path, corpus: Path, is_package: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    tokenizer = train_tokenizer(corpus, vocab_size=300)
    model = build("llama", vocab_size=len(tokenizer), rms_norm_eps=1e-5)
    folder = tmp_path / "site" / "tiny_model"
    folder.mkdir(parents=True)
    (folder / "__init__.py").write_text("raise ImportError('nothing of a package is run')\n")
    write_gguf(folder / "tiny.gguf", model, tokenizer)
    monkeypatch.setattr(sys, "path", [str(tmp_path / "site"), *sys.path])
    name = "package:tiny_model/tiny.gguf" if is_package else str(folder / "tiny.gguf")
    loaded, loaded_tokenizer = checkpoint.load_pretrained(name)
    text = "the cat sat on the mat"
    ids = tokenizer.encode(text, add_special_tokens=False)
    assert loaded_tokenizer.encode(text, add_special_tokens=False) == ids
    with torch.no_grad():
        expected = model(torch.tensor([ids])).logits
        torch.testing.assert_close(loaded(torch.tensor([ids])).logits, expected, atol=1e-4, rtol=1e-4)
        checkpoint.save_model(loaded, loaded_tokenizer, tmp_path / "saved")
        again, _ = checkpoint.load_model(tmp_path / "saved")
        torch.testing.assert_close(again(torch.tensor([ids])).logits, expected, atol=1e-4, rtol=1e-4)
