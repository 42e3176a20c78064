"""The rule language: what patterns find, what every rule is guarded against, and what the driver does."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, ClassVar

import numpy as np
import onnx
import pytest

from graphopt import registry, rule_listing
from graphopt.analysis.constants import DYNAMIC
from graphopt.base import Context
from graphopt.edit import Edit
from graphopt.errors import InternalError, SpecError
from graphopt.matcher import Matcher
from graphopt.model import Model, load
from graphopt.order import sort_nodes
from graphopt.pattern import Constant, Many, Op, Scalar, Value
from graphopt.replacement import FROM, RULE
from graphopt.rewrite import Match, RefusedError, Rewriter, Rule, RulePass
from graphopt.rule_check import check_rule
from graphopt.runtime import evaluate


def model(text: str) -> Model:
    return load(onnx.parser.parse_model(f'<ir_version: 9, opset_import: ["" : 17]> {text}'))


def rewritten(text: str, *rules: type[Rule]) -> tuple[list[str], list[str], Model]:
    """Return operators left, reasons of near misses, and the model after applying rules to the fixpoint."""
    found = model(text)
    reasons: list[str] = []
    context = Context(found, evaluate)
    for graph in list(found.graphs()):
        with Edit(graph) as edit:
            for change in Rewriter(edit, context, rules).changes():
                if change.apply is None:
                    reasons.append(change.why)
                else:
                    change.apply()
        sort_nodes(graph)
    onnx.checker.check_model(found.proto, full_check=True)
    return [n.op for n in found.graph.nodes], reasons, found


class AddTwice(Rule):
    """(x + a) + b  ->  x + (a + b)"""

    @staticmethod
    def pattern(x: Value, a: Constant, b: Constant) -> Value:
        return (x + a) + b

    @staticmethod
    def rewrite(x: Value, a: Constant, b: Constant) -> Value:
        return x + (a.wide + b.wide)


class Swish(Rule):
    """x * clip(x - 3, 0, 6) / 6  ->  Softsign(x)      an algebra only for matching"""

    @staticmethod
    def pattern(op: Op, x: Value) -> Value:
        return x * op.Clip(x - 3.0, 0.0, 6.0) / 6.0

    @staticmethod
    def rewrite(op: Op, x: Value) -> Value:
        return op.Softsign(x)


def test_operands_come_in_any_order_and_numbers_in_any_rank() -> None:
    for product in ("Mul(x, c)", "Mul(c, x)"):
        for shift in ("Add(x, m)", "Sub(x, p)"):
            ops, reasons, _ = rewritten(
                f"""g (float[2,3] x) => (float[2,3] y)
                <float[1] p = {{3.0}}, float m = {{-3.0}},
                 float z = {{0.0}}, float s = {{6.0}}, float[1,1] i = {{0.16666667}}>
                {{ a = {shift}  c = Clip(a, z, s)  d = {product}  y = Mul(i, d) }}""",
                Swish,
            )
            assert ops == ["Softsign"], (product, shift, reasons)


def test_another_number_is_no_match_and_no_near_miss() -> None:
    ops, reasons, _ = rewritten(
        """g (float[2,3] x) => (float[2,3] y) <float p = {3.0}, float z = {0.0}, float s = {6.1}>
        { a = Sub(x, p)  c = Clip(a, z, s)  d = Mul(x, c)  y = Div(d, s) }""",
        Swish,
    )
    assert "Softsign" not in ops
    assert reasons == []


def test_a_chain_shrinks_to_one_node_with_names_and_provenance() -> None:
    chain = "\n".join(f"t{i} = Add({'x' if i == 0 else f't{i - 1}'}, c)" for i in range(30))
    ops, _, found = rewritten(
        f"g (float[2,3] x) => (float[2,3] y) <float c = {{0.5}}> {{ {chain}  y = Add(t29, c) }}", AddTwice
    )
    assert ops == ["Add"]
    node = found.graph.nodes[0]
    assert node.outputs[0].name == "y"
    assert float(node.inputs[1].values) == 15.5
    assert found.metadata(node)[RULE] == "AddTwice"
    assert found.metadata(node)[FROM].startswith("t0, t1, ")
    assert found.metadata(node)[FROM].endswith("…")  # thirty-one names would be too many


def test_inner_values_that_others_need_block_with_a_reason() -> None:
    text = "g (float[2] x) => ({outputs}) <float c = {{0.5}}> {{ t = Add(x, c)  y = Add(t, c)  {more} }}"
    _, reasons, _ = rewritten(text.format(outputs="float[2] y, float[2] t", more=""), AddTwice)
    assert reasons == ["inner value 't' is a graph output"]
    _, reasons, _ = rewritten(text.format(outputs="float[2] y, float[2] z", more="z = Neg(t)"), AddTwice)
    assert reasons == ["inner value 't' is read by node 'z', too"]


def test_a_reader_in_a_subgraph_counts() -> None:
    ops, reasons, _ = rewritten(
        """g (float[2] x, bool k) => (float[2] y, float[2] z) <float c = {0.5}>
        { t = Add(x, c)  y = Add(t, c)
          z = If(k) <then_branch = a () => (float[2] u) { u = Neg(t) },
                     else_branch = b () => (float[2] v) { v = Abs(t) }> }""",
        AddTwice,
    )
    assert ops.count("Add") == 2
    assert "is read by node" in reasons[0]


def test_shared_inner_values_stay_where_a_rule_allows() -> None:
    class Shared(AddTwice):
        """(x + a) + b  ->  x + (a + b)"""

        shared = True

    ops, reasons, _ = rewritten(
        "g (float[2] x) => (float[2] y, float[2] t) <float c = {0.5}> { t = Add(x, c)  y = Add(t, c) }", Shared
    )
    assert sorted(ops) == ["Add", "Add"]
    assert reasons == []


def test_a_result_of_another_shape_is_refused() -> None:
    class DropConstant(Rule):
        """x + 0  ->  x      without minding what broadcasting does"""

        @staticmethod
        def pattern(x: Value, c: Constant) -> Value:
            return x + c

        @staticmethod
        def rewrite(op: Op, x: Value) -> Value:
            return op.Neg(-x)

    _, reasons, _ = rewritten(
        "g (float[3] x) => (float[2,3] y) <float[2,1] c = {0.0, 0.0}> { y = Add(x, c) }", DropConstant
    )
    assert reasons == ["the result would have shape [3], not [2, 3]"]


def test_an_unknown_rank_and_a_constant_with_one_are_refused() -> None:
    ops, reasons, _ = rewritten(
        """g (float[N,M] x, int64[K] s) => (float y) <float[1] c = {0.5}>
        { r = Reshape(x, s)  t = Add(r, c)  y = Add(t, c) }""",
        AddTwice,
    )
    assert ops == ["Reshape", "Add", "Add"]
    assert "the rank of" in reasons[0]


def test_types_and_opsets() -> None:
    class Late(AddTwice):
        """(x + a) + b  ->  x + (a + b)"""

        min_opset = 18

    text = "g ({kind}[2] x) => ({kind}[2] y) <{kind} c = {{1}}> {{ t = Add(x, c)  y = Add(t, c) }}"
    _, reasons, _ = rewritten(text.format(kind="int64"), AddTwice)
    assert reasons == ["the type is int64"]
    _, reasons, _ = rewritten(text.format(kind="float"), Late)
    assert reasons == ["the graph is of opset 17, the rule is for 18"]


def test_overflowing_constants_are_refused() -> None:
    _, reasons, _ = rewritten(
        "g (float[2] x) => (float[2] y) <float c = {3e38}> { t = Add(x, c)  y = Add(t, c) }", AddTwice
    )
    assert reasons == ["a new constant is not a finite float32"]


def test_large_constants_are_not_kept_twice() -> None:
    found = model("g (float[400] x) => (float[400] y, float[400] z) { y = Neg(x)  z = Neg(x) }")
    graph = onnx.helper.make_graph(
        [
            onnx.helper.make_node("Add", ["x", "c"], ["t"]),
            onnx.helper.make_node("Add", ["t", "c"], ["y"]),
            onnx.helper.make_node("Mul", ["x", "c"], ["z"]),
        ],
        "g", list(found.proto.graph.input), list(found.proto.graph.output),
        [onnx.numpy_helper.from_array(np.ones(400, np.float32), "c")],
    )  # fmt: skip
    large = load(onnx.helper.make_model(graph, opset_imports=[onnx.helper.make_opsetid("", 17)], ir_version=9))
    with Edit(large.graph) as edit:
        changes = list(Rewriter(edit, Context(large, evaluate), (AddTwice,)).changes())
    assert [c.why for c in changes] == ["constant 'c' is used elsewhere, too"]


def test_a_capture_used_twice_is_one_tensor_or_equal_constants() -> None:
    class Double(Rule):
        """x * c + y * c  ->  (x + y) * c"""

        @staticmethod
        def pattern(x: Value, y: Value, c: Constant) -> Value:
            return x * c + y * c

        @staticmethod
        def rewrite(x: Value, y: Value, c: Constant) -> Value:
            return (x + y) * c

    text = """g (float[2] a, float[2] b) => (float[2] y) <float c = {{0.5}}, float d = {{{second}}}>
    {{ s = Mul(a, c)  t = Mul(b, d)  y = Add(s, t) }}"""
    assert rewritten(text.format(second=0.5), Double)[0] == ["Add", "Mul"]
    assert rewritten(text.format(second=0.6), Double)[0] == ["Mul", "Mul", "Add"]


def test_parameters_match_as_attribute_or_input_and_defaults_count() -> None:
    class MeanLast(Rule):
        """ReduceMean(x, -1)  ->  Neg(x) mean"""

        @staticmethod
        def pattern(op: Op, x: Value) -> Value:
            return op.ReduceMean(x, axes=[-1], keepdims=1)

        @staticmethod
        def rewrite(op: Op, x: Value) -> Value:
            return op.ReduceSum(x, axes=[-1]) * 0.5

    ops, _, found = rewritten("g (float[3,2] x) => (float[3,1] y) { y = ReduceMean <axes: ints = [-1]> (x) }", MeanLast)
    assert ops == ["ReduceSum", "Mul"]
    assert found.graph.nodes[0].inputs[1].values.tolist() == [-1]  # an input since opset 13


def test_optional_inputs_many_and_several_outputs() -> None:
    class Together(Rule):
        """Concat(Split(x))  ->  Identity(x)"""

        types = None

        @staticmethod
        def pattern(op: Op, x: Value, sizes: Constant | None) -> Value:
            a, b = op.Split(x, sizes, name="split", outputs=2)
            return op.Concat(a, b, name="concat")

        @staticmethod
        def check(m: Match) -> str | None:
            same = m["split"].param("axis") == m["concat"].param("axis")
            return None if same else "the axes differ"

        @staticmethod
        def rewrite(op: Op, x: Value) -> Value:
            return op.Identity(x)

    text = "g (float[4,4] x) => (float[A,B] y) {{ a, b = Split <axis = 0> (x)  y = Concat <axis = {axis}> ({order}) }}"
    assert rewritten(text.format(axis=0, order="a, b"), Together)[0] == ["Identity"]
    assert rewritten(text.format(axis=0, order="b, a"), Together)[0] == ["Split", "Concat"]
    assert rewritten(text.format(axis=1, order="a, b"), Together)[1] == ["the axes differ"]


def test_patterns_with_two_outputs_meet_at_their_inputs() -> None:
    class Both(Rule):
        """Sin(x), Cos(x)  ->  Cos(x), Sin(x) of the negative"""

        @staticmethod
        def pattern(op: Op, x: Value) -> tuple[Value, Value]:
            return op.Sin(x), op.Cos(x)

        @staticmethod
        def rewrite(op: Op, x: Value) -> tuple[Value, Value]:
            return op.Tan(x), op.Atan(x)

    ops, _, _ = rewritten(
        "g (float[2] x, float[2] w) => (float[2] y, float[2] z, float[2] v) { y = Sin(x)  z = Cos(x)  v = Cos(w) }",
        Both,
    )
    assert sorted(ops) == ["Atan", "Cos", "Tan"]


def test_many_takes_all_inputs() -> None:
    class Sums(Rule):
        """Sum(xs…)  ->  Max(xs…)"""

        @staticmethod
        def pattern(op: Op, xs: Many) -> Value:
            return op.Sum(xs)

        @staticmethod
        def rewrite(op: Op, xs: Any) -> Value:
            return op.Max(*xs)

    ops, _, found = rewritten("g (float[2] a, float[2] b, float[2] c) => (float[2] y) { y = Sum(a, b, c) }", Sums)
    assert ops == ["Max"]
    assert [t.name for t in found.graph.nodes[0].inputs] == ["a", "b", "c"]


def test_declared_sizes_unify() -> None:
    class Square(Rule):
        """MatMul(x, w)  ->  Relu(x)      w square"""

        shapes: ClassVar = {"x": "... n", "w": "n n"}

        @staticmethod
        def pattern(op: Op, x: Value, w: Value) -> Value:
            return op.MatMul(x, w)

        @staticmethod
        def rewrite(op: Op, x: Value) -> Value:
            return op.Relu(x)

    text = "g (float[2,3] x, float[3,{m}] w) => (float[2,{m}] y) {{ y = MatMul(x, w) }}"
    assert rewritten(text.format(m=3), Square)[0] == ["Relu"]
    assert rewritten(text.format(m=4), Square)[1] == ["w and x differ in size n: 4 and 3"]


def test_a_rewriting_may_refuse_and_bypass() -> None:
    class Undo(Rule):
        """-(-x)  ->  x"""

        @staticmethod
        def pattern(op: Op, x: Value) -> Value:
            return op.Neg(-x)

        @staticmethod
        def rewrite(x: Value) -> Value:
            if x.rank == 1:
                raise RefusedError("a vector")
            return x

    text = "g (float[{shape}] x) => (float[{shape}] y) {{ w = Relu(x)  s = Neg(w)  t = Neg(s)  y = Abs(t) }}"
    assert rewritten(text.format(shape="2,2"), Undo)[0] == ["Relu", "Abs"]
    assert rewritten(text.format(shape="2"), Undo)[1] == ["a vector"]
    ops, _, found = rewritten("g (float[2,2] x) => (float[2,2] y) { w = Relu(x) s = Neg(w) y = Neg(s) }", Undo)
    assert ops == ["Relu"]
    assert found.graph.nodes[0].outputs[0].name == "y"
    _, reasons, _ = rewritten("g (float[2,2] x) => (float[2,2] y) { s = Neg(x) y = Neg(s) }", Undo)
    assert reasons == ["it joins a graph input to an output"]


def test_oscillation_is_found_and_named() -> None:
    class There(Rule):
        """Sin(x)  ->  Cos(x)"""

        @staticmethod
        def pattern(op: Op, x: Value) -> Value:
            return op.Sin(x)

        @staticmethod
        def rewrite(op: Op, x: Value) -> Value:
            return op.Cos(x)

    class Back(Rule):
        """Cos(x)  ->  Sin(x)"""

        @staticmethod
        def pattern(op: Op, x: Value) -> Value:
            return op.Cos(x)

        @staticmethod
        def rewrite(op: Op, x: Value) -> Value:
            return op.Sin(x)

    with pytest.raises(InternalError, match="rewrite 'y' again and again: Back, There"):
        rewritten("g (float[2] x) => (float[2] y) { y = Sin(x) }", There, Back)


def test_constants_of_functions_become_nodes() -> None:
    found = load(
        onnx.parser.parse_model(
            """<ir_version: 9, opset_import: ["" : 17, "local" : 1]>
            g (float[2] x) => (float[2] y) { y = local.f(x) }
            <domain: "local", opset_import: ["" : 17]>
            f (x) => (y) { c = Constant <value = float {0.5}> ()  t = Add(x, c)  y = Add(t, c) }"""
        )
    )
    body = found.functions[0]

    class Anything(AddTwice):
        """(x + a) + b  ->  x + (a + b)      of any type: a function's are not known"""

        types = None

    with Edit(body) as edit:
        for change in Rewriter(edit, Context(found, evaluate), (Anything,)).changes():
            assert change.apply is not None, change.why
            change.apply()
    sort_nodes(body)
    assert [n.op for n in body.nodes if n.op != "Constant"] == ["Add"]
    onnx.checker.check_model(found.proto, full_check=True)
    assert evaluate(found.proto, {"x": np.array([1, 2], np.float32)})["y"].tolist() == [2.0, 3.0]


