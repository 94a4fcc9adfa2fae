"""prefect.yaml for real: a server, a work pool, every deployment, a worker, a run."""

import os
import shutil
import signal
import socket
import subprocess
import sys
import time
import urllib.error
import urllib.request
from collections.abc import Iterator
from pathlib import Path

import pytest

from tests.conftest import ROOT, TINY

pytestmark = pytest.mark.slow


class Project:
    """A clone's root with a server beside it."""

    def __init__(self, root: Path, port: int) -> None:
        self.root, self.port = root, port
        self.environment = {
            **{key: value for key, value in os.environ.items() if not key.startswith("PREFECT_")},
            "PREFECT_API_URL": f"http://127.0.0.1:{port}/api",
            "PREFECT_HOME": str(root / ".prefect"),
            "PREFECT_SERVER_ANALYTICS_ENABLED": "false",
            "PREFECT_WORKER_QUERY_SECONDS": "1",
            "PYTHONPATH": str(ROOT),
        }
        self._processes: list[subprocess.Popen[bytes]] = []

    def start(self, *arguments: str) -> None:
        """Starts a Prefect command in a session of its own, which is how it can be stopped."""
        log = (self.root / f"{arguments[0]}.log").open("wb")
        command = [sys.executable, "-m", "prefect", *arguments]
        self._processes.append(
            subprocess.Popen(
                command, cwd=self.root, env=self.environment, stdout=log, stderr=log, start_new_session=True
            )
        )

    def prefect(self, *arguments: str) -> tuple[int, str]:
        command = [sys.executable, "-m", "prefect", *arguments]
        done = subprocess.run(
            command, cwd=self.root, env=self.environment, capture_output=True, text=True, check=False, timeout=300
        )
        return done.returncode, done.stdout + done.stderr

    def wait_until_healthy(self) -> None:
        deadline = time.monotonic() + 240
        while time.monotonic() < deadline:
            try:
                urllib.request.urlopen(f"http://127.0.0.1:{self.port}/api/health", timeout=5)
                return
            except (urllib.error.URLError, ConnectionError, TimeoutError):
                time.sleep(1)
        pytest.fail((self.root / "server.log").read_text()[-2000:])

    def stop(self) -> None:
        """The worker first: one that outlives its server logs long traces."""
        for process in reversed(self._processes):
            os.killpg(process.pid, signal.SIGTERM)
            try:
                process.wait(20)
            except subprocess.TimeoutExpired:
                os.killpg(process.pid, signal.SIGKILL)
                process.wait()


@pytest.fixture
def project(tmp_path: Path, finished_run: Path) -> Iterator[Project]:
    for name in ("prefect.yaml", "params.yaml"):
        shutil.copy(ROOT / name, tmp_path)
    for name in ("profiles", "flows", "tasks", "tables"):
        shutil.copytree(ROOT / name, tmp_path / name)
    shutil.copytree(finished_run, tmp_path / "runs/demo")
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = int(free.getsockname()[1])
    project = Project(tmp_path, port)
    try:
        project.start("server", "start", "--host", "127.0.0.1", "--port", str(port), "--no-ui")
        project.wait_until_healthy()
        yield project
    finally:
        project.stop()


@pytest.mark.timeout(900)
def test_every_profile_deploys_and_the_demo_runs_under_a_worker(project: Project) -> None:
    code, output = project.prefect("work-pool", "create", "bitdistill-cpu", "--type", "process")
    assert code == 0, output
    code, output = project.prefect("--no-prompt", "deploy", "--all")
    assert code == 0, output
    code, output = project.prefect("deployment", "ls")
    deployed = (
        {"tables/cpu"} | {f"convert/{path.stem}" for path in (ROOT / "profiles").glob("*.yaml")} | {"convert/demo"}
    )
    assert all(name in output for name in deployed), output

    project.start("worker", "start", "--pool", "bitdistill-cpu")
    overrides = "[" + ", ".join(f'"{key}={value}"' for key, value in TINY.items()) + "]"
    run = ["deployment", "run", "convert/demo", "-p", f"overrides={overrides}", "-p", "track=false"]
    code, output = project.prefect(*run, "--watch")
    assert code == 0, output + (project.root / "worker.log").read_text()[-3000:]
    assert "Completed" in output

    code, output = project.prefect("deployment", "run", "convert/demo", "-p", "seed=abc", "--watch")
    assert code != 0
    assert "seed" in output
