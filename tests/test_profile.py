"""Profiles: every kernel finds its way back to nodes of the model, and no time is lost or counted twice."""

from __future__ import annotations

import json
from typing import Any

import numpy as np
import onnx
import pytest
from onnx import TensorProto, helper, numpy_helper

from graphopt.errors import DataError
from graphopt.model import load
from graphopt.profile import Profile, _exclusive, _kernel_times, observe, per_node

FLOAT = TensorProto.FLOAT


def info(name: str, shape: list[int | str], dtype: int = FLOAT) -> onnx.ValueInfoProto:
    return helper.make_tensor_value_info(name, dtype, shape)


def model_of(
    nodes: list[onnx.NodeProto],
    inputs: list[onnx.ValueInfoProto],
    output: str,
    constants: dict[str, Any] | None = None,
    functions: list[onnx.FunctionProto] | None = None,
) -> onnx.ModelProto:
    weights = [numpy_helper.from_array(v, k) for k, v in (constants or {}).items()]
    graph = helper.make_graph(nodes, "g", inputs, [helper.make_tensor_value_info(output, FLOAT, None)], weights)
    opsets = [helper.make_opsetid("", 17), *(helper.make_opsetid(f.domain, 1) for f in functions or [])]
    return helper.make_model(graph, opset_imports=opsets, functions=functions or [], ir_version=9)


def convolutions() -> onnx.ModelProto:
    """Conv, BatchNormalization, Relu, Conv, Add to the first, Relu; some nodes have no name."""
    rng = np.random.default_rng(0)
    weights = {f"w{i}": rng.standard_normal((16, 16, 3, 3)).astype(np.float32) for i in (0, 1)}
    weights |= {k: np.ones(16, np.float32) for k in ("scale", "shift", "mean", "var")}
    nodes = [
        helper.make_node("Conv", ["x", "w0"], ["a"], name="first", pads=[1] * 4),
        helper.make_node("BatchNormalization", ["a", "scale", "shift", "mean", "var"], ["b"], name="norm"),
        helper.make_node("Relu", ["b"], ["c"], name="bend"),
        helper.make_node("Conv", ["c", "w1"], ["d"], pads=[1] * 4),
        helper.make_node("Add", ["d", "c"], ["e"], name="sum"),
        helper.make_node("Relu", ["e"], ["f"], name="end"),
        helper.make_node("HardSwish", ["f"], ["y"]),
    ]
    return model_of(nodes, [info("x", [1, 16, 12, 12])], "y", weights)


def names(profile: Profile) -> set[str]:
    return {n for row in profile.nodes for n in ((row.name, *row.fused) if not row.added else row.fused)}


def test_fused_kernels_lead_back_to_their_nodes() -> None:
    found = per_node(convolutions(), runs=4)
    rows = {row.name: row for row in found.nodes}
    assert rows["first"].op == "Conv"
    assert set(rows["first"].fused) == {"norm", "bend"}
    second = rows["Conv -> d"]  # nodes without a name are shown by what they make
    assert second.kernel in ("Conv", "FusedConv")
    assert names(found) == {"first", "norm", "bend", "Conv -> d", "sum", "end", "HardSwish -> y"}
    taken_apart = [row.kernel for row in found.nodes if row.name == "HardSwish -> y"]
    assert sorted(taken_apart) == ["HardSigmoid", "Mul"]
    assert all(row.kernel in ("ReorderInput", "ReorderOutput") for row in found.nodes if row.added)


def test_shares_and_operators_add_up() -> None:
    found = per_node(convolutions(), runs=4)
    assert sum(row.share for row in found.nodes) == pytest.approx(1.0)
    assert sum(row["share"] for row in found.by_op()) == pytest.approx(1.0)
    assert sum(row["nodes"] for row in found.by_op()) == len({row.name for row in found.nodes})
    assert sum(row.seconds for row in found.nodes) <= found.seconds
    assert found.nodes == tuple(sorted(found.nodes, key=lambda row: -row.seconds))
    assert found.providers == {"CPUExecutionProvider": len(found.nodes)}
    document = json.loads(json.dumps(found.to_dict()))
    assert document["runs"] == found.runs == 2  # the faster half
    assert document["outside_ms"] >= 0


def test_the_model_given_is_untouched() -> None:
    model = load(convolutions())
    before = model.proto
    per_node(model, runs=1)
    assert model.proto == before


def looping() -> onnx.ModelProto:
    body = helper.make_graph(
        [
            helper.make_node("MatMul", ["s", "s"], ["t"], name="inner"),
            helper.make_node("Identity", ["k"], ["k2"], name="keep"),
        ],
        "body",
        [info("i", [], TensorProto.INT64), info("k", [], TensorProto.BOOL), info("s", [8, 8])],
        [info("k2", [], TensorProto.BOOL), info("t", [8, 8])],
    )
    node = helper.make_node("Loop", ["n", "", "x"], ["y"], body=body, name="outer")
    return model_of([node], [info("x", [8, 8])], "y", {"n": np.array(3)})


