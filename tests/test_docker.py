"""The container files: linted, valid, closed to the outside, without secrets; the inference image's short install."""

import importlib.metadata
import json
import re
import shutil
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
from ruamel.yaml import YAML

from tests.core.classifiers import write_classifier

ROOT = Path(__file__).parent.parent
DOCKER = ROOT / "docker"
COMPOSE = DOCKER / "compose.yaml"
COMPOSE_GPU = DOCKER / "compose.gpu.yaml"
DOCKERFILES = sorted(DOCKER.glob("*.Dockerfile"))
SECRET = re.compile(r"PASSWORD|SECRET|TOKEN|_KEY", re.IGNORECASE)
# `python -c` with this first argument: a JSON list of modules that must look as if they were not installed.
WITHOUT_MODULES = """
import json, sys
absent = set(json.loads(sys.argv.pop(1)))
class Absent:
    def find_spec(self, name, path=None, target=None):
        if name.partition(".")[0] in absent:
            raise ModuleNotFoundError(f"No module named {name!r}", name=name)
sys.meta_path.insert(0, Absent())
from bitdistill_core.cli import main
main()
"""


def tool(name: str) -> str:
    path = shutil.which(name, path=Path(sys.executable).parent) or shutil.which(name)
    if path is None:
        pytest.skip(f"{name} is not installed")
    return path


def instructions(dockerfile: Path) -> list[str]:
    """Its lines, comments left out and continued lines joined."""
    text = re.sub(r"^\s*#.*\n", "", dockerfile.read_text(), flags=re.MULTILINE)
    return [line.strip() for line in text.replace("\\\n", " ").splitlines() if line.strip()]


def final_stage(dockerfile: Path) -> list[str]:
    lines = instructions(dockerfile)
    return lines[max(i for i, line in enumerate(lines) if line.startswith("FROM ")) :]


@pytest.fixture(scope="module")
def compose() -> dict[str, Any]:
    return YAML(typ="safe").load(COMPOSE.read_text())


@pytest.fixture(scope="module")
def services(compose: dict[str, Any]) -> dict[str, Any]:
    return compose["services"]


