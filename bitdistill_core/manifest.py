"""What is up to date: the one judge, whoever drives (command line, Prefect or DVC).

A stage's directory appears whole or not at all. It is written beside, under `.work/`, and renamed when the stage has
finished; its manifest.json (configuration, digests of inputs and outputs, code version) is written last. Training
checkpoints live in `.work/` too and survive an interruption, and other parameters in between.
"""

import errno
import fcntl
import hashlib
import json
import os
import shutil
import subprocess
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, fields
from functools import cache
from pathlib import Path
from typing import Any

from pydantic import BaseModel
from safetensors import SafetensorError

from bitdistill_core import __version__
from bitdistill_core.disk import sync, write_text

MANIFEST = "manifest.json"
METRICS = "metrics.json"
METRICS_LOG = "metrics.jsonl"
# parameters that change no result: when to save and report, and where data lie, whose content counts
NO_PART_OF_A_RESULT = {"data_root", "report_every", "checkpoint_every"}

Metrics = dict[str, float]
Report = Callable[[dict[str, float], int], None]


class StageBusyError(ValueError):
    """Another process works on the same stage of the same run."""


def discard(metrics: dict[str, float], step: int) -> None:
    """A report that keeps nothing."""


@dataclass(frozen=True)
class Result:
    """What became of a stage."""

    directory: Path
    metrics: Metrics
    was_up_to_date: bool
    seconds: float  # of the run that made the directory


def read_manifest(directory: Path) -> dict[str, Any]:
    """The manifest of a finished stage.

    Raises:
        ValueError: the stage has not finished there, or a file is missing, cut short or changed since.
    """
    _require_finished(directory)
    path = directory / MANIFEST
    try:
        manifest: dict[str, Any] = json.loads(path.read_text())
        outputs: Mapping[str, str] = manifest["outputs"]
    except (ValueError, KeyError, TypeError):
        raise ValueError(f"unreadable manifest path={path}; delete {directory} and run the stage again") from None
    for name, digest in outputs.items():
        file = directory / name
        if not file.is_file() or digest_file(file) != digest:
            state = "changed" if file.is_file() else "missing"
            raise ValueError(f"{state} file path={file} since its stage finished; delete {directory} and run it again")
    return manifest


def _require_finished(directory: Path) -> None:
    if not (directory / MANIFEST).is_file():
        raise ValueError(f"no finished stage in path={directory} ({MANIFEST} is missing); run that stage first")


def execute(
    stage: str,
    run: Callable[..., Metrics],
    config: BaseModel,
    inputs: Any,
    *,
    directory: Path,
    work_root: Path,
    input_roots: Sequence[Path] = (),
    sources: Sequence[Path] = (),
    reads_metrics: bool = False,
    depends_on: Mapping[str, Any] | None = None,
    report: Report = discard,
    **context: Any,
) -> Result:
    """Runs a stage unless its directory holds the result of the same configuration, inputs and code.

    Args:
        stage: its name, part of the fingerprint.
        run: `run(config, inputs, *, out_dir, work_dir, report, **context)`, which returns its final metrics.
        inputs: a dataclass of stage directories; of a field with metadata `reads` only files whose names begin so.
        directory: where the result appears; work_root: where the stage works until then.
        input_roots: the work_roots of the stages in `inputs`, which no process replaces while this one reads them.
        sources: files outside the run that the stage reads (data, a checkpoint); their content counts.
        reads_metrics: the inputs' metrics, configuration and times count too, not only what they wrote.
        depends_on: what else makes another result (the threads of a benchmark, the format of a packed file).
        context: passed on; no part of the fingerprint (device, threads).
    """
    with ExitStack() as stack:
        for root in input_roots:
            if _lock_file(root).is_file():
                stack.enter_context(locked(root, fcntl.LOCK_SH))
        for read in fields(inputs):
            _require_finished(getattr(inputs, read.name))  # before a lock makes a directory
        for root in input_roots:
            stack.enter_context(locked(root, fcntl.LOCK_SH))
        outputs_of = {read.name: read_outputs(getattr(inputs, read.name)) for read in fields(inputs)}
        identity = {
            "stage": stage,
            "config": decisive(config.model_dump(mode="json")),
            "inputs": digest_inputs(type(inputs), outputs_of, reads_metrics=reads_metrics),
            "version": __version__,
            "sources": [[path.name, digest_file(path)] for path in sources],
            **({"depends_on": dict(depends_on)} if depends_on else {}),
        }
        fingerprint = _digest_bytes(json.dumps(identity, sort_keys=True).encode())
        with locked(work_root, fcntl.LOCK_SH):  # looking is no reason to keep others from reading
            done = _finished(directory, fingerprint)
        if done is not None:
            return done
        stack.enter_context(locked(work_root, fcntl.LOCK_EX))
        stack.enter_context(_full_disk_named(stage, work_root))
        done = _finished(directory, fingerprint)  # another process may have made it meanwhile
        if done is not None:
            return done
        work_dir = work_root / fingerprint[:16]  # what another configuration left stays until the stage finishes
        out_dir = work_dir / "out"
        shutil.rmtree(out_dir, ignore_errors=True)
        out_dir.mkdir(parents=True)
        recorder = _Recorder(work_dir, report)
        report({}, 0)  # it begins, maybe hours before its first figure
        commit = code_commit()  # before hours in which the code may be edited
        metrics = run(config, inputs, out_dir=out_dir, work_dir=work_dir, report=recorder, **context)
        ended = time.time()
        times = {"seconds": recorder.seconds(ended), "started": recorder.starts[0], "ended": ended}
        recorder.copy_to(out_dir / METRICS_LOG)
        (out_dir / METRICS).write_text(json.dumps(metrics, indent=1, sort_keys=True) + "\n")
        outputs = {str(p.relative_to(out_dir)): digest_file(p) for p in sorted(out_dir.rglob("*")) if p.is_file()}
        whole = {"config": config.model_dump(mode="json"), "fingerprint": fingerprint, "outputs": outputs}
        manifest = {**identity, **whole, **times, "commit": commit}
        (out_dir / MANIFEST).write_text(json.dumps(manifest, indent=1) + "\n")
        for path in (*out_dir.rglob("*"), out_dir):  # on the disk before the checkpoints go
            sync(path)
        _replace_directory(out_dir, directory)
        sync(directory.parent)
        shutil.rmtree(work_root, ignore_errors=True)
    return Result(directory, metrics, was_up_to_date=False, seconds=times["seconds"])


