"""Pipeline text and TOML: they round-trip, and errors say where."""

from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from graphopt import spec
from graphopt.errors import SpecError
from graphopt.spec import PassStep, RepeatStep

names = st.from_regex(r"[a-z][a-z0-9]*(-[a-z0-9]+){0,2}", fullmatch=True).filter(lambda n: n not in spec.KINDS)
scalars = (
    st.booleans()
    | st.integers(-(2**31), 2**31)
    | st.floats(allow_nan=False, allow_infinity=False)
    | st.text(st.characters(blacklist_categories=("Cs", "Cc")), max_size=8)
)
options = st.dictionaries(
    st.from_regex(r"[a-z]\w{0,8}", fullmatch=True).filter(lambda k: k not in {"step", *spec.KINDS} and k.isascii()),
    scalars | st.lists(scalars, max_size=3),
    max_size=3,
)
pass_steps = st.builds(PassStep, names, options)
steps = st.recursive(
    pass_steps,
    lambda inner: st.builds(RepeatStep, st.lists(inner, min_size=1, max_size=3).map(tuple), st.integers(1, 9)),
    max_leaves=6,
)


@given(st.lists(steps, max_size=4))
def test_text_round_trips(pipeline: list[spec.Step]) -> None:
    assert spec.parse(spec.to_text(pipeline)) == tuple(pipeline)


@given(st.lists(steps, max_size=4))
def test_toml_round_trips(pipeline: list[spec.Step]) -> None:
    assert spec.from_toml(spec.to_toml(pipeline)) == tuple(pipeline)


@given(st.lists(steps, max_size=3))
def test_text_and_toml_say_the_same(pipeline: list[spec.Step]) -> None:
    assert spec.from_toml(spec.to_toml(spec.parse(spec.to_text(pipeline)))) == tuple(pipeline)


@pytest.mark.parametrize("value", ['a"b', "a'b", "a\\", "}", "{", 'x", y="', "a,b]"])
def test_quotes_and_braces_inside_strings(value: str) -> None:
    step = PassStep("a", {"x": value, "y": [value]})
    assert spec.parse(spec.to_text([step, step])) == (step, step)


def test_bare_words_are_strings() -> None:
    assert spec.parse("prune{criterion=l1, scope=[global, layer], fast=true}") == (
        PassStep("prune", {"criterion": "l1", "scope": ["global", "layer"], "fast": True}),
    )


@pytest.mark.parametrize(
    ("text", "what"),
    [
        ("a,,b", "expected the name of a pass"),
        ("a{x=1", "never closed"),
        ("a{x=}", "key=value"),
        ("a b", "expected ','"),
        ("repeat", "needs its steps"),
        ("repeat()", "has no steps"),
        ("repeat{times=0}(a)", "whole number"),
        ("repeat{often=2}(a)", "no option 'often'"),
        ("repeat(a", r"expected '\)'"),
    ],
)
def test_errors_say_what_is_wrong(text: str, what: str) -> None:
    with pytest.raises(SpecError, match=what):
        spec.parse(text)


def test_error_shows_the_position() -> None:
    with pytest.raises(SpecError) as caught:
        spec.parse("fold-constants, ?")
    assert caught.value.at == "fold-constants,  >>> ?"


@pytest.mark.parametrize(
    ("text", "what"),
    [
        ("step = 3", "tables"),
        ("[[step]]\nfoo = 1", "must have one of: pass, repeat"),
        ("[[step]]\ntrain = 'x'", "must have one of: pass, repeat"),
        ("[[step]]\npass = 3", "is a name"),
        ("[[steps]]\npass = 'a'", "unknown entry 'steps'"),
        ("[[step", "not TOML"),
    ],
)
def test_toml_errors(text: str, what: str) -> None:
    with pytest.raises(SpecError, match=what):
        spec.from_toml(text)
