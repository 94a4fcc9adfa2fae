"""The `bitdistill` command. Thin: it parses, calls, prints, and turns an error into one line and exit code 1.

Tasks and flows are imported inside the commands that need them, so `--help` and inference stay fast.
"""

import io
import json
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Annotated, Any, Literal

import typer

from bitdistill_core.cli_errors import one_line_errors
from bitdistill_core.cli_tables import commands
from bitdistill_core.openmp import set_waiting

set_waiting()  # before PyTorch is loaded

app = typer.Typer(
    help="Turn a full-precision decoder LM into a packed 1.58-bit student (BitNet Distillation).",
    no_args_is_help=True,
    add_completion=False,
    pretty_exceptions_enable=False,
)
app.add_typer(commands)

ParamsFile = Annotated[Path, typer.Option("--params", help="The parameter file.")]
RunsDir = Annotated[Path, typer.Option("--runs-dir", help="Where runs are kept.")]
Profile = Annotated[str, typer.Option(help="demo, or a file name in profiles/.")]
Overrides = Annotated[list[str], typer.Option("--set", metavar="SECTION.KEY=VALUE", help="Override a parameter.")]
Seed = Annotated[
    int | None, typer.Option(min=0, max=10**12, help="Replace every seed; the run is then called PROFILE-seedN.")
]
DataRoot = Annotated[str | None, typer.Option(help="Read parquet below this directory instead of the hub.")]
Name = Annotated[str | None, typer.Option(help="Name of the run, runs/NAME.")]
Threads = Annotated[int, typer.Option(min=0, help="0: every core.")]
Model = Annotated[Path, typer.Argument(help="A model.bitdistill file, or a run's directory.")]


@app.command()
def convert(
    profile: Profile = "demo",
    overrides: Overrides = [],  # noqa: B006
    seed: Seed = None,
    name: Name = None,
    data_root: DataRoot = None,
    params_file: ParamsFile = Path("params.yaml"),
    runs_dir: RunsDir = Path("runs"),
    track: Annotated[bool, typer.Option(help="Record the run in MLflow.")] = True,
) -> None:
    """Convert a model: every stage, from data to report. Finished stages are not run again."""
    with one_line_errors():
        from bitdistill_core.params import load_params, run_name

        params = load_params(params_file, profile=profile, overrides=overrides, seed=seed, data_root=data_root)
        run_name(profile, seed=seed, name=name)
        from bitdistill_core.pipeline import require_sources

        require_sources(params)  # what is wrong so far is said before a server starts
        from flows.convert import run_locally

        result = run_locally(
            profile=profile,
            overrides=overrides,
            seed=seed,
            name=name,
            data_root=data_root,
            params_file=params_file,
            runs_dir=runs_dir,
            track=track,
        )
        typer.echo(f"report: {Path(result['run_dir']) / 'report' / 'index.html'}", err=True)
        print(json.dumps(result))


@app.command()
def stage(
    stage_name: Annotated[str, typer.Argument(metavar="NAME", help="A stage, as in `dvc dag`.")],
    profile: Profile = "demo",
    overrides: Overrides = [],  # noqa: B006
    seed: Seed = None,
    name: Name = None,
    data_root: DataRoot = None,
    params_file: ParamsFile = Path("params.yaml"),
    runs_dir: RunsDir = Path("runs"),
    track: Annotated[bool, typer.Option(help="Record the stage in MLflow.")] = True,
) -> None:
    """Run one stage; the stages before it must be finished. The last line of stdout is JSON."""
    with one_line_errors():
        from bitdistill_core.params import load_params, run_name
        from bitdistill_core.pipeline import find_node

        params = load_params(params_file, profile=profile, overrides=overrides, seed=seed, data_root=data_root)
        find_node(stage_name)
        run_dir = runs_dir / run_name(profile, seed=seed, name=name)
        from tasks.tracking import run_stage

        result = run_stage(stage_name, params, run_dir, profile=profile, track=track)
        if result.was_up_to_date:
            typer.echo(f"{stage_name}: up to date", err=True)
        print(json.dumps({"stage": stage_name, "directory": str(result.directory), "metrics": result.metrics}))


