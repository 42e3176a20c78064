"""Residual blocks: which additions end one and why others do not; what leaving them out leaves."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import numpy as np
import onnx
import onnx.parser
import pytest
from onnx import numpy_helper

from graphopt.analysis.blocks import Block, Blocks, find_blocks
from graphopt.analysis.dominators import Dominators
from graphopt.analysis.shapes import Shapes
from graphopt.errors import DataError, SpecError
from graphopt.model import Model, load
from graphopt.pipeline import Pipeline, Result, Settings
from graphopt.runtime import Session
from graphopt.samples import Samples

TOLERANCE = 1e-6
"""Relative to the largest element: dropping a branch leaves the arithmetic of the rest as it was, but for its order."""

NORM = "LayerNormalization <axis: int = -1>"


def parsed(body: str, *, shape: str = "N, 5, 8", inputs: str = "", outputs: str = "", opset: int = 17) -> Model:
    """Return a model over `x` (N, 5, 8) -> `y`; every name that starts with W is a seeded random weight (8, 8)."""
    text = f"""<ir_version: 8, opset_import: ["": {opset}]>
        g (float[{shape}] x{inputs}) => (float[{shape}] y{outputs}) <WEIGHTS> {{ {body} }}"""
    names = sorted({w for w in text.replace(")", " ").replace(",", " ").split() if w[0] == "W" and w[1:].isdigit()})
    text = text.replace("<WEIGHTS>", f"<{', '.join(f'float[8, 8] {n} = {{{ZEROS}}}' for n in names)}>" if names else "")
    proto = onnx.parser.parse_model(text)
    rng = np.random.default_rng(7)
    for index, name in enumerate(names):
        values = np.asarray(rng.normal(size=(8, 8)) / 4, np.float32)
        proto.graph.initializer[index].CopyFrom(numpy_helper.from_array(values, name))
    for index, node in enumerate(proto.graph.node):
        node.name = node.name or f"n{index}_{node.output[0]}"
    return load(proto)


ZEROS = ", ".join(["0"] * 64)


def found(model: Model) -> Blocks:
    return find_blocks(model, Shapes(model))


def names(model: Model) -> dict[str, str]:
    """Return by the output of each addition the name of its x, or why it ends no block."""
    blocks = found(model)
    told = {b.add.outputs[0].name: b.source.name for b in blocks.found}
    return told | {node.outputs[0].name: why for node, why in blocks.refused}


def one(model: Model) -> Block:
    (block,) = found(model).found
    return block


def feeds(count: int = 4, batch: int = 2) -> Iterator[dict[str, Any]]:
    for seed in range(count):
        yield {"x": np.asarray(np.random.default_rng(seed).normal(size=(batch, 5, 8)), np.float32)}


def run(pipeline: str, model: Model, samples: Samples | None = None, **settings: Any) -> Result:
    given = Settings(verify="off", **{"on_failure": "stop", **settings})
    return Pipeline(pipeline).run(model, samples=samples or Samples(feeds, "four feeds"), settings=given)


def assert_same(one: Model, other: Model, batches: tuple[int, ...] = (1, 3)) -> None:
    a, b = Session(one, optimization="off"), Session(other, optimization="off")
    for batch in batches:
        for feed in feeds(1, batch):
            for name, wanted in a.run(feed).items():
                largest = float(np.abs(wanted).max(initial=1e-30))
                np.testing.assert_allclose(b.run(feed)[name], wanted, rtol=0, atol=TOLERANCE * largest)


TWO = """
    a = MatMul(x, W0) b = Relu(a) c = MatMul(b, W1) s = Add(x, c)
    d = MatMul(s, W2) e = Relu(d) f = MatMul(e, W3) t = Add(f, s)
    y = Tanh(t)
