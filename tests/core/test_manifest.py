"""What is up to date, what is made again, and that nothing is ever half-written."""

import errno
import fcntl
import json
import shutil
from dataclasses import dataclass, field
from pathlib import Path

import pytest
from pydantic import BaseModel
from safetensors import SafetensorError

from bitdistill_core.manifest import (
    Metrics,
    Report,
    Result,
    StageBusyError,
    decisive,
    execute,
    locked,
    read_manifest,
)


class Config(BaseModel):
    value: int
    checkpoint_every: int = 1


@dataclass(frozen=True)
class Inputs:
    source: Path


@dataclass(frozen=True)
class NoInputs:
    pass


class Stage:
    """A stage that counts its runs and can be made to fail."""

    def __init__(self) -> None:
        self.runs, self.error = 0, None

    def __call__(self, config: Config, inputs: object, *, out_dir: Path, work_dir: Path, report: Report) -> Metrics:
        self.runs += 1
        (out_dir / "a.txt").write_text(f"{config.value}")
        (work_dir / "state").write_text(
            (work_dir / "state").read_text() + "x" if (work_dir / "state").exists() else "x"
        )
        report({"stage/value": config.value}, self.runs)
        if self.error is not None:
            raise self.error
        return {"stage/value": float(config.value)}


def run(stage: Stage, tmp_path: Path, value: int = 1, **options: object) -> Result:
    return execute(
        "stage",
        stage,
        Config(value=value),
        NoInputs(),
        directory=tmp_path / "out",
        work_root=tmp_path / "work",
        **options,
    )


def states(tmp_path: Path) -> list[str]:
    """What unfinished runs left in their work directories."""
    return [path.read_text() for path in (tmp_path / "work").glob("*/state")]


def test_a_finished_stage_is_not_run_again(tmp_path: Path) -> None:
    stage = Stage()
    first, second = run(stage, tmp_path), run(stage, tmp_path)
    assert stage.runs == 1
    assert (first.was_up_to_date, second.was_up_to_date) == (False, True)
    assert second.metrics == {"stage/value": 1.0}
    assert json.loads((tmp_path / "out" / "metrics.jsonl").read_text())["stage/value"] == 1
    assert not (tmp_path / "work").exists()


def test_another_configuration_runs_again(tmp_path: Path) -> None:
    stage = Stage()
    run(stage, tmp_path)
    assert not run(stage, tmp_path, value=2).was_up_to_date
    assert (tmp_path / "out" / "a.txt").read_text() == "2"


def test_a_changed_input_makes_the_stage_stale(tmp_path: Path) -> None:
    source, stage = Stage(), Stage()

    def both(value: int) -> Result:
        run(source, tmp_path, value)
        return execute(
            "next", stage, Config(value=0), Inputs(tmp_path / "out"), directory=tmp_path / "n", work_root=tmp_path / "w"
        )

    both(1)
    assert both(1).was_up_to_date
    assert not both(2).was_up_to_date


def test_a_stage_that_reads_metrics_is_stale_when_only_they_changed(tmp_path: Path) -> None:
    source, stage = Stage(), Stage()

    def both(reads_metrics: bool) -> Result:
        run(source, tmp_path)
        directories = {"directory": tmp_path / "n", "work_root": tmp_path / "w"}
        inputs = Inputs(tmp_path / "out")
        return execute("next", stage, Config(value=0), inputs, reads_metrics=reads_metrics, **directories)

    both(True)
    assert both(True).was_up_to_date
    shutil.rmtree(tmp_path / "out")  # made again: the same files, another time
    assert not both(True).was_up_to_date
    both(False)
    shutil.rmtree(tmp_path / "out")
    assert both(False).was_up_to_date


def test_a_changed_source_file_makes_the_stage_stale(tmp_path: Path) -> None:
    stage, file = Stage(), tmp_path / "data.parquet"
    file.write_text("1")
    run(stage, tmp_path, sources=[file])
    assert run(stage, tmp_path, sources=[file]).was_up_to_date
    file.write_text("2")
    assert not run(stage, tmp_path, sources=[file]).was_up_to_date


def test_a_measurement_of_another_machine_is_made_again(tmp_path: Path) -> None:
    stage = Stage()
    for threads, is_there in ((1, False), (1, True), (2, False), (2, True)):
        assert run(stage, tmp_path, depends_on={"num_threads": threads}).was_up_to_date == is_there


@pytest.mark.parametrize("damage", ["changed", "missing"])
def test_a_damaged_output_is_made_again_and_named(tmp_path: Path, damage: str) -> None:
    stage = Stage()
    run(stage, tmp_path)
    file = tmp_path / "out" / "a.txt"
    file.write_text("9") if damage == "changed" else file.unlink()
    with pytest.raises(ValueError, match=f"{damage} file path=.*a.txt"):
        read_manifest(tmp_path / "out")
    assert not run(stage, tmp_path).was_up_to_date
    assert file.read_text() == "1"


