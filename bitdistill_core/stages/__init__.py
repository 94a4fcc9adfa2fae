"""The stages of a conversion, one module each.

Every module has a dataclass `Inputs` of stage directories and `run(config, inputs, *, out_dir, work_dir, report,
device) -> Metrics`, which writes only below out_dir (and, to resume, work_dir). One that reads files from outside the
run has `sources(config)`, their paths. See pipeline.py for how they connect.
"""

from collections.abc import Sequence
from pathlib import Path
from types import ModuleType
from typing import Any


def stage_sources(stage: ModuleType, config: Any) -> Sequence[Path]:
    """The files that a stage reads from outside the run. Raises ValueError where one is not there."""
    found: Sequence[Path] = stage.sources(config) if hasattr(stage, "sources") else ()
    return found
