"""Pipelines as text and as TOML, and back.

Text: steps separated by commas; options are a TOML inline table, bare words allowed for strings; `repeat` runs
its steps until nothing changes, at most `times` times:

    fold-constants{max_growth=0.05}, repeat{times=4}(eliminate-identity, eliminate-dead)

TOML: one `[[step]]` table a step, named by its kind (`pass`, `repeat`), options beside it:

    [[step]]
    pass = "fold-constants"
    max_growth = 0.05

    [[step]]
    repeat = 4
    [[step.step]]
    pass = "eliminate-identity"
"""

from __future__ import annotations

import re
import tomllib
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, TypeAlias

import tomli_w

from graphopt.errors import SpecError, did_you_mean

KINDS = ("pass", "repeat")
"""Kinds of step; later ones (search, train) become further keys of a `[[step]]` table."""

DEFAULT_TIMES = 8


@dataclass(frozen=True)
class PassStep:
    """One pass with its options."""

    name: str
    options: Mapping[str, Any] = field(default_factory=dict)


@dataclass(frozen=True)
class RepeatStep:
    """Steps run again and again until they change nothing, at most `times` times."""

    steps: tuple[Step, ...]
    times: int = DEFAULT_TIMES


Step: TypeAlias = PassStep | RepeatStep


def pass_steps(steps: Iterable[Step]) -> Iterator[PassStep]:
    """Return the passes among steps, those in `repeat` too."""
    for step in steps:
        if isinstance(step, PassStep):
            yield step
        else:
            yield from pass_steps(step.steps)


def parse(text: str) -> tuple[Step, ...]:
    """Return the steps of a pipeline's text form.

    Raises:
        SpecError: with the position, where the text is not understood.
    """
    parser = _Parser(text)
    steps = parser.steps()
    if parser.rest():
        raise parser.error("expected ',' or the end")
    return steps


class _Parser:
    _NAME = re.compile(r"[A-Za-z][\w-]*")

    def __init__(self, text: str) -> None:
        self.text = text
        self.position = 0

    def rest(self) -> str:
        while self.position < len(self.text) and self.text[self.position].isspace():
            self.position += 1
        return self.text[self.position :]

    def error(self, what: str) -> SpecError:
        shown = self.text[: self.position] + " >>> " + self.text[self.position :]
        return SpecError(
            f"pipeline not understood: {what}",
            at=shown.strip(),
            hint="example: fold-constants{max_growth=0.05},eliminate-dead",
        )

    def take(self, token: str) -> bool:
        if self.rest().startswith(token):
            self.position += len(token)
            return True
        return False

    def steps(self) -> tuple[Step, ...]:
        found: list[Step] = []
        if not self.rest() or self.rest().startswith(")"):
            return ()
        while True:
            found.append(self.step())
            if not self.take(","):
                return tuple(found)

    def step(self) -> Step:
        match = self._NAME.match(self.rest())
        if match is None:
            raise self.error("expected the name of a pass")
        self.position += match.end()
        options = self.options()
        if match[0] != "repeat":
            return PassStep(match[0], options)
        if not self.take("("):
            raise self.error("'repeat' needs its steps in parentheses")
        steps = self.steps()
        if not self.take(")"):
            raise self.error("expected ')'")
        return _repeat(steps, options.pop("times", DEFAULT_TIMES), options)

    def options(self) -> dict[str, Any]:
        if not self.rest().startswith("{"):
            return {}
        end = _closing_brace(self.rest())
        if end is None:
            raise self.error("'{' is never closed")
        inner = self.rest()[1:end]
        try:
            found = tomllib.loads(f"options = {{{_quote_bare(inner)}}}")["options"]
        except tomllib.TOMLDecodeError as error:
            raise self.error(f"options are key=value pairs ({error})") from error
        self.position += end + 1
        return dict(found)


def _closing_brace(text: str) -> int | None:
    depth, quote, escaped = 0, "", False
    for i, character in enumerate(text):
        if escaped:
            escaped = False
        elif quote:
            escaped = quote == '"' and character == "\\"
            quote = "" if character == quote else quote
        elif character in "\"'":
            quote = character
        elif character == "{":
            depth += 1
        elif character == "}":
            depth -= 1
            if depth == 0:
                return i
    return None


