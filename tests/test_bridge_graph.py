"""How an ONNX graph becomes a module, where its constants are found, and how they are written back."""

from __future__ import annotations

import copy
import subprocess
import sys
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import pytest
from onnx import TensorProto, helper, numpy_helper

pytest.importorskip("torch")
import torch

from graphopt.bridge import TrainableGraph
from graphopt.errors import DataError, ModelError, SpecError
from graphopt.model import load
from graphopt.ops import SPARSE
from graphopt.runtime import evaluate
from tests.bridge_check import assert_only_trained_changed_on_disk, check, check_gradients, perturb

torch.set_num_threads(1)

Array = np.ndarray[Any, Any]


def graph_of(text: str, constants: Mapping[str, Array] | None = None, *, ir: int = 8, opset: int = 17) -> Any:
    """Return a model of ONNX's text form, its opset and constants put in."""
    header = f'<ir_version: {ir}, opset_import: ["" : {opset}, "local" : 1]>'
    model = onnx.parser.parse_model(header + text)
    model.graph.initializer.extend(numpy_helper.from_array(v, n) for n, v in (constants or {}).items())
    return model


def normal(*shape: int, seed: int = 0, dtype: Any = np.float32) -> Array:
    return np.random.default_rng([seed, *shape]).standard_normal(shape).astype(dtype)


LINEAR = "g (float[n,4] x) => (float[n,3] y) { y = MatMul(x, w) }"
X = normal(5, 4)


def test_names_that_become_the_same_are_kept_apart() -> None:
    model = graph_of("g (float[n,4] x) => (float[n,4] y) { a = MatMul(x, u) b = MatMul(a, v) y = MatMul(b, w) }")
    for node, name in zip(model.graph.node, ("layer.0/w", "layer_0.w", "0 w+"), strict=True):
        node.input[1] = name
        model.graph.initializer.append(numpy_helper.from_array(normal(4, 4, seed=len(name)), name))
    bridge = check(model, {"x": X})
    assert list(bridge.parameters) == ["layer.0/w", "layer_0.w", "0 w+"]
    assert len({id(p) for p in bridge.module.parameters()}) == 3


@pytest.mark.parametrize("name", ["self", "class", "torch", "graph", "code", "training", "forward", "1:0", "_modules"])
def test_any_name_will_do(name: str) -> None:
    """Of an input, a node and a weight: those of Python, torch and its modules too."""
    model = graph_of(LINEAR, {"w": normal(4, 3)})
    model.graph.input[0].name = model.graph.node[0].input[0] = model.graph.node[0].name = name
    assert list(check(model, {name: X}).parameters) == ["w"]
    model = graph_of(LINEAR, {name: normal(4, 3)})
    model.graph.node[0].input[1] = name
    assert list(check(model, {"x": X}).parameters) == [name]


def test_inputs_and_weights_may_be_outputs() -> None:
    text = "g (float[n,4] x) => (float[n,4] x, float[4,3] w, float[n,3] y) { y = MatMul(x, w) }"
    check(graph_of(text, {"w": normal(4, 3)}), {"x": X})


def test_a_weight_used_twice_is_one_parameter() -> None:
    text = "g (float[n,4] x) => (float[n,4] y) { t = Transpose(w) a = MatMul(x, w) b = Relu(a) y = MatMul(b, t) }"
    bridge = check(graph_of(text, {"w": normal(4, 4)}), {"x": X})
    assert len(list(bridge.module.parameters())) == 1
    assert bridge.channel_axis("w") == 1


def test_one_number_stays_one_number() -> None:
    """Of rank 0 in an initializer and in a Constant; trained only where it is named."""
    text = """g (float[n,4] x) => (float[n,3] y) {
        k = Constant <value_float: float = 0.5> ()
        a = MatMul(x, w) b = Mul(a, s) y = Add(b, k) }"""
    constants = {"w": normal(4, 3), "s": np.array(2.0, np.float32)}
    assert set(TrainableGraph(graph_of(text, constants)).parameters) == {"w"}
    bridge = TrainableGraph(graph_of(text, constants), only=["w", "s", "k"])
    assert set(bridge.parameters) == {"w", "s", "k"}
    assert bridge.parameters["s"].shape == ()
    with torch.no_grad():
        bridge.parameters["s"].fill_(3.0)
        bridge.parameters["k"].fill_(0.25)
    back = bridge.write_back()
    assert bridge.values()["s"].shape == ()
    assert list(back.emit().graph.initializer[1].dims) == []
    assert np.allclose(evaluate(back, {"x": X})["y"], X @ constants["w"] * 3.0 + 0.25, atol=1e-5)


