"""convert-fp16: valid, close, idempotent, and float32 where float16 would fail."""

from __future__ import annotations

import random
import subprocess
import sys
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import onnx_graphsurgeon as gs
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from onnx import TensorProto, numpy_helper, parser

from graphopt.base import Target
from graphopt.data import load_samples
from graphopt.errors import GraphoptError, SpecError
from graphopt.half import CUDA_HALF, PRECISE, RISKS
from graphopt.model import load
from graphopt.models import zoo
from graphopt.passes.half_survey import Survey
from graphopt.pipeline import Pipeline, Result, Settings
from graphopt.registry import get
from graphopt.runtime import Session
from graphopt.text import to_text
from tests.conformance.test_backend_suite import differences, load_cases, read_case
from tests.test_passes_properties import assert_equal, is_dynamic, models

Array = np.ndarray[Any, Any]

EPSILON = 2.0**-11
"""Half a unit in the last place of float16, relative."""

SAMPLED = 300
"""Models of ONNX's backend suite."""


def run(
    model: onnx.ModelProto | str,
    spec: str = "convert-fp16",
    samples: Sequence[Mapping[str, Any]] | None = None,
    provider: str = "cpu",
) -> Result:
    source = parsed(model) if isinstance(model, str) else model
    given_samples = None if samples is None else load_samples(list(samples), load(source))
    settings = Settings(verify="off", on_failure="stop", target=Target(provider=provider, here=provider == "cpu"))
    return Pipeline(spec).run(source, samples=given_samples, settings=settings)


def parsed(text: str, opset: int = 17) -> onnx.ModelProto:
    return parser.parse_model(f'<ir_version: 8, opset_import: ["": {opset}]>\n{text}')


def reasons(result: Result) -> dict[str, str]:
    return {b["where"]: b["why"] for b in result.report.passes[0].blocked}


def kinds(result: Result) -> dict[str, str]:
    """Return the element type of every tensor that the text names one for."""
    inferred = onnx.shape_inference.infer_shapes(result.proto)
    infos = [*inferred.graph.value_info, *inferred.graph.output, *inferred.graph.input]
    found = {i.name: TensorProto.DataType.Name(i.type.tensor_type.elem_type) for i in infos}
    return found | {i.name: TensorProto.DataType.Name(i.data_type) for i in inferred.graph.initializer}


def always(_: Survey, node: gs.Node) -> int:
    """Return a gain that outweighs any Cast."""
    return 0 if node.op == "Cast" else 1 << 20


@pytest.fixture
def eager(monkeypatch: pytest.MonkeyPatch) -> None:
    """Let everything convert that may: in small models Casts cost more than they save."""
    monkeypatch.setattr("graphopt.passes.half_assignment.gain", always)


CONVS = """
g (float[1, 8, 64, 64] x) => (float[1, 8, 62, 62] y)
<float[8, 8, 3, 3] w, float[8] b>
{ a = Conv (x, w, b)  y = Relu (a) }
"""


def convs(scale: float = 0.1) -> onnx.ModelProto:
    model = parser.parse_model(
        f'<ir_version: 8, opset_import: ["": 17]>\n{CONVS.replace("<float[8, 8, 3, 3] w, float[8] b>", "")}'
    )
    rng = np.random.default_rng(0)
    model.graph.initializer.append(
        numpy_helper.from_array((rng.normal(size=(8, 8, 3, 3)) * scale).astype(np.float32), "w")
    )
    model.graph.initializer.append(numpy_helper.from_array(rng.normal(size=8).astype(np.float32), "b"))
    return model


def test_weights_and_tensors_are_half_and_the_signature_stays() -> None:
    model = convs()
    result = run(model)
    assert [n.op_type for n in result.proto.graph.node] == ["Cast", "Conv", "Relu", "Cast"]
    assert {kinds(result)[n] for n in ("w", "b", "a")} == {"FLOAT16"}
    assert {kinds(result)[n] for n in ("x", "y")} == {"FLOAT"}
    x = np.random.default_rng(1).normal(size=(1, 8, 64, 64)).astype(np.float32)
    wanted, found = (Session(m).run({"x": x})["y"] for m in (model, result.proto))
    # each of 72 products and the sum round: a few half-units of the largest
    assert np.abs(wanted - found).max() <= 8 * EPSILON * np.abs(wanted).max()
    assert np.abs(wanted - found).max() > 0


