"""Coupled channels: what each rule ties and freezes, on small graphs; and that values leave only through readers."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any, TypeAlias

import numpy as np
import onnx
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from onnx import numpy_helper, parser

from graphopt.analysis.channels import Channels, Group, find_groups
from graphopt.analysis.shapes import Shapes
from graphopt.model import load
from graphopt.runtime import evaluate

Weights: TypeAlias = Mapping[str, Sequence[int] | np.ndarray[Any, Any]]


def build(text: str, weights: Weights, opset: int = 17) -> onnx.ModelProto:
    """A model from ONNX's text form; `weights` are random where only a shape is given."""
    graph = parser.parse_graph(text)
    rng = np.random.default_rng(0)
    for name, given_as in weights.items():
        values = given_as if isinstance(given_as, np.ndarray) else rng.normal(size=tuple(given_as)).astype(np.float32)
        graph.initializer.append(numpy_helper.from_array(values, name))
    for node in graph.node:
        node.name = node.name or node.output[0]
    model = onnx.helper.make_model(graph, opset_imports=[onnx.helper.make_opsetid("", opset)], ir_version=8)
    onnx.checker.check_model(model)
    return model


def ints(*values: int) -> np.ndarray[Any, Any]:
    return np.array(values, np.int64)


def find(text: str, weights: Weights, opset: int = 17, *, normalization: bool = False) -> Channels:
    model = load(build(text, weights, opset))
    return find_groups(model, Shapes(model), evaluate, normalization=normalization)


def image(body: str, weights: Weights, size: str = "8, 8", **more: Any) -> Channels:
    """A net on x: (N, 3, 8, 8): conv `w0` makes 8 channels `a`, `body` makes `b` of them, and `w9` reads those."""
    text = f"g (float[N, 3, {size}] x) => (float[N, 2, H, W] y) {{ a = Conv(x, w0) {body} y = Conv(b, w9) }}"
    return find(text, {"w0": (8, 3, 1, 1), **weights}, **more)


def named(found: Channels, name: str) -> Group:
    return next(g for g in found.groups if g.name == name)


def units(group: Group, tensor: str, axis: int) -> list[int]:
    site = next(s for s in group.sites if s.tensor.name == tensor and s.axis == axis)
    return [int(unit) for unit in site.units]


def roles(group: Group) -> dict[str, list[str]]:
    """Role -> constants in it, with their axis."""
    found: dict[str, list[str]] = {}
    for site in group.sites:
        if site.role != "carries":
            found.setdefault(site.role, []).append(f"{site.tensor.name}.{site.axis}")
    return found


def test_a_channel_and_all_that_is_coupled_to_it() -> None:
    norm = dict.fromkeys(("scale", "shift", "mean", "variance"), (8,))
    found = image("n = BatchNormalization(a, scale, shift, mean, variance) r = Relu(n) b = MaxPool <kernel_shape = "
                  "[2, 2]> (r)", {**norm, "w9": (2, 8, 3, 3)})  # fmt: skip
    group, last = found.groups
    assert (group.name, group.size, group.kind, group.frozen) == ("a", 8, "channels", "")
    assert roles(group) == {
        "makes": ["w0.0"], "holds": ["scale.0", "shift.0", "mean.0", "variance.0"], "reads": ["w9.1"],
    }  # fmt: skip
    assert [s.tensor.name for s in group.role("carries")] == ["a", "n", "r", "b"]
    assert all(s.units.tolist() == list(range(8)) for s in group.sites)
    assert last.frozen == "it is output 'y' of the graph"
    assert found.prunable() == [group]
    assert found.coverage() == (8 * 3 + 4 * 8 + 2 * 8 * 9, 8 * 3 + 4 * 8 + 2 * 8 * 9)
    whys = {(axis.where, axis.axis): axis.why for axis in found.frozen_axes}
    assert whys["a:w0", 1] == "it is input 'x' of the graph"
    assert whys["y:w9", 2] == "kernels lie along it"
    assert found.of(group.sites[0].tensor, 0) == [group]
    assert found.of(group.sites[0].tensor, 1) == []


