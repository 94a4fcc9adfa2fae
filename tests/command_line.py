"""The command `bitdistill` within the process of a test."""

from typer.testing import CliRunner

from bitdistill_core.cli import app


def run(*arguments: str, stdin: str = "") -> tuple[int, str, str]:
    """Exit status, stdout and stderr."""
    result = CliRunner().invoke(app, list(arguments), input=stdin)
    return result.exit_code, result.stdout, result.stderr