def _of_q(q: Value) -> str | None:
    return q.name


@pytest.mark.parametrize(
    ("body", "message"),
    [
        ({"__doc__": None}, "needs a docstring"),
        ({"rewrite": None}, "has no rewrite"),
        ({"check": staticmethod(_of_q)}, "check asks for 'q'"),
    ],
)
def test_wrong_rules_are_refused_when_they_are_made(body: dict[str, Any], message: str) -> None:
    good: dict[str, Any] = {
        "__doc__": "-x -> x", "pattern": staticmethod(_negated), "rewrite": staticmethod(lambda x: x),
    }  # fmt: skip
    type("Fine", (Rule,), dict(good))
    with pytest.raises(SpecError, match=message):
        type("Wrong", (Rule,), {**good, **body})


def _negated(x: Value) -> Value:
    return -x


def test_a_constant_cannot_be_subtracted_in_a_pattern() -> None:
    def pattern(x: Value, c: Constant) -> Value:
        return x - c

    with pytest.raises(SpecError, match="Sub by the constant 'c'"):
        type("R", (Rule,), {"__doc__": "a", "pattern": staticmethod(pattern), "rewrite": staticmethod(lambda x: x)})


def test_cases_notice_a_missing_guard(monkeypatch: pytest.MonkeyPatch) -> None:
    """Without the guard of inner values, the generated cases of a plain rule fail."""
    assert check_rule(AddTwice).problems == []
    monkeypatch.setattr(Rewriter, "_inner", lambda *_: None)
    assert check_rule(AddTwice, wanted=200, until_problem=True).problems