BRANCHES = """g (float[n,4] x, bool c) => (float[n,3] y) {
    h = MatMul(x, w)
    z = If (c) <
        then_branch = then () => (float[n,3] o) <float[3] b = {1.0, 2.0, 3.0}> {
            k = Constant <value = float[3] {0.5, 0.25, 0.125}> ()
            p = Mul(h, k) o = Add(p, b) },
        else_branch = other () => (float[n,3] o) <float[3] b = {4.0, 5.0, 6.0}> {
            q = MatMul(x, w) o = Add(q, b) } >
    y = Relu(z) }"""


@pytest.mark.parametrize("taken", [True, False])
def test_branches_have_weights_of_their_own_and_of_the_graph(taken: bool) -> None:
    """Two branches that use a name twice; the graph's weight is one parameter in both."""
    model = graph_of(BRANCHES, {"w": normal(4, 3)})
    model.graph.node[1].name = "If_1"
    bridge = check(model, {"x": X, "c": np.array(taken)})
    assert set(bridge.parameters) == {"w", "b", "k", "If_1/else_branch/b"}
    weights = [p for p in bridge.module.parameters() if p.shape == (4, 3)]
    assert len(weights) == 1


def test_a_constant_condition_takes_one_branch() -> None:
    model = graph_of(BRANCHES.replace(", bool c", ""), {"w": normal(4, 3), "c": np.array(True)})
    bridge = check(model, {"x": X})
    assert not any(type(m).__name__ == "If" for m in bridge.module.modules())


FUNCTIONS = """g (float[n,4] x) => (float[n,4] y) {
    a = local.block <power: float = 2.0> (x, w)
    y = local.block <power: float = 0.5> (a, v) }
<opset_import: ["" : 17, "local" : 1], domain: "local">
inner (x) => (y) { b = Constant <value = float[4] {0.1, 0.2, 0.3, 0.4}> () y = Add(x, b) }
<opset_import: ["" : 17, "local" : 1], domain: "local">
block <power> (x, w) => (y) {
    k = Constant <value_float: float = @power> ()
    h = MatMul(x, w)
    i = local.inner(h)
    s = Sigmoid(i)
    y = Mul(s, k) }"""


def test_local_functions_are_put_in_place() -> None:
    """Called twice with other attributes; the constant of the inner one is tied, and is written into the function."""
    bridge = check(graph_of(FUNCTIONS, {"w": normal(4, 4), "v": normal(4, 4, seed=1)}), {"x": X})
    assert set(bridge.parameters) == {"w", "v", "b"}


@pytest.mark.parametrize("calls", ["local.f0", "local.f1"])
def test_functions_that_call_each_other_without_end_are_refused(calls: str) -> None:
    """Two calls at each of thirty depths; a function that calls itself."""
    text = ["g (float[n,4] x) => (float[n,4] y) { h = MatMul(x, w) y = local.f0(h) }"]
    for depth in range(30):
        inner = f"local.f{depth + 1}" if calls == "local.f1" else calls
        body = f"{{ a = {inner}(x) y = {inner}(a) }}" if depth < 29 else "{ y = Relu(x) }"
        text.append(f'<opset_import: ["" : 17, "local" : 1], domain: "local"> f{depth} (x) => (y) {body}')
    model = graph_of("\n".join(text), {"w": normal(4, 4)})
    with pytest.raises(ModelError, match=r"call each other|nested too deeply|itself|recurs"):
        TrainableGraph(model)


