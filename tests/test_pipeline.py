"""The pipeline: what it applies, checks, rolls back, reports; `optimize` on top of it."""

from __future__ import annotations

import json
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any, ClassVar

import numpy as np
import onnx
import onnx_graphsurgeon as gs
import pytest

import graphopt
from graphopt import Change, Context, Pass, Pipeline, Settings
from graphopt.bisection import bisect
from graphopt.data import load_samples
from graphopt.edit import Edit
from graphopt.errors import ModelError, SpecError
from graphopt.pipeline import StopPipelineError
from graphopt.ratio import Ratio
from graphopt.registry import register


def small_model() -> onnx.ModelProto:
    model = onnx.parser.parse_model("""
        <ir_version: 8, opset_import: ["": 17]>
        small (float[N, 4] x) => (float[N, 4] y)
        <float[4, 4] w = {1,2,3,4, 5,6,7,8, 9,10,11,12, 13,14,15,16}, float[4] b = {1, 2, 3, 4}>
        {
            one = Identity(x)
            product = MatMul(one, w)
            two = Identity(product)
            sum = Add(two, b)
            three = Identity(sum)
            y = Relu(three)
        }
    """)
    onnx.checker.check_model(model, full_check=True)
    return model


@register
@dataclass(frozen=True)
class DropIdentity(Pass):
    """Removes Identity nodes (test pass)."""

    name: ClassVar[str] = "test-drop-identity"

    def run(self, graph: gs.Graph, ctx: Context) -> Iterator[Change]:
        with Edit(graph) as edit:
            for node in [n for n in graph.nodes if n.op == "Identity"]:

                def apply(node: gs.Node = node) -> None:
                    edit.bypass(node.outputs[0], node.inputs[0])
                    edit.remove(node)

                yield Change(node.outputs[0].name, "remove Identity", apply=apply)


@register
@dataclass(frozen=True)
class Negate(Pass):
    """Negates every constant called `target`: a wrong rewrite (test pass)."""

    name: ClassVar[str] = "test-negate"
    target: str = "b"

    def run(self, graph: gs.Graph, ctx: Context) -> Iterator[Change]:
        for constant in ctx.model.constants():
            if constant.name == self.target:

                def apply(constant: gs.Constant = constant) -> None:
                    constant.values = -constant.values

                yield Change(constant.name, "negate", apply=apply)
            else:
                yield Change(constant.name, "negate", why=f"it is not '{self.target}'")


@register
@dataclass(frozen=True)
class Crash(Pass):
    """Changes something, then raises (test pass)."""

    name: ClassVar[str] = "test-crash"

    def run(self, graph: gs.Graph, ctx: Context) -> Iterator[Change]:
        yield Change("everything", "clear", apply=graph.nodes.clear)
        raise ZeroDivisionError("a bug of the pass's author")


@register
@dataclass(frozen=True)
class RenameOutput(Pass):
    """Renames the first output, which passes must not (test pass)."""

    name: ClassVar[str] = "test-rename-output"

    def run(self, graph: gs.Graph, ctx: Context) -> Iterator[Change]:
        tensor = graph.outputs[0]
        yield Change(tensor.name, "rename", apply=lambda: setattr(tensor, "name", "other"))


def settings(**options: Any) -> Settings:
    return Settings(**options)


def ops(model: onnx.ModelProto) -> list[str]:
    return [node.op_type for node in model.graph.node]


def test_passes_apply_and_the_input_stays_untouched() -> None:
    model = small_model()
    before = model.SerializeToString()
    result = Pipeline("test-drop-identity").run(model)
    assert model.SerializeToString() == before
    assert ops(result.proto) == ["MatMul", "Add", "Relu"]
    record = result.report.passes[0]
    assert (record.status, record.changes, record.before.nodes, record.after.nodes) == ("changed", 3, 6, 3)
    assert result.report.verification is not None
    assert result.report.verification["ok"]


def test_pass_objects_are_steps_too() -> None:
    pipeline = Pipeline([DropIdentity(), Negate(target="w")])
    assert str(pipeline) == 'test-drop-identity, test-negate{target="w"}'
    assert str(Pipeline(str(pipeline))) == str(pipeline)


@pytest.mark.parametrize("name", ["test-crash", "test-rename-output", "test-negate"])
def test_a_failing_pass_is_rolled_back_and_the_rest_goes_on(name: str, tmp_path: Path) -> None:
    chosen = settings(verify="each", reproducers=tmp_path)
    result = Pipeline(f"{name}, test-drop-identity").run(small_model(), settings=chosen)
    failed, kept = result.report.passes
    assert (failed.status, kept.status) == ("rolled back", "changed")
    assert failed.failure is not None
    assert ops(result.proto) == ["MatMul", "Add", "Relu"]
    np.testing.assert_array_equal(onnx.numpy_helper.to_array(result.proto.graph.initializer[1]), [1, 2, 3, 4])
    folder = Path(str(failed.reproducer))
    assert (folder / "before.onnx").exists()
    assert f"-p {name} " in (folder / "README.txt").read_text()


