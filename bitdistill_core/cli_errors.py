"""How every command ends when something is wrong: one line on stderr and an exit code, never a traceback."""

import os
import signal
import sys
import threading
from collections.abc import Iterator
from contextlib import contextmanager

import typer

from bitdistill_core.errors import one_line


@contextmanager
def one_line_errors(*, resumes: bool = True) -> Iterator[None]:
    """A user's error, or the machine's, as one line on stderr and exit code 1.

    Args:
        resumes: the command goes on where it was interrupted.
    """
    try:
        with _terminable():
            yield
    except BrokenPipeError:  # the reader has enough, like head
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        raise typer.Exit(1) from None
    except MemoryError as error:
        typer.echo(f"error: out of memory: {str(error) or 'a smaller batch, prompt or model is needed'}", err=True)
        raise typer.Exit(1) from None
    except RuntimeError as error:
        if "can't allocate memory" in str(error):  # PyTorch's, on a CPU
            typer.echo(
                f"error: out of memory: {one_line(error)}; lower batch_size, max_length or block_size of that stage",
                err=True,
            )
            raise typer.Exit(1) from None
        if type(error).__name__ != "OutOfMemoryError":  # PyTorch's; importing it here would slow every command
            raise
        typer.echo(
            f"error: the GPU is out of memory: {one_line(error, 300)}; raise gradient_accumulation or "
            "lower max_length, block_size or batch_size of that stage",
            err=True,
        )
        raise typer.Exit(1) from None
    except (ValueError, OSError) as error:
        typer.echo(f"error: {one_line(error, None)}", err=True)
        raise typer.Exit(1) from None
    except ModuleNotFoundError as error:
        typer.echo(f"error: this command needs the full install, and package {error.name} is missing", err=True)
        raise typer.Exit(1) from None
    except KeyboardInterrupt:
        remedy = "; run the same command to go on from the last checkpoint" if resumes else ""
        typer.echo(f"interrupted{remedy}", err=True)
        raise typer.Exit(130) from None


@contextmanager
def _terminable() -> Iterator[None]:
    """A polite end (SIGTERM: kill, a job scheduler, docker stop) is an interruption, so what is open is closed."""

    def interrupt(number: int, frame: object) -> None:
        raise KeyboardInterrupt

    if threading.current_thread() is not threading.main_thread():
        yield
        return
    before = signal.signal(signal.SIGTERM, interrupt)
    try:
        yield
    finally:
        signal.signal(signal.SIGTERM, before)
