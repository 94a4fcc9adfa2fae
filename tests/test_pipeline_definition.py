"""One graph, four drivers: pipeline.NODES, params.yaml, dvc.yaml and prefect.yaml must say the same."""

from dataclasses import fields
from pathlib import Path
from typing import Any

import pytest
from ruamel.yaml import YAML

from bitdistill_core.config import Params, list_profiles, load_params
from bitdistill_core.pipeline import NODES, Node, find_node
from tasks import stages
from tasks.versioning import DVC_RUN

ROOT = Path(__file__).parent.parent
CODE_VERSION = "bitdistill_core/__init__.py"


def read_yaml(name: str) -> Any:
    return YAML(typ="safe", pure=True).load((ROOT / name).read_text())


def dvc_stages() -> dict[str, dict[str, Any]]:
    """The stages of dvc.yaml with `foreach` written out, by DVC's own resolver."""
    from dvc.dvcfile import ProjectFile
    from dvc.repo import Repo

    repo = Repo(str(ROOT), uninitialized=True)
    return dict(ProjectFile(repo, str(ROOT / "dvc.yaml")).resolver.resolve()["stages"])


def directory(name: str) -> str:
    return find_node(name).directory(DVC_RUN).as_posix()


@pytest.fixture(scope="module")
def dvc() -> dict[str, dict[str, Any]]:
    return dvc_stages()


@pytest.mark.parametrize("node", NODES, ids=lambda node: node.name)
def test_a_node_has_a_section_a_task_and_matching_inputs(node: Node) -> None:
    assert node.section in Params.model_fields
    assert getattr(stages, node.section).task_run_name == "{node}"
    assert {field.name for field in fields(node.stage.Inputs)} == set(node.inputs)
    assert callable(node.stage.run)


def test_a_node_comes_after_the_nodes_that_feed_it() -> None:
    names = [node.name for node in NODES]
    assert len(set(names)) == len(names)
    for position, node in enumerate(NODES):
        assert set(node.inputs.values()) <= set(names[:position])


def test_dvc_has_every_node_and_no_other(dvc: dict[str, dict[str, Any]]) -> None:
    assert sorted(dvc) == sorted(node.name for node in NODES)


@pytest.mark.parametrize("node", NODES, ids=lambda node: node.name)
def test_a_dvc_stage_is_its_node(node: Node, dvc: dict[str, dict[str, Any]]) -> None:
    stage = dvc[node.name]
    assert stage["cmd"] == f"bitdistill stage {node.name}"
    assert stage["params"] == [node.section]
    assert stage["outs"] == [{directory(node.name): {"persist": True}}]
    data = load_params(ROOT / "params.yaml").data
    files = [data.examples, data.corpus] if node.name == "data" else []
    assert sorted(stage["deps"]) == sorted([CODE_VERSION, *files, *map(directory, node.inputs.values())])


def test_dvc_metrics_and_plots_lie_in_stage_directories() -> None:
    content = read_yaml("dvc.yaml")
    outputs = [directory(node.name) for node in NODES]
    paths = [plot if isinstance(plot, str) else next(iter(plot["Loss curves"]["y"])) for plot in content["plots"]]
    for path in [*content["metrics"], *paths]:
        assert any(path.startswith(f"{output}/") for output in outputs), path


def test_there_is_a_deployment_for_every_profile() -> None:
    content = read_yaml("prefect.yaml")
    names = [deployment["name"] for deployment in content["deployments"]]
    assert sorted(names) == sorted(list_profiles(ROOT / "params.yaml"))
    for deployment in content["deployments"]:
        assert deployment["parameters"] == {"profile": deployment["name"]}
        assert deployment["entrypoint"] == "flows/convert.py:convert"
        assert deployment["work_pool"]["name"] == "bitdistill-cpu"
        assert deployment["concurrency_limit"] == 1


@pytest.mark.parametrize("profile", list_profiles(ROOT / "params.yaml"))
def test_a_profile_is_valid(profile: str) -> None:
    assert load_params(ROOT / "params.yaml", profile=profile)