def test_adding_ties_what_two_layers_make() -> None:
    found = image("c = Conv(a, w1) b = Add(a, c)", {"w1": (8, 8, 1, 1), "w9": (2, 8, 1, 1)})
    assert roles(found.prunable()[0]) == {"makes": ["w0.0", "w1.0"], "reads": ["w1.1", "w9.1"]}


def test_constants_of_one_value_tie_nothing_and_one_per_channel_is_held() -> None:
    found = image(
        "c = Mul(a, half) d = Add(c, shift) b = Mul(d, map)",
        {"half": (1,), "shift": (8, 1, 1), "map": (1, 1, 8, 8), "w9": (2, 8, 1, 1)},
    )
    assert roles(found.prunable()[0]) == {"makes": ["w0.0"], "holds": ["shift.0"], "reads": ["w9.1"]}


def test_a_gate_goes_with_its_channels() -> None:
    found = image(
        "p = GlobalAveragePool(a) q = Conv(p, down) r = Relu(q) s = Conv(r, up) t = Sigmoid(s) b = Mul(a, t)",
        {"down": (4, 8, 1, 1), "up": (8, 4, 1, 1), "w9": (2, 8, 1, 1)},
    )
    wide, narrow = found.prunable()
    assert roles(wide) == {"makes": ["w0.0", "up.0"], "reads": ["down.1", "w9.1"]}
    assert roles(narrow) == {"makes": ["down.0"], "reads": ["up.1"]}


def test_concatenation_keeps_groups_apart_and_split_does_too() -> None:
    found = image("c = Conv(a, w1) b = Concat <axis = 1> (a, c)", {"w1": (6, 8, 1, 1), "w9": (2, 14, 1, 1)})
    first, second = found.prunable()
    assert units(first, "w9", 1) == [*range(8), *[-1] * 6]
    assert units(second, "w9", 1) == [*[-1] * 8, *range(6)]
    found = image("c, d = Split <axis = 1> (a) b = Mul(c, d)", {"w9": (2, 4, 1, 1)})
    assert units(found.prunable()[0], "w0", 0) == [0, 1, 2, 3, 0, 1, 2, 3]