def test_cases_notice_wrong_algebra_numbers_and_domains(monkeypatch: pytest.MonkeyPatch) -> None:
    class Wrong(AddTwice):
        """(x + a) + b  ->  x + (a - b)"""

        @staticmethod
        def rewrite(x: Value, a: Constant, b: Constant) -> Value:
            return x + (a.wide - b.wide)

    assert "differs by" in check_rule(Wrong, until_problem=True).problems[0]
    monkeypatch.setattr(Matcher, "_stands", lambda *_: True)
    assert any("another domain" in p for p in check_rule(AddTwice, wanted=200, until_problem=True).problems)


def test_cases_notice_a_number_that_matches_too_much(monkeypatch: pytest.MonkeyPatch) -> None:
    class Half(Rule):
        """x * 0.5 + x * 0.5  ->  x"""

        @staticmethod
        def pattern(x: Value) -> Value:
            return x * 0.5 + x * 0.5

        @staticmethod
        def rewrite(x: Value) -> Value:
            return x * 1.0

    assert check_rule(Half).problems == []
    monkeypatch.setattr("graphopt.matcher.is_number", lambda *_: True)
    assert any("another number" in p for p in check_rule(Half, wanted=200, until_problem=True).problems)


def test_node_views_read_defaults_and_computed_parameters() -> None:
    seen: list[Any] = []

    class Look(Rule):
        """Softmax(Reshape(x))  ->  nothing"""

        @staticmethod
        def pattern(op: Op, x: Value, s: Value) -> Value:
            return op.Softmax(op.Reshape(x, s, name="reshape"), name="softmax")

        @staticmethod
        def check(m: Match) -> str | None:
            seen.extend([m["softmax"].param("axis"), m["reshape"].param("shape"), "other" in m])
            return "only looking"

        @staticmethod
        def rewrite(x: Value) -> Value:
            return x

    rewritten("g (float[4] x, int64[2] s) => (float[A,B] y) { r = Reshape(x, s)  y = Softmax(r) }", Look)
    assert seen == [-1, DYNAMIC, False]