def test_reproducer_reproduces(tmp_path: Path) -> None:
    chosen = settings(verify="each", reproducers=tmp_path)
    report = Pipeline("test-negate").run(small_model(), settings=chosen).report
    folder = Path(str(report.passes[0].reproducer))
    model = graphopt.load(folder / "before.onnx")
    samples = load_samples(folder / "feeds", model)
    with pytest.raises(StopPipelineError, match="outputs differ"):
        Pipeline("test-negate").run(model, samples=samples, settings=settings(verify="each", on_failure="stop"))
    first_differing = (folder / "README.txt").read_text()
    assert "Add" in first_differing or "sum" in first_differing


def test_a_wrong_pass_found_only_at_the_end_is_left_out() -> None:
    result = Pipeline("test-drop-identity, test-negate").run(small_model(), settings=settings(verify="end"))
    assert [r.status for r in result.report.passes] == ["changed", "rolled back"]
    assert result.report.verification is not None
    assert result.report.verification["ok"]


def test_stop_on_failure_raises() -> None:
    with pytest.raises(StopPipelineError, match="test-crash"):
        Pipeline("test-crash").run(small_model(), settings=settings(on_failure="stop"))


def test_without_verification_a_wrong_pass_stays_but_an_invalid_one_does_not() -> None:
    result = Pipeline("test-negate, test-rename-output").run(small_model(), settings=settings(verify="off"))
    assert [r.status for r in result.report.passes] == ["changed", "rolled back"]
    assert result.report.verification is None


def test_bisect_names_the_pass_and_the_change() -> None:
    found = bisect(Pipeline("test-drop-identity, test-negate, test-drop-identity"), small_model())
    assert found.startswith("change 4 of 4: test-negate: b: negate")


def test_bisect_of_a_pipeline_that_breaks_nothing_is_refused() -> None:
    with pytest.raises(SpecError, match="nothing to bisect"):
        bisect(Pipeline("test-drop-identity"), small_model())


def test_near_misses_are_reported() -> None:
    result = Pipeline('test-negate{target="none"}').run(small_model(), settings=settings(verify="off"))
    blocked = result.report.passes[0].blocked
    assert {"where": "w", "what": "negate", "why": "it is not 'none'"} in blocked
    assert result.report.passes[0].status == "unchanged"


def test_limit_applies_only_the_first_changes() -> None:
    result = Pipeline("test-drop-identity").run(small_model(), settings=settings(limit=2))
    assert ops(result.proto).count("Identity") == 1


def test_repeat_ends_when_nothing_changes() -> None:
    result = Pipeline("repeat{times=5}(test-drop-identity)").run(small_model(), settings=settings(verify="off"))
    assert len(result.report.passes) == 2


def test_stop_after_and_print_after() -> None:
    printed: list[str] = []
    chosen = settings(
        verify="off", stop_after="test-drop-identity", print_after=frozenset({"all"}), printer=printed.append
    )
    result = Pipeline("test-drop-identity, test-negate").run(small_model(), settings=chosen)
    assert [r.name for r in result.report.passes] == ["test-drop-identity"]
    assert printed[0].startswith("== test-drop-identity: changed\n")
    assert printed[0].endswith("\n")
    assert any(line.startswith("-") and "Identity" in line for line in printed[0].splitlines())


def test_lists_mix_texts_and_passes() -> None:
    pipeline = Pipeline(["test-drop-identity, repeat(eliminate-dead)", Negate()])
    assert str(pipeline) == "test-drop-identity, repeat(eliminate-dead), test-negate"


def test_an_unregistered_pass_and_other_things_are_refused() -> None:
    @dataclass(frozen=True)
    class Stranger(Pass):
        """Was never registered (test pass)."""

        name: ClassVar[str] = "test-stranger"

    with pytest.raises(SpecError, match="not registered"):
        Pipeline([Stranger()])
    with pytest.raises(SpecError, match="a step is a text"):
        Pipeline([DropIdentity])  # type: ignore[list-item]
    with pytest.raises(SpecError, match="verify is one of each, end, off"):
        Settings(verify="sometimes")  # type: ignore[arg-type]
    with pytest.raises(ModelError, match="not int"):
        graphopt.load(3)  # type: ignore[arg-type]


def test_unknown_pass_and_option_are_named() -> None:
    with pytest.raises(SpecError, match="no pass 'test-drop-identiti'") as caught:
        Pipeline("test-drop-identiti")
    assert caught.value.hint == "did you mean 'test-drop-identity'?"
    with pytest.raises(SpecError, match="no option 'targe'"):
        Pipeline("test-negate{targe=w}")
    with pytest.raises(SpecError, match="must be of type str"):
        Pipeline("test-negate{target=3}")


