"""The command line, run in this process."""

from __future__ import annotations

from typing import Any

from typer.testing import CliRunner

from fcvgg.cli import app


def run(*args: object, columns: int = 200) -> Any:
    """What ``fcvgg ARGS`` prints, and its exit code; what it does not catch is raised."""
    environment = {"NO_COLOR": "1", "TERM": "dumb", "COLUMNS": str(columns)}
    result = CliRunner(env=environment).invoke(app, [str(a) for a in args], prog_name="fcvgg")
    if result.exception and not isinstance(result.exception, SystemExit):
        raise result.exception
    return result
