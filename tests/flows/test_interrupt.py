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
    code = f"from flows.convert import run_locally; run_locally(**{parameters!r})"
    status, log = interrupt(code, tmp_path / "runs/demo/.work", tmp_path)
    assert status != 0
    assert "ConnectError" not in log
    assert "Crashed('Execution was aborted by an interrupt signal.')" in log


@pytest.mark.slow
def test_ctrl_c_ends_the_flow_of_the_tables_and_keeps_the_checkpoint(endless_scale: Path, tmp_path: Path) -> None:
    parameters = {
        "profile": "tiny",
        "plans": str(endless_scale),
        "params_file": str(ROOT / "params.yaml"),
        "track": False,
    }
    code = f"from flows.tables import run_locally; run_locally(**{parameters!r})"
    status, log = interrupt(code, tmp_path / "runs/tables/tiny/.work", tmp_path)
    assert status != 0
    assert "ConnectError" not in log
    assert "Crashed('Execution was aborted by an interrupt signal.')" in log


@pytest.mark.slow
def test_ctrl_c_ends_the_command_of_the_tables_and_keeps_the_checkpoint(endless_scale: Path, tmp_path: Path) -> None:
    arguments = ["tables", "--profile", "tiny", "--tables", str(endless_scale)]
    arguments += ["--params", str(ROOT / "params.yaml"), "--no-track"]
    code = f"from bitdistill_core.cli import app; app({arguments!r})"
    status, log = interrupt(code, tmp_path / "runs/tables/tiny/.work", tmp_path)
    assert status == 130
    assert log.splitlines()[-1] == "interrupted; run the same command to go on from the last checkpoint"


def interrupt(code: str, work: Path, folder: Path) -> tuple[int, str]:
    """Runs Python code, interrupts it when its base model has a checkpoint; its exit status and what it logged."""
    # a shell that starts this test in the background would have the signal ignored in all its children
    code = "import signal; signal.signal(signal.SIGINT, signal.default_int_handler)\n" + code
    log = folder / "log"
    process = subprocess.Popen(
        [sys.executable, "-c", code],
        env={**os.environ, "PYTHONPATH": str(ROOT)},
        stderr=log.open("w"),
        start_new_session=True,  # a process group of its own, as a terminal makes one
    )
    try:
        deadline = time.monotonic() + 300
        while not list(work.glob("base*/*/step-*")):
            assert process.poll() is None, log.read_text()[-2000:]
            assert time.monotonic() < deadline, log.read_text()[-2000:]
            time.sleep(0.5)
        os.killpg(process.pid, signal.SIGINT)
        status = process.wait(45)
    finally:
        if process.poll() is None:
            os.killpg(process.pid, signal.SIGKILL)
            process.wait()
    assert list(work.glob("base*/*/step-*"))
    return status, log.read_text()


def test_a_killed_conversion_leaves_no_server(tmp_path: Path) -> None:
    code = """
import os, signal
from prefect.server.api.server import SubprocessASGIServer
from flows.server import start_temporary_server
start_temporary_server()
print(SubprocessASGIServer().server_process.pid, flush=True)
os.kill(os.getpid(), signal.SIGKILL)
"""
    environment = {**os.environ, "PYTHONPATH": str(ROOT), "PREFECT_HOME": str(tmp_path)}
    environment.pop("PREFECT_API_URL", None)
    killed = subprocess.run(
        [sys.executable, "-c", code], env=environment, stdout=subprocess.PIPE, text=True, check=False, timeout=120
    )
    assert killed.returncode == -signal.SIGKILL
    server, deadline = Path("/proc") / killed.stdout.strip(), time.monotonic() + 30
    while server.exists() and "\nState:\tZ" not in (server / "status").read_text():
        assert time.monotonic() < deadline
        time.sleep(0.2)