def test_inner_nodes_are_counted_once() -> None:
    found = per_node(looping(), runs=4)
    rows = {row.name: row for row in found.nodes}
    assert rows["inner"].calls == pytest.approx(3)
    assert rows["outer"].calls == pytest.approx(1)
    assert sum(row.seconds for row in found.nodes) <= found.seconds


def test_nodes_of_functions_are_found_at_every_call() -> None:
    function = helper.make_function(
        "my",
        "Fun",
        ["p"],
        ["q"],
        [helper.make_node("Exp", ["p"], ["r"], name="exp"), helper.make_node("Softmax", ["r"], ["q"])],
        [helper.make_opsetid("", 17)],
    )
    calls = [
        helper.make_node("Fun", ["x"], ["y"], domain="my", name="one"),
        helper.make_node("Fun", ["y"], ["z"], domain="my", name="two"),
    ]
    found = per_node(model_of(calls, [info("x", [4, 4])], "z", functions=[function]), runs=2)
    rows = {row.name: row for row in found.nodes}
    assert set(rows) == {"exp", "Softmax -> q"}
    assert rows["exp"].calls == pytest.approx(2)


def test_fused_under_a_new_name() -> None:
    """LayerNormalization written out comes back as one kernel that stands for all of it."""
    nodes = [
        helper.make_node("ReduceMean", ["x"], ["m"], name="mean", axes=[-1]),
        helper.make_node("Sub", ["x", "m"], ["d"], name="center"),
        helper.make_node("Pow", ["d", "two"], ["d2"], name="square"),
        helper.make_node("ReduceMean", ["d2"], ["v"], name="variance", axes=[-1]),
        helper.make_node("Add", ["v", "tiny"], ["ve"], name="stable"),
        helper.make_node("Sqrt", ["ve"], ["s"], name="root"),
        helper.make_node("Div", ["d", "s"], ["n"], name="normal"),
        helper.make_node("Mul", ["n", "g"], ["ng"], name="gain"),
        helper.make_node("Add", ["ng", "b"], ["y"], name="shift"),
    ]
    constants = {
        "two": np.array(2, np.float32),
        "tiny": np.array(1e-5, np.float32),
        "g": np.ones(8, np.float32),
        "b": np.ones(8, np.float32),
    }
    found = per_node(model_of(nodes, [info("x", [2, 3, 8])], "y", constants), runs=2)
    assert len(found.nodes) == 1
    assert found.nodes[0].op == found.nodes[0].kernel == "LayerNormalization"
    assert names(found) == {n.name for n in nodes}


def test_samples_may_not_be_empty() -> None:
    with pytest.raises(DataError):
        per_node(convolutions(), [])


def event(name: str, start: float, length: float, category: str = "Node") -> dict[str, Any]:
    return {
        "name": name,
        "ts": start,
        "dur": length,
        "cat": category,
        "tid": 1,
        "args": {"op_name": "X", "provider": "P"},
    }


def test_time_of_nested_events_is_taken_out() -> None:
    events = [event("in1", 2, 3), event("in2", 6, 2), event("deep", 6, 1), event("out", 1, 10), event("next", 11, 4)]
    inner = {e["name"]: taken for e, taken in _exclusive(events)}
    assert inner == {"out": 5, "in1": 0, "in2": 1, "deep": 0, "next": 0}


def test_slow_runs_and_warmup_do_not_count() -> None:
    lengths = [500, 10, 11, 90, 12]
    events = []
    for i, length in enumerate(lengths):
        events.append(event("model_run", 1000 * i, length, "Session"))
        events.append(event("n_kernel_time", 1000 * i + 1, length - 5))
    kept, seconds, found = _kernel_times(events, skip=1, feeds=1)
    assert kept == 2
    assert seconds == pytest.approx(10.5e-6)
    assert found["n"].calls == 2
    assert found["n"].micros == 11
    # two feeds in turn: of run 2 and 4, of run 1 and 3, the faster each
    kept, seconds, _ = _kernel_times(events, skip=1, feeds=2)
    assert kept == 2
    assert seconds == pytest.approx(10.5e-6)


def test_observation_knows_shapes_and_calls() -> None:
    model = load(looping())
    found = observe(model, {"x": np.eye(8, dtype=np.float32)})
    body = model.graph.nodes[0].attrs["body"]
    assert found.calls[id(body.nodes[0])] == 3
    assert found.calls[id(model.graph.nodes[0])] == 1
    assert found.shapes[id(model.graph.outputs[0])] == (8, 8)


@pytest.mark.zoo
@pytest.mark.parametrize("name", ["ppocr-det", "resnet50", "densenet121", "silero-vad", "minilm-dynamo", "magika"])
def test_all_kernels_of_real_models_are_traced(name: str) -> None:
    from graphopt.models import zoo

    found = per_node(zoo.fetch(name), list(zoo.feeds(name, count=1)), runs=1, warmup=1)
    lost = [(row.name, row.kernel) for row in found.nodes if row.added and not row.kernel.startswith("Reorder")]
    assert not lost
    assert sum(row.share for row in found.nodes) == pytest.approx(1.0)
