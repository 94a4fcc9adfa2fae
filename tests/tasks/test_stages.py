"""The Prefect tasks: one a stage, no cache, no retries."""

import pytest
from prefect import Task
from prefect.cache_policies import NO_CACHE

from bitdistill_core.pipeline import NODES
from tasks import stages

SECTIONS = sorted({node.section for node in NODES})


@pytest.mark.parametrize("section", SECTIONS)
def test_a_stage_has_a_task_that_neither_caches_nor_retries(section: str) -> None:
    task = stages.STAGES[section]
    assert isinstance(task, Task)
    assert task.name == section
    assert task.cache_policy == NO_CACHE
    assert task.retries == 0
    assert not task.persist_result


def test_every_stage_says_in_the_interface_what_it_does() -> None:
    assert sorted(stages.STAGES) == SECTIONS
    assert all(task.description and f"`{name}`" in task.description for name, task in stages.STAGES.items())
