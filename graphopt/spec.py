"""Pipelines as text and as TOML, and back.

Text: steps separated by commas; options are a TOML inline table, bare words allowed for strings; `repeat` runs
its steps until nothing changes, at most `times` times; `gradual` runs them `times` times, and goes from one number to
another with the options that say so:

    fold-constants{max_growth=0.05}, repeat{times=4}(eliminate-identity, eliminate-dead)
    gradual{times=8}(sparsify-weights{amount={from=0.0, to=0.9}}, distill{steps=100})

TOML: one `[[step]]` table a step, named by its kind (`pass`, `repeat`, `gradual`), options beside it:

    [[step]]
    pass = "fold-constants"
    max_growth = 0.05

    [[step]]
    repeat = 4
    [[step.step]]
    pass = "eliminate-identity"

    [[step]]
    gradual = 8
    [[step.step]]
    pass = "sparsify-weights"
    amount = {from = 0.0, to = 0.9}
    [[step.step]]
    pass = "distill"
    steps = 100
"""

from __future__ import annotations

import math
import re
import tomllib
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Any, TypeAlias

import tomli_w

from graphopt.errors import SpecError, did_you_mean

KINDS = ("pass", "repeat", "gradual")
"""Kinds of step: each is a key of a `[[step]]` table."""

DEFAULT_TIMES = 8

CUBIC = 3.0
"""Power of the way that `gradual` goes unless told: fast at first, slow at the end (Zhu, Gupta: To prune, or not to
prune, 2017)."""

FROM_TO = frozenset({"from", "to"})
"""Keys of an option that goes from one number to another."""


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


@dataclass(frozen=True)
class GradualStep:
    """Steps run `times` times; options of the form `{from=A, to=B}` go from A to B.

    The i-th time, such an option is B + (A - B) · (1 - i / times)^power: the last time it is B.
    """

    steps: tuple[Step, ...]
    times: int = DEFAULT_TIMES
    power: float = CUBIC

    def unrolled(self) -> Iterator[tuple[Step, ...]]:
        """Yield the steps of each time, numbers in place of what goes from one to another."""
        for number in range(1, self.times + 1):
            left = (1.0 - number / self.times) ** self.power
            yield tuple(_at(step, left) for step in self.steps)


Step: TypeAlias = PassStep | RepeatStep | GradualStep


def pass_steps(steps: Iterable[Step]) -> Iterator[PassStep]:
    """Return the passes among steps, those in `repeat` too, and those in `gradual` as often as it runs them."""
    for step in steps:
        if isinstance(step, PassStep):
            yield step
        elif isinstance(step, RepeatStep):
            yield from pass_steps(step.steps)
        else:
            for steps_then in step.unrolled():
                yield from pass_steps(steps_then)


def _at(step: Step, left: float) -> Step:
    """Return a step of `gradual` where so much of the way is left; one of an inner `gradual` goes its own way."""
    if isinstance(step, RepeatStep):
        return replace(step, steps=tuple(_at(inner, left) for inner in step.steps))
    if isinstance(step, GradualStep):
        return step
    return PassStep(step.name, {k: _between(v, left) if _goes(v) else v for k, v in step.options.items()})


def _goes(value: Any) -> bool:
    return isinstance(value, Mapping) and set(value) == FROM_TO


def _between(way: Mapping[str, Any], left: float) -> float:
    start, end = float(way["from"]), float(way["to"])
    return end if left == 0.0 else float(f"{end + (start - end) * left:.6g}")


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
        if match[0] not in _BLOCKS:
            return PassStep(match[0], options)
        if not self.take("("):
            raise self.error(f"'{match[0]}' needs its steps in parentheses")
        steps = self.steps()
        if not self.take(")"):
            raise self.error("expected ')'")
        return _block(match[0], steps, options.pop("times", DEFAULT_TIMES), options)

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