def test_a_second_run_changes_nothing_and_says_why() -> None:
    once = run(convs())
    twice = run(once.proto)
    assert twice.report.passes[0].status == "unchanged"
    assert "float16 already" in " ".join(reasons(twice).values())


def test_small_graphs_are_left_alone() -> None:
    result = run("g (float[4] x) => (float[4] y) { a = Relu (x)  y = Tanh (a) }")
    assert result.report.passes[0].status == "unchanged"
    assert set(reasons(result).values()) == {"the Casts around it would cost more than it saves"}


@pytest.mark.usefixtures("eager")
@pytest.mark.parametrize(
    ("body", "opset", "why"),
    [
        ("y = Exp (x)", 17, "e^x"),
        ("y = Mul (x, x)", 17, "squares"),
        ("y = Pow (x, two)", 17, "squares"),
        ("y = Sin (x)", 17, "argument of 1000"),
        ("y = Div (x, x)", 17, "divisors below"),
        ("y = ReduceSum <keepdims = 1> (x)", 17, "sum over a long axis"),
        ("y = Mul (x, big)", 17, "'big' holds 7e+04, beyond 65504"),
        ("y = Add (x, tiny)", 17, "'tiny' is at most 1e-09"),
        ("y = Mul (x, nothing)", 17, "'nothing' is at most 1e-09"),
        ("y = Mean (x, two)", 1, "upgrade first"),
        ("y = CumSum (x, axis)", 17, "running sum"),
        ("y = BitCast <to = 1> (x)", 26, "bits"),
    ],
)
def test_what_stays_float_without_samples(body: str, opset: int, why: str) -> None:
    constants = (
        "float two = {2.0}, float big = {70000.0}, float tiny = {1e-9}, float nothing = {1e-9}, int64 axis = {0}"
    )
    model = parsed(f"g (float[65] x) => (float[N] y) <{constants}> {{ {body} }}", opset)
    used = {i for n in model.graph.node for i in n.input}
    kept = [i for i in model.graph.initializer if i.name in used]
    del model.graph.initializer[:]
    model.graph.initializer.extend(kept)
    result = run(model)
    assert result.report.passes[0].status == "unchanged"
    assert why in " ".join(reasons(result).values())


@pytest.mark.usefixtures("eager")
def test_samples_settle_risks() -> None:
    text = "g (float[N] x) => (float[N] y) { a = Exp (x)  y = Mul (a, a) }"
    small, large = ({"x": np.full(8, v, np.float32)} for v in (1.0, 6.0))
    assert run(text).report.passes[0].changes == 0
    assert [n.op_type for n in run(text, samples=[small]).proto.graph.node] == ["Cast", "Exp", "Mul", "Cast"]
    result = run(text, samples=[small, large])  # e^12 is too much
    assert [n.op_type for n in result.proto.graph.node] == ["Cast", "Exp", "Cast", "Mul"]
    assert "'y' reaches 1.63e+05 on the samples" in reasons(result)["y"]


@pytest.mark.usefixtures("eager")
def test_headroom() -> None:
    text = "g (float[N] x) => (float[N] y) { a = Neg (x)  y = Abs (a) }"
    samples = [{"x": np.full(8, 30000, np.float32)}]
    assert run(text, samples=samples).report.passes[0].status == "changed"
    assert run(text, "convert-fp16{headroom=4}", samples=samples).report.passes[0].status == "unchanged"
    with pytest.raises(SpecError, match="headroom must be at least 1"):
        run(text, "convert-fp16{headroom=0.5}")


@pytest.mark.usefixtures("eager")
def test_what_samples_keep_stays_when_they_are_others() -> None:
    text = "g (float[N] x) => (float[N] y) { a = Abs (x)  b = Mul (a, a)  c = Sqrt (b)  y = Tanh (c) }"
    once = run(text, samples=[{"x": np.full(8, 900, np.float32)}])
    assert "'b' reaches 8.1e+05" in reasons(once)["b"]
    twice = run(once.proto, samples=[{"x": np.full(8, 2, np.float32)}])
    assert twice.report.passes[0].status == "unchanged"
    assert "'b' reaches 8.1e+05" in reasons(twice)["b"]


@pytest.mark.usefixtures("eager")
def test_values_too_small_for_float16_stay_float() -> None:
    text = "g (float[N] x) => (float[N] y) { a = Neg (x)  y = Abs (a) }"
    result = run(text, samples=[{"x": np.full(8, 1e-6, np.float32)}])
    assert result.report.passes[0].status == "unchanged"
    assert "keeps few of its digits" in reasons(result)["y"]