def decisive(config: Mapping[str, Any]) -> dict[str, Any]:
    """The parameters of a stage that make its result. Beside a checkpoint, what would be trained instead is none."""
    loads = config.get("checkpoint") is not None
    return {
        key: decisive(value) if isinstance(value, Mapping) else value
        for key, value in config.items()
        if key not in NO_PART_OF_A_RESULT and not (loads and key == "scratch")
    }


@cache
def code_commit() -> str | None:
    """The git commit of this code, with a + where a file of the library differs; None outside of a clone."""
    root = Path(__file__).parent.parent
    if not (root / ".git").exists():
        return None

    def git(*arguments: str) -> str:
        command = ["git", "--no-optional-locks", "-C", str(root), *arguments]
        return subprocess.run(command, capture_output=True, text=True, check=True).stdout.strip()

    try:
        is_changed = git("status", "--porcelain", "--untracked-files=no", "--", "bitdistill_core")
        return git("rev-parse", "--short=12", "HEAD") + ("+" if is_changed else "")
    except (OSError, subprocess.CalledProcessError):  # no git here, or another user's clone
        return None


@contextmanager
def locked(work_root: Path, kind: int) -> Iterator[None]:
    """Holds a stage, or whatever else is made in `work_root`, for this process; the system frees it at the end.

    Args:
        kind: fcntl.LOCK_EX to make it, fcntl.LOCK_SH to read it.
    Raises:
        StageBusyError: another process holds it.
    """
    path = _lock_file(work_root)
    path.parent.mkdir(parents=True, exist_ok=True)
    with path.open("w") as file:
        try:
            fcntl.flock(file, kind | fcntl.LOCK_NB)
        except BlockingIOError:
            raise _busy(work_root) from None
        yield


def _lock_file(work_root: Path) -> Path:
    return work_root.with_name(f"{work_root.name}.lock")


def _busy(work_root: Path) -> StageBusyError:
    return StageBusyError(
        f"another process is working on stage={work_root.name} of this run, or reads it (path={work_root}); wait for "
        "it, or give this run another name"
    )


@contextmanager
def _full_disk_named(stage: str, work_root: Path) -> Iterator[None]:
    """Raises ValueError when the disk is full; every other error as it is."""
    try:
        yield
    except (OSError, SafetensorError) as error:
        full = {errno.ENOSPC, errno.EDQUOT}
        if getattr(error, "errno", None) not in full and not any(f"(os error {n})" in str(error) for n in full):
            raise
        raise ValueError(
            f"the disk is full; got free_mib={shutil.disk_usage(work_root.parent).free / 2**20:.1f} at "
            f"path={work_root.parent} in stage={stage}; make room and run the same command again, finished stages and "
            "the last checkpoint are kept"
        ) from None