@app.command("track")
def send_to_mlflow(
    profile: Profile = "demo",
    overrides: Overrides = [],  # noqa: B006
    seed: Seed = None,
    name: Name = None,
    data_root: DataRoot = None,
    params_file: ParamsFile = Path("params.yaml"),
    runs_dir: RunsDir = Path("runs"),
) -> None:
    """Send a run to MLflow from its files, as when the server was down. The last line of stdout is JSON."""
    with one_line_errors():
        from bitdistill_core.params import load_params, run_name
        from tasks import tracking

        params = load_params(params_file, profile=profile, overrides=overrides, seed=seed, data_root=data_root)
        run_dir = runs_dir / run_name(profile, seed=seed, name=name)
        print(json.dumps(tracking.send(run_dir, params, profile=profile)))


@app.command()
def classify(
    model: Model,
    texts: Annotated[
        list[str],
        typer.Argument(
            metavar="TEXT...",
            help="Texts; JSON objects for several columns; - reads one a line from stdin, without empty lines.",
        ),
    ],
    batch_size: Annotated[int, typer.Option(min=1, help="Texts at once; 1 answers each line as it comes.")] = 256,
    num_threads: Threads = 0,
) -> None:
    """Label texts with a packed classifier: label, probability and text, tab-separated.

    Of a text that does not fit the model's window only the end counts, as in training.
    """
    with one_line_errors(resumes=False):
        import numpy as np

        from bitdistill_core.engine.model import Engine

        engine = Engine.load(packed_path(model), num_threads=num_threads)
        template = _task_template(engine, model, "classification", "use `bitdistill generate`")
        choices = [" " + word for word in template.label_words]

        def answer(group: list[tuple[str, str]]) -> None:
            if not group:
                return
            scores = engine.score([prompt for _, prompt in group], choices, truncate=True)
            for (text, _), row in zip(group, scores, strict=True):
                best = int(row.argmax())
                print(f"{template.label_words[best]}\t{np.exp(row[best]):.3f}\t{' '.join(text.split())}", flush=True)

        group: list[tuple[str, str]] = []
        for place, text in _numbered(texts):
            try:
                group.append((text, _prompt(template, text)))
            except ValueError as error:
                answer(group)  # what came before it is not lost
                raise ValueError(f"{place}: {error}") from None
            if len(group) == batch_size:
                answer(group)
                group = []
        answer(group)


@app.command()
def generate(
    model: Model,
    prompt: Annotated[str, typer.Argument(help="Text to continue; with --task, what its prompt is made of.")],
    in_task_prompt: Annotated[
        bool, typer.Option("--task", help="Put the text into the prompt of the model's task.")
    ] = False,
    max_new_tokens: Annotated[int, typer.Option(min=1)] = 128,
    temperature: Annotated[float, typer.Option(min=0.0, help="0: greedy.")] = 0.0,
    top_k: Annotated[int, typer.Option(min=0)] = 0,
    top_p: Annotated[float, typer.Option(min=0.0, max=1.0)] = 1.0,
    stop: Annotated[list[str], typer.Option(help="End before this text.")] = [],  # noqa: B006
    seed: Annotated[int, typer.Option(min=0)] = 0,
    kv_dtype: Annotated[str, typer.Option(help="float32, or float16: half the memory of a long context.")] = "float32",
    num_threads: Threads = 0,
) -> None:
    """Continue a prompt with a packed model, as it is computed."""
    with one_line_errors(resumes=False):
        from bitdistill_core.engine.model import Engine

        engine = Engine.load(packed_path(model), num_threads=num_threads, kv_dtype=kv_dtype, read_head=True)
        if in_task_prompt:
            template = _task_template(engine, model, "generation", "leave --task out")
            prompt = _prompt(template, prompt)
        for piece in engine.generate(
            prompt,
            max_new_tokens=max_new_tokens,
            temperature=temperature,
            top_k=top_k,
            top_p=top_p,
            stop=stop,
            seed=seed,
            truncate=in_task_prompt,
        ):
            print(piece, end="", flush=True)
        print()


@app.command()
def bench(
    model: Model,
    prompt_tokens: Annotated[int, typer.Option(min=1)] = 128,
    new_tokens: Annotated[int, typer.Option(min=2)] = 32,
    rounds: Annotated[int, typer.Option(min=1)] = 5,
    num_threads: Threads = 0,
    against: Annotated[Path | None, typer.Option(help="A checkpoint directory to run beside it in PyTorch.")] = None,
) -> None:
    """Measure prefill, decode, time to first token and memory. Interleaved rounds, medians."""
    with one_line_errors(resumes=False):
        from dataclasses import asdict

        from bitdistill_core import latency
        from bitdistill_core.engine.model import Engine

        path = packed_path(model)
        if against is not None and not (against / "config.json").is_file():
            raise ValueError(f"--against needs a checkpoint directory; got no config.json in path={against}")
        engine = Engine.load(path, num_threads=num_threads)
        window = engine.config.max_position_embeddings
        if prompt_tokens + new_tokens > window:
            raise ValueError(
                f"prompt and new tokens must fit the model's window; got prompt_tokens={prompt_tokens}, "
                f"new_tokens={new_tokens}, window={window}; lower them"
            )
        models = {"packed": path, **({"pytorch": against} if against is not None else {})}
        timings = latency.measure(
            models,
            prompt_ids=[i % engine.config.vocab_size for i in range(prompt_tokens)],
            new_tokens=new_tokens,
            num_rounds=rounds,
            warmup_rounds=1,
            num_threads=engine.num_threads,
        )
        print(
            json.dumps({name: asdict(timing) for name, timing in timings.items()} | {"info": engine.info()}, indent=1)
        )


