"""Models save and reload exactly; what cannot be loaded is one clear error."""

import json
import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file
from transformers import PreTrainedModel, PreTrainedTokenizerFast

from bitdistill_core import checkpoint
from bitdistill_core.quantize.rows import quantize_rows
from bitdistill_core.stages import training
from bitdistill_core.stages.base import train_tokenizer
from bitdistill_core.surgery import operate
from tests.conftest import ROOT
from tests.core.conftest import build

IDS = torch.tensor([[3, 14, 15, 92]])


@pytest.fixture
def tokenizer(corpus: Path) -> PreTrainedTokenizerFast:
    """A small BPE tokenizer."""
    return train_tokenizer(corpus, vocab_size=300)


def make_student(model: PreTrainedModel, subln: str = "all") -> PreTrainedModel:
    """A student whose SubLN gains have been learned."""
    operate(model, subln=subln, sub_norm_eps=1e-6)
    generator = torch.Generator().manual_seed(0)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if name.endswith("input_norm.weight"):
                parameter.copy_(torch.rand(parameter.shape, generator=generator) + 0.5)
    return model


@pytest.mark.parametrize("subln", ["none", "output", "all"])
def test_a_student_reloads_exactly(
    any_model: PreTrainedModel, tokenizer: PreTrainedTokenizerFast, tmp_path: Path, subln: str
) -> None:
    student = make_student(any_model, subln)
    checkpoint.save_model(student, tokenizer, tmp_path)
    loaded, loaded_tokenizer = checkpoint.load_model(tmp_path)
    assert loaded_tokenizer.get_vocab() == tokenizer.get_vocab()
    with torch.no_grad():
        assert torch.equal(student(IDS).logits, loaded(IDS).logits)


def test_a_dense_model_reloads_exactly(
    any_model: PreTrainedModel, tokenizer: PreTrainedTokenizerFast, tmp_path: Path
) -> None:
    checkpoint.save_model(any_model, tokenizer, tmp_path)
    modes = {(tmp_path / name).stat().st_mode for name in ("config.json", "model.safetensors")}
    assert len(modes) == 1  # whoever may read the one may read the other
    loaded, _ = checkpoint.load_model(tmp_path)
    with torch.no_grad():
        assert torch.equal(any_model(IDS).logits, loaded(IDS).logits)
    assert checkpoint.surgery_record(loaded.config) is None


@pytest.mark.parametrize("damage", ["missing", "unexpected"])
def test_a_lost_norm_gain_is_an_error(tokenizer: PreTrainedTokenizerFast, tmp_path: Path, damage: str) -> None:
    checkpoint.save_model(make_student(build("qwen3")), tokenizer, tmp_path)
    state = load_file(tmp_path / "model.safetensors")
    name = "model.layers.0.self_attn.o_proj.input_norm.weight"
    if damage == "missing":
        del state[name]
    else:
        state["model.layers.0.extra.weight"] = torch.zeros(1)
    save_file(state, tmp_path / "model.safetensors", metadata={"format": "pt"})
    with pytest.raises(ValueError, match=r"does not fit its config\.json: .*(input_norm|extra)"):
        checkpoint.load_model(tmp_path)


def test_a_truncated_checkpoint_is_an_error(tokenizer: PreTrainedTokenizerFast, tmp_path: Path) -> None:
    checkpoint.save_model(build("qwen3"), tokenizer, tmp_path)
    path = tmp_path / "model.safetensors"
    path.write_bytes(path.read_bytes()[:-100])
    with pytest.raises(ValueError, match=r"unreadable checkpoint path=.*model\.safetensors"):
        checkpoint.load_model(tmp_path)


def test_missing_checkpoints_are_named(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match=r"needs config\.json; not found"):
        checkpoint.load_model(tmp_path)
    with pytest.raises(ValueError, match=r"is no model directory: no config\.json"):
        checkpoint.load_pretrained(str(tmp_path))
    with pytest.raises(ValueError, match=r"no GGUF file at base\.checkpoint="):
        checkpoint.load_pretrained(str(tmp_path / "none.gguf"))
    with pytest.raises(ValueError, match="Python package that holds module=no_such_package; pip install it"):
        checkpoint.load_pretrained("package:no_such_package/x.gguf")


def test_an_unsupported_architecture_is_refused_before_its_weights_load(tmp_path: Path) -> None:
    (tmp_path / "config.json").write_text('{"model_type": "gpt2"}')
    with pytest.raises(ValueError, match="unsupported architecture model_type=gpt2; supported are qwen3"):
        checkpoint.load_pretrained(str(tmp_path))


