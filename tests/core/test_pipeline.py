"""What the graph of a conversion refuses before anything is trained, and what it does again."""

import json
import shutil
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

from bitdistill_core import pipeline
from bitdistill_core.config import Params
from bitdistill_core.pipeline import find_node, require_packable, run_node
from bitdistill_core.quantize.rows import round_rows


def test_what_the_engine_cannot_run_is_refused(finished_run: Path, tiny_params: Params, tmp_path: Path) -> None:
    config = json.loads((finished_run / "base" / "config.json").read_text())
    yarn = config | {"rope_parameters": {"rope_type": "yarn", "factor": 2.0, "rope_theta": 1e4}}
    (tmp_path / "config.json").write_text(json.dumps(yarn))
    require_packable(tiny_params, finished_run / "base")
    with pytest.raises(ValueError, match="the engine supports rope_type default, linear, llama3"):
        require_packable(tiny_params, tmp_path)


def test_a_new_packed_format_packs_again_and_trains_nothing(
    finished_run: Path, tiny_params: Params, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    run_dir = tmp_path / "run"
    shutil.copytree(finished_run, run_dir)
    assert run_node(find_node("pack@bitdistill"), tiny_params, run_dir).was_up_to_date
    monkeypatch.setattr(pipeline, "FORMAT_VERSION", "999")
    assert run_node(find_node("distill"), tiny_params, run_dir).was_up_to_date
    assert not run_node(find_node("pack@bitdistill"), tiny_params, run_dir).was_up_to_date


@pytest.mark.parametrize(("stage", "is_rounded"), [("teacher", False), ("bitnet_sft", True), ("distill", True)])
def test_students_end_with_the_embeddings_that_their_files_hold(
    finished_run: Path, stage: str, is_rounded: bool
) -> None:
    weight = load_file(finished_run / stage / "model.safetensors")["model.embed_tokens.weight"]
    assert torch.allclose(weight, round_rows(weight), rtol=1e-6, atol=1e-6) == is_rounded
