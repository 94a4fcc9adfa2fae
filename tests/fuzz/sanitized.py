"""Runs a Python module with the native extension built under a sanitizer; anything it finds ends the process.

python -m tests.fuzz.sanitized address,undefined tests.fuzz.packed_files --count 100000
python -m tests.fuzz.sanitized thread pytest -q tests/core/test_engine_batches.py
"""

import os
import subprocess
import sys
from pathlib import Path

ROOT = Path(__file__).parents[2]

RUN = """
import importlib.util, runpy, sys
spec = importlib.util.spec_from_file_location("bitdistill_core.engine._native", sys.argv[1])
module = importlib.util.module_from_spec(spec)
import bitdistill_core.engine
sys.modules[spec.name] = bitdistill_core.engine._native = module
spec.loader.exec_module(module)
sys.argv[:] = sys.argv[2:]
runpy.run_module(sys.argv[0], run_name="__main__", alter_sys=True)
"""


def build(sanitizers: str) -> Path:
    """The extension built with `-fsanitize=sanitizers`."""
    directory = ROOT / "build" / f"sanitize-{sanitizers.replace(',', '-')}"
    configure = ["cmake", "-S", ROOT, "-B", directory, "-DCMAKE_BUILD_TYPE=RelWithDebInfo"]
    configure += [f"-DBITDISTILL_SANITIZE={sanitizers}", f"-DPython_EXECUTABLE={sys.executable}"]
    subprocess.run(configure, check=True, stdout=subprocess.DEVNULL)
    subprocess.run(["cmake", "--build", directory, "--parallel", "2"], check=True, stdout=subprocess.DEVNULL)
    return next(directory.glob("_native*.so"))


def main() -> None:
    sanitizers, *command = sys.argv[1:]
    extension = build(sanitizers)
    names = {"address": "libasan.so", "undefined": "libubsan.so", "thread": "libtsan.so"}
    libraries = [
        subprocess.run(
            ["g++", f"-print-file-name={names[name]}"], capture_output=True, text=True, check=True
        ).stdout.strip()
        for name in sanitizers.split(",")
    ]
    environment = os.environ | {
        "LD_PRELOAD": " ".join(libraries),
        "ASAN_OPTIONS": "detect_leaks=0:abort_on_error=1:allocator_may_return_null=1",
        "UBSAN_OPTIONS": "halt_on_error=1:print_stacktrace=1",
        "TSAN_OPTIONS": "halt_on_error=1:report_signal_unsafe=0",
    }
    os.execve(sys.executable, [sys.executable, "-c", RUN, str(extension), *command], environment)


if __name__ == "__main__":
    main()