def test_a_rule_pass_runs_in_a_pipeline() -> None:
    @dataclass(frozen=True)
    class Adds(RulePass):
        """Merge additions."""

        name: ClassVar[str] = "merge-adds-for-test"
        rules: ClassVar = (AddTwice,)

    found = model("g (float[2] x) => (float[2] y) <float c = {0.5}> { t = Add(x, c)  y = Add(t, c) }")
    changes = list(Adds().run(found.graph, Context(found, evaluate)))
    assert [(c.where, c.what) for c in changes] == [("y", "AddTwice: (x + a) + b  ->  x + (a + b)")]


def test_scalars_give_their_number() -> None:
    class Power(Rule):
        """x ** s  ->  x * s"""

        @staticmethod
        def pattern(x: Value, s: Scalar) -> Value:
            return x**s

        @staticmethod
        def rewrite(x: Value, s: Scalar) -> Value:
            return x * float(s.number)

    _, _, found = rewritten("g (float[2] x) => (float[2] y) <float[1] s = {3.0}> { y = Pow(x, s) }", Power)
    assert found.graph.nodes[0].inputs[1].values == 3.0


def test_cases_notice_numbers_out_of_nan() -> None:
    class ExpLog(Rule):
        """exp(log(x))  ->  x"""

        @staticmethod
        def pattern(op: Op, x: Value) -> Value:
            return op.Exp(op.Log(x))

        @staticmethod
        def rewrite(x: Value) -> Value:
            return x

    class Widening(ExpLog):
        """exp(log(x))  ->  x      also below 0"""

        widens = True

    assert "is a number where the original is NaN" in check_rule(ExpLog, until_problem=True).problems[0]
    assert check_rule(Widening).problems == []