def test_a_failed_stage_leaves_no_result_and_keeps_the_old_one(tmp_path: Path) -> None:
    stage = Stage()
    run(stage, tmp_path)
    stage.error = PermissionError(errno.EACCES, "Permission denied")
    with pytest.raises(PermissionError, match="Permission denied"):
        run(stage, tmp_path, value=2)
    assert (tmp_path / "out" / "a.txt").read_text() == "1"
    read_manifest(tmp_path / "out")


def test_an_interrupted_stage_finds_its_work_again(tmp_path: Path) -> None:
    stage = Stage()
    stage.error = KeyboardInterrupt()
    with pytest.raises(KeyboardInterrupt):
        run(stage, tmp_path)
    assert not (tmp_path / "out").exists()
    assert states(tmp_path) == ["x"]
    stage.error = None
    with_other = Stage()
    run(with_other, tmp_path)
    lines = [json.loads(line) for line in (tmp_path / "out" / "metrics.jsonl").read_text().splitlines()]
    assert [line["step"] for line in lines] == [1]  # the repeated step replaced the old line


def test_reports_and_times_of_a_stage_interrupted_twice(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    clock = [1000.0]
    monkeypatch.setattr("bitdistill_core.manifest.time.time", lambda: clock[0])

    def attempt(begin: int, end: int, *, cut_short: bool) -> Result:
        """Reports a loss each 10 steps, 1 s apart, and another figure just behind the checkpoint it begins at."""

        def stage(config: Config, inputs: object, *, out_dir: Path, work_dir: Path, report: Report) -> Metrics:
            for step in range(begin + 1, end + 1):
                if step == begin + 1 and begin:
                    report({"norm": begin}, step)
                if step % 10 == 0:
                    clock[0] += 1
                    report({"loss": begin + step / 1000}, step)
            if cut_short:
                with (work_dir / "metrics.jsonl").open("a") as file:
                    file.write('{"step": 99')
                raise ValueError("interrupted")
            return {}

        return execute(
            "stage", stage, Config(value=1), NoInputs(), directory=tmp_path / "out", work_root=tmp_path / "work"
        )

    for begin, end in ((0, 60), (20, 50)):
        with pytest.raises(ValueError, match="interrupted"):
            attempt(begin, end, cut_short=True)
        clock[0] += 500  # idle
    result = attempt(40, 80, cut_short=False)
    lines = [json.loads(line) for line in (tmp_path / "out" / "metrics.jsonl").read_text().splitlines()]
    losses = [(line["step"], line["loss"]) for line in lines if "loss" in line]
    assert losses == [
        (s, b + s / 1000) for b, steps in ((0, (10, 20)), (20, (30, 40)), (40, range(50, 90, 10))) for s in steps
    ]
    assert [line["step"] for line in lines if "norm" in line] == [21, 41]
    manifest = read_manifest(tmp_path / "out")
    assert manifest["started"] == 1000
    assert manifest["ended"] == clock[0] == 1000 + 6 + 500 + 3 + 500 + 4
    # of attempts 1 and 2 the reports that still count: up to step 20, and up to step 40
    assert result.seconds == manifest["seconds"] == 2 + 2 + 4


def test_work_of_another_configuration_is_neither_resumed_nor_lost(tmp_path: Path) -> None:
    stage = Stage()
    stage.error = KeyboardInterrupt()
    for value in (1, 2, 1):
        with pytest.raises(KeyboardInterrupt):
            run(stage, tmp_path, value=value)
    assert sorted(states(tmp_path)) == ["x", "xx"]
    stage.error = None
    run(stage, tmp_path)
    assert not (tmp_path / "work").exists()


def test_how_often_it_is_saved_changes_no_result(tmp_path: Path) -> None:
    def go(checkpoint_every: int) -> Result:
        config = Config(value=1, checkpoint_every=checkpoint_every)
        return execute("stage", stage, config, NoInputs(), directory=tmp_path / "out", work_root=tmp_path / "work")

    stage = Stage()
    stage.error = KeyboardInterrupt()
    with pytest.raises(KeyboardInterrupt):
        go(1)
    with pytest.raises(KeyboardInterrupt):
        go(2)
    assert states(tmp_path) == ["xx"]
    stage.error = None
    assert not go(3).was_up_to_date
    assert go(4).was_up_to_date
    assert read_manifest(tmp_path / "out")["config"] == {"value": 1, "checkpoint_every": 3}


def test_parameters_that_make_no_result_do_not_count_at_any_depth() -> None:
    scratch = {"learning_rate": 1e-3, "checkpoint_every": 5, "report_every": 1}
    assert decisive({"checkpoint": None, "scratch": scratch}) == {
        "checkpoint": None,
        "scratch": {"learning_rate": 1e-3},
    }
    assert decisive({"checkpoint": "org/model", "scratch": scratch}) == {"checkpoint": "org/model"}


def test_files_that_a_stage_does_not_read_leave_it_up_to_date(tmp_path: Path) -> None:
    @dataclass(frozen=True)
    class Part:
        source: Path = field(metadata={"reads": ("examples/train", "task")})

    def source(config: Config, inputs: object, *, out_dir: Path, **options: object) -> Metrics:
        (out_dir / "examples").mkdir()
        for name, content in files.items():
            (out_dir / name).write_text(content)
        return {}

    def both() -> Result:
        shutil.rmtree(tmp_path / "data", ignore_errors=True)
        where = {"directory": tmp_path / "data", "work_root": tmp_path / "w1"}
        execute("data", source, Config(value=1), NoInputs(), **where)
        where = {"directory": tmp_path / "n", "work_root": tmp_path / "w2"}
        return execute("next", stage, Config(value=0), Part(tmp_path / "data"), **where)

    stage = Stage()
    files = {"examples/train.parquet": "1", "examples/test.parquet": "1", "task.json": "1"}
    both()
    files["examples/test.parquet"] = "2"
    assert both().was_up_to_date
    for name in ("examples/train.parquet", "task.json"):
        files[name] = "2"
        assert not both().was_up_to_date
        assert both().was_up_to_date


def test_an_unfinished_input_is_one_clear_error(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match=r"no finished stage in path=.*run that stage first"):
        execute(
            "next",
            Stage(),
            Config(value=0),
            Inputs(tmp_path / "none"),
            directory=tmp_path / "n",
            work_root=tmp_path / "w",
        )


def test_two_processes_never_work_on_one_stage(tmp_path: Path) -> None:
    class Nested(Stage):
        def __call__(self, *arguments: object, **options: object) -> Metrics:  # type: ignore[override]
            with pytest.raises(ValueError, match="another process is working on stage=work of this run"):
                run(Stage(), tmp_path)
            return super().__call__(*arguments, **options)  # type: ignore[arg-type]

    assert run(Nested(), tmp_path).metrics == {"stage/value": 1.0}


@pytest.mark.parametrize(
    "error",
    [OSError(errno.ENOSPC, "No space left on device"), SafetensorError("I/O error: No space (os error 28)")],
    ids=["python", "safetensors"],
)
def test_a_full_disk_says_so_and_loses_nothing(tmp_path: Path, error: Exception) -> None:
    stage = Stage()
    stage.error = error
    with pytest.raises(ValueError, match=r"the disk is full; got free_mib=\d+\.\d at path=.* in stage=stage; make"):
        run(stage, tmp_path)
    assert not (tmp_path / "out").exists()
    assert states(tmp_path) == ["x"]
    stage.error = None
    run(stage, tmp_path)
    assert (tmp_path / "out" / "a.txt").is_file()


def test_a_stage_that_another_reads_is_found_but_not_replaced(tmp_path: Path) -> None:
    source = Stage()
    run(source, tmp_path, value=1)

    def reader(config: Config, inputs: Inputs, *, out_dir: Path, **context: object) -> dict[str, float]:
        assert run(source, tmp_path, value=1).was_up_to_date
        with pytest.raises(StageBusyError, match="another process is working on stage=work of this run, or reads it"):
            run(source, tmp_path, value=2)
        return {"value": float((inputs.source / "a.txt").read_text())}

    places = {"directory": tmp_path / "n", "work_root": tmp_path / "w", "input_roots": [tmp_path / "work"]}
    found = execute("next", reader, Config(value=0), Inputs(tmp_path / "out"), **places)
    assert found.metrics == {"value": 1.0}
    assert not run(source, tmp_path, value=2).was_up_to_date  # free again


def test_an_input_that_is_missing_leaves_no_lock_and_one_that_is_being_made_says_so(tmp_path: Path) -> None:
    def reader(config: Config, inputs: Inputs, **context: object) -> dict[str, float]:
        raise AssertionError

    places = {"directory": tmp_path / "n", "work_root": tmp_path / "w", "input_roots": [tmp_path / "work"]}
    with pytest.raises(ValueError, match=r"no finished stage in path=.*out"):
        execute("next", reader, Config(value=0), Inputs(tmp_path / "out"), **places)
    assert not list(tmp_path.iterdir())
    with (
        locked(tmp_path / "work", fcntl.LOCK_EX),
        pytest.raises(StageBusyError, match="another process is working on stage=work"),
    ):
        execute("next", reader, Config(value=0), Inputs(tmp_path / "out"), **places)


def test_a_finished_stage_is_found_while_another_process_looks_at_it(tmp_path: Path) -> None:
    source = Stage()
    run(source, tmp_path, value=1)
    with locked(tmp_path / "work", fcntl.LOCK_SH):
        assert run(source, tmp_path, value=1).was_up_to_date