@app.command()
def inspect(
    model: Annotated[Path | None, typer.Argument(help="A model.bitdistill file or a run.")] = None,
    cpu: Annotated[bool, typer.Option("--cpu", help="Show this processor's kernels.")] = False,
) -> None:
    """Verify a packed file and show what is in it."""
    with one_line_errors(resumes=False):
        from bitdistill_core.engine.kernels import active_kernel, available_kernels, built_kernels

        content: dict[str, Any] = {}
        if cpu:
            available = available_kernels()
            kernels = {
                name: {"needs": needs, "runs_here": name in available} for name, needs in built_kernels().items()
            }
            content.update(kernels=kernels, active_kernel=active_kernel())
        if model is not None:
            from bitdistill_core.engine.model import Engine

            engine = Engine.load(packed_path(model))
            content.update(engine.info(), task=engine.model.task)
        if not content:
            raise ValueError("inspect needs a model or --cpu; got neither")
        print(json.dumps(content, indent=1))


@app.command()
def report(run: Annotated[Path, typer.Argument(help="A run's directory, like runs/demo.")]) -> None:
    """Print a finished run's report and where its page is."""
    with one_line_errors():
        page = run / "report" / "index.html"
        if not page.is_file():
            raise ValueError(f"no report in run={run}; finish it with `bitdistill convert`")
        print((run / "report" / "report.md").read_text())
        typer.echo(f"report: {page}", err=True)


def packed_path(model: Path) -> Path:
    """The packed file that a user means by a file, a run or a stage directory."""
    from bitdistill_core.packing import PACKED_FILE

    for candidate in (model, model / PACKED_FILE, model / "pack" / "bitdistill" / PACKED_FILE):
        if candidate.is_file():
            return candidate
    raise ValueError(f"no packed model at path={model}; give a model.bitdistill file or a finished run")


def _task_template(engine: Any, model: Path, kind: Literal["classification", "generation"], remedy: str) -> Any:
    from bitdistill_core.templates import packed_template

    task = engine.model.task
    if task is None or task["kind"] != kind:
        raise ValueError(f"this needs a model for {kind}; got model={model}, task={task and task['name']}; {remedy}")
    return packed_template(task)


def _numbered(texts: list[str]) -> Iterator[tuple[str, str]]:
    """Where each text is, and the text; for - the lines of stdin that are not empty."""
    for number, text in enumerate(texts, 1):
        if text != "-":
            yield f"text {number}", text
            continue
        if sys.stdin is None:
            raise ValueError("- reads texts from standard input, which is closed")
        if isinstance(sys.stdin, io.TextIOWrapper):  # a byte that is no UTF-8 is found with its line
            sys.stdin.reconfigure(encoding="utf-8-sig", errors="surrogateescape")
        yield from ((f"line {i}", line.rstrip("\r\n")) for i, line in enumerate(sys.stdin, 1) if line.strip())


def _prompt(template: Any, text: str) -> str:
    """The task's prompt of one text; where it has several columns, of a JSON object."""
    columns = template.columns
    row: Any = {columns[0]: text}
    if len(columns) > 1:
        try:
            row = json.loads(text)
        except (ValueError, RecursionError):
            row = None
        if not isinstance(row, dict) or not set(columns) <= row.keys():
            raise ValueError(f"this task needs a JSON object with the columns {', '.join(columns)}; got {text[:200]!r}")
    prompt = str(template.render_prompt(row))
    try:
        prompt.encode()
    except UnicodeEncodeError:
        raise ValueError(f"a text must be UTF-8; got {text[:80]!r}; convert it") from None
    return prompt


def main() -> None:
    """Entry point of the `bitdistill` command."""
    app()


if __name__ == "__main__":
    main()
