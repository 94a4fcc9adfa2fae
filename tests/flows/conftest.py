"""A temporary Prefect server for the session, and a scale whose first cell never ends."""

import shutil
from collections.abc import Iterator
from pathlib import Path

import pytest
from prefect.testing.utilities import prefect_test_harness
from ruamel.yaml import YAML


@pytest.fixture(scope="session", autouse=True)
def prefect_server() -> Iterator[None]:
    with prefect_test_harness(server_startup_timeout=180):
        yield


@pytest.fixture
def endless_scale(tiny_scale: Path, tmp_path: Path) -> Path:
    """The folder of `tiny_scale` with training that takes hours, and a checkpoint every few steps."""
    folder = Path(shutil.copytree(tiny_scale, tmp_path / "scales"))
    yaml = YAML(typ="safe")
    scale = yaml.load((folder / "tiny.yaml").read_text())
    scale["params"]["data"]["corpus_documents"] = 0
    scale["params"]["base"]["scratch"] |= {"num_tokens": 100_000_000, "checkpoint_every": 5}
    yaml.dump(scale, folder / "tiny.yaml")
    return folder
