"""Ctrl-C in a terminal: every process of the group gets the signal, the temporary server too."""

import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

from tests.conftest import ROOT


@pytest.mark.slow
def test_ctrl_c_ends_the_conversion_at_once_and_keeps_the_checkpoint(tiny_overrides: list[str], tmp_path: Path) -> None:
    overrides = [*tiny_overrides, "base.scratch.num_tokens=100000000", "base.scratch.checkpoint_every=5"]
    overrides += ["data.corpus_documents=0"]
    parameters = {"overrides": overrides, "params_file": str(ROOT / "params.yaml"), "track": False}
    # a shell that starts this test in the background would have the signal ignored in all its children
    code = "import signal; signal.signal(signal.SIGINT, signal.default_int_handler)\n"
    code += f"from flows.convert import run_locally; run_locally(**{parameters!r})"
    log = tmp_path / "log"
    process = subprocess.Popen(
        [sys.executable, "-c", code],
        env={**os.environ, "PYTHONPATH": str(ROOT)},
        stderr=log.open("w"),
        start_new_session=True,  # a process group of its own, as a terminal makes one
    )
    work_dir = tmp_path / "runs/demo/.work/base"
    try:
        deadline = time.monotonic() + 300
        while not list(work_dir.glob("step-*")):
            assert process.poll() is None, log.read_text()[-2000:]
            assert time.monotonic() < deadline, log.read_text()[-2000:]
            time.sleep(0.5)
        os.killpg(process.pid, signal.SIGINT)
        assert process.wait(45) != 0
    finally:
        if process.poll() is None:
            os.killpg(process.pid, signal.SIGKILL)
            process.wait()
    assert list(work_dir.glob("step-*"))
    assert "ConnectError" not in log.read_text()
    assert "Crashed('Execution was aborted by an interrupt signal.')" in log.read_text()