def test_cases_notice_slopes_below_zero() -> None:
    class Leaky(Rule):
        """LeakyRelu(Relu(x))  ->  Relu(x)      wrong the other way round"""

        @staticmethod
        def pattern(op: Op, x: Value) -> Value:
            return op.Relu(op.LeakyRelu(x))

        @staticmethod
        def rewrite(op: Op, x: Value) -> Value:
            return op.Relu(x)

    assert "differs" in check_rule(Leaky, wanted=100, until_problem=True).problems[0]


@pytest.mark.parametrize(("kind", "hint"), [("flaot32", "float32"), ("int33", "int32")])
def test_element_types_are_known_ones(kind: str, hint: str) -> None:
    with pytest.raises(SpecError, match=f"'{kind}' is no element type") as caught:
        type("R", (AddTwice,), {"__doc__": "a -> b", "types": frozenset({kind})})
    assert hint in (caught.value.hint or "")


def test_operators_that_onnx_does_not_have_are_named() -> None:
    def pattern(op: Op, x: Value) -> Value:
        return op.Logg(x)

    with pytest.raises(SpecError, match="no operator 'Logg'") as caught:
        type("R", (Rule,), {"__doc__": "a", "pattern": staticmethod(pattern), "rewrite": staticmethod(lambda x: x)})
    assert "Log" in (caught.value.hint or "")


