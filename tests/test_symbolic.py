"""Sizes as expressions against arithmetic on numbers; facts about models against runs of them."""

from __future__ import annotations

import itertools
import time
from collections.abc import Callable
from typing import Any

import numpy as np
import onnx
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from graphopt.analysis import symbolic_expr as expr
from graphopt.analysis.shapes import Shapes
from graphopt.analysis.symbolic import Symbolic
from graphopt.analysis.symbolic_expr import Size
from graphopt.errors import GraphoptError, ProviderError
from graphopt.model import load
from graphopt.models import zoo
from graphopt.runtime import Session

from .conformance.test_backend_suite import load_cases, read_case
from .fact_check import Solver, contradictions, opened

SYMBOLS = {"a": 0, "b": 0, "c": 2}
"""Symbols with the least that they can be."""

Tree = tuple[Any, ...]

trees = st.recursive(
    st.sampled_from([("symbol", name) for name in SYMBOLS]) | st.integers(-3, 4).map(lambda n: ("number", n)),
    lambda inner: (
        st.tuples(st.sampled_from(["add", "subtract", "multiply", "minimum", "maximum"]), inner, inner)
        | st.tuples(
            st.sampled_from(["floor_divide", "modulo"]), inner, st.sampled_from([("number", n) for n in (1, 2, 3)])
        )
    ),
    max_leaves=6,
)

NUMBERS: dict[str, Callable[[int, int], int]] = {
    "add": lambda a, b: a + b, "subtract": lambda a, b: a - b, "multiply": lambda a, b: a * b, "minimum": min,
    "maximum": max, "floor_divide": lambda a, b: a // b, "modulo": lambda a, b: a % b,
}  # fmt: skip

VALUES = [dict(zip(SYMBOLS, values, strict=True)) for values in itertools.product((0, 1, 4, 7), (0, 1, 3), (2, 5))]


def size(tree: Tree) -> Size:
    if tree[0] == "number":
        return int(tree[1])
    if tree[0] == "symbol":
        return expr.symbol(tree[1], SYMBOLS[tree[1]])
    return getattr(expr, tree[0])(size(tree[1]), size(tree[2]))  # type: ignore[no-any-return]  # by name


def number(tree: Tree, values: dict[str, int]) -> int:
    if tree[0] == "number":
        return int(tree[1])
    if tree[0] == "symbol":
        return values[tree[1]]
    return int(NUMBERS[tree[0]](number(tree[1], values), number(tree[2], values)))


def value(of: Size, values: dict[str, int]) -> int | None:
    solver = Solver()
    solver.known.update(values)
    return solver.value(of)


@settings(max_examples=300)
@given(trees, trees)
def test_expressions_mean_what_they_say(left: Tree, right: Tree) -> None:
    """The normal form has the value of the tree; what is said of two sizes holds for all values."""
    try:
        a, b = size(left), size(right)
        same, below, low = expr.equal(a, b), expr.less(a, b), expr.low(a)
        exact = expr.quotient(a, b)
    except expr.TooComplexError:
        return
    for values in VALUES:
        x, y = number(left, values), number(right, values)
        assert value(a, values) == x
        assert same in (None, x == y)
        assert below in (None, x < y)
        assert low is None or low <= x
        if exact is not None:
            assert value(exact, values) * y == x  # type: ignore[operator]  # known


@pytest.mark.parametrize(
    ("made", "text"),
    [
        (expr.add(expr.multiply(expr.symbol("a"), 2), expr.symbol("a")), "3*a"),
        (expr.floor_divide(expr.add(expr.multiply(expr.symbol("a"), 2), 1), 2), "a"),
        (expr.add(expr.floor_divide(expr.subtract(expr.symbol("h"), 1), 2), 1), "((h + 1)//2)"),
        (expr.subtract(3, expr.multiply(expr.symbol("b"), expr.symbol("a"))), "-a*b + 3"),
        (expr.maximum(expr.symbol("a"), -1), "a"),
        (expr.minimum(expr.symbol("a"), expr.symbol("b")), "min(a, b)"),
    ],
)
def test_normal_form(made: Size, text: str) -> None:
    assert str(made) == text


def test_expressions_do_not_grow_without_end() -> None:
    sums = [expr.add(expr.symbol(f"s{place}"), 1) for place in range(100)]
    with pytest.raises(expr.TooComplexError):
        expr.product(sums)


def facts(text: str) -> dict[str, str]:
    """Return what is known of the shapes in a model, as text."""
    model = load(onnx.parser.parse_model(text))
    symbolic = Symbolic(model)
    tensors = [*model.graph.inputs, *(t for n in model.graph.nodes for t in n.outputs)]
    return {t.name: str(symbolic.of(t).shape) for t in tensors}


HEAD = '<ir_version: 8, opset_import: ["": 17]>\n'


def test_axes_of_one_name_on_two_inputs_are_two_symbols() -> None:
    """ORT runs a model whose inputs give such axes different sizes."""
    text = HEAD + "g (float[n] x, float[n] y) => (float[m] z) { z = Add(x, y) }"
    given = {"x": np.ones(3, np.float32), "y": np.ones(1, np.float32)}
    assert Session(onnx.parser.parse_model(text)).run(given)["z"].shape == (3,)
    found = facts(text)
    assert found["x"] == "(x[0],)"
    assert found["y"] == "(y[0],)"
    assert found["z"] == "(broadcast(x[0], y[0]),)"