@pytest.mark.parametrize("dockerfile", DOCKERFILES, ids=lambda path: path.name)
def test_dockerfile_passes_hadolint(dockerfile: Path) -> None:
    done = subprocess.run([tool("hadolint"), str(dockerfile)], capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stdout + done.stderr


def test_compose_files_follow_the_compose_specification() -> None:
    command = [tool("check-jsonschema"), "--builtin-schema", "vendor.compose-spec", str(COMPOSE), str(COMPOSE_GPU)]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stdout + done.stderr


@pytest.mark.parametrize("dockerfile", DOCKERFILES, ids=lambda path: path.name)
def test_final_stage_has_a_numeric_user_and_no_compiler(dockerfile: Path) -> None:
    stage = final_stage(dockerfile)
    users = [line.split()[1] for line in stage if line.startswith("USER ")]
    assert users, "the image would run as root"
    assert re.fullmatch(r"[1-9]\d*:[1-9]\d*", users[-1])
    assert not [line for line in stage if re.search(r"apt-get|g\+\+|pip install", line)]


@pytest.mark.parametrize("dockerfile", DOCKERFILES, ids=lambda path: path.name)
def test_every_copied_file_exists_and_is_in_the_build_context(dockerfile: Path) -> None:
    allowed = {line[1:] for line in (ROOT / ".dockerignore").read_text().splitlines() if line.startswith("!")}
    for line in instructions(dockerfile):
        if not line.startswith("COPY ") or "--from=" in line:
            continue
        for source in line.split()[1:-1]:
            assert (ROOT / source).exists(), f"{line}: no {source}"
            assert source in allowed | {"."}, f"{line}: .dockerignore leaves {source} out"


def test_build_context_is_a_list_of_names_that_exist() -> None:
    rules = [line for line in (ROOT / ".dockerignore").read_text().splitlines() if line and not line.startswith("#")]
    assert rules[0] == "*"
    assert [name for name in rules if name.startswith("!") and not (ROOT / name[1:]).exists()] == []


def test_services_depend_on_services_that_exist_and_report_their_health(services: dict[str, Any]) -> None:
    for name, service in services.items():
        for other, how in service.get("depends_on", {}).items():
            assert other in services, f"{name} depends on {other}"
            needs_health = how["condition"] == "service_healthy"
            assert not needs_health or "healthcheck" in services[other], f"{other} has no health check"
    running = [name for name, service in services.items() if service.get("restart") == "unless-stopped"]
    assert [name for name in running if "healthcheck" not in services[name]] == []


def test_published_ports_are_reached_from_this_machine_only(services: dict[str, Any]) -> None:
    ports = [port for service in services.values() for port in service.get("ports", [])]
    assert ports
    assert [port for port in ports if not (isinstance(port, str) and port.startswith("127.0.0.1:"))] == []
    assert [name for name, service in services.items() if service.get("network_mode") == "host"] == []


def test_the_gpu_file_adds_to_services_that_there_are(services: dict[str, Any]) -> None:
    added = YAML(typ="safe").load(COMPOSE_GPU)["services"]
    assert set(added) == {"worker"} <= set(services)


def test_volumes_and_networks_are_declared(compose: dict[str, Any], services: dict[str, Any]) -> None:
    volumes = {volume.partition(":")[0] for service in services.values() for volume in service.get("volumes", [])}
    networks = {network for service in services.values() for network in service.get("networks", [])}
    assert volumes == set(compose["volumes"])
    assert networks - {"default"} == set(compose["networks"])


def test_services_are_addressed_by_names_and_ports_they_listen_on(services: dict[str, Any]) -> None:
    urls = [str(value) for service in services.values() for value in service.get("environment", {}).values()]
    found = re.findall(r"http://([a-z][a-z-]*):(\d+)", " ".join(urls))
    assert {name for name, _ in found} == {"prefect-server", "mlflow"}
    for name, port in found:
        assert services[name]["ports"] == [f"127.0.0.1:{port}:{port}"]


def test_worker_serves_the_pool_that_prefect_yaml_deploys_to(services: dict[str, Any]) -> None:
    deployments = YAML(typ="safe").load((ROOT / "prefect.yaml").read_text())["deployments"]
    (pool,) = {deployment["work_pool"]["name"] for deployment in deployments}
    command = services["worker"]["command"]
    assert command[command.index("--pool") + 1] == pool
    assert pool in services["deploy"]["command"][-1]


def test_no_secret_is_written_in_the_files(services: dict[str, Any]) -> None:
    for name, service in services.items():
        for key, value in service.get("environment", {}).items():
            if SECRET.search(key):
                assert re.fullmatch(r"\$\{[A-Z_]+:\?[^}]+\}", str(value)), f"{name}: {key} must come from docker/.env"
    for dockerfile in DOCKERFILES:
        assert not [line for line in instructions(dockerfile) if re.match("ENV|ARG", line) and SECRET.search(line)]
    settings = [line for line in (DOCKER / ".env.example").read_text().splitlines() if not line.startswith("#")]
    assert settings == ["POSTGRES_PASSWORD="]
    assert "/.env" in (DOCKER / ".gitignore").read_text().splitlines()


def test_training_image_sends_no_telemetry() -> None:
    (environment,) = (line for line in final_stage(DOCKER / "train.Dockerfile") if line.startswith("ENV "))
    expected = ("DO_NOT_TRACK=true", "MLFLOW_DISABLE_TELEMETRY=true", "PREFECT_SERVER_ANALYTICS_ENABLED=false")
    assert set(expected) <= set(environment.split())
    assert {"DVC_NO_ANALYTICS=1", "OMP_WAIT_POLICY=PASSIVE"} <= set(environment.split())


def serve_requirements() -> list[str]:
    lines = (DOCKER / "serve-requirements.txt").read_text().splitlines()
    return [line for line in lines if line and not line.startswith(("#", "-c"))]


def test_inference_requirements_are_pinned_by_the_constraints() -> None:
    pinned = {line.partition("==")[0] for line in (ROOT / "constraints.txt").read_text().splitlines() if "==" in line}
    assert [name for name in serve_requirements() if name not in pinned] == []


def test_inference_needs_the_listed_packages_only(tmp_path: Path) -> None:
    present = {re.sub(r"[-_.]+", "-", name).lower() for name in [*serve_requirements(), "bitdistill"]}
    absent = [
        module
        for module, owners in importlib.metadata.packages_distributions().items()
        if not present & {re.sub(r"[-_.]+", "-", owner).lower() for owner in owners}
    ]
    assert {"torch", "transformers", "prefect", "mlflow"} <= set(absent)
    model = tmp_path / "model.bitdistill"
    task = {"name": "mood", "kind": "classification", "prompt": "{text} is", "label_words": ["bad", "good"]}
    write_classifier(model, task)

    def run(*arguments: str) -> str:
        command = [sys.executable, "-c", WITHOUT_MODULES, json.dumps(absent), *arguments]
        done = subprocess.run(command, capture_output=True, text=True, check=False, cwd=ROOT)
        assert done.returncode == 0, done.stderr
        return done.stdout

    assert "bench" in run("--help")
    assert json.loads(run("inspect", "--cpu", str(model)))["task"] == task
    label, probability, text = run("classify", str(model), "a film").rstrip("\n").split("\t")
    assert label in task["label_words"]
    assert 0.5 <= float(probability) <= 1.0
    assert text == "a film"
    assert run("generate", str(model), "a film", "--max-new-tokens", "2").endswith("\n")