def test_constants_in_every_spelling() -> None:
    """Attributes of numbers, sparse tensors in nodes and in initializers: what is stored sparse stays zero there."""
    text = """g (float[n,4] x) => (float[n,3] y) {
        b = Constant <value_floats = [0.5, 0.25, 0.125]> ()
        u = Identity(x)
        a = MatMul(u, w) h = Add(a, b) t = MatMul(h, v) y = MatMul(t, m) }"""
    model = graph_of(text, {"w": normal(4, 3)})
    sparse = helper.make_sparse_tensor(
        numpy_helper.from_array(np.array([1.5, -2.0], np.float32), "v"),
        numpy_helper.from_array(np.array([[0, 1], [2, 2]], np.int64)), [3, 3],
    )  # fmt: skip
    model.graph.sparse_initializer.append(sparse)
    held = helper.make_sparse_tensor(
        numpy_helper.from_array(np.array([1.0, 3.0], np.float32)), numpy_helper.from_array(np.array([2, 4])), [3, 3]
    )
    node = helper.make_node("Constant", [], ["m"])
    node.attribute.add(name="sparse_value", type=onnx.AttributeProto.SPARSE_TENSOR, sparse_tensor=held)
    model.graph.node.insert(0, node)
    bridge = check(model, {"x": X})
    assert set(bridge.parameters) == {"w", "b", "v", "m"}
    back = bridge.write_back().emit().graph
    assert len(back.sparse_initializer) == 1
    assert np.count_nonzero(bridge.values()["m"]) == 2


@pytest.mark.parametrize("ir", [3, 8])
def test_initializers_that_are_inputs(ir: int) -> None:
    text = "g (float[n,4] x, float[4,3] w) => (float[n,3] y) { y = MatMul(x, w) }"
    bridge = check(graph_of(text, {"w": normal(4, 3)}, ir=ir), {"x": X})
    assert set(bridge.parameters) == {"w"}
    with pytest.raises(DataError, match="no input 'w'"):
        bridge.module({"x": X, "w": normal(4, 3)})


def test_external_data(tmp_path: Path) -> None:
    model = graph_of(
        "g (float[n,64] x) => (float[n,64] y) { a = MatMul(x, w) y = MatMul(a, v) }",
        {"w": normal(64, 64), "v": normal(64, 64, seed=1)},
    )
    before, after = tmp_path / "m.onnx", tmp_path / "after.onnx"
    onnx.save(model, before, save_as_external_data=True, location="m.data", size_threshold=0)
    bridge = TrainableGraph(before, freeze=["v"])
    perturb(bridge)
    bridge.write_back().save(after)
    x = normal(3, 64)
    with torch.no_grad():
        assert np.allclose(evaluate(after, {"x": x})["y"], bridge.module({"x": x})["y"], atol=1e-4)
    held = {t.name: numpy_helper.to_array(t) for t in onnx.load(after).graph.initializer}
    assert np.array_equal(held["v"], normal(64, 64, seed=1))
    assert not np.array_equal(held["w"], normal(64, 64))


def test_files_differ_in_the_trained_tensors_alone(tmp_path: Path) -> None:
    """Metadata, doc strings, unused constants, stated types and typed fields stay as they came."""
    model = graph_of(LINEAR)
    weight = helper.make_tensor("w", TensorProto.FLOAT, [4, 3], normal(4, 3).reshape(-1))
    weight.doc_string = "of the layer"
    weight.metadata_props.add(key="origin", value="here")
    unused = helper.make_tensor("unused", TensorProto.FLOAT, [2], [1.0, 2.0])
    model.graph.initializer.extend([unused, weight])
    model.graph.node[0].metadata_props.add(key="scope", value="net.layer")
    model.metadata_props.add(key="author", value="somebody")
    before, after = tmp_path / "before.onnx", tmp_path / "after.onnx"
    load(model).save(before)
    bridge = TrainableGraph(before)
    bridge.write_back().save(after)
    assert before.read_bytes() == after.read_bytes()  # nothing has been trained yet
    perturb(bridge)
    bridge.write_back().save(after)
    assert_only_trained_changed_on_disk(before, after, ["w"])
    assert before.read_bytes() != after.read_bytes()


def test_half_precision_has_masters_and_does_not_overflow() -> None:
    text = """g (float16[n,4] x) => (float16[n,3] y) {
        a = MatMul(x, w) f = Cast <to = 1> (a) h = Cast <to = 10> (f) y = Add(h, b) }"""
    model = graph_of(text, {"w": normal(4, 3, dtype=np.float16), "b": normal(3, dtype=np.float16)})
    bridge = TrainableGraph(model)
    assert all(p.dtype == torch.float32 for p in bridge.parameters.values())
    x = X.astype(np.float16)
    with torch.no_grad():
        found = bridge.module({"x": x})["y"].numpy()
        assert np.abs(found - evaluate(model, {"x": x})["y"]).max() < 1e-2  # float16 has 3 digits
        bridge.parameters["b"].fill_(1e6)
    values = bridge.values()
    assert values["b"].dtype == np.float16
    assert (values["b"] == np.finfo(np.float16).max).all()