def test_a_hugging_face_directory_loads(tokenizer: PreTrainedTokenizerFast, tmp_path: Path) -> None:
    model = build("llama")
    model.save_pretrained(tmp_path)
    tokenizer.save_pretrained(tmp_path)
    loaded, _ = checkpoint.load_pretrained(str(tmp_path))
    with torch.no_grad():
        assert torch.allclose(model(IDS).logits, loaded(IDS).logits, atol=1e-6)
    shutil.rmtree(tmp_path)


def test_a_hub_id_may_name_a_revision(tokenizer: PreTrainedTokenizerFast, tmp_path: Path) -> None:
    repository = tmp_path / "hub/models--some--model"  # as the hub's client lays out what it fetched
    (repository / "refs/pr").mkdir(parents=True)
    models = {}
    for seed, (commit, name) in enumerate((("a" * 40, "main"), ("b" * 40, "pr/1"))):
        models[commit] = build("qwen3", seed, vocab_size=len(tokenizer))
        models[commit].save_pretrained(repository / "snapshots" / commit)
        tokenizer.save_pretrained(repository / "snapshots" / commit)
        (repository / "refs" / name).write_text(commit)
    code = """
import sys, torch
from pathlib import Path
from bitdistill_core.stages import base
from tests.core.conftest import section
for name, out in zip(("some/model", "some/model@pr/1", "some/model@" + "a" * 40), map(Path, sys.argv[1:])):
    out.mkdir()
    options = {"work_dir": out, "report": lambda *_: None, "device": torch.device("cpu")}
    base.run(section("base", checkpoint=name), base.Inputs(Path("none")), out_dir=out, **options)
"""
    outs = [tmp_path / "main", tmp_path / "v2", tmp_path / "commit"]
    environment = {**os.environ, "HF_HOME": str(tmp_path), "HF_HUB_OFFLINE": "1", "PYTHONPATH": str(ROOT)}
    environment.pop("HF_HUB_CACHE", None)
    subprocess.run([sys.executable, "-c", code, *map(str, outs)], env=environment, check=True)
    for out, commit in zip(outs, ("a" * 40, "b" * 40, "a" * 40), strict=True):
        assert json.loads((out / "source.json").read_text()) == {"repository": "some/model", "commit": commit}
        loaded, _ = checkpoint.load_model(out)
        for name, value in models[commit].state_dict().items():
            assert torch.equal(value, loaded.state_dict()[name]), name


@pytest.mark.parametrize("has_own_head", [False, True])
def test_a_head_of_its_own_is_kept_whatever_the_config_says(
    tokenizer: PreTrainedTokenizerFast, tmp_path: Path, has_own_head: bool
) -> None:
    model = build("qwen3", vocab_size=len(tokenizer))
    model.save_pretrained(tmp_path / "hub")
    tokenizer.save_pretrained(tmp_path / "hub")
    assert model.config.tie_word_embeddings
    if has_own_head:
        weights = load_file(tmp_path / "hub" / "model.safetensors")
        weights["lm_head.weight"] = weights["model.embed_tokens.weight"].flip(0).contiguous()
        save_file(weights, tmp_path / "hub" / "model.safetensors", metadata={"format": "pt"})
    loaded, _ = checkpoint.load_pretrained(str(tmp_path / "hub"))
    checkpoint.save_model(loaded, tokenizer, tmp_path / "base")
    again, _ = checkpoint.load_model(tmp_path / "base")
    with torch.no_grad():
        expected = model(IDS).logits.flip(-1) if has_own_head else model(IDS).logits
        assert torch.equal(loaded(IDS).logits, again(IDS).logits)
        torch.testing.assert_close(again(IDS).logits, expected)


def test_a_base_that_lacks_weights_is_refused(tokenizer: PreTrainedTokenizerFast, tmp_path: Path) -> None:
    model = build("llama", tie_word_embeddings=False)
    model.save_pretrained(tmp_path)
    tokenizer.save_pretrained(tmp_path)
    checkpoint.load_pretrained(str(tmp_path))
    state = load_file(tmp_path / "model.safetensors")
    del state["lm_head.weight"]  # as of a classifier
    save_file(state, tmp_path / "model.safetensors", metadata={"format": "pt"})
    with pytest.raises(
        ValueError, match=r"got missing=1 in base.checkpoint=.*, the first lm_head.weight; take a causal"
    ):
        checkpoint.load_pretrained(str(tmp_path))


@pytest.mark.parametrize("subln", ["none", "output"])
def test_a_student_is_no_base(tokenizer: PreTrainedTokenizerFast, tmp_path: Path, subln: str) -> None:
    checkpoint.save_model(make_student(build("qwen3"), subln), tokenizer, tmp_path)
    with pytest.raises(ValueError, match=r"must be a full-precision model; got a student in base.checkpoint="):
        checkpoint.load_pretrained(str(tmp_path))