def test_report_is_json() -> None:
    report = graphopt.optimize(small_model(), measure=False).report
    assert json.loads(json.dumps(report.to_dict()))["decision"] == "optimized"


def test_optimize_is_reproducible_byte_for_byte(tmp_path: Path) -> None:
    written = []
    for name in ("a.onnx", "b.onnx"):
        graphopt.optimize(small_model(), measure=False).save(tmp_path / name)
        written.append((tmp_path / name).read_bytes())
    assert written[0] == written[1]


def test_nothing_to_gain_returns_the_input() -> None:
    done = graphopt.optimize(small_model(), measure=False)
    again = graphopt.optimize(done.proto, measure=True)
    assert again.report.decision == "input kept"
    assert again.proto == done.proto


def test_optimize_takes_paths_models_and_protos(tmp_path: Path) -> None:
    path = tmp_path / "m.onnx"
    onnx.save(small_model(), path)
    protos = [graphopt.optimize(s, measure=False).proto for s in (path, str(path), small_model(), graphopt.load(path))]
    assert all(p == protos[0] for p in protos)


def test_a_wrong_output_shape_in_the_input_is_no_fault_of_a_pass() -> None:
    """Exports with axes named by hand state ranks that inference contradicts once constants are folded."""
    model = onnx.parser.parse_model("""
        <ir_version: 7, opset_import: ["": 12]>
        wrong (float[2, 6] x) => (float[2, n] y)
        <int64[1] two = {2}, int64[1] three = {3}, int64[1] rest = {-1}>
        {
            shape = Concat <axis = 0> (two, three, rest)
            inner = Reshape(x, shape)
            y = Relu(inner)
        }
    """)
    result = graphopt.optimize(model, measure=False)
    assert not result.report.failures
    assert ops(result.proto) == ["Reshape", "Relu"]


CUSTOM = """
    <ir_version: 8, opset_import: ["": 17, "my.ops": 1]>
    custom (float[N, 4] x) => (float[N, 4] y) { a = Identity(x)  b = my.ops.Twist(a)  y = Relu(b) }
"""


def test_custom_operators_are_kept_and_not_run_unless_their_library_is_named(tmp_path: Path) -> None:
    model = onnx.parser.parse_model(CUSTOM)
    with pytest.raises(ModelError, match="not a registered function") as caught:
        graphopt.optimize(model)
    assert "--custom-ops" in str(caught.value.hint)
    assert ops(graphopt.optimize(model, measure=False, verify="off").proto) == ["Twist", "Relu"]
    with pytest.raises(ModelError, match="no such library"):
        graphopt.load(model, custom_ops=[tmp_path / "none.so"])
    (tmp_path / "text.so").write_text("no library")
    with pytest.raises(ModelError, match="not a library of custom operators"):
        graphopt.optimize(graphopt.load(model, custom_ops=[tmp_path / "text.so"]))


def test_an_opset_beside_a_pipeline_of_ones_own_is_refused() -> None:
    with pytest.raises(SpecError, match="belongs to the default pipeline") as caught:
        graphopt.optimize(small_model(), pipeline="eliminate-dead", opset=20)
    assert caught.value.hint == "put upgrade-opset{to=20} into yours"


def test_an_input_that_is_kept_says_which_opset_it_stays_at(monkeypatch: pytest.MonkeyPatch) -> None:
    slower = Ratio(1.5, 1.4, 1.6, conditions={"threads": 1, "provider": "cpu", "clock": "wall"})
    monkeypatch.setattr("graphopt.judge.quick_ratio", lambda *_, **__: slower)
    result = graphopt.optimize(small_model(), opset=20)
    assert result.report.decision == "input kept"
    assert "stays at opset 17" in str(result.report.reason)
    assert result.model.opset == 17
    assert result.proto == small_model()


def test_only_constants_that_nothing_reads_were_lost() -> None:
    head = '<ir_version: 9, opset_import: ["" : 17]> g (float[2] x) => (float[2] y)'
    text = head + " <float a = {{{a}}}{more}> {{ y = {op}(x, a) }}"
    first = graphopt.load(onnx.parser.parse_model(text.format(a=1, more=", float b = {2}", op="Add"))).snapshot()
    for changes, expected in (
        ({}, True),
        ({"a": 3}, False),
        ({"op": "Mul"}, False),
        ({"more": ", float b = {2}"}, False),
    ):
        later = graphopt.load(onnx.parser.parse_model(text.format(**{"a": 1, "more": "", "op": "Add", **changes})))
        assert first.only_lost_constants(later.snapshot()) is expected
