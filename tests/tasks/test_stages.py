"""The Prefect tasks: one a stage, no cache, no retries."""

import ast
from pathlib import Path

import pytest
from prefect import Task
from prefect.cache_policies import NO_CACHE

from bitdistill_core.pipeline import NODES
from tasks import stages

SECTIONS = sorted({node.section for node in NODES})


@pytest.mark.parametrize("section", SECTIONS)
def test_a_stage_has_a_task_that_neither_caches_nor_retries(section: str) -> None:
    task = getattr(stages, section)
    assert isinstance(task, Task)
    assert task.name == section
    assert task.cache_policy == NO_CACHE
    assert task.retries == 0
    assert not task.persist_result


def test_tasks_hold_no_logic_of_their_own() -> None:
    tree = ast.parse(Path(stages.__file__).read_text())
    tasks = [node for node in tree.body if isinstance(node, ast.FunctionDef) and node.decorator_list]
    assert sorted(node.name for node in tasks) == sorted([*SECTIONS, "cell"])  # a cell of the tables, not a stage
    assert all(len(node.body) == 2 for node in tasks)  # docstring and one statement
