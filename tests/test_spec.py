"""Pipeline text and TOML: they round-trip, and errors say where."""

from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from graphopt import spec
from graphopt.errors import SpecError
from graphopt.spec import GradualStep, PassStep, RepeatStep

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
ways = st.builds(
    lambda a, b: PassStep("a", {"x": {"from": a, "to": b}}),
    st.integers(-9, 9) | st.floats(-1.0, 1.0),
    st.integers(-9, 9) | st.floats(-1.0, 1.0),
)


def blocks(inner: st.SearchStrategy[spec.Step]) -> st.SearchStrategy[spec.Step]:
    many, times = st.lists(inner, min_size=1, max_size=3).map(tuple), st.integers(1, 9)
    going = st.tuples(ways, many).map(lambda both: (both[0], *both[1]))
    return st.builds(RepeatStep, many, times) | st.builds(GradualStep, going, times, st.sampled_from([1.0, 2.5, 3.0]))


steps = st.recursive(pass_steps, blocks, max_leaves=6)


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
        ("gradual{times=3}(a{x=1})", "no option in 'gradual' goes"),
        ("gradual{times=0}(a{x={from=1, to=2}})", "whole number"),
        ("gradual{power=0}(a{x={from=1, to=2}})", "above 0"),
        ("gradual{steps=3}(a{x={from=1, to=2}})", "no option 'steps'"),
        ("gradual(a{x={from=1, to=b}})", "from number to number"),
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
        ("[[step]]\nfoo = 1", "must have one of: pass, repeat, gradual"),
        ("[[step]]\ntrain = 'x'", "must have one of: pass, repeat, gradual"),
        ("[[step]]\npass = 3", "is a name"),
        ("[[steps]]\npass = 'a'", "unknown entry 'steps'"),
        ("[[step", "not TOML"),
    ],
)
def test_toml_errors(text: str, what: str) -> None:
    with pytest.raises(SpecError, match=what):
        spec.from_toml(text)


def amounts(text: str) -> list[float]:
    return [step.options["x"] for step in spec.pass_steps(spec.parse(text)) if "x" in step.options]


def test_gradual_goes_from_one_number_to_another() -> None:
    assert amounts("gradual{times=4}(a{x={from=0.0, to=0.8}}, b)") == [0.4625, 0.7, 0.7875, 0.8]  # 0.8 (1 - left³)
    assert amounts("gradual{times=4, power=1}(a{x={from=1, to=0}})") == [0.75, 0.5, 0.25, 0.0]
    assert amounts("gradual{times=1}(repeat(a{x={from=0, to=0.3}}))") == [0.3]


def test_gradual_inside_gradual_goes_its_own_way() -> None:
    inner = "gradual{times=2, power=1}(b{x={from=0, to=2}})"
    assert amounts(f"gradual{{times=2, power=1}}(a{{x={{from=0, to=8}}}}, {inner})") == [4.0, 1.0, 2.0, 8.0, 1.0, 2.0]


def test_gradual_in_toml() -> None:
    text = "[[step]]\ngradual = 2\n[[step.step]]\npass = 'a'\nx = {from = 0.0, to = 0.5}\n[[step.step]]\npass = 'b'\n"
    (step,) = spec.from_toml(text)
    assert isinstance(step, GradualStep)
    assert step == GradualStep((PassStep("a", {"x": {"from": 0.0, "to": 0.5}}), PassStep("b")), 2)
    assert [[each.name for each in spec.pass_steps(turn)] for turn in step.unrolled()] == [["a", "b"], ["a", "b"]]