@pytest.mark.parametrize("class_name", ["Qwen2Tokenizer", None])
def test_a_base_without_a_tokenizer_is_refused(tmp_path: Path, class_name: str | None) -> None:
    build("qwen2").save_pretrained(tmp_path)
    if class_name is not None:
        (tmp_path / "tokenizer_config.json").write_text(json.dumps({"tokenizer_class": class_name}))
    with pytest.raises(ValueError, match=r"has no tokenizer that knows words; put|cannot load"):
        checkpoint.load_pretrained(str(tmp_path))


def test_quantised_weights_are_no_base(tokenizer: PreTrainedTokenizerFast, tmp_path: Path) -> None:
    build("qwen2").save_pretrained(tmp_path)
    tokenizer.save_pretrained(tmp_path)
    config = json.loads((tmp_path / "config.json").read_text())
    (tmp_path / "config.json").write_text(json.dumps(config | {"quantization_config": {"quant_method": "gptq"}}))
    with pytest.raises(ValueError, match=r"must be a full-precision model; got quantised weights in base\.checkpoint="):
        checkpoint.load_pretrained(str(tmp_path))


@pytest.mark.parametrize("change", [{"hidden_size": "wide"}, {"num_hidden_layers": None}, {"rope_parameters": 3}])
def test_a_config_of_wrong_types_is_one_error(
    tokenizer: PreTrainedTokenizerFast, tmp_path: Path, change: dict[str, object]
) -> None:
    build("qwen2").save_pretrained(tmp_path)
    tokenizer.save_pretrained(tmp_path)
    config = json.loads((tmp_path / "config.json").read_text())
    (tmp_path / "config.json").write_text(json.dumps(config | change))
    with pytest.raises(ValueError, match=r"cannot read a model configuration from|cannot load base\.checkpoint="):
        checkpoint.load_pretrained(str(tmp_path))


@pytest.mark.parametrize("size", [0, 10, 100])
def test_a_gguf_file_that_is_cut_short_is_one_error(tmp_path: Path, size: int) -> None:
    header = b"GGUF" + (3).to_bytes(4, "little") + (5).to_bytes(8, "little") + (9).to_bytes(8, "little")
    (tmp_path / "model.gguf").write_bytes((header + b"\x05" * 100)[:size])
    with pytest.raises(ValueError, match="cannot read a model configuration from"):
        checkpoint.load_pretrained(str(tmp_path / "model.gguf"))


def test_code_in_a_model_directory_is_never_run(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    code = f"open({str(tmp_path / 'ran')!r}, 'w')\nfrom transformers import PretrainedConfig\n"
    (tmp_path / "own.py").write_text(code + "class Own(PretrainedConfig):\n    model_type = 'own'\n")
    config = {"model_type": "own", "auto_map": {"AutoConfig": "own.Own"}}
    (tmp_path / "config.json").write_text(json.dumps(config))
    monkeypatch.setattr("builtins.input", lambda *_: "y")
    with pytest.raises(ValueError, match="cannot read a model configuration from"):
        checkpoint.load_pretrained(str(tmp_path))
    assert not (tmp_path / "ran").exists()


def test_rounded_embeddings_stay_tied_and_close() -> None:
    model = build("qwen3")
    before = model.get_input_embeddings().weight.detach().clone()
    training.round_embeddings(model)
    after = model.get_input_embeddings().weight
    assert after is model.get_output_embeddings().weight
    grid = quantize_rows(before)
    assert ((after - before).abs() <= 0.5001 * grid.row_scale[:, None] * grid.column_scale).all()
    assert (after - before).norm() < 0.01 * before.norm()


def test_a_base_with_a_weight_that_is_no_number_is_refused(tokenizer: PreTrainedTokenizerFast, tmp_path: Path) -> None:
    model = build("qwen3", vocab_size=len(tokenizer))
    with torch.no_grad():
        model.get_decoder().layers[1].mlp.up_proj.weight[3, 4] = float("nan")
    checkpoint.save_model(model, tokenizer, tmp_path)
    with pytest.raises(
        ValueError, match=r"must be finite; got NaN or infinity in tensor=model.layers.1.mlp.up_proj.weight"
    ):
        checkpoint.load_pretrained(str(tmp_path))


@pytest.mark.parametrize("name", ["package:../../x", "package:no.such/x.gguf", "package:"])
def test_a_package_is_one_module_and_a_file(name: str) -> None:
    with pytest.raises(ValueError, match=r"must be package:MODULE/file.gguf; got package:"):
        checkpoint.load_pretrained(name)
