"""Git and DVC: the commit of the code, and the outputs of a conversion that Prefect drove.

Runs `python -m dvc`, so that `dvc status` is clean afterwards; never decides what is up to date.
"""

import logging
import shutil
import subprocess
import sys
from pathlib import Path

from bitdistill_core.config import Params
from bitdistill_core.params import load_params
from bitdistill_core.pipeline import NODES

log = logging.getLogger(__name__)
DVC_RUN = Path("runs/demo")  # what dvc.yaml describes, below the project's root


def commit(run_dir: Path, params: Params, *, params_file: Path) -> bool:
    """True when DVC has recorded the run. Failing costs a warning: the files are there either way."""
    root = params_file.resolve().parent
    if not (root / "dvc.yaml").is_file() or not (root / ".dvc").is_dir():
        return False
    if run_dir.resolve() != root / DVC_RUN or not _has_plain_params(params, root / "params.yaml"):
        return False
    stages = [node.name for node in NODES]  # not the paper's tables, which the run has nothing to do with
    command = [sys.executable, "-m", "dvc", "commit", "--force", "--quiet", *stages]
    done = subprocess.run(command, cwd=root, capture_output=True, text=True, check=False)
    if done.returncode:
        reason = (done.stderr or done.stdout).strip().splitlines()
        log.warning("the run is not recorded in DVC: %s", reason[-1] if reason else f"exit code {done.returncode}")
    return done.returncode == 0


def git_commit() -> str | None:
    """The commit of the current directory's repository, if it is one and git is there."""
    if shutil.which("git") is None:
        return None
    done = subprocess.run(["git", "rev-parse", "HEAD"], capture_output=True, text=True, check=False)
    return done.stdout.strip() if done.returncode == 0 else None


def _has_plain_params(params: Params, params_file: Path) -> bool:
    """Whether a run has the values that dvc.yaml tracks; the machine's section is not among them."""
    plain = load_params(params_file)
    return params.model_dump(exclude={"runtime"}) == plain.model_dump(exclude={"runtime"})