NORMED = """g (float[n,2,h,k] x) => (float[n,3,h,k] y) {
    a = Conv (x, w) y = BatchNormalization <momentum = 0.8> (a, s, b, m, v) }"""


def normed() -> Any:
    constants = {"w": normal(3, 2, 1, 1), "s": normal(3), "b": normal(3, seed=1), "m": normal(3, seed=2)}
    return graph_of(NORMED, {**constants, "v": np.abs(normal(3, seed=3)) + 0.5})


def test_batch_norm_frozen_and_trained() -> None:
    """Frozen statistics never change; trained ones follow torch's rule, and only in training mode."""
    x = torch.from_numpy(normal(4, 2, 5, 5))
    frozen = TrainableGraph(normed())
    frozen.module.train()
    before = frozen.module(x)["y"]
    assert torch.equal(before, frozen.module.eval()(x)["y"])
    assert set(frozen.values()) == {"w", "s", "b"}
    bridge = TrainableGraph(normed(), batch_norm="train")
    assert bridge.roles == {"w": "weight", "s": "norm", "b": "norm", "m": "statistics", "v": "statistics"}
    start = bridge.values()
    bridge.module.eval()(x)
    assert np.array_equal(bridge.values()["m"], start["m"])
    bridge.module.train()(x)
    hidden = torch.nn.functional.conv2d(x, bridge.parameters["w"]).detach()
    found = bridge.values()
    assert np.allclose(found["m"], 0.8 * start["m"] + 0.2 * hidden.mean((0, 2, 3)).numpy(), atol=1e-6)
    assert np.allclose(found["v"], 0.8 * start["v"] + 0.2 * hidden.var((0, 2, 3)).numpy(), atol=1e-6)
    stored = {t.name: numpy_helper.to_array(t) for t in bridge.write_back().emit().graph.initializer}
    assert np.array_equal(stored["v"], found["v"])


def test_dropout_drops_in_training_mode_alone() -> None:
    text = "g (float[n,4] x) => (float[n,3] y) { a = MatMul(x, w) y = Dropout(a, r) }"
    constants = {"w": np.ones((4, 3), np.float32), "r": np.array(0.5, np.float32)}
    bridge = TrainableGraph(graph_of(text, constants))
    x = torch.ones(200, 4)
    assert (bridge.module.eval()(x)["y"] == 4).all()
    found = bridge.module.train()(x)["y"]
    assert set(found.unique().tolist()) == {0.0, 8.0}
    assert 0.4 < (found == 0).float().mean() < 0.6


def test_taps_come_out_beside_the_outputs() -> None:
    text = "g (float[n,4] x) => (float[n,3] y) { a = Relu(x) b = MatMul(a, w) y = Tanh(b) }"
    bridge = TrainableGraph(graph_of(text, {"w": normal(4, 3)}), taps=["b", "x", "w"])
    found = bridge.module({"x": X})
    assert list(found) == ["y", "b", "x", "w"]
    assert torch.equal(found["b"].tanh(), found["y"])
    with pytest.raises(ModelError, match="no tensor 'bb' to tap") as raised:
        TrainableGraph(graph_of(text, {"w": normal(4, 3)}), taps=["bb"])
    assert raised.value.hint


