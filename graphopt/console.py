"""What the command line prints, and how it ends: documents, errors of three lines, exit codes."""

from __future__ import annotations

import contextlib
import json
import os
import re
import sys
import tempfile
import time
import traceback
from collections.abc import Callable, Iterator
from typing import Any, NoReturn

import typer
from rich.console import Console
from rich.markup import escape
from rich.progress import BarColumn, MofNCompleteColumn, Progress

from graphopt.errors import GraphoptError, SpecError
from graphopt.interrupt import INTERRUPTED, MESSAGE

UNWRAPPED = 100_000
"""Columns for output that goes into a pipe or file: lines stay whole there."""

out = Console(soft_wrap=True, highlight=False, width=None if sys.stdout.isatty() else UNWRAPPED)
err = Console(stderr=True, soft_wrap=True, highlight=False, width=None if sys.stderr.isatty() else UNWRAPPED)


def emit(document: Any, as_json: bool, *shown: Any) -> None:
    """Print one JSON document, or what is meant for people."""
    if as_json:
        sys.stdout.write(json.dumps(document, indent=2, default=_plain, allow_nan=False) + "\n")
        return
    for part in shown:
        out.print(part)


def _plain(value: Any) -> Any:
    if hasattr(value, "item"):
        return value.item()
    return str(value)


def print_diff(text: str) -> None:
    """Print a text diff on stderr, as it is."""
    err.print(text, markup=False, end="")


@contextlib.contextmanager
def working(what: str, as_json: bool) -> Iterator[Callable[[str], None]]:
    """Show a spinner on stderr while working, on a terminal only; yield what takes words about the step at hand."""
    if as_json or not err.is_terminal:
        yield lambda _: None
        return
    with err.status(what) as status:
        yield lambda step: status.update(f"{what}: {escape(step)}")


FIRST_LOGGED, LOGGED_EVERY = 3.0, 30.0
"""Seconds before the first line of a log, and between two of them."""


@contextlib.contextmanager
def training(what: str, as_json: bool) -> Iterator[Callable[[int, int, str], None]]:
    """Show a bar on stderr while training, elsewhere a line now and then (a log); yield what is told of every step."""
    if as_json or not err.is_terminal:
        yield _Log(what)
        return
    columns = ("{task.description}", BarColumn(), MofNCompleteColumn(), "{task.fields[words]}")
    with Progress(*columns, console=err, transient=True) as bar:
        task = bar.add_task(what, total=None, words="")
        yield lambda done, total, words: bar.update(task, completed=done, total=total, words=words)


class _Log:
    """Lines on stderr about something that takes long."""

    def __init__(self, what: str) -> None:
        self.what, self.last = what, time.monotonic() - LOGGED_EVERY + FIRST_LOGGED

    def __call__(self, done: int, total: int, words: str) -> None:
        """Take steps done, of how many, and words."""
        if time.monotonic() - self.last >= LOGGED_EVERY:
            err.print(f"{self.what}: {done} of {total}, {words}", markup=False, soft_wrap=True)
            self.last = time.monotonic()


def fail(error: GraphoptError) -> NoReturn:
    """Print an error as three lines, and as a document where one was asked for; leave with its exit code."""
    if "--json" in sys.argv:
        document = {"what": error.what, "at": error.at, "hint": error.hint, "exit_code": error.exit_code}
        emit({"error": document}, as_json=True)
    err.print(f"error: {error}", markup=False, style="red")
    sys.exit(error.exit_code)


def usage_error(error: Any) -> SpecError:
    """Return an error of typer's own, made while it reads the options, as one of ours."""
    what, suggestion = str(error.format_message()).rstrip("."), None
    if found := re.fullmatch(r"(.*?)\.? \(?(Did you mean|Possible options:) ([^)]*?)\??\)?", what, re.DOTALL):
        what, suggestion = found[1], f"did you mean {found[3].replace(', ', ' or ')}?"
    what = what.replace(": Value error, ", ": ").replace("Input should", "it should")
    path = getattr(getattr(error, "ctx", None), "command_path", None) or "graphopt"
    return SpecError(what[:1].lower() + what[1:], at=path, hint=suggestion or f"{path} --help")


def bug(error: BaseException) -> NoReturn:
    """Report a bug of ours: where the details are, exit code 3."""
    with tempfile.NamedTemporaryFile(
        "w", prefix="graphopt-bug-", suffix=".txt", delete=False, encoding="utf-8"
    ) as file:
        file.write(" ".join(sys.argv) + "\n\n" + "".join(traceback.format_exception(error)))
    err.print(f"a bug in graphopt: {type(error).__name__}: {error}", markup=False, style="red")
    err.print(f"  details: {file.name}\n  hint: please report it with that file", markup=False)
    sys.exit(3)


def run(app: Callable[..., Any]) -> NoReturn:
    """Run the command line and leave with its exit code."""
    try:
        code = app(standalone_mode=False, prog_name="graphopt")
    except GraphoptError as error:
        fail(error)
    except (KeyboardInterrupt, typer.Abort):
        code = INTERRUPTED
    except BrokenPipeError:
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        sys.exit(0)
    except Exception as error:  # noqa: BLE001  (the last resort: bugs get a file, not a traceback)
        if type(error).__name__ == "NoArgsIsHelpError":
            error.show()  # type: ignore[attr-defined]  # typer keeps its exceptions private
            sys.exit(2)
        if hasattr(error, "format_message"):
            fail(usage_error(error))
        bug(error)
    if code == INTERRUPTED:  # newer versions of typer give the code instead of raising
        err.print(MESSAGE)
    sys.exit(code if isinstance(code, int) else 0)