@pytest.mark.usefixtures("eager")
def test_divisors_that_come_near_zero() -> None:
    text = "g (float[N] x, float[N] d) => (float[N] y) { y = Div (x, d) }"
    x = np.ones(8, np.float32)
    assert run(text, samples=[{"x": x, "d": x}]).report.passes[0].status == "changed"
    near = run(text, samples=[{"x": x, "d": np.linspace(-1, 1, 8, dtype=np.float32)}])
    assert "comes near zero" in reasons(near)["y"]


@pytest.mark.usefixtures("eager")
@pytest.mark.parametrize("provider", ["cpu", "cuda"])
def test_provider_without_a_kernel(provider: str) -> None:
    text = "g (float[1, 4, 8, 8] x) => (float[1, 4, 8, 8] y) { a = Relu (x)  y = Acos (a) }"
    found = reasons(run(text, provider=provider))
    assert found.get("y") == (None if provider == "cpu" else "provider 'cuda' has no float16 Acos")


@pytest.mark.usefixtures("eager")
def test_functions_of_onnx_are_spelled_out_by_the_provider() -> None:
    text = "g (float[8] x) => (float[8] y) { y = Mish (x) }"
    assert "Mish" not in CUDA_HALF
    assert run(parsed(text, 18), provider="cuda").report.passes[0].status == "changed"


@pytest.mark.usefixtures("eager")
def test_globs() -> None:
    text = "g (float[8] x) => (float[8] y) { [first] a = Relu (x)  [second] y = Tanh (a) }"
    only, skip = (run(text, f'convert-fp16{{{o}=["f*"]}}') for o in ("only", "skip"))
    assert reasons(only) == {"second": "it is not among those asked for"}
    assert reasons(skip) == {"first": "it is to be skipped"}


@pytest.mark.usefixtures("eager")
def test_positions_stay_exact() -> None:
    """Whole numbers on their way to indices or angles are computed as they were; others may be float16."""
    text = """g (float[1, 4, N, N] x, float[8] z) => (int64[K] places, float[8] s, float[8] r)
    <float half = {0.5}, int64 zero = {0}, int64 one = {1}, int64[8] steps = {0, 1, 2, 3, 4, 5, 6, 4001}>
    {
        shape = Shape (x)  wide = Cast <to = 1> (shape)  scaled = Mul (wide, half)  places = Cast <to = 7> (scaled)
        t = Cast <to = 1> (steps)  angle = Mul (t, half)  s = Sin (angle)
        r = Mul (z, half)
    }"""
    result = run(text)
    assert {kinds(result)[n] for n in ("wide", "scaled", "t", "angle", "s")} == {"FLOAT"}
    assert kinds(result)["r/float16"] == "FLOAT16"
    feeds = {"x": np.zeros((1, 4, 4099, 4099), np.float32), "z": np.ones(8, np.float32)}
    wanted, found = (Session(m).run(feeds) for m in (parsed(text), result.proto))
    np.testing.assert_array_equal(wanted["places"], found["places"])
    np.testing.assert_array_equal(wanted["s"], found["s"])


@pytest.mark.usefixtures("eager")
def test_masks_become_the_largest_number() -> None:
    text = """g (float[2, 4] x, bool[2, 4] seen) => (float[2, 4] y)
    <float none = {0.0}, float low = {-3.4e38}> { m = Where (seen, none, low)  a = Add (x, m)  y = Softmax (a) }"""
    result = run(text)
    assert {kinds(result)[n] for n in ("m", "a", "low")} == {"FLOAT16"}
    x = np.random.default_rng(0).normal(size=(2, 4)).astype(np.float32)
    seen = np.array([[1, 0, 1, 1], [0, 0, 0, 0]], bool)  # nothing seen at all: still no NaN
    wanted, found = (Session(m).run({"x": x, "seen": seen})["y"] for m in (parsed(text), result.proto))
    assert np.abs(wanted[0] - found[0]).max() <= 4 * EPSILON
    np.testing.assert_allclose(found[1].sum(), 1, atol=4 * EPSILON)
    elsewhere = run(text.replace("float[2, 4] y)", "float[2, 4] y, float[2, 4] m)"))
    assert "'low' holds 3.4e+38" in reasons(elsewhere)["m"]


