"""`explain`: fates, what ORT adds and why, integers and floats, near misses; facts about ORT are held here."""

from __future__ import annotations

import functools
import json
import warnings
from collections import Counter
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any, ClassVar

import numpy as np
import onnx
import onnx_graphsurgeon as gs
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from onnx import helper
from onnx.backend.test import loader

from graphopt import base, profile
from graphopt.dry_run import Site, grouped
from graphopt.errors import GraphoptError
from graphopt.explain import Explanation
from graphopt.explain import explain as run_explain
from graphopt.model import load
from tests import explain_models as models
from tests.explain_models import explain, rows, shown, with_pipeline

N = helper.make_node


def kinds(found: Explanation) -> dict[str, str]:
    return {row.name: row.fate for row in found.nodes}


@pytest.fixture(autouse=True)
def _tidy_only(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> None:
    """Keep the dry run short: passes have tests of their own; the zoo's models go through all of them."""
    if request.node.get_closest_marker("zoo") is None:
        with_pipeline(monkeypatch, "eliminate-identity")


# --- fates


def test_convolution_takes_norm_and_activation() -> None:
    found = rows(explain(models.conv_norm_relu()))
    assert found["before"].fate == "kept"
    assert found["before"].how == "runs as it is in the blocked layout, with 'norm', 'bend' inside"
    assert found["norm"].how == "folded into the weights of Conv of 'before'"
    assert found["bend"].how == "the activation of Conv of 'before'"
    assert (found["norm"].level, found["bend"].level) == ("basic", "extended")
    assert all(row.blocked for row in found.values())
    assert found["before"].share is not None
    assert found["norm"].share is None  # within the convolution's


def test_matmul_and_add_become_gemm() -> None:
    found = rows(explain(models.gemm()))
    assert (found["product"].fate, found["product"].kernel) == ("fused", "Gemm")
    assert found["shift"].how == "the bias of Gemm of 'product'"
    assert found["product"].macs == 2 * 8 * 4


def test_layer_norm_is_one_kernel() -> None:
    found = rows(explain(models.layer_norm()))
    assert {row.kernel for row in found.values()} == {"LayerNormalization"}
    assert {row.fate for row in found.values()} == {"fused"}
    assert sum(row.share is not None for row in found.values()) == 1


def test_gelu_is_one_kernel() -> None:
    found = rows(explain(models.gelu()))
    assert {(row.fate, row.kernel) for row in found.values()} == {("fused", "Gelu")}


def test_hard_swish_is_taken_apart() -> None:
    model = models.model([N("HardSwish", ["x"], ["y"], name="act")], [("x", models.FLOAT, [2, 8])], "y")
    (row,) = explain(model).nodes
    assert row.fate == "rewritten"
    assert set(row.kernel.split(" + ")) == {"HardSigmoid", "Mul"}


def test_what_is_folded_shared_and_removed() -> None:
    found = explain(models.tidied())
    fates = kinds(found)
    assert {fates[name] for name in ("sum", "exp", "shape")} == {"folded"}
    assert {fates[name] for name in ("nothing", "same type")} == {"removed"}
    assert fates["dead"] == "kept"  # ORT runs what nobody reads
    assert sorted([fates["neg1"], fates["neg2"]]) == ["kept", "shared"]
    merged, left = ("neg1", "neg2") if fates["neg1"] == "shared" else ("neg2", "neg1")
    assert rows(found)[merged].how == f"computes the same as '{left}'"
    assert all(row.kernel == "" and row.share is None for row in found.nodes if row.fate != "kept")


def test_what_is_known_from_shapes_is_folded() -> None:
    nodes = [
        N("Shape", ["x"], ["s"], name="shape"),
        N("Gather", ["s", "zero"], ["g"], name="pick", axis=0),
        N("Concat", ["g", "rest"], ["t"], name="target", axis=0),
        N("Reshape", ["x", "t"], ["y"], name="reshape"),
    ]
    constants = {"zero": np.array([0]), "rest": np.array([-1])}
    found = rows(explain(models.model(nodes, [("x", models.FLOAT, [2, 3, 4])], "y", constants)))
    for name in ("shape", "pick", "target"):
        assert found[name].fate == "folded"
        assert found[name].how.startswith("computed when the model is loaded")
    assert found["reshape"].fate == "kept"


def test_what_is_fused_in_the_blocked_layout_is_found_by_its_name() -> None:
    """No tensor of the model is left there: ORT names the kernel after the Mul."""
    middle = [N("Sigmoid", ["a"], ["s"], name="sigmoid"), N("Mul", ["a", "s"], ["m"], name="times")]
    found = rows(explain(models.between(middle)))
    assert {(found[name].kernel, found[name].fate) for name in ("sigmoid", "times")} == {("QuickGelu", "fused")}
    assert found["times"].blocked
    assert found["sigmoid"].how == "part of QuickGelu of 'times'"


def test_all_around_an_integer_convolution_is_part_of_it() -> None:
    found = rows(explain(models.quantized()))
    for name in ("xDQ", "wDQ", "yQ"):
        assert (found[name].fate, found[name].how) == ("fused", "part of QLinearConv of 'conv'")
    assert found["xQ"].fate == found["yDQ"].fate == "kept"


def test_layers_are_listed_by_arithmetic_with_the_reason() -> None:
    tail = [
        N("QuantizeLinear", ["c", "ys", "z"], ["yq"], name="yQ"),
        N("DequantizeLinear", ["yq", "ys", "z"], ["yd"], name="yDQ"),
        N("Conv", ["yd", "f"], ["e"], name="half-way", **models.PAD),
        N("Conv", ["e", "f"], ["y"], name="plain", **models.PAD),
    ]
    given = models.quantized(tail=tail)
    given.graph.initializer.append(onnx.numpy_helper.from_array(models.numbers(16, 16, 3, 3), "f"))
    lines = shown(explain(given), width=1000)
    table = [" ".join(line.split()) for line in lines[lines.index("layers by arithmetic") + 2 :]]
    told = {line.split()[-1]: line for line in table[: table.index("")]}
    assert set(told) == {"conv", "half-way", "plain"}
    assert told["conv"].startswith("1 Conv integer 33.3% ")
    assert "runs as QLinearConv" in told["conv"]
    assert "float 33.3%" in told["half-way"]
    assert "its constant input is float" in told["half-way"]
    assert "not quantized: nothing it reads has a code" in told["plain"]


def test_a_float_model_has_no_table_of_arithmetic() -> None:
    assert "layers by arithmetic" not in shown(explain(models.conv_norm_relu()))


def test_a_lone_norm_becomes_a_convolution_of_the_blocked_layout() -> None:
    middle = [
        N("Relu", ["a"], ["r"], name="bend"),
        N("BatchNormalization", ["r", "s", "s", "s", "s"], ["m"], name="norm"),
    ]
    row = rows(explain(models.between(middle, {"s": np.ones(16, np.float32)})))["norm"]
    assert (row.fate, row.kernel, row.blocked, row.level) == ("rewritten", "Conv", True, "all")


def test_a_branch_never_taken_is_removed() -> None:
    found = rows(explain(models.branches(constant=True)))
    assert found["choose"].how == "its condition is constant: then_branch took its place"
    assert {found[name].fate for name in ("then Sin", "then", "neg")} == {"kept"}
    assert found["else Cos"].how == "in a branch of 'choose' that is never taken"
    assert found["else"].fate == "removed"


def test_both_branches_are_kept_and_one_ran() -> None:
    found = explain(models.branches(constant=False), data=[{"x": np.ones((2, 8), np.float32), "c": np.array(False)}])
    assert set(kinds(found).values()) == {"kept"}
    assert rows(found)["else Cos"].provider == "CPUExecutionProvider"
    assert rows(found)["then Sin"].provider is None
    assert any("did not run" in line for line in shown(found, everything=True))


def test_transposes_that_cancel() -> None:
    found = explain(models.transposed())
    assert kinds(found) == {"there": "removed", "bend": "kept", "back": "removed"}
    assert found.moves == ()


OPS = ("Relu", "Sigmoid", "Tanh", "Exp", "Neg", "Identity", "HardSwish", "Softplus", "LeakyRelu")


@st.composite
def networks(draw: st.DrawFn) -> onnx.ModelProto:
    """Chains and sums of activations, constants and convolutions, some nodes unnamed."""
    constants: dict[str, Any] = {"s": np.array(1.5, np.float32), "k": models.numbers(16, 16, 1, 1)}
    tensors, nodes = ["x"], []
    for i in range(draw(st.integers(1, 10))):
        source, other = draw(st.sampled_from(tensors)), draw(st.sampled_from([*tensors, "s"]))
        kind = draw(st.sampled_from(["unary", "unary", "Add", "Mul", "Conv", "Transpose"]))
        name = draw(st.sampled_from(["", f"node {i}"]))
        op = draw(st.sampled_from(OPS)) if kind == "unary" else kind
        inputs = {"Add": [source, other], "Mul": [other, source], "Conv": [source, "k"]}.get(kind, [source])
        attributes: dict[str, Any] = {"perm": [0, 1, 3, 2]} if kind == "Transpose" else {}
        nodes.append(N(op, inputs, [f"t{i}"], name=name, **attributes))
        tensors.append(f"t{i}")
    read = {name for node in nodes for name in node.input}
    return models.model(
        nodes, [("x", models.FLOAT, [1, 16, 4, 4])], [t for t in tensors[1:] if t not in read], constants
    )


@settings(max_examples=200)
@given(networks())
def test_every_node_has_a_fate_and_all_time_is_accounted_for(model: onnx.ModelProto) -> None:
    found = explain(model)
    assert len(found.nodes) == len(model.graph.node)
    assert "unknown" not in found.fates
    own = sum(row.share or 0.0 for row in found.nodes)
    assert own + sum(move.share for move in found.moves) == pytest.approx(1.0)
    assert sum(found.ops_after.values()) == len(profile.optimized_graph(load(model)).graph.node)  # type: ignore[union-attr]
    for op, count in Counter(row.op for row in found.nodes if row.fate == "kept").items():
        assert count <= found.ops_after[op]  # each has a kernel of its own
    for row in found.nodes:
        assert bool(row.kernel) == (row.fate in ("kept", "fused", "rewritten")), row
        assert row.how
    for move in found.moves:
        assert move.node is not None, move
    json.dumps(found.to_dict())


# --- what graphopt would do


@dataclass(frozen=True)
class _Nearly(base.Pass):
    """Nearly changes every Exp, `times` times, and never does."""

    name: ClassVar[str] = "test-nearly"
    times: int = 1
    op: str = "Exp"

    def run(self, graph: gs.Graph, ctx: base.Context) -> Iterator[base.Change]:
        for node in graph.nodes:
            for turn in range(self.times if node.op == self.op else 0):
                why = f"inner value '{node.inputs[0].name}' is a graph output"
                yield base.Change(f"{node.name}{turn or ''}", "Nearly", why)


@dataclass(frozen=True)
class _Fails(base.Pass):
    """Changes something, then raises."""

    name: ClassVar[str] = "test-fails"

    def run(self, graph: gs.Graph, ctx: base.Context) -> Iterator[base.Change]:
        yield base.Change("here", "a change that is rolled back", apply=lambda: None)
        raise ValueError("on purpose")


@dataclass(frozen=True)
class _SameNames(base.Pass):
    """Gives all nodes one name, which ORT refuses."""

    name: ClassVar[str] = "test-same-names"

    def run(self, graph: gs.Graph, ctx: base.Context) -> Iterator[base.Change]:
        for node in graph.nodes:
            yield base.Change(node.name, "rename", apply=functools.partial(setattr, node, "name", "same"))


def test_changes_and_near_misses_of_a_dry_run(monkeypatch: pytest.MonkeyPatch) -> None:
    with_pipeline(monkeypatch, "repeat(eliminate-identity, eliminate-dead, test-nearly)", _Nearly)
    model = load(models.tidied())
    before = model.proto
    run = explain(model).dry_run
    assert model.proto == before
    changed = {(site.step, site.where) for site in run.changes}
    assert {("eliminate-identity", "nothing"), ("eliminate-identity", "same type")} <= changed
    # three rounds propose it; it counts once
    assert run.near_misses == (Site("test-nearly", "exp", "Nearly", "inner value 's' is a graph output"),)
    assert run.after.nodes < run.before.nodes
    assert run.result.kernels is not None
    assert run.result.timing is None


def test_what_a_later_round_resolves_is_no_near_miss(monkeypatch: pytest.MonkeyPatch) -> None:
    with_pipeline(monkeypatch, "repeat(test-nearly{op=Identity}, eliminate-identity)", _Nearly)
    run = explain(models.tidied()).dry_run
    assert "nothing" in {site.where for site in run.changes}
    assert run.near_misses == ()


def test_near_misses_are_complete(monkeypatch: pytest.MonkeyPatch) -> None:
    """The pipeline's own report keeps 200 of a pass."""
    with_pipeline(monkeypatch, "test-nearly{times=300}", _Nearly)
    (group,) = explain(models.tidied()).to_dict()["graphopt"]["near_misses"]
    assert group["count"] == len(group["places"]) == 300
    assert group["example"] == "inner value 's' is a graph output"


def test_a_pass_that_fails_is_named_and_its_changes_are_not_promised(monkeypatch: pytest.MonkeyPatch) -> None:
    with_pipeline(monkeypatch, "eliminate-identity, test-fails", _Fails)
    found = explain(models.tidied())
    assert list(found.dry_run.failures) == ["test-fails"]
    assert "on purpose" in found.dry_run.failures["test-fails"]
    assert {site.step for site in found.dry_run.changes} == {"eliminate-identity"}
    assert any("test-fails would be rolled back" in line for line in shown(found))


def test_a_result_that_ort_refuses_is_no_crash(monkeypatch: pytest.MonkeyPatch) -> None:
    with_pipeline(monkeypatch, "test-same-names", _SameNames)
    found = run_explain(models.gemm())
    assert "same node name" in (found.dry_run.result.refused or "")
    assert found.dry_run.result.timing is None
    assert any("would be refused" in line for line in shown(found))


def test_sites_are_grouped_by_what_they_say() -> None:
    sites = [
        Site("p", "n1", "Rule", "inner value 'a' is read by conv_7, too"),
        Site("p", "n2", "Rule", "inner value 'b' is read by conv_8, too"),
        Site("p", "n3", "Rule", "64 channels are too many"),
        Site("p", "n4", "Rule", "32 channels are too many"),
        Site("q", "n5", "Rule", "32 channels are too many"),
        Site("p", "n6", "Rule to [1, 2]", ""),
    ]
    found = grouped(sites, {"conv_7", "conv_8"})
    assert [(g.step, g.places, g.why) for g in found] == [
        ("p", ("n1", "n2"), "inner value '…' is read by '…', too"),
        ("p", ("n3", "n4"), "N channels are too many"),
        ("q", ("n5",), "N channels are too many"),
        ("p", ("n6",), ""),
    ]
    assert found[0].example == sites[0].why
    assert [g.count for g in grouped(sites, reasons=False)] == [4, 1, 1]


def test_the_result_is_timed_when_asked() -> None:
    timing = run_explain(models.scalar_mul()).dry_run.result.timing
    assert timing is not None
    assert timing["interval"][0] <= timing["ratio"] <= timing["interval"][1]


def cases() -> list[Any]:
    """One in ten models of the backend suite."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        found = [case for kind in ("node", "simple") for case in loader.load_model_tests(kind=kind)]
    return [case.model or f"{case.model_dir}/model.onnx" for case in found][::10]


@pytest.mark.conformance
def test_models_of_the_backend_suite_are_explained() -> None:
    """Functions that ORT takes apart, types that it lacks, sequences, empty tensors: no time is lost, hardly a fate."""
    explained, unknown = 0, 0
    for model in cases():
        try:
            found = explain(model)
        except GraphoptError:  # ORT does not run it
            continue
        explained += 1
        unknown += found.fates.get("unknown", 0)
        assert found.unplaced == pytest.approx(0.0, abs=1e-9) or found.fates.get("unknown", 0)
        shown(found, everything=True)
    assert explained > 100
    assert unknown <= 0.02 * explained


# --- where ORT's graph cannot be read, the terminal, the command


def test_fates_by_name_where_the_graph_cannot_be_read(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(profile, "is_readable", lambda *_: False)
    found = explain(models.conv_norm_relu())
    assert not found.readable
    assert found.moves == ()
    assert set(found.fates) <= {"kept", "unknown"}
    assert rows(found)["norm"].fate == "unknown"
    assert any("cannot be read" in line for line in shown(found))
    assert found.dry_run.result.kernels is None


def test_the_command(cli: Callable[..., Any], tmp_path: Path) -> None:
    path = tmp_path / "net.onnx"
    onnx.save(models.scalar_mul(), path)
    document = cli("explain", path, "--no-measure", "--json").json
    assert document["at"] == {"x": [1, 16, 12, 12]}
    assert document["summary"]["reorders"] == 4
    assert {row["name"] for row in document["nodes"]} == {"before", "bend", "scale", "after"}
    assert {"op": "ReorderInput", "before": 0, "after": 2} in document["ops"]
    printed = cli("explain", path, "--no-measure").out
    assert "4 reorders in and out of it" in printed
    assert "Mul: its operand is a scalar constant" in printed
    every = cli("explain", path, "--no-measure", "--all").out
    assert all(name in every for name in ("before", "bend", "scale", "after"))
    wrong = cli("explain", path, "--shape", "x=1")
    assert wrong.code == 2
    assert wrong.err.startswith("error: ")


def test_the_command_takes_plugins(cli: Callable[..., Any], tmp_path: Path) -> None:
    onnx.save(models.gemm(), tmp_path / "net.onnx")
    assert "no such" in cli("explain", tmp_path / "net.onnx", "--plugin", tmp_path / "none.py").err


ZOO = ("ppocr-det", "minilm-torchscript", "silero-vad", "efficientnet-lite0-torchscript")


@pytest.mark.zoo
@pytest.mark.parametrize("name", ZOO)
def test_real_models_are_explained_on_one_page(name: str) -> None:
    from graphopt.models import zoo

    found = explain(zoo.fetch(name), data=list(zoo.feeds(name, count=1)))
    assert "unknown" not in found.fates
    assert sum(found.by_op().values()) == pytest.approx(1.0)
    assert all(move.node is not None for move in found.moves)
    lines = shown(found, width=100_000)
    assert len(lines) <= 65
    every = "\n".join(shown(found, everything=True, width=100_000))
    assert all(row.name in every for row in found.nodes)


@pytest.mark.zoo
def test_the_detector_spends_its_time_outside_the_blocked_layout() -> None:
    """What ORT-FACTS says of it: scalar Mul and Add between convolutions force reorders."""
    from graphopt.models import zoo

    found = explain(zoo.fetch("ppocr-det"))
    count, share = found.reorders
    assert count == 93
    assert share > 0.03
    assert found.elementwise_outside is not None
    assert found.elementwise_outside > 0.15
    forced = [m for m in found.moves if m.why.endswith("is a scalar constant")]
    assert len(forced) > 50
