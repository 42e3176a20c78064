"""The text of a graph: golden, stable, bounded; and differences of texts."""

from __future__ import annotations

import random
from collections.abc import Sequence

import numpy as np
import onnx
from hypothesis import given, settings
from hypothesis import strategies as st
from onnx import TensorProto, helper, numpy_helper

from graphopt.model import load
from graphopt.text import diff, to_text

from .protos import models

F = TensorProto.FLOAT


def example() -> onnx.ModelProto:
    then = helper.make_graph(
        [helper.make_node("Mul", ["x", "k"], ["m"])], "yes", [], [helper.make_tensor_value_info("m", F, None)],
        [numpy_helper.from_array(np.array(0.1, np.float32), "k")],
    )  # fmt: skip
    other = helper.make_graph([helper.make_node("Identity", ["x"], ["e"])], "no", [], [onnx.ValueInfoProto(name="e")])
    nodes = [
        helper.make_node("Conv", ["x", "w", ""], ["c"], name="conv1", strides=[2, 2], auto_pad="VALID"),
        helper.make_node("If", ["flag"], ["i"], else_branch=other, then_branch=then),
        helper.make_node("Twice", ["c"], ["y", ""], domain="my.ops", alpha=0.3),
    ]
    weights = [
        numpy_helper.from_array(np.zeros((4, 3, 3, 3), np.float32), "w"),
        numpy_helper.from_array(np.array([1, -1], np.int64), "shape"),
    ]
    inputs = [
        helper.make_tensor_value_info("x", F, [1, 3, "H", None]),
        helper.make_tensor_value_info("flag", TensorProto.BOOL, []),
    ]
    graph = helper.make_graph(nodes, "main", inputs, [helper.make_tensor_value_info("y", F, [1, 4, None])], weights)
    imports = [helper.make_opsetid("", 17), helper.make_opsetid("my.ops", 1)]
    proto = helper.make_model(graph, opset_imports=imports, ir_version=8)
    body = helper.make_node("Mul", ["a", "a"], ["b"])
    scaled = helper.make_node("LeakyRelu", ["b"], ["d"])
    scaled.attribute.add(name="alpha", ref_attr_name="alpha", type=onnx.AttributeProto.FLOAT)
    proto.functions.append(
        helper.make_function("my.ops", "Twice", ["a"], ["d", "b"], [body, scaled], imports, ["alpha"])
    )
    return proto


GOLDEN = """\
model ir 8, opset 17, 'my.ops' 1
graph 'main' (%x: float32[1,3,H,?], %flag: bool[]) -> (%y: float32[1,4,?]) {
  %w: float32[4,3,3,3]
  %shape: int64[2] = [1,-1]
  %c = Conv(%x, %w, _) {auto_pad='VALID', strides=[2,2]}  # conv1
  %i = If(%flag)
      else_branch: graph 'no' () -> (%e) {
        %e = Identity(%x)
      }
      then_branch: graph 'yes' () -> (%m: float32[...]) {
        %k: float32[] = 0.1
        %m: float32[...] = Mul(%x, %k)
      }
  %y: float32[1,4,?], _ = my.ops.Twice(%c) {alpha=0.3}
}
function my.ops.Twice<alpha> (%a) -> (%d, %b) {
  %b = Mul(%a, %a)
  %d = LeakyRelu(%b) {alpha=@alpha}
}
"""


def test_golden() -> None:
    model = load(example())
    assert to_text(model) == GOLDEN
    assert to_text(model.graph) == GOLDEN[GOLDEN.index("graph 'main'") : GOLDEN.index("function")]


def test_texts_read_no_large_weights_and_change_nothing() -> None:
    model = load(example())
    to_text(model)
    assert all(not isinstance(c._values, np.ndarray) for c in model.constants())
    assert model.proto == example()


def test_odd_names_stay_on_their_line() -> None:
    proto = example()
    proto.graph.node[0].name = "a\nb"
    proto.graph.node[2].name = "n" * 10_000
    text = to_text(load(proto))
    assert len(text.splitlines()) == len(GOLDEN.splitlines())
    assert "# a\\nb" in text
    assert max(map(len, text.splitlines())) < 500


@given(models())
@settings(max_examples=25)
def test_every_model_has_a_bounded_text(proto: onnx.ModelProto) -> None:
    text = to_text(load(proto))
    assert text == to_text(load(proto))
    assert max(map(len, text.splitlines())) < 3000


def applied(before: Sequence[str], patch: str) -> list[str]:
    """Apply a unified diff."""
    out: list[str] = []
    at = 0
    for line in patch.splitlines():
        if line.startswith("@@"):
            start = int(line.split()[1][1:].split(",")[0]) - 1
            out += before[at:start]
            at = start
        elif line[0] == "+":
            out.append(line[1:])
        else:
            assert before[at] == line[1:]
            at += 1
            out += [line[1:]] * (line[0] == " ")
    return out + list(before[at:])


LINES = st.lists(st.sampled_from("abcdefgh"), max_size=25)


@given(LINES, LINES, st.integers(0, 3))
@settings(max_examples=300)
def test_a_diff_applied_gives_the_other_text(a: list[str], b: list[str], context: int) -> None:
    patch = diff("\n".join(a), "\n".join(b), context=context)
    assert applied(a, patch) == b
    assert (patch == "") == (a == b)


def test_a_diff_is_short() -> None:
    after = GOLDEN.replace("strides=[2,2]", "strides=[1,1]")
    assert diff(GOLDEN, after).splitlines() == [
        "@@ -4,3 +4,3 @@",
        "   %shape: int64[2] = [1,-1]",
        "-  %c = Conv(%x, %w, _) {auto_pad='VALID', strides=[2,2]}  # conv1",
        "+  %c = Conv(%x, %w, _) {auto_pad='VALID', strides=[1,1]}  # conv1",
        "   %i = If(%flag)",
    ]
    assert diff(GOLDEN, GOLDEN) == ""


def test_diffs_of_large_texts_do_not_take_minutes() -> None:
    """difflib alone takes quadratic time on these: minutes."""
    lines = [f"  %t{i} = Add(%t{i - 1}, %c)" for i in range(50_000)]
    shuffled = random.Random(0).sample(lines, len(lines))
    every_seventh = [line for i, line in enumerate(lines) if i % 7]
    equal = ["same"] * 50_000
    for a, b in ((lines, every_seventh), (lines, shuffled), (equal, equal[:30_000] + lines)):
        assert applied(a, diff("\n".join(a), "\n".join(b))) == b