def test_depthwise_layers_carry_channels_on() -> None:
    found = image("b = Conv <group = 8> (a, w1)", {"w1": (16, 1, 3, 3), "w9": (2, 16, 1, 1)})
    group = found.prunable()[0]
    assert roles(group) == {"makes": ["w0.0", "w1.0"], "reads": ["w9.1"]}
    assert (group.kind, group.size, units(group, "w1", 0)) == ("channels", 8, [i // 2 for i in range(16)])


def test_grouped_layers_lose_whole_groups_where_there_are_enough() -> None:
    found = image("b = Conv <group = 4> (a, w1)", {"w1": (12, 2, 1, 1), "w9": (2, 12, 1, 1)})
    group = found.prunable()[0]
    assert (group.kind, group.size) == ("groups", 4)
    assert units(group, "w0", 0) == [i // 2 for i in range(8)]
    assert units(group, "w1", 0) == [i // 3 for i in range(12)]
    found = image("b = Conv <group = 2> (a, w1)", {"w1": (12, 4, 1, 1), "w9": (2, 12, 1, 1)})
    first, second = found.prunable()
    assert (units(first, "w0", 0), units(first, "w1", 1)) == ([0, 1, 2, 3] * 2, [0, 1, 2, 3])
    assert units(second, "w1", 0) == [0, 1, 2, 3, 4, 5] * 2


def test_transposed_convolutions() -> None:
    found = image("b = ConvTranspose(a, w1)", {"w1": (8, 6, 2, 2), "w9": (2, 6, 1, 1)})
    first, second = found.prunable()
    assert roles(first) == {"makes": ["w0.0"], "reads": ["w1.0"]}
    assert roles(second) == {"makes": ["w1.1"], "reads": ["w9.1"]}
    found = image("b = ConvTranspose <group = 8> (a, w1)", {"w1": (8, 1, 2, 2), "w9": (2, 8, 1, 1)})
    assert roles(found.prunable()[0]) == {"makes": ["w0.0", "w1.0"], "reads": ["w9.1"]}


MOVED: dict[str, tuple[str, dict[str, Any], list[int]]] = {
    "shuffle": (
        "c = Reshape(a, apart) d = Transpose <perm = [0, 2, 1, 3, 4]> (c) b = Reshape(d, flat)",
        {"apart": ints(0, 2, 4, 8, 8), "flat": ints(0, 8, 8, 8)},
        [0, 0, 1, 1, 2, 2, 3, 3],
    ),
    "depth to space": ("b = DepthToSpace <blocksize = 2> (a)", {}, [0, 1]),
    "depth to space by rows": ('b = DepthToSpace <blocksize = 2, mode = "CRD"> (a)', {}, [0, 4]),
    "space to depth": ("b = SpaceToDepth <blocksize = 2> (a)", {}, [*range(8)] * 4),
    "picked": ("b = Gather <axis = 1> (a, which)", {"which": ints(6, 1, 1, 4)}, [6, 1, 1, 4]),
    "sliced": ("b = Slice(a, from, to, at)", {"from": ints(2), "to": ints(6), "at": ints(1)}, [2, 3, 4, 5]),
    "tiled": ("b = Tile(a, times)", {"times": ints(1, 2, 1, 1)}, [*range(8)] * 2),
    "padded": ("b = Pad(a, by)", {"by": ints(0, 0, 0, 0, 0, 2, 0, 0)}, [*range(8), -1, -1]),
    "turned": ("b = Transpose <perm = [0, 1, 3, 2]> (a)", {}, [*range(8)]),
}


@pytest.mark.parametrize("what", MOVED)
def test_movement_is_read_off(what: str) -> None:
    """Which of the channels that `w0` makes each channel that `w9` reads is."""
    body, weights, expected = MOVED[what]
    found = image(body, {**weights, "w9": (2, len(expected), 1, 1)})
    made = {tuple(units(g, "w0", 0)): g for g in found.groups if any(s.tensor.name == "w0" for s in g.sites)}
    at = np.full(len(expected), -1)
    for group in made.values():
        first = np.array(units(group, "w0", 0))
        if any(s.tensor.name == "w9" for s in group.sites):
            read = np.array(units(group, "w9", 1))
            for unit in range(group.size):  # called after the first channel that it holds
                at[read == unit] = np.flatnonzero(first == unit)[0]
    assert at.tolist() == expected


def test_flatten_makes_blocks_of_columns() -> None:
    found = find(
        "g (float[N, 3, 2, 2] x) => (float[N, 5] y) { a = Conv(x, w0) f = Flatten(a) y = Gemm(f, w9) }",
        {"w0": (4, 3, 1, 1), "w9": (16, 5)},
    )
    assert units(found.prunable()[0], "w9", 0) == [i // 4 for i in range(16)]


FROZEN: dict[str, tuple[str, dict[str, Any], str]] = {
    "Softmax": ("b = Softmax <axis = 1> (a)", {}, "Softmax 'b' mixes what lies along it"),
    "LRN": ("b = LRN <size = 3> (a)", {}, "LRN 'b' takes a norm over its neighbours"),
    "mean": ("m = ReduceMean <axes = [1]> (a) b = Mul(a, m)", {}, "ReduceMean 'm' works over it"),
    "argmax": ("m = ArgMax <axis = 1> (a) f = Cast <to = 1> (m) b = Mul(a, f)", {}, "ArgMax 'm' picks one along it"),
    "cumsum": ("b = CumSum(a, one)", {"one": np.array(1)}, "CumSum 'b' adds up along it"),
    "product": (
        "t = Transpose <perm = [0, 2, 1, 3]> (a) u = Transpose <perm = [0, 2, 3, 1]> (a) b = MatMul(u, t)", {},
        "MatMul 'b' contracts it between two computed tensors",
    ),
    "picked": ("i = ArgMax <axis = 0, keepdims = 0> (s) b = Gather <axis = 1> (a, i)", {"s": (4, 8)},
               "Gather 'b' picks along it by computed indices"),
    "one taken": (
        "c = Gather <axis = 1> (a, one) d = Unsqueeze(c, at) b = Mul(a, d)", {"one": np.array(1), "at": ints(1)},
        "Gather 'c' takes an index of it by itself",
    ),
}  # fmt: skip


@pytest.mark.parametrize("what", FROZEN)
def test_what_freezes_says_so(what: str) -> None:
    body, weights, why = FROZEN[what]
    found = image(body, {**weights, "w9": (2, 8, 1, 1)})
    reasons = {g.frozen for g in found.groups if any(s.tensor.name == "w0" for s in g.sites)}
    assert why in reasons


def test_operators_without_a_rule_freeze_all_around_them() -> None:
    found = image("b = MaxRoiPool <pooled_shape = [2, 2]> (a, rois)", {"rois": (1, 5), "w9": (2, 8, 1, 1)})
    assert named(found, "a").frozen == "no rule for MaxRoiPool 'b'"


def test_what_graphs_inside_nodes_read_stays() -> None:
    text = """g (float[N, 3, 8, 8] x, bool yes) => (float[N, 2, 8, 8] y) {
        a = Conv(x, w0)
        b = If (yes) <then_branch = t () => (float[N, 8, 8, 8] u) { u = Relu(a) },
                      else_branch = e () => (float[N, 8, 8, 8] v) { v = Neg(a) }>
        y = Conv(b, w9)
    }"""
    found = find(text, {"w0": (8, 3, 1, 1), "w9": (2, 8, 1, 1)})
    assert named(found, "a").frozen == "a graph inside If 'b' reads it"


def test_outputs_and_inputs_stay() -> None:
    found = find(
        "g (float[N, 8, 4, 4] x) => (float[N, 8, 4, 4] a, float[N, 2, 4, 4] y) "
        "{ a = Conv(x, w0) s = Add(a, x) y = Conv(s, w9) }",
        {"w0": (8, 8, 1, 1), "w9": (2, 8, 1, 1)},
    )
    assert named(found, "a").frozen == "it is input 'x' of the graph"
    assert not found.prunable()


def test_unread_and_single_channels_are_no_groups_to_cut() -> None:
    found = image("b = Slice(a, from, to, at)", {"from": ints(0), "to": ints(4), "at": ints(1), "w9": (2, 4, 1, 1)})
    assert [g.frozen for g in found.groups[:2]] == ["", "no layer reads it"]
    found = image("b = ReduceSum(a, at)", {"at": ints(1), "w9": (2, 1, 1, 1)})
    assert not found.prunable()


def test_shared_weights_are_sites_of_their_own() -> None:
    found = image("c = Conv(a, w1) r = Relu(c) b = Conv(r, w1)", {"w1": (8, 8, 1, 1), "w9": (2, 8, 1, 1)})
    first, second, third = found.prunable()
    assert roles(first) == {"makes": ["w0.0"], "reads": ["w1.1"]}
    assert roles(second) == {"makes": ["w1.0"], "reads": ["w1.1"]}
    assert roles(third) == {"makes": ["w1.0"], "reads": ["w9.1"]}
    assert [s.node.name for s in second.sites if s.role != "carries" and s.node is not None] == ["c", "b"]


ATTENTION = """g (float[N, T, 16] x) => (float[N, T, 5] y) {{
    {projected}
    qh = Reshape(q, apart) kh = Reshape(k, apart) vh = Reshape(v, apart)
    qt = Transpose <perm = [0, 2, 1, 3]> (qh) kt = Transpose <perm = [0, 2, 3, 1]> (kh)
    vt = Transpose <perm = [0, 2, 1, 3]> (vh)
    s = MatMul(qt, kt) p = Softmax <axis = -1> (s) c = MatMul(p, vt)
    t = Transpose <perm = [0, 2, 1, 3]> (c) o = Reshape(t, flat) y = MatMul(o, wo)
}}"""
APART = "q = MatMul(x, wq) k = MatMul(x, wk) v = MatMul(x, wv)"
PACKED = """qkv = MatMul(x, w) three = Reshape(qkv, threes)
    q = Gather <axis = 2> (three, zero) k = Gather <axis = 2> (three, one) v = Gather <axis = 2> (three, two)"""


def attention(heads: int, width: int, *, packed: bool = False) -> Channels:
    all_ = heads * width
    weights: dict[str, Any] = {"apart": ints(0, 0, heads, width), "flat": ints(0, 0, all_), "wo": (all_, 5)}
    if packed:
        more: dict[str, Any] = {
            "w": (16, 3 * all_),
            "threes": ints(0, 0, 3, all_),
            "zero": np.array(0),
            "one": np.array(1),
        }
        return find(ATTENTION.format(projected=PACKED), {**weights, **more, "two": np.array(2)})
    return find(ATTENTION.format(projected=APART), {**weights, "wq": (16, all_), "wk": (16, all_), "wv": (16, all_)})


@pytest.mark.parametrize("heads", [4, 2])
def test_whole_heads_go(heads: int) -> None:
    group = attention(heads, 3).prunable()[0]
    assert (group.kind, group.size) == ("heads", heads)
    assert roles(group) == {"makes": ["wq.1", "wk.1", "wv.1"], "reads": ["wo.0"]}
    assert units(group, "wk", 1) == [i // 3 for i in range(3 * heads)]


def test_heads_of_one_projection_for_all() -> None:
    group = attention(4, 3, packed=True).prunable()[0]
    assert (group.kind, group.size) == ("heads", 4)
    assert units(group, "w", 1) == [i // 3 for i in range(12)] * 3


def test_heads_beside_an_unknown_batch() -> None:
    text = """g (float[T, N, 16] x) => (float[N, T, 5] y) {
        q = MatMul(x, wq) shape = Shape(q) t = Slice(shape, c0, c1) n = Slice(shape, c1, c2)
        nh = Mul(n, c4) target = Concat <axis = 0> (t, nh, c3) apart = Concat <axis = 0> (n, c4, t, c3)
        r = Reshape(q, target) s = Transpose <perm = [1, 0, 2]> (r) h = Reshape(s, apart)
        u = Transpose <perm = [0, 2, 1, 3]> (h) f = Reshape(u, flat) y = MatMul(f, wo)
    }"""
    constants = {f"c{i}": ints(i) for i in range(5)}
    found = find(text, {"wq": (16, 12), "flat": ints(0, 0, 12), "wo": (12, 5), **constants})
    part = next(s for s in found.groups[0].sites if s.tensor.name == "r")
    assert (part.part, part.axis, part.units.tolist()) == (True, 1, [0, 1, 2, 3])
    assert units(found.groups[0], "wq", 1) == [i // 3 for i in range(12)]
    assert roles(found.prunable()[0]) == {"makes": ["wq.1"], "reads": ["wo.0"]}


@pytest.mark.parametrize(("heads", "few", "size"), [(8, 4, 4), (8, 2, 4), (6, 1, 6)])
def test_keys_repeated_for_several_heads(heads: int, few: int, size: int) -> None:
    """Keys go with all their heads; where there are few keys, each loses the same heads."""
    text = """g (float[N, 6, 16] x) => (float[N, 6, 5] y) {
        q = MatMul(x, wq) k = MatMul(x, wk) qh = Reshape(q, apart) kh = Reshape(k, few)
        qt = Transpose <perm = [0, 2, 1, 3]> (qh) kt = Transpose <perm = [0, 2, 1, 3]> (kh)
        ku = Unsqueeze(kt, two) ke = Expand(ku, wide) kr = Reshape(ke, all) kk = Transpose <perm = [0, 1, 3, 2]> (kr)
        s = MatMul(qt, kk) p = Softmax <axis = -1> (s) c = MatMul(p, kr)
        t = Transpose <perm = [0, 2, 1, 3]> (c) o = Reshape(t, flat) y = MatMul(o, wo)
    }"""
    each, width = heads // few, 3 * heads
    shapes = {"apart": ints(0, 0, heads, 3), "few": ints(0, 0, few, 3), "two": ints(2),
              "wide": ints(1, few, each, 6, 3), "all": ints(0, heads, 6, 3), "flat": ints(0, 0, width)}  # fmt: skip
    group = find(text, {"wq": (16, width), "wk": (16, 3 * few), "wo": (width, 5), **shapes}).prunable()[0]
    assert (group.kind, group.size) == ("heads", size)
    if few == 4:
        assert units(group, "wk", 1) == [i // 3 for i in range(12)]
        assert units(group, "wq", 1) == units(group, "wo", 0) == [i // 6 for i in range(24)]
    else:
        assert units(group, "wq", 1) == units(group, "wo", 0) == [i // 3 % size for i in range(width)]


def test_a_model_without_channels() -> None:
    assert find("g (float x) => (float y) { y = Neg(x) }", {}) == Channels([], [], {})


def test_weights_that_are_computed() -> None:
    """The constant is a site, not what is computed of it."""
    found = image(
        "t = Reshape(flat, shape) c = Transpose <perm = [1, 0, 2, 3]> (t) b = Conv(a, c)",
        {"flat": (8, 24), "shape": ints(8, 6, 2, 2), "w9": (2, 6, 1, 1)},
    )
    assert roles(found.prunable()[0]) == {"makes": ["w0.0"], "reads": ["flat.0"]}
    assert roles(found.prunable()[1]) == {"makes": ["flat.1"], "reads": ["w9.1"]}
    assert units(found.prunable()[1], "flat", 1) == [i // 4 for i in range(24)]


@pytest.mark.parametrize(("op", "gates"), [("RNN", 1), ("GRU", 3), ("LSTM", 4)])
@pytest.mark.parametrize("directions", [1, 2])
def test_hidden_units_of_recurrent_layers(op: str, gates: int, directions: int) -> None:
    way = ', direction = "bidirectional"' if directions == 2 else ""
    text = f"""g (float[T, N, 6] x) => (float[T, N, 3] y) {{
        i = MatMul(x, w0) h = {op} <hidden_size = 5{way}> (i, w, r, b)
        t = Transpose <perm = [0, 2, 1, 3]> (h) f = Reshape(t, flat) y = MatMul(f, w9)
    }}"""
    found = find(text, {
        "w0": (6, 4), "w": (directions, gates * 5, 4), "r": (directions, gates * 5, 5), "b": (directions, gates * 10),
        "flat": ints(0, 0, directions * 5), "w9": (directions * 5, 3),
    })  # fmt: skip
    read, hidden = found.prunable()
    assert roles(read) == {"makes": ["w0.1"], "reads": ["w.2"]}
    assert (hidden.kind, hidden.size) == ("hidden", 5)
    assert roles(hidden) == {"makes": ["w.1", "r.1"], "holds": ["b.1"], "reads": ["r.2", "w9.0"]}
    assert units(hidden, "b", 1) == [0, 1, 2, 3, 4] * 2 * gates
    assert units(hidden, "w9", 0) == [0, 1, 2, 3, 4] * directions


def test_weights_in_codes_are_read_like_weights() -> None:
    codes = {name: np.ones(shape, np.int8) for name, shape in (("w0", (8, 3, 1, 1)), ("w9", (2, 8, 1, 1)))}
    found = find(
        """g (float[N, 3, 8, 8] x) => (float[N, 2, 8, 8] y) {
            f0 = DequantizeLinear <axis = 0> (w0, s0, z0) f9 = DequantizeLinear(w9, s9)
            a = Conv(x, f0) q = QuantizeLinear(a, s9) b = DequantizeLinear(q, s9) y = Conv(b, f9)
        }""",
        {**codes, "s0": (8,), "z0": np.zeros(8, np.int8), "s9": np.array(0.1, np.float32)},
    )
    group = found.prunable()[0]
    assert roles(group) == {"makes": ["w0.0"], "holds": ["s0.0", "z0.0"], "reads": ["w9.1"]}
    assert group.name == "a"


@pytest.mark.parametrize("normalization", [False, True])
def test_layer_norm_freezes_its_axis_unless_asked(normalization: bool) -> None:
    found = find(
        "g (float[N, T, 6] x) => (float[N, T, 3] y) { a = MatMul(x, w0) n = LayerNormalization(a, s, b) "
        "y = MatMul(n, w9) }",
        {"w0": (6, 8), "s": (8,), "b": (8,), "w9": (8, 3)}, normalization=normalization,
    )  # fmt: skip
    group = named(found, "a")
    why = "LayerNormalization 'n' takes statistics over it"
    assert (group.frozen, group.inexact) == (("", why) if normalization else (why, ""))


def test_group_norm_ties_whole_groups_written_out_too() -> None:
    found = image("b = GroupNormalization <num_groups = 4> (a, s, s)", {"s": (8,), "w9": (2, 8, 1, 1)}, opset=21)
    assert units(found.prunable()[0], "w0", 0) == [i // 2 for i in range(8)]
    found = image(
        "g = Reshape(a, groups) n = InstanceNormalization(g, s, s) h = Reshape(n, back) b = Mul(h, scale)",
        {"groups": ints(0, 4, -1), "back": ints(0, 8, 8, 8), "s": (4,), "scale": (8, 1, 1), "w9": (2, 8, 1, 1)},
    )
    assert units(found.prunable()[0], "w0", 0) == [i // 2 for i in range(8)]


@pytest.mark.parametrize("few", [4, 8])
def test_attention_as_one_operator(few: int) -> None:
    found = find(
        """g (float[N, 6, 16] x) => (float[N, 6, 5] y) {
            q = MatMul(x, wq) k = MatMul(x, wk) v = MatMul(x, wv)
            qh = Reshape(q, apart) kh = Reshape(k, few) vh = Reshape(v, few)
            qt = Transpose <perm = [0, 2, 1, 3]> (qh) kt = Transpose <perm = [0, 2, 1, 3]> (kh)
            vt = Transpose <perm = [0, 2, 1, 3]> (vh) c = Attention(qt, kt, vt)
            t = Transpose <perm = [0, 2, 1, 3]> (c) o = Reshape(t, flat) y = MatMul(o, wo)
        }""",
        {"wq": (16, 24), "wk": (16, 3 * few), "wv": (16, 3 * few), "wo": (24, 5), "apart": ints(0, 0, 8, 3),
         "few": ints(0, 0, few, 3), "flat": ints(0, 0, 24)}, opset=23,
    )  # fmt: skip
    group = found.prunable()[0]
    assert (group.kind, group.size) == ("heads", few)
    assert units(group, "wq", 1) == [i // (24 // few) for i in range(24)]


def test_einsum() -> None:
    found = find(
        'g (float[N, T, 6] x) => (float[N, T, 3] y) { a = Einsum <equation = "bti,hio->btho"> (x, w0) '
        'y = Einsum <equation = "btho,hoc->btc"> (a, w9) }',
        {"w0": (4, 6, 5), "w9": (4, 5, 3)},
    )
    heads, widths = found.prunable()
    assert (roles(heads), roles(widths)) == (
        {"makes": ["w0.0"], "reads": ["w9.0"]}, {"makes": ["w0.2"], "reads": ["w9.1"]},
    )  # fmt: skip


BLOCKS: dict[str, tuple[str, dict[str, Any]]] = {
    "conv": ("{y} = Conv(t{i}, w{i}) t{j} = Relu({y})", {"w": (8, 8, 1, 1)}),
    "residual": ("c{i} = Conv(t{i}, w{i}) s{i} = Sigmoid(c{i}) t{j} = Add(t{i}, s{i})", {"w": (8, 8, 1, 1)}),
    "depthwise": ("t{j} = Conv <group = 8, pads = [1, 1, 1, 1]> (t{i}, w{i}, b{i})", {"w": (8, 1, 3, 3), "b": (8,)}),
    "grouped": ("t{j} = Conv <group = 4> (t{i}, w{i}, b{i})", {"w": (8, 2, 1, 1), "b": (8,)}),
    "in halves": ("t{j} = Conv <group = 2> (t{i}, w{i})", {"w": (8, 4, 1, 1)}),
    "swap": ("a{i}, b{i} = Split <axis = 1> (t{i}) t{j} = Concat <axis = 1> (b{i}, a{i})", {}),
    "branch": ("c{i} = Conv(t{i}, w{i}) d{i}, e{i} = Split <axis = 1> (t{i}) t{j} = Concat <axis = 1> (c{i}, d{i})",
               {"w": (4, 8, 1, 1)}),
    "gate": ("p{i} = GlobalAveragePool(t{i}) c{i} = Conv(p{i}, w{i}) s{i} = Sigmoid(c{i}) t{j} = Mul(t{i}, s{i})",
             {"w": (8, 8, 1, 1)}),
    "shuffle": ("r{i} = Reshape(t{i}, two) m{i} = Transpose <perm = [0, 2, 1, 3, 4]> (r{i}) t{j} = Reshape(m{i}, back)",
                {}),
    "pick": ("t{j} = Gather <axis = 1> (t{i}, some)", {}),
    "pad": ("c{i} = Conv(t{i}, w{i}) q{i} = Pad(c{i}, by) n{i} = Cos(q{i}) t{j} = Add(t{i}, n{i})",
            {"w": (6, 8, 1, 1)}),
    "mix": ("t{j} = Softmax <axis = 1> (t{i})", {}),
    "sum": ("m{i} = ReduceMean <axes = [1]> (t{i}) t{j} = Add(t{i}, m{i})", {}),
    "stage": ("c{i} = Conv(t{i}, w{i}) n{i} = InstanceNormalization(c{i}, b{i}, b{i}) t{j} = HardSwish(n{i})",
              {"w": (8, 8, 1, 1), "b": (8,)}),
}  # fmt: skip
"""Blocks on eight channels of an image of 4 x 4; each weight is called after its block."""

SHARED = {
    "two": ints(0, 2, 4, 4, 4), "back": ints(0, 8, 4, 4), "some": ints(7, 0, 3, 3, 1, 2, 5, 4),
    "by": ints(0, 0, 0, 0, 0, 2, 0, 0),
}  # fmt: skip


def network(kinds: Sequence[str]) -> onnx.ModelProto:
    weights: dict[str, Any] = {"w": (8, 3, 1, 1), "wz": (8, 5)}
    body = ["t0 = Conv(x, w)"]
    for i, kind in enumerate(kinds):
        text, own = BLOCKS[kind]
        body.append(text.format(i=i, j=i + 1, y=f"y{i}"))
        weights.update({f"{name}{i}": shape for name, shape in own.items()})
    text = " ".join(body)
    weights.update({name: values for name, values in SHARED.items() if f", {name})" in text})
    end = f"g = GlobalAveragePool(t{len(kinds)}) f = Flatten(g) y = Gemm(f, wz)"
    return build(f"g (float[2, 3, 4, 4] x) => (float[2, 5] y) {{ {text} {end} }}", weights)


@settings(max_examples=60, deadline=None)
@given(st.lists(st.sampled_from(sorted(BLOCKS)), min_size=1, max_size=6), st.integers(0, 1000))
def test_values_of_a_unit_leave_only_where_they_are_read(kinds: list[str], seed: int) -> None:
    """With the readers of some units at zero, whatever the layers make of those units changes nothing."""
    proto, rng = network(kinds), np.random.default_rng(seed)
    model = load(proto)
    groups = find_groups(model, Shapes(model), evaluate).prunable()
    zeroed = {t.name: numpy_helper.to_array(t).copy() for t in proto.graph.initializer}
    changed = {name: values.copy() for name, values in zeroed.items()}
    for group in groups:
        gone = rng.random(group.size) < 0.5
        for site in group.sites:
            if site.role == "carries":
                continue
            lost = np.flatnonzero((site.units >= 0) & gone[site.units])
            where = (slice(None),) * site.axis + (lost,)
            if site.role == "reads":
                zeroed[site.tensor.name][where] = changed[site.tensor.name][where] = 0
            else:
                shape = changed[site.tensor.name][where].shape
                changed[site.tensor.name][where] += rng.normal(size=shape).astype(np.float32)
        for site in group.role("reads"):
            lost = np.flatnonzero((site.units >= 0) & gone[site.units])
            changed[site.tensor.name][(slice(None),) * site.axis + (lost,)] = 0
    feed = {"x": rng.normal(size=(2, 3, 4, 4)).astype(np.float32)}
    outputs = [evaluate(_with(proto, values), feed, ["y"])["y"] for values in (zeroed, changed)]
    np.testing.assert_array_equal(*outputs)  # multiplied by zero: not even rounding differs


def _with(proto: onnx.ModelProto, values: Mapping[str, np.ndarray[Any, Any]]) -> onnx.ModelProto:
    out = onnx.ModelProto()
    out.CopyFrom(proto)
    for tensor in out.graph.initializer:
        tensor.CopyFrom(numpy_helper.from_array(values[tensor.name], tensor.name))
    return out


def test_the_same_groups_every_time() -> None:
    def told(found: Channels) -> list[tuple[str, int, str, int]]:
        return [(g.name, g.size, g.frozen, len(g.sites)) for g in found.groups]

    assert told(attention(4, 3)) == told(attention(4, 3))
