"""Every kernel table against the scalar one, also those that this processor cannot run.

check_kernels.cpp does the comparing; its x86-64 build holds the VNNI sources twice, with their own flags and with the
instructions in software (vnni_emulated.h), and its AArch64 build runs under QEMU.
"""

import platform
import shutil
import subprocess
from pathlib import Path

import pytest

HERE = Path(__file__).parent
NATIVE = HERE.parent.parent / "bitdistill_core/engine/native"
FLAGS = ["-std=c++20", "-O3", "-Wall", "-Wextra", "-Wno-psabi", "-ffp-contract=fast", "-I", str(NATIVE)]
AVX2 = ["-mavx2", "-mfma", "-mf16c"]
AVX512 = ["-mavx512f", "-mavx512bw", "-mavx512vl", "-mavx512dq", "-mavx512vnni"]
EMULATED = ["-include", str(HERE / "vnni_emulated.h")]
DOTPROD = ["-march=armv8.2-a+dotprod"]
Part = tuple[Path, list[str]]
CHECK: list[Part] = [
    (HERE / "check_kernels.cpp", ["-O1"]),
    *((NATIVE / f"{name}.cpp", []) for name in ("scalar", "linear", "team")),
]


def build(compiler: str, parts: list[Part], folder: Path, link_flags: list[str]) -> Path:
    """Compiles each source with its own flags, as the engine's build does, and links a program."""
    objects = [str(folder / f"{index}.o") for index in range(len(parts))]
    for (source, flags), target in zip(parts, objects, strict=True):
        run([compiler, *FLAGS, *flags, "-c", str(source), "-o", target])
    run([compiler, *objects, "-pthread", *link_flags, "-o", str(folder / "check_kernels")])
    return folder / "check_kernels"


def run(command: list[str]) -> str:
    result = subprocess.run(command, capture_output=True, text=True)
    assert result.returncode == 0, f"{command}\nexit status {result.returncode}\n{result.stdout}{result.stderr}"
    return result.stdout


def results(output: str) -> dict[str, str]:
    """The lines `table: result` that check_kernels prints."""
    return dict(line.split(": ", 1) for line in output.splitlines())


def host_compiler() -> str:
    found = next(filter(None, map(shutil.which, ("c++", "g++", "clang++"))), None)
    assert found, "missing: a C++ compiler (Debian: apt install g++)"
    return found


@pytest.mark.slow
@pytest.mark.skipif(platform.machine() not in ("x86_64", "AMD64"), reason="this processor is not x86-64")
def test_x86_64_tables_equal_the_scalar_table(tmp_path: Path) -> None:
    parts = [
        *CHECK,
        (NATIVE / "dispatch.cpp", ["-DBITDISTILL_X86_64", "-DBITDISTILL_AVX_VNNI"]),
        (NATIVE / "avx2.cpp", AVX2),
        (NATIVE / "avx2_base3.cpp", AVX2),
        (NATIVE / "avx2_tables.cpp", AVX2),
        (NATIVE / "avx_vnni.cpp", [*AVX2, "-mavxvnni"]),
        (NATIVE / "avx512_vnni.cpp", [*AVX2, *AVX512]),
        (NATIVE / "avx512_vbmi.cpp", [*AVX2, *AVX512, "-mavx512vbmi"]),
        (NATIVE / "avx_vnni.cpp", [*AVX2, *EMULATED]),
        (NATIVE / "avx512_vnni.cpp", [*AVX2, *EMULATED]),
        (NATIVE / "avx512_vbmi.cpp", [*AVX2, *EMULATED]),
    ]
    found = results(run([str(build(host_compiler(), parts, tmp_path, []))]))
    emulated = {"avx-vnni (emulated)", "avx512-vnni (emulated)", "avx512-vbmi (emulated)"}
    assert set(found) == {"scalar", "avx2", "avx-vnni", "avx512-vnni", "avx512-vbmi"} | emulated
    if found["avx2"].startswith("not run"):
        pytest.skip(f"avx2: {found['avx2']}")
    assert all(found[name].endswith(" 0 differences") for name in {"scalar", "avx2"} | emulated), found


@pytest.mark.slow
def test_neon_table_equals_the_scalar_table(tmp_path: Path) -> None:
    is_native = platform.machine() in ("aarch64", "arm64")
    compiler = host_compiler() if is_native else shutil.which("aarch64-linux-gnu-g++")
    emulator = None if is_native else shutil.which("qemu-aarch64-static") or shutil.which("qemu-aarch64")
    if compiler is None:
        pytest.skip("missing: aarch64-linux-gnu-g++ (Debian: apt install g++-aarch64-linux-gnu)")
    if not is_native and emulator is None:
        pytest.skip("missing: qemu-aarch64 (Debian: apt install qemu-user)")
    parts = [*CHECK, (NATIVE / "dispatch.cpp", ["-DBITDISTILL_AARCH64"]), (NATIVE / "neon.cpp", DOTPROD)]
    program = build(compiler, parts, tmp_path, [] if is_native else ["-static"])
    found = results(run([emulator, str(program)] if emulator else [str(program)]))
    assert set(found) == {"scalar", "neon"}
    assert all(result.endswith(" 0 differences") for result in found.values()), found
