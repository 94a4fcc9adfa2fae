"""`dvc commit` after a conversion, in a real repository."""

import logging
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
from ruamel.yaml import YAML

from bitdistill_core.config import Params
from bitdistill_core.params import load_params
from bitdistill_core.pipeline import NODES
from tasks import versioning
from tests.conftest import ROOT, TINY


def run(*command: str, cwd: Path) -> str:
    done = subprocess.run(command, cwd=cwd, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    return done.stdout


@pytest.fixture
def project(tmp_path: Path, finished_run: Path) -> Path:
    """A git and DVC project whose params.yaml is the tiny one, with its finished run."""
    for name in ("dvc.yaml", "tables", ".dvc", ".dvcignore", ".gitignore", "data/demo", "bitdistill_core/__init__.py"):
        target = tmp_path / name
        target.parent.mkdir(parents=True, exist_ok=True)
        if (ROOT / name).is_dir():
            shutil.copytree(ROOT / name, target, ignore=shutil.ignore_patterns("tmp", "cache"))
        else:
            shutil.copy(ROOT / name, target)
    yaml = YAML()
    values = yaml.load((ROOT / "params.yaml").read_text())
    for key, value in TINY.items():
        *sections, last = key.split(".")
        node = values
        for section in sections:
            node = node[section]
        node[last] = str(Path(value).relative_to(ROOT)) if str(value).startswith(str(ROOT)) else value
    yaml.dump(values, tmp_path / "params.yaml")
    shutil.copytree(finished_run, tmp_path / "runs/demo")
    run("git", "init", "--quiet", ".", cwd=tmp_path)
    run("git", "add", "--all", cwd=tmp_path)
    return tmp_path


STAGES = [node.name for node in NODES]  # without the paper's tables


@pytest.mark.slow
def test_a_conversion_of_the_plain_parameters_leaves_dvc_clean(project: Path) -> None:
    params_file = project / "params.yaml"
    params = load_params(params_file, overrides=["runtime.num_threads=2"])  # the machine's section does not count
    assert versioning.commit(project / "runs/demo", params, params_file=params_file)
    assert "up to date" in run(sys.executable, "-m", "dvc", "status", *STAGES, cwd=project)
    assert "runs/" not in run("git", "status", "--porcelain", cwd=project)
    assert "evaluate/test/accuracy" in run(sys.executable, "-m", "dvc", "metrics", "show", cwd=project)
    shutil.rmtree(project / "runs/demo/report")
    run(sys.executable, "-m", "dvc", "checkout", "--quiet", cwd=project)
    assert (project / "runs/demo/report/index.html").is_file()


def test_another_run_or_changed_parameters_are_not_committed(project: Path) -> None:
    params_file = project / "params.yaml"
    changed = load_params(params_file, overrides=["distill.kd_temperature=2.0"])
    assert not versioning.commit(project / "runs/demo", changed, params_file=params_file)
    assert not versioning.commit(project / "runs/demo-seed1", load_params(params_file), params_file=params_file)
    assert not (project / "dvc.lock").exists()


def test_a_failing_dvc_is_one_warning(project: Path, caplog: pytest.LogCaptureFixture) -> None:
    (project / "dvc.yaml").write_text("stages: [this, is, wrong]\n")
    params_file = project / "params.yaml"
    with caplog.at_level(logging.WARNING):
        assert not versioning.commit(project / "runs/demo", load_params(params_file), params_file=params_file)
    assert len(caplog.records) == 1
    assert "not recorded in DVC" in caplog.text


def test_without_dvc_nothing_happens(tmp_path: Path, tiny_params: Params) -> None:
    assert not versioning.commit(tmp_path / "runs/demo", tiny_params, params_file=ROOT / "params.yaml")