def test_masks_keep_weights_zero() -> None:
    """Given, or of a weight whose layer says that it was made sparse: whatever an optimizer does."""
    model = graph_of(LINEAR, {"w": np.where(normal(4, 3) > 0, normal(4, 3, seed=1), 0).astype(np.float32)})
    model.graph.node[0].metadata_props.add(
        key=SPARSE, value='{"1": {"share": 0.5, "pattern": "", "request": "0.5 magnitude global"}}'
    )
    mask = normal(4, 3) > 0
    for bridge in (TrainableGraph(model), TrainableGraph(graph_of(LINEAR, {"w": normal(4, 3)}), masks={"w": mask})):
        with torch.no_grad():
            bridge.parameters["w"].add_(5.0)
        back = bridge.write_back()
        assert (bridge.values()["w"][~mask] == 0).all()
        assert (bridge.values()["w"][mask] != 0).all()
        with torch.no_grad():
            assert np.allclose(evaluate(back, {"x": X})["y"], bridge.module({"x": X})["y"], atol=1e-5)
    assert TrainableGraph(model, masks={}).masks == {}
    for bad, what in (({"v": mask}, "no initializer"), ({"w": mask.T}, "has shape")):
        with pytest.raises(DataError, match=what):
            TrainableGraph(model, masks=bad)


def test_some_are_trained_and_some_are_frozen() -> None:
    text = "g (float[n,4] x) => (float[n,3] y) { a = MatMul(x, head.w) b = Relu(a) y = Add(b, head.b) }"
    model = graph_of(text.replace(".", "_"), {"head_w": normal(4, 3), "head_b": normal(3)})
    assert set(TrainableGraph(model, only=["head_*"], freeze=["*_b"]).parameters) == {"head_w"}
    assert not TrainableGraph(model, freeze=["*"]).parameters
    with pytest.raises(SpecError, match="no initializer is called 'haed_w'") as raised:
        TrainableGraph(model, only=["haed_w"])
    assert raised.value.hint == "did you mean 'head_w'?"


def test_roles_are_by_use() -> None:
    text = """g (float[n,4] x, int64[n] i) => (float[n,4] z) {
        e = Gather(table, i) a = Add(e, x) n = LayerNormalization(a, gain, shift)
        h = MatMul(n, w) k = Add(h, bias) r = PRelu(k, slope) s = Mul(r, eps) m = Add(s, mask)
        y = Softmax(m) u = Add(y, shifted) z = Mul(u, gate) }"""
    constants = {
        "table": normal(7, 4), "gain": normal(4), "shift": normal(4, seed=1), "w": normal(4, 4), "bias": normal(4),
        "slope": normal(4), "eps": np.array([0.5], np.float32), "mask": np.array([[0, 0, 0, -np.inf]], np.float32),
        "shifted": np.array([[0, 0, -100, -100]], np.float32), "gate": np.array([[1, 1, 1, 1]], np.float32),
    }  # fmt: skip
    bridge = check(graph_of(text, constants), {"x": X, "i": np.arange(5)})
    assert bridge.roles == {
        "table": "weight", "gain": "norm", "shift": "norm", "w": "weight", "bias": "bias", "slope": "norm",
        "eps": "scalar", "mask": "fixed", "shifted": "fixed", "gate": "norm",
    }  # fmt: skip


def test_numbers_of_places_are_not_trained() -> None:
    """Windows are told apart by numbers that constants make; the mask made of them is no weight."""
    text = """g (float[n,4] x) => (float[n,4] y) {
        s = ScatterND(zeros, places, ones) d = Sub(s, row) e = Equal(d, nought) m = Where(e, nought, far)
        h = MatMul(x, w) y = Add(h, m) }"""
    constants = {
        "zeros": np.zeros((2, 4), np.float32), "places": np.array([[1]]), "ones": np.ones((1, 4), np.float32),
        "row": np.array([[0, 1, 2, 3]], np.float32), "nought": np.zeros((), np.float32), "w": normal(4, 4),
        "far": np.array([[-5.0, -4, -3, -2]], np.float32),
    }  # fmt: skip
    bridge = check(graph_of(text, constants), {"x": X[:2]})
    assert set(bridge.parameters) == {"w", "far"}


def test_the_bridge_is_there_when_it_is_asked_for() -> None:
    """Importing graphopt imports no torch; its attribute `bridge` does."""
    code = "import sys, graphopt; assert 'torch' not in sys.modules; graphopt.bridge.TrainableGraph"
    subprocess.run([sys.executable, "-c", code], check=True, timeout=120)


