"""unpack-sequences: what becomes of each reader of a sequence, what stays and why, and that nothing changes."""

from __future__ import annotations

import numpy as np
import onnx
import pytest

from graphopt.pipeline import Pipeline, Result, Settings
from graphopt.runtime import Session

HEAD = '<ir_version: 8, opset_import: ["": 17]>\n'
ONES = "<int64 zero = {0}, int64 one = {1}, int64 last = {-1}, int64 two = {2}, int64[2] parts = {1, 4}>"


def run(text: str) -> tuple[onnx.ModelProto, Result]:
    model = onnx.parser.parse_model(HEAD + text)
    result = Pipeline("repeat(unpack-sequences, eliminate-dead)").run(
        model, settings=Settings(verify="off", on_failure="stop")
    )
    return model, result


def ops(result: Result) -> list[str]:
    return [n.op for n in result.model.graph.nodes]


def reasons(result: Result) -> list[str]:
    return [b["why"] for r in result.report.passes for b in r.blocked]


def assert_same(model: onnx.ModelProto, result: Result, *sizes: int) -> None:
    for size in sizes:
        x = np.random.default_rng(0).normal(size=(size, 5)).astype(np.float32)
        for mode in ("off", "all"):
            a, b = (Session(m, optimization=mode).run({"x": x}) for m in (model, result.proto))
            for name in a:
                np.testing.assert_array_equal(b[name], a[name])  # elements only move


@pytest.mark.parametrize(("split", "sizes"), [("two", [2, 2, 1]), ("parts", [1, 4])])
def test_constant_parts_become_a_split(split: str, sizes: list[int]) -> None:
    model, result = run(
        f"""g (float[n, 5] x) => (float[a, b] y) {ONES} {{
            s = SplitToSequence<axis = 1>(x, {split})
            p = SequenceAt(s, zero)  q = SequenceAt(s, last)
            y = Concat<axis = 1>(q, p)
        }}"""
    )
    assert ops(result) == ["Split", "Concat"]
    assert list(result.model.graph.nodes[0].inputs[1].values) == sizes
    assert_same(model, result, 1, 3)


def test_slices_without_their_axis_become_gathers() -> None:
    """Also along an axis of open size: only the places that are read count."""
    model, result = run(
        f"""g (float[n, 5] x) => (float[b] y) {ONES} {{
            s = SplitToSequence<axis = 0, keepdims = 0>(x)
            p = SequenceAt(s, one)  q = SequenceAt(s, last)
            y = Add(p, q)
        }}"""
    )
    assert ops(result) == ["Gather", "Gather", "Add"]
    assert_same(model, result, 2, 4)


def test_a_constructed_sequence_goes() -> None:
    model, result = run(
        f"""g (float[n, 5] x) => (float[a, b] y) {ONES} {{
            r = Relu(x)  t = Tanh(x)
            s = SequenceConstruct(r, t)
            p = SequenceAt(s, last)
            c = ConcatFromSequence<axis = 0>(s)
            y = Concat<axis = 0>(c, p)
        }}"""
    )
    assert ops(result) == ["Relu", "Tanh", "Concat", "Concat"]
    assert_same(model, result, 0, 2)


@pytest.mark.parametrize(
    ("body", "why"),
    [
        ("s = SplitToSequence<axis = 0>(x, two)  y = SequenceAt(s, zero)", "number of parts of axis 0 is not known"),
        ("s = SplitToSequence<axis = 1>(x, two)  k = SequenceLength(s)  f = CastLike(k, x)  p = SequenceAt(s, zero) "
         "y = Add(p, f)", "SequenceLength 'k' reads the sequence"),
        ("s = SplitToSequence<axis = 1>(x, two)  y = ConcatFromSequence<axis = 1>(s)", "reads the sequence"),
    ],
)  # fmt: skip
def test_near_misses(body: str, why: str) -> None:
    model, result = run(f"g (float[n, 5] x) => (float[a, b] y) {ONES} {{ {body} }}")
    assert any(why in reason for reason in reasons(result)), reasons(result)
    assert result.report.passes[0].status == "unchanged"
    assert_same(model, result, 2)