@pytest.mark.usefixtures("eager")
def test_subgraphs_share_one_constant_in_half() -> None:
    text = """g (bool c, float[64] x) => (float[64] y) <float[64] w = {@}> {
        y = If (c) <then_branch = t () => (float[64] p) { p = Mul (x, w) },
                    else_branch = e () => (float[64] q) { q = Add (x, w) }> }"""
    model = parsed(text.replace("@", ",".join(["0.5"] * 64)))
    result = run(model)
    assert [(i.name, i.data_type) for i in result.proto.graph.initializer] == [("w/float16", TensorProto.FLOAT16)]
    onnx.checker.check_model(result.proto, full_check=True)
    x = np.arange(64, dtype=np.float32)
    for flag in (True, False):
        feeds = {"c": np.array(flag), "x": x}
        np.testing.assert_array_equal(Session(model).run(feeds)["y"], Session(result.proto).run(feeds)["y"])


@pytest.mark.usefixtures("eager")
def test_shared_between_the_sides_a_constant_is_there_twice() -> None:
    text = """g (float[3] x) => (float[3] y, float[3] z) <float[3] w = {1.0, 2.0, 3.0}>
    { y = Add (x, w)  [s] z = Sub (x, w) }"""
    result = run(text, 'convert-fp16{skip=["s"]}')
    assert {i.name: i.data_type for i in result.proto.graph.initializer} == {
        "w": TensorProto.FLOAT, "w/float16": TensorProto.FLOAT16
    }  # fmt: skip


@pytest.mark.usefixtures("eager")
def test_existing_half_parts_grow_together() -> None:
    text = """g (float[8] x) => (float[8] y) {
        a = Cast <to = 10> (x)  b = Relu (a)  c = Cast <to = 1> (b)  d = Tanh (c)  e = Cast <to = 10> (d)
        f = Neg (e)  y = Cast <to = 1> (f) }"""
    result = run(text)
    assert [n.op_type for n in result.proto.graph.node] == ["Cast", "Relu", "Tanh", "Neg", "Cast"]


@pytest.mark.usefixtures("eager")
def test_sequences_optionals_and_quantized_parts_stay() -> None:
    text = """g (float[8] x) => (float[8] y) <float s = {0.1}, uint8 z = {3}, int64 first = {0}> {
        q = QuantizeLinear (x, s, z)  d = DequantizeLinear (q, s, z)  l = SequenceConstruct (d, x)
        e = SequenceAt (l, first)  o = Optional (e)  g = OptionalGetElement (o)  y = Relu (g) }"""
    result = run(parsed(text, 18))
    onnx.checker.check_model(result.proto, full_check=True)
    found = reasons(result)
    assert "scales of quantized values" in found["q"]
    assert "sequences" in found["l"]
    x = np.linspace(-1, 1, 8).astype(np.float32)
    wanted, got = (Session(m).run({"x": x})["y"] for m in (parsed(text, 18), result.proto))
    assert np.abs(wanted - got).max() <= EPSILON


@pytest.mark.usefixtures("eager")
def test_functions_custom_operators_bfloat16_and_double_are_left_alone() -> None:
    text = """<ir_version: 8, opset_import: ["": 17, "mine": 1]>
    g (float[8] x, double[8] d, bfloat16[8] h) => (float[8] y, double[8] e, bfloat16[8] k)
    { a = mine.Twice (x)  y = Relu (a)  e = Neg (d)  k = Identity (h) }
    <domain: "mine", opset_import: ["": 17]> Twice (v) => (w) { w = Add (v, v) }"""
    result = run(parser.parse_model(text))
    found = reasons(result)
    assert "operators of 'mine'" in found["a"]
    assert "inline functions first" in found["Twice"]
    assert {kinds(result)[n] for n in ("e", "k")} == {"DOUBLE", "BFLOAT16"}


@pytest.mark.usefixtures("eager")
def test_integer_kernels_stay_whole() -> None:
    text = """g (float[4, 8] x) => (float[4, 8] y) <float s = {0.1}, uint8 z = {128}> {
        a = Neg (x)  b = Relu (a)  q = QuantizeLinear (b, s, z)  d = DequantizeLinear (q, s, z)  e = Sigmoid (d)
        r = QuantizeLinear (e, s, z)  f = DequantizeLinear (r, s, z)  h = Tanh (f)  y = Abs (h) }"""
    result = run(text)
    found = reasons(result)
    assert {n: "quantized values" in found[n] for n in ("b", "e", "h")} == dict.fromkeys("beh", True)
    assert {kinds(result).get(n) for n in ("a", "y/float16")} == {"FLOAT16"}