def test_ways_to_call_the_module() -> None:
    text = "g (float[n,4] x, float[n,4] z) => (float[n,3] y) { a = Add(x, z) y = MatMul(a, w) }"
    bridge = TrainableGraph(graph_of(text, {"w": normal(4, 3)}))
    wanted = bridge.module({"x": X, "z": X})["y"]
    tensor = torch.from_numpy(X)
    for found in (bridge.module(X, tensor), bridge.module(x=tensor, z=X), bridge.module(tensor, z=tensor)):
        assert torch.equal(found["y"], wanted)
    assert torch.equal(bridge.module(X.astype(np.float64), X)["y"], wanted)
    for feeds, what in (
        ({"x": X}, "input 'z' is not fed"),
        ({"x": X, "zz": X, "z": X}, "no input 'zz'"),
        ({"x": X, "z": np.array(["a"])}, "is fed with"),
        ({"x": X, "z": np.zeros((5, 4), np.int64)}, "is of type float32, not int64"),
    ):
        with pytest.raises(DataError, match=what):
            bridge.module(feeds)


def test_a_node_that_fails_is_named() -> None:
    model = graph_of(LINEAR, {"w": normal(4, 3)})
    model.graph.node[0].name = "head"
    with pytest.raises(ModelError) as raised:
        TrainableGraph(model).module({"x": normal(5, 6)})
    assert raised.value.at == "node 'head' (MatMul)"


def test_operators_that_are_unknown_are_named_unless_nothing_needs_them() -> None:
    text = "g (float[n,4] x) => (float[n,3] y) { y = MatMul(x, w) z = local.Mystery (y) }"
    model = graph_of(text, {"w": normal(4, 3)})
    check_gradients(TrainableGraph(model), {"x": X})
    model.graph.output[0].name = "z"
    model.graph.node[1].name = "odd"
    with pytest.raises(ModelError, match="Mystery cannot be trained") as raised:
        TrainableGraph(model)
    assert raised.value.at == "node 'odd' (local.Mystery)"
    assert raised.value.hint


def test_attributes_that_are_unknown_are_refused() -> None:
    model = graph_of("g (float[n,4] x) => (float[n,3] y) { y = Gemm <blocked = 3> (x, w) }", {"w": normal(4, 3)})
    with pytest.raises(ModelError, match="attribute 'blocked' of Gemm"):
        TrainableGraph(model)


@pytest.mark.parametrize("op", ["ConstantOfShape (huge)", "Expand (one, huge)", "Tile (line, huge)"])
def test_huge_sizes_cost_nothing_before_they_run(op: str) -> None:
    """A terabyte, from a constant shape: made neither when the module is built, nor where its branch is not taken."""
    text = f"""g (float[n,4] x, bool c) => (float[n,3] y) {{
        y = If (c) <
            then_branch = then () => (float[n,3] o) {{ big = {op} s = ReduceSum <keepdims = 0> (big)
                t = Cast <to = 1> (s) p = MatMul(x, w) o = Add(p, t) }},
            else_branch = other () => (float[n,3] o) {{ o = MatMul(x, w) }} > }}"""
    huge = np.array([1 << 40], np.int64)
    model = graph_of(text, {"w": normal(4, 3), "huge": huge, "one": normal(1), "line": normal(1)})
    bridge = TrainableGraph(model)
    assert bridge.module({"x": X, "c": np.array(False)})["y"].shape == (5, 3)


def test_shape_arithmetic_stays_in_one_compiled_graph() -> None:
    """Heads split by computed sizes, pads that a chain of constants makes, a condition on a size."""
    text = """g (float[n,4] x) => (float[n,2,3] y) {
        s = Shape(x) n = Gather(s, zero) m = Unsqueeze(n, zeros) r = Concat <axis = 0> (m, heads)
        h = Reshape(x, r) p = MatMul(h, w)
        z = ConstantOfShape <value = int64[1] {0}> (two) q = Concat <axis = 0> (z, z) f = Reshape(q, square)
        t = Transpose <perm = [1, 0]> (f) l = Reshape(t, flat) u = Concat <axis = 0> (l, zeros, zeros)
        k = Pad(p, u)
        e = Equal(n, one)
        y = If (e) < then_branch = a () => (float[n,2,3] o) { o = Neg(k) },
                     else_branch = b () => (float[n,2,3] o) { o = Identity(k) } > }"""
    constants = {"zero": 0, "zeros": [0], "heads": [2, 2], "two": [2], "square": [-1, 2], "flat": [-1], "one": 1}
    model = graph_of(text, {"w": normal(2, 3), **{k: np.array(v, np.int64) for k, v in constants.items()}})
    bridge = check(model, {"x": X})
    compiled = torch.compile(bridge.module, fullgraph=True, backend="eager", dynamic=False)
    for rows in (5, 1):
        x = torch.from_numpy(normal(rows, 4))
        assert torch.equal(compiled(x)["y"], bridge.module(x)["y"])


