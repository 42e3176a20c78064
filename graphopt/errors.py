"""Everything graphopt raises on purpose.

GraphoptError          the user can do something about it; carries an exit code
  InputError     (2)   what the user gave is wrong
    ModelError         the model file or graph
    DataError          samples, labels, evaluation functions
    SpecError          pipelines, pass names, options
    ProviderError      a runtime, provider or extra that is not installed
  GateMissedError (1)  a gate, target or validation was missed
InternalError    (3)   a bug in graphopt; never a GraphoptError
"""

from __future__ import annotations

import difflib
import traceback
from collections.abc import Iterable
from pathlib import Path
from typing import ClassVar


class GraphoptError(Exception):
    """What happened, where, and what to do about it.

    Args:
        what: one sentence saying what is wrong.
        at: the file, node, tensor or option it is about.
        hint: what the user can do.
    """

    exit_code: ClassVar[int] = 2

    def __init__(self, what: str, *, at: str | None = None, hint: str | None = None) -> None:
        super().__init__(what)
        self.what = what
        self.at = at
        self.hint = hint

    def __str__(self) -> str:
        lines = [self.what]
        if self.at:
            lines.append(f"  at: {self.at}")
        if self.hint:
            lines.append(f"  hint: {self.hint}")
        return "\n".join(lines)

    def __reduce__(self) -> tuple[object, ...]:
        # keyword-only arguments are lost by the default; xdist and joblib send errors between processes
        return (_rebuild, (type(self), self.what, self.at, self.hint))


def _rebuild(kind: type[GraphoptError], what: str, at: str | None, hint: str | None) -> GraphoptError:
    return kind(what, at=at, hint=hint)


class InputError(GraphoptError):
    """What the user gave is wrong."""


class ModelError(InputError):
    """The model file or its graph is not usable."""


class DataError(InputError):
    """Samples, labels or an evaluation function are not usable."""


class SpecError(InputError):
    """A pipeline, pass name or option is not understood."""


class ProviderError(InputError):
    """A runtime, execution provider or optional dependency is missing."""


class GateMissedError(GraphoptError):
    """A gate, target or validation was missed; nothing was written."""

    exit_code: ClassVar[int] = 1


class InternalError(Exception):
    """A bug in graphopt: please report it with the reproducer it names."""


def did_you_mean(word: str, candidates: Iterable[str]) -> str | None:
    """Return ``did you mean 'x'?`` for the candidate closest to ``word``, or None."""
    close = difflib.get_close_matches(word, list(candidates), n=1, cutoff=0.6)
    return f"did you mean '{close[0]}'?" if close else None


def last_frame(error: BaseException) -> str:
    """Return where an exception was raised, outside graphopt if the trace leads there."""
    frames = traceback.extract_tb(error.__traceback__)
    own = Path(__file__).parent
    others = [f for f in frames if not Path(f.filename).is_relative_to(own)]
    frame = (others or frames)[-1]
    return f"{frame.filename}, line {frame.lineno}, in {frame.name}"