def _block(kind: str, steps: Sequence[Step], times: Any, others: dict[str, Any]) -> Step:
    """Return a step that holds others."""
    known = _BLOCKS[kind]
    for name in others:
        if name not in known:
            hint = "its only option is times" if not known else f"its options: times, {', '.join(known)}"
            raise SpecError(f"'{kind}' has no option '{name}'", hint=hint)
    if not isinstance(times, int) or isinstance(times, bool) or times < 1:
        raise SpecError(f"'{kind}' needs a whole number of times, not {times!r}")
    if not steps:
        raise SpecError(f"'{kind}' has no steps", hint=_EXAMPLES[kind])
    if kind == "repeat":
        return RepeatStep(tuple(steps), times)
    return _gradual(tuple(steps), times, others.get("power", CUBIC))


_BLOCKS: Mapping[str, tuple[str, ...]] = {"repeat": (), "gradual": ("power",)}
"""Kinds of step that hold steps, with their options besides `times`."""

_EXAMPLES: Mapping[str, str] = {
    "repeat": "repeat{times=4}(eliminate-identity, eliminate-dead)",
    "gradual": "gradual{times=8}(sparsify-weights{amount={from=0.0, to=0.9}}, distill{steps=100})",
}


def _gradual(steps: tuple[Step, ...], times: int, power: Any) -> GradualStep:
    if not _is_number(power) or power <= 0:
        raise SpecError(f"the power of 'gradual' is a number above 0, not {power!r}", hint="3 is cubic, 1 is linear")
    ways = list(_ways(steps))
    for name, way in ways:
        if not _is_number(way["from"]) or not _is_number(way["to"]):
            raise SpecError(f"'gradual' goes from number to number, not {_value_text(way)}", at=f"option '{name}'")
    if not ways:
        raise SpecError("no option in 'gradual' goes from one number to another", hint=_EXAMPLES["gradual"])
    return GradualStep(steps, times, float(power))


def _ways(steps: Iterable[Step]) -> Iterator[tuple[str, Mapping[str, Any]]]:
    """Yield the options of steps that go from one number to another, by name."""
    for step in steps:
        if isinstance(step, PassStep):
            yield from ((name, value) for name, value in step.options.items() if _goes(value))
        elif isinstance(step, RepeatStep):
            yield from _ways(step.steps)


def _is_number(value: Any) -> bool:
    return isinstance(value, int | float) and not isinstance(value, bool) and math.isfinite(value)


def to_text(steps: Iterable[Step]) -> str:
    """Return the text form; `parse` gives the same steps back."""
    return ", ".join(_step_text(step) for step in steps)


def _step_text(step: Step) -> str:
    if isinstance(step, PassStep):
        return step.name + _options_text(step.options)
    options: dict[str, Any] = {} if step.times == DEFAULT_TIMES else {"times": step.times}
    if isinstance(step, RepeatStep):
        return f"repeat{_options_text(options)}({to_text(step.steps)})"
    options |= {} if step.power == CUBIC else {"power": step.power}
    return f"gradual{_options_text(options)}({to_text(step.steps)})"


def _options_text(options: Mapping[str, Any]) -> str:
    return "{" + ", ".join(f"{k}={_value_text(v)}" for k, v in options.items()) + "}" if options else ""


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
        if kinds[0] in _BLOCKS:
            yield _block(kinds[0], tuple(_table_steps(table.get("step", []))), table[kinds[0]], rest)
        elif not isinstance(table["pass"], str):
            raise SpecError(f"step {number}: 'pass' is a name, not {table['pass']!r}")
        else:
            yield PassStep(table["pass"], rest)


def to_toml(steps: Iterable[Step]) -> str:
    """Return the TOML form; `from_toml` gives the same steps back."""
    return tomli_w.dumps({"step": [_step_table(step) for step in steps]})


def _step_table(step: Step) -> dict[str, Any]:
    if isinstance(step, PassStep):
        return {"pass": step.name, **step.options}
    inner = [_step_table(s) for s in step.steps]
    if isinstance(step, RepeatStep):
        return {"repeat": step.times, "step": inner}
    return {"gradual": step.times, **({} if step.power == CUBIC else {"power": step.power}), "step": inner}