def test_odd_names_are_not_taken_for_expressions() -> None:
    model = load(onnx.parser.parse_model(HEAD + "g (float[n, m] x) => (float[k] z) { z = Relu(x) }"))
    model.graph.inputs[0].shape = ["past + 1", "a*b"]
    found = Symbolic(model).of(model.graph.inputs[0]).shape
    assert [str(d) for d in found or ()] == ["x[0]", "x[1]"]


def test_a_layer_says_how_large_its_input_must_be() -> None:
    """(h - 1) / 8 rounds to zero, not down, for h = 0: only a Conv that fails then makes the two one."""
    body = """
        s = Shape <start = 2, end = 3> (x)
        m = Sub(s, one)
        d = Div(m, eight)
        size = Add(d, one)
        r = ConstantOfShape(size)
        """
    head = HEAD + "g (float[n, 3, h, h2] x, float[4, 3, 3, 3] w) => (float[k] r, float[a, b, c, d] y)\n"
    head += "<int64[1] one = {1}, int64[1] eight = {8}>"
    without = facts(head + "{" + body + "y = Relu(x) }")
    layered = facts(head + "{" + body + "y = Conv <strides = [8, 8], pads = [1, 1, 1, 1]> (x, w) }")
    assert without["r"] == "(r?1,)"
    assert layered["r"] == "(((h + 7)//8),)"
    assert layered["y"] == "(n, 4, ((h + 7)//8), ((h2 + 7)//8))"


def test_a_loop_keeps_the_shapes_that_its_body_keeps() -> None:
    found = facts(
        HEAD
        + """g (float[n, 4] x, int64 trips, bool go) => (float[a, b] y, float[c, d] z) {
            y, z = Loop (trips, go, x, x) <body = b (int64 i, bool c, float[p, q] u, float[r, s] v) =>
                (bool c2, float[e, f] u2, float[g, h] v2) {
                    c2 = Identity(c)  u2 = Relu(u)  v2 = Concat<axis = 0>(v, v) }>
        }"""
    )
    assert found["y"] == "(n, 4)"
    assert found["z"].endswith(", 4)")
    assert not found["z"].startswith("(n,")


def test_branches_give_what_they_agree_on() -> None:
    found = facts(
        HEAD
        + """g (float[n, 4] x, bool go) => (float[a, b] y) {
            y = If (go) <then_branch = t () => (float[p, q] u) { u = Relu(x) },
                         else_branch = e () => (float[r, s] v) { v = Concat<axis = 0>(x, x) }>
        }"""
    )
    assert found["y"].endswith(", 4)")
    assert "n" not in found["y"].replace("y?1", "")


@pytest.mark.parametrize("part", range(4))
def test_facts_hold_on_the_backend_suite(part: int) -> None:
    """All models that ORT runs, their inputs' sizes as stated and left open: no fact is contradicted by the run."""
    problems, checked = [], 0
    for case in (read_case(c) for c in load_cases()[part::4]):
        constants = {i.name for i in case.model.graph.initializer}
        names = [i.name for i in case.model.graph.input if i.name not in constants]
        for model in (case.model, opened(case.model)):
            try:
                for given in case.inputs:
                    found, count = contradictions(model, dict(zip(names, given, strict=False)))
                    problems += [f"{case.name}: {p}" for p in found]
                    checked += count
            except GraphoptError:
                continue
    assert not problems
    assert checked > 1000


@pytest.mark.zoo
@pytest.mark.parametrize("name", ["ppocr-rec", "ppocr-cls", "magika", "silero-vad-16k-op15", "shufflenet"])
def test_facts_hold_on_real_models(name: str) -> None:
    try:
        model = onnx.load(zoo.fetch(name))
    except ProviderError as error:
        pytest.skip(str(error))
    for source in (model, opened(model)):
        for feed in zoo.feeds(name, count=1):
            found, _ = contradictions(source, feed)
            assert not found


def test_proved_shapes_name_equal_sizes_equally() -> None:
    text = HEAD + "g (float[n, t, 4] x) => (float[a, b, c] y) <int64[2] s = {-1, 4}> {"
    text += "f = Reshape(x, s)  r = Relu(f)  d = Shape(x)  y = Reshape(r, d) }"
    model = load(onnx.parser.parse_model(text))
    shapes = Shapes(model)
    assert shapes.proved(model.graph.nodes[0].outputs[0]).shape == ("n*t", 4)
    assert shapes.proved(model.graph.outputs[0]).shape == ("n", "t", 4)


def test_time_is_near_linear() -> None:
    """Ten times the nodes take far less than a hundred times as long."""

    def seconds(count: int) -> float:
        body = "".join(f"s{i} = Shape(t{i})  t{i + 1} = Reshape(t{i}, s{i})  " for i in range(count))
        model = load(onnx.parser.parse_model(HEAD + f"g (float[n, h] t0) => (float[a, b] t{count}) {{ {body} }}"))
        started = time.process_time()
        assert str(Symbolic(model).of(model.graph.outputs[0]).shape) == "(n, h)"
        return time.process_time() - started

    seconds(200)
    assert seconds(5000) < 40 * seconds(500)