"""
"""Two blocks in a row, the branch on either side of the Add."""


def test_blocks_in_a_row() -> None:
    blocks = found(parsed(TWO)).found
    assert [b.add.outputs[0].name for b in blocks] == ["s", "t"]
    assert [b.source.name for b in blocks] == ["x", "s"]
    assert [[n.op for n in b.nodes] for b in blocks] == [["MatMul", "Relu", "MatMul"]] * 2
    assert not blocks[0].overlaps(blocks[1])


def test_macs_of_open_sizes_need_shapes() -> None:
    model = parsed(TWO)
    assert one_of(found(model).found, "s").macs is None
    sized = find_blocks(model, Shapes(model), inputs={"x": (2, 5, 8)})
    assert one_of(sized.found, "s").macs == 2 * (2 * 5 * 8 * 8)


def one_of(blocks: list[Block], output: str) -> Block:
    return next(b for b in blocks if b.add.outputs[0].name == output)


@pytest.mark.parametrize(
    ("body", "source"),
    [
        ("n = LayerNormalization(x, S, S) a = MatMul(n, W0) s = Add(x, a) y = Tanh(s)", "x"),  # pre-norm
        ("a = MatMul(x, W0) s = Add(x, a) y = LayerNormalization(s, S, S)", "x"),  # post-norm
        ("a = MatMul(x, W0) g = Mul(a, S) s = Add(x, g) y = Tanh(s)", "x"),  # layer scale
        ("h = Mul(x, S) a = MatMul(x, W0) s = Add(h, a) y = Tanh(s)", "x"),  # the other term scaled
        ("a = MatMul(x, W0) g = Sigmoid(a) m = Mul(g, x) s = Add(x, m) y = Tanh(s)", "x"),  # gated
    ],
)
def test_forms_of_residual_blocks(body: str, source: str) -> None:
    model = parsed("S = Constant<value = float[8] {1, 2, 1, 2, 1, 2, 1, 2}>() " + body)
    assert names(model)["s"] == source


def test_terms_side_by_side_are_blocks_each() -> None:
    """Attention and a feed-forward layer that both read one normalised input, added to x in either order."""
    shared = "n = Softmax(x) a = MatMul(n, W0) b = MatMul(n, W1) "
    for sums in ("s = Add(x, a) t = Add(s, b)", "s = Add(a, b) t = Add(x, s)", "s = Add(x, b) t = Add(a, s)"):
        blocks = found(parsed(f"{shared} {sums} y = Tanh(t)")).found
        assert [b.source.name for b in blocks] == ["x", "x"], sums
        assert [b.total.name for b in blocks] == ["t", "t"], sums


def test_nested_blocks_know_what_holds_them() -> None:
    model = parsed("a = MatMul(x, W0) b = MatMul(a, W1) s = Add(a, b) c = MatMul(s, W2) t = Add(x, c) y = Tanh(t)")
    inner, outer = found(model).found
    assert (inner.inside, outer.inside) == (outer.label, "")
    assert inner.overlaps(outer)
    assert outer.overlaps(inner)


def test_a_mask_or_memory_may_flow_in() -> None:
    model = parsed(
        "q = MatMul(x, W0) k = MatMul(m, W1) kt = Transpose<perm = [0, 2, 1]>(k) p = MatMul(q, kt) w = Softmax(p)"
        " o = MatMul(w, m) s = Add(x, o) y = Tanh(s)",
        inputs=", float[N, 7, 8] m",
    )
    block = one(model)
    assert block.source.name == "x"
    assert "k" in {t.name for n in block.nodes for t in n.outputs}, "keys of the memory serve the block alone"


@pytest.mark.parametrize(
    ("body", "why"),
    [
        ("a = MatMul(x, W0) b = MatMul(x, W1) s = Add(a, b) y = Tanh(s)", "neither term is made from the other"),
        ("c = Constant<value = float[8] {1, 1, 1, 1, 1, 1, 1, 1}>() s = Add(x, c) y = Tanh(s)", "adds a constant"),
        ("s = Add(x, x) y = Tanh(s)", "adds a tensor to itself"),
        ("a = MatMul(x, W0) b = Relu(x) s = Sum(x, a, b) y = Tanh(s)", "it adds 3 tensors"),
        ("a = MatMul(x, W0) s = Add(x, a) b = Add(s, a) y = Tanh(b)", "neither term is made from the other"),
        ("p, q = Split<axis = -1>(x) a = Relu(q) s = Add(p, a) y = Concat<axis = -1>(s, q)", "neither term is made"),
        ("r = ReduceMean<axes = [1]>(x) a = Relu(x) s = Add(r, a) y = Tanh(s)", "neither term is made"),
        ("r = ReduceMean<axes = [1]>(x) a = Expand(r, E) b = Relu(a) s = Add(r, b) y = Tanh(s)", "its shape is not"),
    ],
)
def test_additions_that_end_no_block(body: str, why: str) -> None:
    shape = "E = Constant<value = int64[3] {1, 5, 1}>() "
    assert why in names(parsed((shape if "E)" in body else "") + body))["s"]


def test_integers_are_no_features() -> None:
    model = parsed("i = Cast<to = 7>(x) a = Abs(i) s = Add(i, a) y = Cast<to = 1>(s)")
    assert names(model) == {"s": "it adds int64 numbers"}


def test_every_addition_is_a_block_or_has_a_reason() -> None:
    model = parsed("a = MatMul(x, W0) s = Add(x, a) b = MatMul(s, W1) c = MatMul(s, W2) t = Add(b, c) y = Tanh(t)")
    assert names(model) == {"s": "x", "t": "neither term is made from the other alone"}


def test_inputs_of_subgraphs_are_read_by_their_node() -> None:
    """What a branch of an If reads from outside does not serve the Add alone."""
    text = """<ir_version: 8, opset_import: ["": 17]>
        g (float[N, 8] x, bool flag) => (float[N, 8] y) {
            a = Relu(x) s = Add(x, a)
            y = If(flag) <then_branch = t () => (float[N, 8] p) { p = Add(s, a) },
                          else_branch = e () => (float[N, 8] q) { q = Neg(s) }>
        }"""
    model = load(onnx.parser.parse_model(text))
    assert not found(model).found
    graph = model.graph
    ways = Dominators(graph, [(graph.nodes[1], 1)])
    assert ways.serving(graph.nodes[1], 1) == []
    assert ways.dominates(graph.inputs[0], graph.nodes[1].outputs[0])


@pytest.mark.parametrize("criterion", ["cosine", "output"])
def test_one_is_left_out_and_the_rest_computes_as_before(criterion: str) -> None:
    model = parsed(TWO)
    result = run(f"drop-blocks{{criterion={criterion}}}", model)
    left = [n.op for n in result.model.graph.nodes]
    assert left == ["MatMul", "Relu", "MatMul", "Add", "Tanh"]
    gone = next(iter(dropped_names(result.model)))
    body = {"n3_s": "d = MatMul(x, W2) e = Relu(d) f = MatMul(e, W3) t = Add(f, x) y = Tanh(t)",
            "n7_t": "a = MatMul(x, W0) b = Relu(a) c = MatMul(b, W1) s = Add(x, c) y = Tanh(s)"}[gone]  # fmt: skip
    expected = parsed(body + " z = MatMul(x, W0) z1 = MatMul(x, W1) z2 = MatMul(x, W2) z3 = MatMul(x, W3)")
    assert_same(expected, result.model)


def dropped_names(model: Model) -> set[str]:
    from graphopt.passes.drop_blocks import dropped

    return set(dropped(model))


@dataclass(frozen=True)
class Strength:
    """Branches of a chain, by how much they add."""

    factors: tuple[float, ...] = (0.5, 0.01, 2.0)

    def model(self) -> Model:
        body, x = "", "x"
        for i, factor in enumerate(self.factors):
            body += f"k{i} = Constant<value = float {{{factor}}}>() a{i} = MatMul({x}, W{i}) b{i} = Mul(a{i}, k{i}) "
            body += f"s{i} = Add({x}, b{i}) "
            x = f"s{i}"
        return parsed(body + f"y = Tanh({x})")


@pytest.mark.parametrize("criterion", ["cosine", "output"])
def test_the_weakest_go_first(criterion: str) -> None:
    model = Strength().model()
    by_label = {b.label: b.add.outputs[0].name for b in found(model).found}
    for amount, gone in ((1, {"s1"}), (2, {"s0", "s1"}), (3, {"s0", "s1", "s2"})):
        result = run(f"drop-blocks{{amount={amount},criterion={criterion}}}", model)
        assert {by_label[n] for n in dropped_names(result.model)} == gone


def test_the_same_request_again_does_nothing_and_a_larger_one_the_rest() -> None:
    model = Strength().model()
    once = run("drop-blocks{amount=2}", model).model
    again = run("drop-blocks{amount=2}", load(once.proto))
    assert again.report.passes[0].status == "unchanged"
    more = run("drop-blocks{amount=3}", load(once.proto))
    assert dropped_names(more.model) == {b.label for b in found(model).found}
    assert not any(n.op == "Add" for n in more.model.graph.nodes)


def test_marks_survive_when_what_bears_them_goes() -> None:
    """The mark of an inner block lies on a node of the outer one, which goes later."""
    model = parsed("a = MatMul(x, W0) b = MatMul(a, W1) s = Add(a, b) c = MatMul(s, W2) t = Add(x, c) y = Tanh(t)")
    inner, outer = found(model).found
    once = run(f"drop-blocks{{blocks=['{inner.label}']}}", model).model
    twice = run(f"drop-blocks{{blocks=['{outer.label}']}}", once).model
    assert dropped_names(twice) == {inner.label, outer.label}


def test_blocks_by_name_need_no_samples() -> None:
    model = Strength().model()
    label = found(model).found[2].label
    result = Pipeline(f"drop-blocks{{blocks=['{label}']}}").run(model, settings=Settings(verify="off"))
    assert dropped_names(result.model) == {label}


def test_an_outer_block_takes_inner_ones_with_it() -> None:
    model = parsed("a = MatMul(x, W0) b = MatMul(a, W1) s = Add(a, b) c = MatMul(s, W2) t = Add(x, c) y = Tanh(t)")
    result = run("drop-blocks{blocks=['*']}", model)
    assert [n.op for n in result.model.graph.nodes] == ["Tanh"]
    assert result.report.passes[0].changes == 1


def test_what_is_asked_for_and_not_there() -> None:
    model = parsed(TWO)
    unknown = run("drop-blocks{blocks=['n3_z']}", model)
    assert "there is no such block; did you mean 'n3_s'" in blocked(unknown)["n3_z"]
    many = run("drop-blocks{amount=5}", model)
    assert "3 more than can be left out" in blocked(many)["the model"]


def blocked(result: Result) -> dict[str, str]:
    return {b["where"]: b["why"] for b in result.report.passes[0].blocked}


def test_only_and_skip_choose_among_names() -> None:
    model = Strength().model()
    labels = [b.label for b in found(model).found]
    assert dropped_names(run(f"drop-blocks{{only=['{labels[2]}']}}", model).model) == {labels[2]}
    assert dropped_names(run(f"drop-blocks{{skip=['{labels[1]}']}}", model).model) == {labels[0]}


def test_an_input_never_becomes_an_output() -> None:
    model = parsed("a = MatMul(x, W0) y = Add(x, a)")
    result = run("drop-blocks", model)
    assert "it joins a graph input to an output" in next(iter(blocked(result).values()))
    assert [n.op for n in result.model.graph.nodes] == ["MatMul", "Add"]


def test_a_block_that_ends_in_an_output_keeps_its_name() -> None:
    model = parsed("r = Tanh(x) a = MatMul(r, W0) y = Add(r, a)")
    result = run("drop-blocks", model)
    assert [(n.op, n.outputs[0].name) for n in result.model.graph.nodes] == [("Tanh", "y")]
    assert [s.name for s in result.model.outputs] == ["y"]


def test_choosing_without_samples_is_refused() -> None:
    with pytest.raises(DataError, match="there are none"):
        Pipeline("drop-blocks").run(parsed(TWO), settings=Settings(verify="off"))


@pytest.mark.parametrize("options", ["criterion=depth", "amount=-1", "samples=-1"])
def test_values_that_are_no_choice(options: str) -> None:
    with pytest.raises(SpecError, match=r"criterion is|amount is|samples is"):
        Pipeline(f"drop-blocks{{{options}}}")


def test_half_precision() -> None:
    """Gates of the criterion `output` are of the branch's type."""
    text = """<ir_version: 8, opset_import: ["": 17]> g (float16[N, 8] x) => (float16[N, 8] y) {
        a = Relu(x) s = Add(x, a) b = Sigmoid(s) t = Add(s, b) y = Tanh(t) }"""
    rng = np.random.default_rng(0)
    samples = Samples(lambda: iter([{"x": rng.normal(size=(3, 8)).astype(np.float16)}]), "one")
    result = run("drop-blocks{criterion=output}", load(onnx.parser.parse_model(text)), samples)
    assert len(result.model.graph.nodes) == 3


def test_near_linear() -> None:
    """Thousands of blocks in a row, each inside none: seconds, not minutes."""
    count = 1500
    body = "s0 = Relu(x) "
    body += "".join(f"a{i} = Relu(s{i}) b{i} = Tanh(a{i}) s{i + 1} = Add(s{i}, b{i}) " for i in range(count))
    assert len(found(parsed(body + f"y = Tanh(s{count})")).found) == count
