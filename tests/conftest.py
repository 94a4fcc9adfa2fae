"""Environment of every test: offline, no telemetry, one thread, nothing written into the project; a tiny conversion."""

import os
import shutil
import tempfile
from pathlib import Path
from typing import Any

_HOME = tempfile.TemporaryDirectory(prefix="bitdistill-tests-")
os.environ.update({
    "DO_NOT_TRACK": "true",
    "DVC_NO_ANALYTICS": "1",
    "HF_DATASETS_OFFLINE": "1",
    "HF_HUB_OFFLINE": "1",
    "MLFLOW_DISABLE_TELEMETRY": "true",
    "OMP_WAIT_POLICY": "PASSIVE",  # idle OpenMP threads that spin make small models tens of times slower
    "PREFECT_HOME": _HOME.name,
    "PREFECT_SERVER_ANALYTICS_ENABLED": "false",
    "TOKENIZERS_PARALLELISM": "false",
})  # fmt: skip
for _name in ("MLFLOW_TRACKING_URI", "MLFLOW_EXPERIMENT_NAME", "MLFLOW_RUN_ID", "PREFECT_API_URL"):
    os.environ.pop(_name, None)

import pytest  # noqa: E402
import torch  # noqa: E402
from ruamel.yaml import YAML  # noqa: E402

from bitdistill_core.config import Params  # noqa: E402
from bitdistill_core.params import load_params  # noqa: E402
from bitdistill_core.pipeline import NODES, run_node  # noqa: E402
from bitdistill_core.tables.plan import read_plan  # noqa: E402
from bitdistill_core.tables.run import run_plan  # noqa: E402

torch.set_num_threads(1)
ROOT = Path(__file__).parent.parent

TINY = {
    "runtime.device": "cpu",
    "runtime.num_threads": 1,
    "data.examples": str(ROOT / "data/demo/reviews.parquet"),
    "data.corpus": str(ROOT / "data/demo/corpus.parquet"),
    "data.max_train_examples": 64,
    "data.max_eval_examples": 16,
    "data.corpus_documents": 200,
    "base.scratch.vocab_size": 300,
    "base.scratch.hidden_size": 32,
    "base.scratch.intermediate_size": 64,
    "base.scratch.num_layers": 2,
    "base.scratch.num_heads": 4,
    "base.scratch.num_kv_heads": 2,
    "base.scratch.head_dim": 16,
    "base.scratch.max_position_embeddings": 256,
    "base.scratch.num_tokens": 5120,
    "base.scratch.block_size": 64,
    "base.scratch.batch_size": 8,
    "base.scratch.report_every": 2,
    "pretrain.num_tokens": 5120,
    "pretrain.block_size": 64,
    "pretrain.batch_size": 8,
    "pretrain.report_every": 2,
    "teacher.num_epochs": 2,
    "teacher.batch_size": 16,
    "teacher.report_every": 2,
    "distill.num_epochs": 2,
    "distill.batch_size": 16,
    "distill.report_every": 2,
    "distill.num_relation_heads": 4,
    "distill.grad_norm_every": 4,
    "bitnet_sft.num_epochs": 2,
    "bitnet_sft.batch_size": 16,
    "bitnet_sft.report_every": 2,
    "pack.verify_examples": 4,
    "benchmark.prompt_tokens": 16,
    "benchmark.new_tokens": 4,
    "benchmark.num_rounds": 1,
    "benchmark.warmup_rounds": 0,
}

# two cells that share their base, and one that fails when it is run
TINY_SCALE = {
    "description": "Tables at scale tiny",
    "seeds": [0],
    "models": {"small": {"label": "Small"}},
    "tasks": {"reviews": {"label": "Reviews"}},
    "methods": {"broken": {"label": "Broken", "params": {"distill": {"num_relation_heads": 7}}}},
    "groups": {
        "table1": {"models": ["small"], "tasks": ["reviews"], "methods": ["fp16_sft", "bitnet_sft"]},
        "table6": {"models": ["small"], "tasks": ["reviews"], "methods": ["broken"]},
    },
}


@pytest.fixture(scope="session")
def tiny_scale(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder of scales whose scale, tiny, runs in seconds."""
    folder = tmp_path_factory.mktemp("scales")
    for name in ("methods.yaml", "paper.csv"):
        shutil.copy(ROOT / "tables" / name, folder)
    params: dict[str, Any] = {}
    for key, value in TINY.items():
        *sections, last = key.split(".")
        node = params
        for section in sections:
            node = node.setdefault(section, {})
        node[last] = value
    YAML(typ="safe").dump({**TINY_SCALE, "params": params}, folder / "tiny.yaml")
    return folder


@pytest.fixture(scope="session")
def finished_tables(tiny_scale: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with `store` and `results` of group table1 of the tiny scale, every checkpoint kept. Copy before use."""
    folder = tmp_path_factory.mktemp("finished-tables")
    plan = read_plan(tiny_scale, "tiny", ROOT / "params.yaml")
    outcome = run_plan(
        plan,
        store=folder / "store",
        results=folder / "results",
        data_root=None,
        groups=["table1"],
        keep_checkpoints=True,
    )
    assert len(outcome.finished) == 2
    return folder


@pytest.fixture
def stored_stages(finished_tables: Path, tmp_path: Path) -> Path:
    """The stages of these cells, without results, where a command or flow of the tiny scale looks for them."""
    return Path(shutil.copytree(finished_tables / "store", tmp_path / "runs/tables/tiny"))


@pytest.fixture(scope="session")
def tiny_overrides() -> list[str]:
    """Overrides of params.yaml for a conversion that takes seconds."""
    return [f"{key}={value}" for key, value in TINY.items()]


@pytest.fixture(scope="session")
def tiny_params(tiny_overrides: list[str]) -> Params:
    """Parameters of a conversion that takes seconds: two layers, a few steps, a few examples of the demo data."""
    return load_params(ROOT / "params.yaml", overrides=tiny_overrides)


@pytest.fixture(scope="session")
def finished_run(tiny_params: Params, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The run directory of a whole tiny conversion, made by the core alone. Copy it before changing it."""
    run_dir = tmp_path_factory.mktemp("finished") / "runs" / "demo"
    for node in NODES:
        run_node(node, tiny_params, run_dir)
    return run_dir


@pytest.fixture(autouse=True)
def _own_directory(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Tests run in an empty directory, so that default places (mlflow.db, runs/) are never the project's."""
    monkeypatch.chdir(tmp_path)
