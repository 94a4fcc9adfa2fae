"""The import direction: flows -> tasks -> core stages -> core modules. Read from the sources, nothing is imported."""

import ast
import re
import subprocess
import sys
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import pytest

ROOT = Path(__file__).parent.parent
ORCHESTRATION = {"prefect", "mlflow", "dvc", "tasks", "flows"}
HEAVY = {"lm_eval", "datasets"}  # inside the functions that need them
MAY_IMPORT_STAGES = ("bitdistill_core/pipeline.py", "bitdistill_core/cli.py", "bitdistill_core/tables/")


@dataclass(frozen=True)
class Import:
    """One imported module, and whether that happens when the importing file is loaded."""

    file: str
    module: str
    is_at_load: bool

    @property
    def package(self) -> str:
        return self.module.partition(".")[0]


def imports_of(path: Path) -> Iterator[Import]:
    """Every import of a file; `from a import b` counts as a.b, and type-checking blocks do not count."""
    file = path.relative_to(ROOT).as_posix()

    def walk(node: ast.AST, is_at_load: bool) -> Iterator[Import]:
        if isinstance(node, ast.If) and "TYPE_CHECKING" in ast.unparse(node.test):
            return
        if isinstance(node, ast.Import):
            for alias in node.names:
                yield Import(file, alias.name, is_at_load)
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, f"{file} imports relatively"
            for alias in node.names:
                yield Import(file, f"{node.module}.{alias.name}", is_at_load)
        inside = is_at_load and not isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef | ast.Lambda)
        for child in ast.iter_child_nodes(node):
            yield from walk(child, inside)

    yield from walk(ast.parse(path.read_text()), True)


def sources(folder: str) -> list[Path]:
    found = sorted((ROOT / folder).rglob("*.py"))
    assert found, f"no sources in {folder}"
    return found


def all_imports(*folders: str) -> list[Import]:
    return [item for folder in folders for path in sources(folder) for item in imports_of(path)]


def test_the_reader_of_imports_sees_functions_and_blocks() -> None:
    found = {(item.module, item.is_at_load) for item in imports_of(ROOT / "bitdistill_core/cli.py")}
    assert ("typer", True) in found
    assert ("flows.convert.run_locally", False) in found


def test_the_core_knows_no_orchestration() -> None:
    wrong = [i for i in all_imports("bitdistill_core") if i.package in ORCHESTRATION]
    assert {i.file for i in wrong} <= {"bitdistill_core/cli.py", "bitdistill_core/cli_tables.py"}
    assert not [i for i in wrong if i.is_at_load]


def test_the_core_loads_lm_eval_and_datasets_only_when_it_needs_them() -> None:
    assert not [i for i in all_imports("bitdistill_core") if i.package in HEAVY and i.is_at_load]


def test_core_modules_do_not_import_stages() -> None:
    wrong = [
        i
        for i in all_imports("bitdistill_core")
        if i.module.startswith("bitdistill_core.stages")
        and not i.file.startswith("bitdistill_core/stages/")
        and not i.file.startswith(MAY_IMPORT_STAGES)
    ]
    assert not wrong


def test_the_engine_imports_packing_and_itself_and_no_torch() -> None:
    allowed = tuple(f"bitdistill_core.{name}" for name in ("choices", "disk", "engine", "packing", "panels"))
    files = [*sources("bitdistill_core/engine"), ROOT / "bitdistill_core/packing.py"]
    found = [item for path in files for item in imports_of(path)]
    assert not [i for i in found if i.package in {"torch", "transformers"}]
    assert not [i for i in found if i.package == "bitdistill_core" and not i.module.startswith(allowed)]


def test_the_engine_loads_without_torch_and_transformers() -> None:
    code = """
import sys, bitdistill_core.engine.model, bitdistill_core.packing
sys.exit('torch' in sys.modules or 'transformers' in sys.modules)
"""
    assert subprocess.run([sys.executable, "-c", code], cwd=ROOT, check=False).returncode == 0


def test_the_tables_run_where_only_training_is_installed() -> None:
    code = """
import sys
class Missing:
    def find_spec(self, name, path=None, target=None):
        if name.split(".")[0] in ("matplotlib", "prefect", "lm_eval") or name == "bitdistill_core.engine._native":
            raise ModuleNotFoundError(name, name=name)
sys.meta_path.insert(0, Missing())
import bitdistill_core.tables.__main__
"""
    assert subprocess.run([sys.executable, "-c", code], cwd=ROOT, check=False).returncode == 0


def test_only_two_modules_import_mlflow() -> None:
    files = {i.file for i in all_imports("bitdistill_core", "tasks", "flows") if i.package == "mlflow"}
    assert files == {"tasks/tracking.py", "tasks/mlflow_runs.py"}


def test_mlflow_is_loaded_only_when_tracking_is_on() -> None:
    assert not [i for i in all_imports("tasks") if i.package == "mlflow" and i.is_at_load]


def test_a_stage_run_by_dvc_needs_no_prefect() -> None:
    code = "import sys, tasks.tracking, tasks.tables; sys.exit('prefect' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code], cwd=ROOT, check=False).returncode == 0


def test_tasks_do_not_import_flows() -> None:
    assert not [i for i in all_imports("tasks") if i.package == "flows"]


def test_no_test_module_imports_another() -> None:
    assert not [i for i in all_imports("tests") if re.match(r"tests\.(\w+\.)*test_", i.module)]


@pytest.mark.parametrize("folder", ["bitdistill_core", "flows"])
def test_environment_variables_are_the_business_of_tasks(folder: str) -> None:
    users = {
        p.relative_to(ROOT).as_posix() for p in sources(folder) if re.search(r"os\.(environ|getenv)", p.read_text())
    }
    assert users <= {"bitdistill_core/openmp.py"}  # for entry points, before torch is loaded


def test_kernels_include_no_python_header() -> None:
    native = ROOT / "bitdistill_core/engine/native"
    files = [*native.glob("*.cpp"), *native.glob("*.h")]
    headers = re.compile(r"#\s*include\s*[<\"](Python\.h|nanobind|pybind11|torch|ATen)")
    assert {path.name for path in files if headers.search(path.read_text())} == {"bindings.cpp"}