@pytest.mark.usefixtures("eager")
def test_without_samples_large_numbers_spread_until_something_settles_them() -> None:
    text = """g (float[1, 2048] x) => (float[1, 2048] y, float[1, 2048] c) <float n = {0.0005}> {
        e = Exp (x)  a = Neg (e)  t = Tanh (a)  y = Abs (t)
        s = ReduceSum <keepdims = 1> (x)  m = Mul (s, n)  c = Sub (x, m) }"""
    result = run(text)
    found = reasons(result)
    assert "e^x" in found["e"]
    assert found["a"] == "'e' may be too large for float16 (samples would tell)"
    assert found["t"] == "'a' may be too large for float16 (samples would tell)"
    assert "'s' may be too large" in found["m"]
    assert set(found) == {"e", "a", "t", "s", "m"}


def test_tables_name_operators_of_onnx() -> None:
    known = {schema.name for schema in onnx.defs.get_all_schemas() if schema.domain == ""}
    assert set(CUDA_HALF) | set(RISKS) | set(PRECISE) <= known
    assert get("convert-fp16").exactness == "lossy"


# --- random graphs, the backend suite, the zoo

RANDOM_TOLERANCE = 0.05
"""Relative to the largest element; up to 14 operators that divide and normalise, each of which rounds to 2^-11."""


@settings(max_examples=60)
@given(models, st.booleans())
def test_random_graphs(model: onnx.ModelProto, eager_too: bool) -> None:
    with pytest.MonkeyPatch.context() as patch:
        if eager_too:
            patch.setattr("graphopt.passes.half_assignment.gain", always)
        patch.setattr("tests.test_passes_properties.TOLERANCE", RANDOM_TOLERANCE)
        result = run(model)
        onnx.checker.check_model(result.proto, full_check=True)
        assert [str(s) for s in load(model).outputs] == [str(s) for s in result.model.outputs]
        assert_equal(model, result.proto, dynamic=is_dynamic(model))
        again = run(result.proto)
        assert to_text(again.model) == to_text(load(result.proto))


HALF_TOLERANCE = 5e-3
"""Relative to the largest element: single operators, rounded to 2^-11 at both ends."""


@pytest.mark.conformance
@pytest.mark.usefixtures("eager")
def test_backend_suite_stays_valid_and_close(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(
        "tests.conformance.test_backend_suite.TOLERANCE",
        {"float64": 1e-7, "float32": HALF_TOLERANCE, "float16": HALF_TOLERANCE, "bfloat16": 2e-2},
    )
    changed, wrong = 0, []
    for case in random.Random(0).sample(load_cases(), SAMPLED):
        name, model, inputs = (read := read_case(case)).name, read.model, read.inputs
        try:
            session = Session(model, optimization="off")
            feeds = [dict(zip(session.input_names, given_inputs, strict=True)) for given_inputs in inputs]
            wanted = [session.run(feed) for feed in feeds]
        except (GraphoptError, ValueError):
            continue
        result = run(model)
        onnx.checker.check_model(result.proto)
        changed += result.report.passes[0].status == "changed"
        found = [Session(result.proto, optimization="off").run(feed) for feed in feeds]
        wrong += [f"{name}: {d}" for a, b in zip(wanted, found, strict=True) for d in differences(a, b)]
    assert not wrong, "\n".join(wrong)
    assert changed > SAMPLED // 3


@pytest.mark.parametrize("name", ["ppocr-cls", "silero-vad", "squeezenet", "minilm-dynamo"])
def test_zoo(name: str) -> None:
    path = zoo.fetch(name)
    result = run(onnx.load(path))
    onnx.checker.check_model(result.proto, full_check=True)
    assert len(result.proto.SerializeToString()) <= 0.56 * path.stat().st_size
    feeds = next(iter(zoo.feeds(name, 0)))
    for (key, wanted), found in zip(
        Session(path).run(feeds).items(), Session(result.proto).run(feeds).values(), strict=True
    ):
        # deep models: hundreds of operators, whose roundings add up
        assert np.abs(wanted - found).max() <= 0.01 * np.abs(wanted).max(), key


def test_command_line(tmp_path: Path) -> None:
    source, target = tmp_path / "m.onnx", tmp_path / "half.onnx"
    onnx.save(convs(), source)
    command = [sys.executable, "-m", "graphopt", "run", str(source), "-p", "convert-fp16", "-o", str(target)]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    assert "largest error" in done.stdout
    assert onnx.load(target).graph.initializer[0].data_type == TensorProto.FLOAT16