_BARE = re.compile(r"""("(?:\\.|[^"\\])*"|'[^']*')|(?<=[=\[,])(\s*)([A-Za-z_][\w./-]*)(?=\s*(?:[,\]}]|$))""")


def _quote_bare(text: str) -> str:
    """Put quotes around bare words that stand as values, except true, false, inf and nan."""

    def quoted(match: re.Match[str]) -> str:
        if match[1] or match[3] in ("true", "false", "inf", "nan"):
            return match[0]
        return f'{match[2]}"{match[3]}"'

    return _BARE.sub(quoted, text)


def _repeat(steps: Sequence[Step], times: Any, others: Mapping[str, Any]) -> RepeatStep:
    if others:
        raise SpecError(f"'repeat' has no option '{next(iter(others))}'", hint="its only option is times")
    if not isinstance(times, int) or isinstance(times, bool) or times < 1:
        raise SpecError(f"'repeat' needs a whole number of times, not {times!r}")
    if not steps:
        raise SpecError("'repeat' has no steps", hint="repeat{times=4}(eliminate-identity, eliminate-dead)")
    return RepeatStep(tuple(steps), times)


def to_text(steps: Iterable[Step]) -> str:
    """Return the text form; `parse` gives the same steps back."""
    return ", ".join(_step_text(step) for step in steps)


def _step_text(step: Step) -> str:
    if isinstance(step, RepeatStep):
        times = "" if step.times == DEFAULT_TIMES else f"{{times={step.times}}}"
        return f"repeat{times}({to_text(step.steps)})"
    if not step.options:
        return step.name
    return step.name + "{" + ", ".join(f"{k}={_value_text(v)}" for k, v in step.options.items()) + "}"


def _value_text(value: Any) -> str:
    if isinstance(value, list | tuple):
        return "[" + ", ".join(_value_text(v) for v in value) + "]"
    if isinstance(value, Mapping):
        return "{" + ", ".join(f"{k}={_value_text(v)}" for k, v in value.items()) + "}"
    return tomli_w.dumps({"v": value}).removeprefix("v = ").rstrip("\n")


def from_toml(text: str) -> tuple[Step, ...]:
    """Return the steps of a pipeline's TOML form.

    Raises:
        SpecError: not TOML, or a step of no known kind.
    """
    try:
        document = tomllib.loads(text)
    except tomllib.TOMLDecodeError as error:
        raise SpecError(f"the pipeline file is not TOML: {error}") from error
    unknown = set(document) - {"step"}
    if unknown:
        key = min(unknown)
        raise SpecError(
            f"unknown entry '{key}' in the pipeline file",
            hint=did_you_mean(key, ["step"]) or "steps are [[step]] tables",
        )
    return tuple(_table_steps(document.get("step", [])))


def _table_steps(tables: Any) -> Iterator[Step]:
    if not isinstance(tables, list) or not all(isinstance(t, dict) for t in tables):
        raise SpecError("steps are written as [[step]] tables")
    for number, table in enumerate(tables, 1):
        kinds = [kind for kind in KINDS if kind in table]
        if len(kinds) != 1:
            raise SpecError(
                f"step {number} must have one of: {', '.join(KINDS)}", at=", ".join(table) or "an empty step"
            )
        rest = {k: v for k, v in table.items() if k not in (*kinds, "step")}
        if kinds[0] == "repeat":
            yield _repeat(tuple(_table_steps(table.get("step", []))), table["repeat"], rest)
        elif not isinstance(table["pass"], str):
            raise SpecError(f"step {number}: 'pass' is a name, not {table['pass']!r}")
        else:
            yield PassStep(table["pass"], rest)


def to_toml(steps: Iterable[Step]) -> str:
    """Return the TOML form; `from_toml` gives the same steps back."""
    return tomli_w.dumps({"step": [_step_table(step) for step in steps]})


def _step_table(step: Step) -> dict[str, Any]:
    if isinstance(step, RepeatStep):
        return {"repeat": step.times, "step": [_step_table(s) for s in step.steps]}
    return {"pass": step.name, **step.options}
