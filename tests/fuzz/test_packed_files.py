"""A short run of the fuzzer, plain and under sanitizers. docs/engine.md has the long one."""

import os
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]


def run(*arguments: str, cwd: Path) -> str:
    environment = os.environ | {"PYTHONPATH": str(ROOT), "PATH": f"{Path(sys.executable).parent}:{os.environ['PATH']}"}
    process = subprocess.run(
        [sys.executable, "-m", *arguments], cwd=cwd, env=environment, capture_output=True, text=True, check=False
    )
    assert process.returncode == 0, process.stderr[-4000:]
    return process.stdout


def test_mutated_files_load_or_are_refused(tmp_path: Path) -> None:
    out = run("tests.fuzz.packed_files", "--count", "1500", "--seed", "1000000", cwd=tmp_path)
    assert "1500 files: " in out
    assert "none crashed" in out
    assert int(out.split("files: ")[1].split()[0]) > 50, "nearly every file was refused: the engine was not reached"


@pytest.mark.timeout(900)
def test_mutated_files_under_address_and_undefined_behaviour_sanitizers(tmp_path: Path) -> None:
    library = subprocess.run(["g++", "-print-file-name=libasan.so"], capture_output=True, text=True, check=False)
    if not Path(library.stdout.strip()).is_absolute():
        pytest.skip("g++ has no libasan here")
    sanitizers = ("tests.fuzz.sanitized", "address,undefined")
    out = run(*sanitizers, "tests.fuzz.packed_files", "--count", "400", "--seed", "2000000", cwd=tmp_path)
    assert "none crashed" in out