def test_where_is_part_of_the_pattern_and_says_nothing() -> None:
    class OfPairs(AddTwice):
        """(x + a) + b  ->  x + (a + b)      x a matrix of two columns"""

        @staticmethod
        def where(x: Value) -> bool:
            return x.shape is not None and x.shape[-1] == 2

    text = "g (float[3,{n}] x) => (float[3,{n}] y) <float c = {{0.5}}> {{ t = Add(x, c)  y = Add(t, c) }}"
    assert rewritten(text.format(n=2), OfPairs)[:2] == (["Add"], [])
    assert rewritten(text.format(n=3), OfPairs)[:2] == (["Add", "Add"], [])


def test_rules_that_find_no_end_are_stopped_and_named() -> None:
    class Grow(Rule):
        """Sin(x)  ->  Sin(Sin(x) + 1)"""

        @staticmethod
        def pattern(op: Op, x: Value) -> Value:
            return op.Sin(x)

        @staticmethod
        def rewrite(op: Op, x: Value) -> Value:
            return op.Cos(op.Sin(x))

    with pytest.raises(InternalError, match="Grow"):
        rewritten("g (float[2] x) => (float[2] y) { y = Sin(x) }", Grow)


class OpenClip(Rule):
    """clip(x, 0, inf)  ->  Relu(x)"""

    @staticmethod
    def pattern(op: Op, x: Value) -> Value:
        return op.Clip(x, min=0.0, max=np.inf)

    @staticmethod
    def rewrite(op: Op, x: Value) -> Value:
        return op.Relu(x)


@pytest.mark.parametrize("opset", [6, 17])  # an attribute, and an input
@pytest.mark.parametrize(("most", "left"), [(6.0, "Clip"), (3.4e38, "Clip"), (np.inf, "Relu")])
def test_no_number_is_close_to_an_infinite_one(opset: int, most: float, left: str) -> None:
    limits = {"min": 0.0, "max": most}
    given = [onnx.numpy_helper.from_array(np.array(v, np.float32), k) for k, v in limits.items()] if opset > 6 else []
    node = onnx.helper.make_node("Clip", ["x", *(t.name for t in given)], ["y"])
    node.attribute.extend(onnx.helper.make_attribute(k, v) for k, v in limits.items() if not given)
    ends = [onnx.helper.make_tensor_value_info(name, onnx.TensorProto.FLOAT, [2]) for name in ("x", "y")]
    graph = onnx.helper.make_graph([node], "g", ends[:1], ends[1:], given)
    found = load(onnx.helper.make_model(graph, opset_imports=[onnx.helper.make_opsetid("", opset)], ir_version=8))
    with Edit(found.graph) as edit:
        for change in Rewriter(edit, Context(found, evaluate), [OpenClip]).changes():
            assert change.apply is not None
            change.apply()
    assert [n.op for n in found.graph.nodes] == [left]


def test_listing_passes_without_rules_is_an_error() -> None:
    with pytest.raises(SpecError, match="eliminate-dead: not made of rules"):
        rule_listing.rows({"eliminate-dead": registry.get("eliminate-dead")}, check=False, seed=0)
    rows = rule_listing.rows({"fuse-softmax": registry.get("fuse-softmax")}, check=False, seed=0)
    assert all("->" in row["algebra"] for row in rows)
