import json
from pathlib import Path

import pytest
from tokenizers import Tokenizer
from transformers import PreTrainedTokenizerFast

from benchmarks import head
from bitdistill_core import checkpoint
from tests.core.architectures import EOS, VOCAB_SIZE
from tests.core.conftest import build
from tests.core.reference_students import tokenizer_json


def test_the_command_counts_rows_and_compares_with_the_whole_head(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    tokenizer = PreTrainedTokenizerFast(tokenizer_object=Tokenizer.from_str(tokenizer_json().decode()))
    checkpoint.save_model(build("qwen3", vocab_size=VOCAB_SIZE, eos_token_id=EOS), tokenizer, tmp_path / "model")
    text = tmp_path / "text.txt"
    text.write_text("a film that nobody has seen, and that everybody talks about")
    options = ["--text", str(text), "--tokens", "12", "--rounds", "2", "--threads", "1"]
    head.main([str(tmp_path / "model"), *options, "--json", str(tmp_path / "result.json")])
    result = json.loads((tmp_path / "result.json").read_text())
    assert result["num_tokens"] == 12
    assert len(result["milliseconds"]) == len(result["whole_head_milliseconds"]) == 2
    for name in ("next_bit_rows", "whole_rows"):
        assert 0 <= result[name]["median"] <= result[name]["max"] <= VOCAB_SIZE
    assert json.loads(capsys.readouterr().out.splitlines()[-1]) == result["ratios"]


def test_a_model_that_is_not_there_is_one_line(tmp_path: Path) -> None:
    text = tmp_path / "text.txt"
    text.write_text("a film")
    with pytest.raises(SystemExit, match=r"error: no GGUF file at base.checkpoint="):
        head.main([str(tmp_path / "missing.gguf"), "--text", str(text)])
