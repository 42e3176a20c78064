"""How the command line ends: usage errors look like all others, and Ctrl-C is quiet from the first import on."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from graphopt import interrupt

Cli = Callable[..., Any]


@pytest.mark.parametrize(
    ("arguments", "lines"),
    [
        (["optimize"], ["missing argument 'MODEL'", "graphopt optimize", "graphopt optimize --help"]),
        (["optimise"], ["no such command 'optimise'", "graphopt", "did you mean 'optimize'?"]),
        (["nothing-like-it"], ["no such command 'nothing-like-it'", "graphopt", "graphopt --help"]),
        (["inspect", "m", "--jsn"], ["no such option: --jsn", "graphopt inspect", "did you mean --json?"]),
        (
            ["optimize", "m", "--verify", "x"],
            ["invalid value for '--verify': 'x' is not one of 'each', 'end', 'off'", "graphopt optimize"],
        ),
        (["inspect", "m", "n"], ["got unexpected extra argument(s) (n)", "graphopt inspect"]),
        (["bench", "a", "b", "--rounds", "1"], ["invalid value for '--rounds': it should be greater than or equal"]),
    ],
)
def test_usage_errors_are_three_lines(cli: Cli, arguments: list[str], lines: list[str]) -> None:
    ran = cli(*arguments)
    assert ran.code == 2
    assert ran.out == ""
    shown = ran.err.splitlines()
    assert len(shown) == 3
    for line, start, text in zip(shown, ("error: ", "  at: ", "  hint: "), lines, strict=False):
        assert line.startswith(start + text)


def test_usage_errors_are_documents_too(cli: Cli) -> None:
    ran = cli("inspect", "m", "--jsn", "--json")
    assert ran.json["error"] == {
        "what": "no such option: --jsn", "at": "graphopt inspect", "hint": "did you mean --json?", "exit_code": 2
    }  # fmt: skip


def test_no_arguments_show_the_help(cli: Cli) -> None:
    ran = cli()
    assert ran.code == 2
    assert "Commands:" in ran.out + ran.err


@pytest.mark.skipif(os.name != "posix", reason="signals")
@pytest.mark.parametrize("module", ["onnx_graphsurgeon", "typer"])  # in graphopt's own imports, in the command line's
def test_interrupt_while_importing(module: str, tmp_path: Path) -> None:
    (tmp_path / f"{module}.py").write_text("import time\nprint('now', flush=True)\ntime.sleep(60)\n")
    environment = {**os.environ, "PYTHONPATH": str(tmp_path)}
    process = subprocess.Popen(
        [sys.executable, "-m", "graphopt", "passes"], env=environment, cwd=tmp_path,
        stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True,
        preexec_fn=lambda: signal.signal(signal.SIGINT, signal.SIG_DFL),  # noqa: PLW1509  # CI ignores it by default
    )  # fmt: skip
    assert process.stdout is not None
    assert process.stdout.readline() == "now\n"
    time.sleep(0.1)
    process.send_signal(signal.SIGINT)
    _, err = process.communicate(timeout=30)
    assert process.returncode == interrupt.INTERRUPTED == 130
    assert err == interrupt.MESSAGE + "\n"


@pytest.mark.parametrize(
    ("given", "started", "expected"),
    [
        (["python", "-m", "graphopt", "passes"], "-m", True),
        (["python", "/env/bin/graphopt", "passes"], "/env/bin/graphopt", True),
        (["python", "-m", "pytest", "graphopt"], "/env/pytest/__main__.py", False),
        (["python", "my_program.py", "-m"], "my_program.py", False),
        (["python"], "", False),
    ],
)
def test_programs_that_import_graphopt_keep_their_ways(
    monkeypatch: pytest.MonkeyPatch, given: list[str], started: str, expected: bool
) -> None:
    monkeypatch.setattr(sys, "orig_argv", given)
    monkeypatch.setattr(sys, "argv", [started])
    assert interrupt.is_command_line() is expected