def test_a_shape_split_into_one_part_is_whole() -> None:
    """One output of an operator that may have several, of a value on the host."""
    text = """g (float[n,4] x) => (float[n,3] y) {
        s = Shape(x) p = Split <axis = 0> (s) h = Reshape(x, p) y = MatMul(h, w) }"""
    check(graph_of(text, {"w": normal(4, 3)}), {"x": X})


def test_modules_are_ordinary_ones() -> None:
    """Copies are independent, states move between them, autocast computes in 16 bits, the graph's batch is known."""
    bridge = TrainableGraph(normed(), batch_norm="train")
    x = torch.from_numpy(normal(4, 2, 5, 5))
    other = copy.deepcopy(bridge.module)
    perturb(bridge, 0.5)
    assert not torch.equal(other.eval()(x)["y"], bridge.module.eval()(x)["y"])
    other.load_state_dict(bridge.module.state_dict())
    assert torch.equal(other(x)["y"], bridge.module(x)["y"])
    with torch.autocast("cpu", dtype=torch.bfloat16):
        found = bridge.module.train()(x)["y"]
    found.float().sum().backward()
    assert all(p.grad is not None and p.grad.dtype == torch.float32 for p in bridge.parameters.values())
    assert bridge.batch is None
    assert TrainableGraph(graph_of(LINEAR.replace("[n", "[5"), {"w": normal(4, 3)})).batch == 5


def test_write_back_into_another_model() -> None:
    bridge = TrainableGraph(graph_of(LINEAR, {"w": normal(4, 3)}))
    perturb(bridge)
    text = "g (float[n,4] x) => (float[n,3] y) { a = Relu(x) y = MatMul(a, w) }"
    into = load(graph_of(text, {"w": normal(4, 3, seed=2)}))
    found = evaluate(bridge.write_back(into), {"x": X})["y"]
    assert np.allclose(found, np.maximum(X, 0) @ bridge.values()["w"], atol=1e-5)
    with pytest.raises(ModelError, match="no initializer 'w'"):
        bridge.write_back(load(graph_of(LINEAR, {"w": normal(4, 2)})))


def test_statistics_that_layers_share_stay() -> None:
    """An exporter that stores equal tensors once ties layers, and here a variance to a scale: neither may follow."""
    text = """g (float[n,3,h,k] x) => (float[n,3,h,k] y) {
        a = BatchNormalization (x, s, b, m, v) c = Conv (a, w) y = BatchNormalization (c, v, b, m, u) }"""
    constants = {"w": normal(3, 3, 1, 1), **{name: np.abs(normal(3, seed=i)) + 0.5 for i, name in enumerate("sbmvu")}}
    bridge = TrainableGraph(graph_of(text, constants), batch_norm="train")
    bridge.module.train()(torch.from_numpy(normal(4, 3, 5, 5)))
    changed = {name for name, values in bridge.values().items() if not np.array_equal(values, constants[name])}
    assert not changed
    assert set(bridge.parameters) == {"w", "s", "b"}


def test_tensors_that_torch_lacks_are_named_where_they_are_read() -> None:
    """Strings: an input, a constant; one that nothing needs does not matter."""
    text = "g (float[n,4] x) => (float[n,3] y, bool[1] z) { y = MatMul(x, w) z = Equal(word, word) }"
    model = graph_of(text, {"w": normal(4, 3), "word": np.array(["yes"], object)}, opset=19)
    with pytest.raises(ModelError, match="no tensors") as raised:
        TrainableGraph(model)
    assert raised.value.at == "constant 'word'"
    assert raised.value.hint
    model.graph.input.append(helper.make_tensor_value_info("t", TensorProto.STRING, ["n"]))
    del model.graph.output[1]
    with pytest.raises(ModelError, match="no tensors") as raised:
        TrainableGraph(model)
    assert raised.value.at == "input 't'"
    del model.graph.input[1]
    assert set(TrainableGraph(model).parameters) == {"w"}