class _Recorder:
    """Appends every report to metrics.jsonl in the work directory and passes it on; goes on after an interruption."""

    def __init__(self, work_dir: Path, report: Report) -> None:
        self.path, self.report = work_dir / METRICS_LOG, report
        self.lines: list[dict[str, float]] = []
        self.furthest = -1.0
        for line in read_lines(self.path):
            self._add(line)
        self.copy_to(self.path)  # without a line that was cut short
        starts = work_dir / "starts.jsonl"
        self.starts = [line["time"] for line in read_lines(starts)] + [time.time()]
        write_lines(starts, [{"time": start} for start in self.starts])

    def __call__(self, metrics: dict[str, float], step: int) -> None:
        line = {"step": step, "time": time.time(), **metrics}
        self._add(line)
        with self.path.open("a") as file:
            file.write(json.dumps(line) + "\n")
        self.report(metrics, step)

    def _add(self, line: dict[str, float]) -> None:
        """Takes a line; a resumed run repeats the steps since its checkpoint, whose old lines go."""
        if line["step"] <= self.furthest:
            names = set(line) - {"step", "time"}
            self.lines = [old for old in self.lines if old["step"] < line["step"] or not names.intersection(old)]
        self.lines.append(line)
        self.furthest = max(self.furthest, line["step"])

    def seconds(self, now: float) -> float:
        """Spent on the stage: of an interrupted attempt, up to its last report."""
        ends = [*self.starts[1:], float("inf")]
        times = [line["time"] for line in self.lines] + [now]
        spent = (
            max((t - start for t in times if start <= t < end), default=0.0)
            for start, end in zip(self.starts, ends, strict=True)
        )
        return sum(spent)

    def copy_to(self, path: Path) -> None:
        write_lines(path, self.lines)


def read_lines(path: Path) -> list[dict[str, Any]]:
    """The lines of a JSON lines file that are whole; none of a file that is not there."""
    if not path.is_file():
        return []
    return [json.loads(line) for line in path.read_text().splitlines(keepends=True) if line.endswith("\n")]


def write_lines(path: Path, lines: Sequence[Mapping[str, Any]]) -> None:
    """Writes a JSON lines file atomically."""
    write_text(path, "".join(json.dumps(line) + "\n" for line in lines))


def _finished(directory: Path, fingerprint: str) -> Result | None:
    path = directory / MANIFEST
    if not path.is_file():
        return None
    try:
        if json.loads(path.read_text()).get("fingerprint") != fingerprint:
            return None  # before its outputs are read
        manifest = read_manifest(directory)
    except (ValueError, AttributeError):
        return None  # damaged: make it again
    metrics: Metrics = json.loads((directory / METRICS).read_text())
    return Result(directory, metrics, was_up_to_date=True, seconds=float(manifest["seconds"]))


def _replace_directory(source: Path, target: Path) -> None:
    target.parent.mkdir(parents=True, exist_ok=True)
    if target.exists():
        old = source.parent / "replaced"
        shutil.rmtree(old, ignore_errors=True)
        os.replace(target, old)
    os.replace(source, target)


def read_outputs(directory: Path) -> dict[str, str]:
    """Digests of the files of a finished stage, all of them checked, and of its manifest."""
    return {**read_manifest(directory)["outputs"], MANIFEST: digest_file(directory / MANIFEST)}


def digest_inputs(
    inputs: type, outputs_of: Mapping[str, Mapping[str, str]], *, reads_metrics: bool = False
) -> dict[str, str]:
    """Digest of what a stage reads of each of its inputs: of what was written there, without metrics, which hold times.

    Args:
        inputs: the stage's dataclass; outputs_of: `read_outputs` by its fields.
        reads_metrics: digests of all that the inputs say of themselves.
    """
    digests: dict[str, str] = {}
    for read in fields(inputs):
        outputs = outputs_of[read.name]
        content = {
            name: digest
            for name, digest in outputs.items()
            if name not in (MANIFEST, METRICS, METRICS_LOG) and name.startswith(read.metadata.get("reads", ""))
        }
        whole = outputs[MANIFEST]
        digests[read.name] = whole if reads_metrics else _digest_bytes(json.dumps(content, sort_keys=True).encode())
    return digests


def _digest_bytes(content: bytes) -> str:
    return hashlib.sha256(content).hexdigest()


def digest_file(path: Path) -> str:
    """SHA-256 of a file's content."""
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()
