"""One graph, four drivers: pipeline.NODES, params.yaml, dvc.yaml and prefect.yaml must say the same.

The paper's tables: the plan of scale cpu and tables/dvc.yaml must say the same.
"""

import json
import runpy
from dataclasses import fields
from pathlib import Path
from typing import Any

import pytest
from ruamel.yaml import YAML

from bitdistill_core.config import Params
from bitdistill_core.params import list_profiles, load_params
from bitdistill_core.pipeline import NODES, Node, find_node
from bitdistill_core.tables import results as tables_results
from bitdistill_core.tables.cell import chain, result_path, run_cell
from bitdistill_core.tables.plan import Plan, read_plan
from bitdistill_core.tables.render import render
from tasks import stages
from tasks.versioning import DVC_RUN

ROOT = Path(__file__).parent.parent
CODE_VERSION = "bitdistill_core/__init__.py"


def read_yaml(name: str) -> Any:
    return YAML(typ="safe", pure=True).load((ROOT / name).read_text())


def dvc_stages(file: str) -> dict[str, dict[str, Any]]:
    """The stages of a dvc.yaml with `foreach` written out, by DVC's own resolver."""
    from dvc.dvcfile import ProjectFile
    from dvc.repo import Repo

    repo = Repo(str(ROOT), uninitialized=True)
    return dict(ProjectFile(repo, str(ROOT / file)).resolver.resolve()["stages"])


def directory(name: str) -> str:
    return find_node(name).directory(DVC_RUN).as_posix()


@pytest.fixture(scope="module")
def dvc() -> dict[str, dict[str, Any]]:
    """The stages of the demo."""
    return {name: stage for name, stage in dvc_stages("dvc.yaml").items() if name != "tables"}


@pytest.fixture(scope="module")
def plan() -> Plan:
    return read_plan(ROOT / "tables", "cpu", ROOT / "params.yaml")


@pytest.fixture(scope="module")
def make_dvc() -> Any:
    """The script that writes tables/dvc.yaml."""
    return runpy.run_path(str(ROOT / "tables/make_dvc.py"))


@pytest.mark.parametrize("node", NODES, ids=lambda node: node.name)
def test_a_node_has_a_section_a_task_and_matching_inputs(node: Node) -> None:
    assert node.section in Params.model_fields
    assert stages.STAGES[node.section].task_run_name == "{node}"
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


def test_the_pipeline_of_the_tables_is_that_of_the_plan(plan: Plan, make_dvc: Any) -> None:
    assert (ROOT / "tables/dvc.yaml").read_text() == make_dvc["pipeline"](plan), "run python tables/make_dvc.py"


def test_dvc_has_every_cell_once(plan: Plan) -> None:
    stages = dvc_stages("tables/dvc.yaml")
    commands = [f"bitdistill cell {c.model} {c.task} {c.method} {c.seed} --profile cpu" for c in plan.cells()]
    assert [stage["cmd"] for stage in stages.values()] == commands
    outs = [next(iter(stage["outs"][0])) for stage in stages.values()]
    assert outs == [result_path(Path("results/cpu"), cell).as_posix() for cell in plan.cells()]
    assert all(out.startswith("results/cpu/cells/") for out in outs)
    assert {stage["wdir"] for stage in stages.values()} == {".."}


def test_dvc_knows_the_tables(plan: Plan, make_dvc: Any) -> None:
    tables = dvc_stages("dvc.yaml")["tables"]
    assert tables["cmd"] == "bitdistill tables --profile cpu"
    assert [next(iter(out)) for out in tables["outs"]] == [f"results/cpu/{name}" for name in make_dvc["outputs"](plan)]


def test_dvc_knows_every_file_that_rendering_writes(
    plan: Plan,
    make_dvc: Any,
    tiny_scale: Path,
    stored_stages: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """Rendered from one tiny result in the place of every cell's."""
    monkeypatch.setattr(tables_results, "NUM_RESAMPLES", 40)  # names of files do not depend on intervals
    tiny = read_plan(tiny_scale, "tiny", ROOT / "params.yaml")
    cell = tiny.find("small", "reviews", "bitdistill", 0)
    results = tmp_path / "results"
    result = run_cell(tiny, cell, store=stored_stages, results=tmp_path / "tiny", data_root=None)
    for other in plan.cells():
        path = result_path(results, other)
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(json.dumps({**result, "sources": {}, "recipe": chain(plan, other).recipe}))
    assert render(plan, results, ROOT / "tables/paper.csv") == []
    assert sorted(path.name for path in results.iterdir() if path.is_file()) == make_dvc["outputs"](plan)


def test_there_is_a_deployment_for_every_profile_and_for_the_tables() -> None:
    names: dict[str, list[str]] = {"flows/convert.py:convert": [], "flows/tables.py:tables": []}
    for deployment in read_yaml("prefect.yaml")["deployments"]:
        names[deployment["entrypoint"]].append(deployment["name"])
        assert deployment["parameters"] == {"profile": deployment["name"]}
        assert deployment["work_pool"]["name"] == "bitdistill-cpu"
        # a limit's slot outlives a killed server, and a server's restart would end the run that holds it
        assert "concurrency_limit" not in deployment
    assert sorted(names["flows/convert.py:convert"]) == sorted(list_profiles(ROOT / "params.yaml"))
    assert names["flows/tables.py:tables"] == ["cpu"]
