"""Ctrl-C while modules are still being imported: the line and exit code that it has later, no traceback.

The package imports this module first.  Only the command line is meant: a program that imports graphopt keeps its
own ways.
"""

from __future__ import annotations

import os
import sys
from pathlib import Path
from types import TracebackType

INTERRUPTED = 130
"""Exit code after Ctrl-C (128 + SIGINT, as shells have it)."""

MESSAGE = "interrupted; nothing was written"


def is_command_line() -> bool:
    """Tell whether this process was started as `graphopt …` or `python -m graphopt …`."""
    given = sys.orig_argv
    as_module = "-m" in given[:-1] and given[given.index("-m") + 1] == "graphopt"
    return as_module or Path(sys.argv[0] if sys.argv else "").stem == "graphopt"


def _leave(kind: type[BaseException], error: BaseException, trace: TracebackType | None) -> None:
    """End as the command line does; anything but Ctrl-C is shown as always."""
    if not issubclass(kind, KeyboardInterrupt):
        sys.__excepthook__(kind, error, trace)
        return
    sys.stderr.write(MESSAGE + "\n")
    sys.stderr.flush()
    os._exit(INTERRUPTED)  # the interpreter's own way out would be the signal


if is_command_line():
    sys.excepthook = _leave
