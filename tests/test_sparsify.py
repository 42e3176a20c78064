"""sparsify: which elements go, that the rest makes up for it, that requests add up; the command and its bad input."""

from __future__ import annotations

import itertools
import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from onnx import TensorProto, helper, numpy_helper
from typer.testing import CliRunner

from graphopt import obs, sparsifier
from graphopt.cli import app
from graphopt.data import load_samples
from graphopt.errors import DataError, GateMissedError, GraphoptError, ModelError, SpecError
from graphopt.gradients import save_gradients
from graphopt.metric import Evaluation
from graphopt.model import Model, load
from graphopt.models.digits import demo_model, task
from graphopt.pipeline import Pipeline, Result, Settings
from graphopt.quality import Bound
from graphopt.runtime import Session
from graphopt.sparse_fit import Curve, allocate
from graphopt.sparse_layers import find
from graphopt.sparse_marks import marks
from graphopt.sparsity import (
    Pattern,
    lowest,
    lowest_in_runs,
    lowest_per_output,
    made_up_for,
    over_all,
    refit,
    relative_error,
    wanda_scores,
)

Array = np.ndarray[Any, Any]

TASK = str(Path(task.__file__))


def problem(seed: int, group: int = 1, inputs: int = 40, outputs: int = 12) -> tuple[Array, Array]:
    """Return a weight and second moments of inputs that go together in a few directions, as real ones do."""
    rng = np.random.default_rng(seed)
    rank = max(inputs // 4, 1)
    rows = rng.normal(size=(group, 400, rank)) @ rng.normal(size=(group, rank, inputs))
    rows = (rows + 0.3 * rng.normal(size=rows.shape)) * rng.lognormal(sigma=0.7, size=(group, 1, inputs))
    return rng.normal(size=(group, inputs, outputs)), np.swapaxes(rows, 1, 2) @ rows / 400


@given(st.integers(0, 99), st.integers(1, 3), st.integers(2, 30))
@settings(max_examples=25)
def test_the_factor_is_that_of_the_inverse(seed: int, group: int, inputs: int) -> None:
    matrix = problem(seed, group, inputs)[1] + 0.1 * np.eye(inputs)
    factor = obs.inverse_factor(matrix)
    assert not np.tril(factor, -1).any()
    product = np.swapaxes(factor, 1, 2) @ factor @ matrix
    np.testing.assert_allclose(product, np.broadcast_to(np.eye(inputs), product.shape), atol=1e-8)


def test_carried_errors_do_not_depend_on_the_blocks() -> None:
    weight, matrix = problem(3, 2, 37)

    def settle(_: Array, values: Array) -> Array:
        return np.rint(values)

    found = [obs.carry(weight, matrix + np.eye(37), settle, block=block) for block in (1, 5, 128)]
    for other in found[1:]:
        np.testing.assert_allclose(other, found[0], atol=1e-9)


@given(st.integers(0, 99), st.sampled_from([0.3, 0.5, 0.8, 0.95]), st.integers(1, 3))
@settings(max_examples=25)
def test_sparsegpt_has_the_zeros_asked_for_and_errs_less_than_wanda(seed: int, amount: float, group: int) -> None:
    weight, matrix = problem(seed, group)
    found = made_up_for(weight, matrix, amount)
    assert ((found.weight == 0) == found.mask).all()
    assert abs(found.mask.mean() - amount) < 1 / weight[0].shape[0]
    wanda = np.where(lowest_per_output(wanda_scores(weight, matrix), amount), 0.0, weight)
    assert found.error < 0.9 * relative_error(weight, wanda, matrix)


def test_what_is_left_is_the_least_squares_solution() -> None:
    weight, matrix = problem(1, 1, 16, 3)
    matrix = matrix + 0.05 * np.eye(16)
    mask: Array = np.random.default_rng(0).random(weight.shape) < np.full(weight.shape, 0.5)
    found = np.where(mask, 0.0, weight)
    refit(found, weight, matrix, mask, 60)
    for j in range(3):
        kept = ~mask[0, :, j]
        best = np.linalg.solve(matrix[0][np.ix_(kept, kept)], (matrix[0] @ weight[0, :, j])[kept])
        np.testing.assert_allclose(found[0, kept, j], best, rtol=1e-6, atol=1e-8)
    assert (found[mask] == 0).all()


@given(st.integers(0, 99), st.sampled_from(["2:4", "1:4", "4:8", "1:2", "3:5"]), st.booleans())
@settings(max_examples=25)
def test_patterns_hold_in_every_run(seed: int, text: str, turned: bool) -> None:
    pattern = Pattern.parse(text)
    assert pattern is not None
    weight, matrix = problem(seed, 2, 40)
    order = np.random.default_rng(seed).permutation(40) if turned else np.arange(40)
    found = made_up_for(weight, matrix, 0.0, pattern=pattern, order=order)
    counts = (found.weight[:, order] != 0).reshape(2, 40 // pattern.run, pattern.run, -1).sum(axis=2)
    assert (counts == pattern.kept).all()
    mask = lowest_in_runs(np.abs(weight), pattern, order)
    assert mask.mean() == pytest.approx(pattern.amount)


@given(st.integers(0, 99), st.floats(0.01, 0.99))
def test_counts_of_masks(seed: int, amount: float) -> None:
    rng = np.random.default_rng(seed)
    scores = {"a": rng.random((2, 7, 5)), "b": rng.random((3, 11))}
    assert lowest(scores["b"], 4).sum() == 4
    assert lowest_per_output(scores["a"], amount).sum() == round(amount * 70)
    per_output = lowest_per_output(scores["a"], amount).sum(axis=1)
    assert per_output.max() - per_output.min() <= 1
    masks = over_all(scores, amount)
    assert sum(int(mask.sum()) for mask in masks.values()) == round(amount * 103)
    highest = max(float(scores[n][masks[n]].max(initial=0)) for n in scores)
    assert highest <= min(float(scores[n][~masks[n]].min(initial=1)) for n in scores)


@given(st.integers(0, 99), st.floats(0.05, 0.95))
def test_no_exchange_between_two_layers_lowers_the_loss(seed: int, amount: float) -> None:
    rng = np.random.default_rng(seed)
    curves = {
        str(i): Curve(int(rng.integers(100, 9000)), float(rng.normal(scale=3)), float(rng.uniform(1, 12)))
        for i in range(6)
    }

    def loss(amounts: dict[str, float]) -> float:
        return sum(float(np.exp(curve.offset + curve.slope * amounts[n])) for n, curve in curves.items())

    found = allocate(curves, amount)
    total = sum(curve.size for curve in curves.values())
    assert sum(curves[n].size * a for n, a in found.items()) == pytest.approx(amount * total, rel=1e-3)
    for a, b in itertools.permutations(curves, 2):
        moved = dict(found)
        moved[a] += 5 / curves[a].size
        moved[b] -= 5 / curves[b].size
        if moved[a] <= 0.99 and moved[b] >= 0:
            assert loss(moved) >= loss(found) * (1 - 1e-9)


# The pass


def network(seed: int = 0, groups: int = 4) -> onnx.ModelProto:
    """Return Conv, grouped Conv, ConvTranspose, Gemm (transB), MatMul and Add: every layout, a few thousand weights."""
    rng = np.random.default_rng(seed)
    weights = {
        "c": rng.normal(size=(32, 4, 3, 3)) / 6, "cb": rng.normal(size=32),
        "g": rng.normal(size=(32, 32 // groups, 3, 3)) / 8, "t": rng.normal(size=(32, 16, 2, 2)) / 6,
        "f": rng.normal(size=(24, 256)) / 16, "fb": rng.normal(size=24), "m": rng.normal(size=(24, 40)) / 5,
        "mb": rng.normal(size=40),
    }  # fmt: skip
    make = helper.make_node
    nodes = [
        make("Conv", ["x", "c", "cb"], ["a"], pads=[1] * 4, name="conv"),
        make("Relu", ["a"], ["ar"]),
        make("Conv", ["ar", "g"], ["b"], pads=[1] * 4, group=groups, name="grouped"),
        make("ConvTranspose", ["b", "t"], ["d"], strides=[2, 2], name="up"),
        make("GlobalAveragePool", ["d"], ["p"]),
        make("AveragePool", ["d"], ["q"], kernel_shape=[2, 2], strides=[2, 2]),
        make("Flatten", ["q"], ["r"]),
        make("Gemm", ["r", "f", "fb"], ["h"], transB=1, alpha=0.5, name="gemm"),
        make("Relu", ["h"], ["hr"]),
        make("MatMul", ["hr", "m"], ["k"], name="matmul"),
        make("Add", ["k", "mb"], ["y"], name="add"),
    ]
    tensors = [numpy_helper.from_array(v.astype(np.float32), n) for n, v in weights.items()]
    graph = helper.make_graph(
        nodes, "net", [helper.make_tensor_value_info("x", TensorProto.FLOAT, ["N", 4, 4, 4])],
        [helper.make_tensor_value_info("y", TensorProto.FLOAT, ["N", 40])], tensors,
    )  # fmt: skip
    return helper.make_model(graph, opset_imports=[helper.make_opsetid("", 17)], ir_version=8)


LAYERS = ["conv", "grouped", "up", "gemm", "matmul"]
FUSED = {"conv", "grouped", "up", "gemm", "add"}
"""The same behind the canonical stage: the last product and its bias are one Gemm."""


def feeds(count: int = 24, seed: int = 5) -> list[dict[str, Array]]:
    rng = np.random.default_rng(seed)
    mix = rng.normal(size=(4, 4))
    return [
        {"x": np.einsum("ij,njhw->nihw", mix, rng.normal(size=(8, 4, 4, 4))).astype(np.float32)} for _ in range(count)
    ]


def run(spec: str, model: Any = None, *, sampled: bool = True, **extra: Any) -> Result:
    proto = network() if model is None else model
    samples = load_samples(feeds(), load(proto)) if sampled else None
    return Pipeline(spec).run(proto, samples=samples, settings=Settings(verify="off", on_failure="stop", **extra))


def shares(model: Model) -> dict[str, float]:
    return {layer.label: float(np.mean(layer.values() == 0)) for layer in find(model, model.graph)[0]}


def noise(model: Model, reference: onnx.ModelProto) -> float:
    """Return noise over signal on feeds that nothing was fitted on."""
    a, b = Session(reference), Session(model)
    pairs = [(a.run(feed)["y"], b.run(feed)["y"]) for feed in feeds(8, seed=77)]
    return float(sum(np.square(x - y).sum() for x, y in pairs) / sum(np.square(x).sum() for x, _ in pairs))


ALL = [
    f"sparsify-weights{{amount=0.6,criterion={criterion},spread={spread}}}"
    for criterion in ("magnitude", "random", "wanda", "sparsegpt")
    for spread in ("global", "per-layer")
]


@pytest.mark.parametrize("spec", ALL)
def test_the_amount_is_reached_and_said_and_the_same_again_does_nothing(spec: str) -> None:
    result = run(spec)
    model = result.model
    layers = find(model, model.graph)[0]
    assert [layer.label for layer in layers] == LAYERS
    zeros = sum(int((layer.values() == 0).sum()) for layer in layers)
    assert zeros / sum(layer.size for layer in layers) == pytest.approx(0.6, abs=0.01)
    if "per-layer" in spec:
        assert all(share == pytest.approx(0.6, abs=0.02) for share in shares(model).values())
    for layer in layers:
        assert marks(model.metadata(layer.node))[1].share == pytest.approx(np.mean(layer.values() == 0), abs=1e-5)
    proto = model.proto
    onnx.checker.check_model(proto, full_check=True)
    assert [t.name for t in proto.graph.initializer if t.name in {"c", "g", "t", "f", "m"}] == ["c", "g", "t", "f", "m"]
    again = run(spec, proto)
    assert again.report.passes[0].status == "unchanged"
    assert again.model.proto == proto


@pytest.mark.parametrize("criterion", ["magnitude", "wanda", "sparsegpt"])
def test_patterns_leave_n_of_m_channels(criterion: str) -> None:
    model = run(f'sparsify-weights{{criterion={criterion},pattern="2:4"}}').model
    values = {layer.label: layer.values() for layer in find(model, model.graph)[0]}
    runs = {
        "conv": values["conv"].reshape(32, 1, 4, 9).transpose(0, 1, 3, 2),
        "grouped": values["grouped"].reshape(32, 2, 4, 9).transpose(0, 1, 3, 2),
        "up": values["up"].reshape(8, 4, 16, 4).transpose(0, 2, 3, 1),
        "gemm": values["gemm"].reshape(24, 64, 4),
        "matmul": values["matmul"].reshape(6, 4, 40).transpose(0, 2, 1),
    }
    for name, each in runs.items():
        assert ((each != 0).sum(axis=-1) == 2).all(), name


def test_more_goes_on_from_there_and_less_does_nothing() -> None:
    half = run("sparsify-weights{amount=0.5}").model
    less = run("sparsify-weights{amount=0.3,criterion=random}", half.proto)
    assert less.report.passes[0].status == "unchanged"
    for criterion in ("magnitude", "random", "wanda", "sparsegpt"):
        more = run(f"sparsify-weights{{amount=0.7,criterion={criterion},spread=per-layer}}", half.proto).model
        for before, after in zip(find(half, half.graph)[0], find(more, more.graph)[0], strict=True):
            if np.mean(before.values() == 0) <= 0.7:  # else the layer was sparser than the new amount before
                assert (after.values()[before.values() == 0] == 0).all(), criterion


def test_fitting_beats_looking_and_looking_beats_size() -> None:
    found = {
        criterion: noise(run(f"sparsify-weights{{amount=0.6,criterion={criterion}}}").model, network())
        for criterion in ("random", "magnitude", "wanda", "sparsegpt")
    }
    assert found["sparsegpt"] < 0.7 * min(found["magnitude"], found["wanda"]), found
    assert max(found["magnitude"], found["wanda"]) < found["random"], found


def test_global_amounts_are_no_worse_than_equal_ones() -> None:
    spread = {
        how: noise(run(f"sparsify-weights{{amount=0.7,criterion=sparsegpt,spread={how}}}").model, network())
        for how in ("global", "per-layer")
    }
    assert spread["global"] < spread["per-layer"], spread


def test_globs_and_small_weights() -> None:
    model = run('sparsify-weights{only=["c*", "g*"],skip=["gemm"]}', sampled=False).model
    assert {name for name, share in shares(model).items() if share > 0} == {"conv", "grouped"}
    assert not find(model, model.graph, least=10**6)[0]


def test_gradients_rank_by_what_the_loss_would_feel() -> None:
    proto = network()
    model = load(proto)
    gradients = {layer.tensor.name: np.ones(layer.shape, np.float32) for layer in find(model, model.graph)[0]}
    gradients["m"] = np.zeros((24, 40), np.float32)
    result = run("sparsify-weights{amount=0.1,criterion=gradient}", sampled=False, gradients=gradients)
    assert shares(result.model)["matmul"] == 1.0
    with pytest.raises(GraphoptError, match="looks at gradients, and there are none"):
        run("sparsify-weights{criterion=gradient}", sampled=False)


def test_layers_that_cannot_be_measured_say_why_and_stay() -> None:
    rng = np.random.default_rng(0)
    weights = {"w": rng.normal(size=(1, 64, 12)), "r": rng.normal(size=(1, 64, 16)), "b": rng.normal(size=(2, 8, 40))}
    nodes = [
        helper.make_node("LSTM", ["x", "w", "r"], ["", "h"], hidden_size=16, name="lstm"),
        helper.make_node("MatMul", ["z", "b"], ["y"], name="batched"),
    ]
    graph = helper.make_graph(
        nodes, "net",
        [helper.make_tensor_value_info("x", TensorProto.FLOAT, ["T", 2, 12]),
         helper.make_tensor_value_info("z", TensorProto.FLOAT, [2, 3, 8])],
        [helper.make_tensor_value_info("h", TensorProto.FLOAT, [1, 2, 16]),
         helper.make_tensor_value_info("y", TensorProto.FLOAT, [2, 3, 40])],
        [numpy_helper.from_array(v.astype(np.float32), n) for n, v in weights.items()],
    )  # fmt: skip
    proto = helper.make_model(graph, opset_imports=[helper.make_opsetid("", 17)], ir_version=8)
    model = run("sparsify-weights{amount=0.5,spread=per-layer}", proto, sampled=False).model
    assert shares(model) == {"lstm:w": 0.5, "lstm:r": 0.5, "batched": 0.5}
    assert sorted(marks(model.metadata(model.graph.nodes[0]))) == [1, 2]
    samples = [{"x": rng.normal(size=(3, 2, 12)).astype("f"), "z": rng.normal(size=(2, 3, 8)).astype("f")}]
    result = Pipeline("sparsify-weights{criterion=wanda}").run(
        proto, samples=load_samples(samples, load(proto)), settings=Settings(verify="off", on_failure="stop")
    )
    assert {miss["where"] for miss in result.report.passes[0].blocked} == {"lstm:w", "lstm:r", "batched"}
    assert result.report.passes[0].changes == 0


def test_a_weight_that_two_layers_share_stays_shared() -> None:
    rng = np.random.default_rng(0)
    nodes = [
        helper.make_node("MatMul", ["x", "w"], ["a"], name="first"),
        helper.make_node("MatMul", ["a", "w"], ["y"], name="second"),
    ]
    graph = helper.make_graph(
        nodes, "net", [helper.make_tensor_value_info("x", TensorProto.FLOAT, ["N", 32])],
        [helper.make_tensor_value_info("y", TensorProto.FLOAT, ["N", 32])],
        [numpy_helper.from_array(rng.normal(size=(32, 32)).astype(np.float32), "w")],
    )  # fmt: skip
    proto = helper.make_model(graph, opset_imports=[helper.make_opsetid("", 17)], ir_version=8)
    model = run("sparsify-weights", proto, sampled=False).model
    assert [t.name for t in model.proto.graph.initializer] == ["w"]
    assert all(marks(model.metadata(node))[1].share == 0.5 for node in model.graph.nodes)


# The command


@pytest.fixture(scope="module")
def digits() -> sparsifier.Sparsified:
    """The digits model at 80 %, fitted on half of the 200 calibration images."""
    bound = Bound(metric=task.accuracy, max_drop=0.01)
    return sparsifier.sparsify(demo_model(), data=f"{TASK}:calibration", amount=0.8, bound=bound, measure=False, seed=0)


@pytest.mark.slow
def test_digits_keep_their_accuracy_at_80_percent_without_training(digits: sparsifier.Sparsified) -> None:
    report = digits.report
    assert report.zeros == pytest.approx(0.8, abs=0.005)
    evaluation = report.quality.evaluation if report.quality else None
    assert isinstance(evaluation, Evaluation)
    assert evaluation.reference - evaluation.candidate <= 0.01  # on 600 images
    assert report.files is not None
    assert report.files.file < 0.55 * report.files.dense
    onnx.checker.check_model(digits.model.proto, full_check=True)


@pytest.mark.slow
@pytest.mark.parametrize("then", ["optimize", "quantize", "validate", "bench"])
def test_a_sparse_file_goes_through_the_other_commands(
    digits: sparsifier.Sparsified, then: str, tmp_path: Path
) -> None:
    path, out = tmp_path / "sparse.onnx", tmp_path / "out.onnx"
    digits.save(path)
    command = {
        "optimize": ["optimize", str(path), "--no-measure", "-o", str(out)],
        "quantize": ["quantize", str(path), "--weight-only", "int8", "-o", str(out)],
        "validate": ["validate", str(path), str(path)],
        "bench": ["bench", str(path), str(path), "--rounds", "3"],
    }[then]
    ran = CliRunner().invoke(app, command)
    assert ran.exit_code == 0, ran.output
    if then == "optimize":
        assert out.stat().st_size < 1.1 * path.stat().st_size
        x = {"image": np.random.default_rng(0).random((4, 1, 8, 8), dtype=np.float32)}
        np.testing.assert_allclose(Session(load(out)).run(x)["logits"], Session(load(path)).run(x)["logits"], atol=1e-4)


def sparsify(**options: Any) -> sparsifier.Sparsified:
    return sparsifier.sparsify(network(), measure=False, **options)


def test_the_report_says_sizes_layers_and_that_time_stays() -> None:
    result = sparsify(amount=0.9)
    document = json.loads(json.dumps(result.report.to_dict()))
    assert document["decision"] == "sparse"
    assert document["files"]["file"] < 0.6 * document["files"]["dense"]
    assert document["files"]["dense_gzip"] < document["files"]["dense"]
    assert {row["layer"] for row in document["layers"] if row["zeros"] > 0} == FUSED
    lines = result.report.summary()
    assert any("as long as without" in line for line in lines)
    assert any("not judged" in line for line in lines)


def test_dense_storage_and_the_untouched_graph() -> None:
    result = sparsify(amount=0.9, storage="dense", optimize=False)
    assert result.report.files is not None
    assert result.report.files.file == result.report.files.dense
    assert [n.op for n in result.model.graph.nodes] == [n.op_type for n in network().graph.node]
    assert result.report.pipeline.startswith("sparsify-weights")


def test_without_an_amount_the_most_within_the_bound_is_found() -> None:
    result = sparsify(data=feeds(40), bound=Bound(min_sqnr=30.0), optimize=False)
    assert result.report.quality is not None
    assert result.report.quality.ok
    amount = result.report.amount or 0.0
    assert 0.1 < amount < 0.98
    missed = [float(t.form.split("%")[0]) / 100 for t in result.report.tried if t.quality and not t.quality.ok]
    assert missed
    assert min(missed) - amount < 0.02


def test_a_bound_that_nothing_keeps_leaves_the_lossless_model() -> None:
    result = sparsify(data=feeds(40), bound=Bound(min_sqnr=140.0), optimize=False)
    assert result.report.decision == "lossless"
    assert "of zeros miss the bound" in result.report.reason
    assert shares(result.model) == dict.fromkeys(LAYERS, 0.0)


def test_decisions_make_the_same_file_again(tmp_path: Path) -> None:
    first = sparsify(data=feeds(40), amount=0.7)
    (tmp_path / "d.json").write_text(json.dumps(first.report.decisions))
    again = sparsify(data=feeds(40), amount=0.7, decisions=tmp_path / "d.json")
    assert again.model.proto == first.model.proto


def quantized() -> onnx.ModelProto:
    weight = numpy_helper.from_array(np.random.default_rng(0).normal(size=(64, 32)).astype(np.float32), "w")
    graph = helper.make_graph(
        [helper.make_node("MatMul", ["x", "w"], ["y"], name="only")], "net",
        [helper.make_tensor_value_info("x", TensorProto.FLOAT, ["N", 64])],
        [helper.make_tensor_value_info("y", TensorProto.FLOAT, ["N", 32])], [weight],
    )  # fmt: skip
    proto = helper.make_model(graph, opset_imports=[helper.make_opsetid("", 17)], ir_version=8)
    return Pipeline("quantize-weights").run(proto, settings=Settings(verify="off", on_failure="stop")).model.proto


def other_gradients(tmp_path: Path) -> Path:
    path = tmp_path / "g.npz"
    save_gradients(path, load(network(seed=9)), {"m": np.zeros((24, 40), np.float32)})
    return path


def bad_calls(tmp_path: Path) -> Iterator[tuple[type[GraphoptError], str, dict[str, Any]]]:
    yield SpecError, "an amount lies between 0 and 1", {"amount": 1.5}
    yield SpecError, "an amount lies between 0 and 1", {"amount": float("nan")}
    yield SpecError, "an amount lies between 0 and 1", {"amount": 0.0}
    yield SpecError, "a pattern is N:M", {"pattern": "4:2"}
    yield SpecError, "a pattern is N:M", {"pattern": "half"}
    yield SpecError, "says how much becomes zero", {"pattern": "2:4", "amount": 0.5}
    yield SpecError, "criterion is one of", {"criterion": "size", "amount": 0.5}
    yield SpecError, "spread is one of", {"scope": "galaxy", "amount": 0.5}
    yield SpecError, "how much becomes zero is not said", {}
    yield DataError, "wanda looks at what flows", {"criterion": "wanda", "amount": 0.5}
    yield SpecError, "go together", {"criterion": "gradient", "amount": 0.5}
    yield SpecError, "go together", {"gradients": other_gradients(tmp_path), "amount": 0.5}
    yield DataError, "of another model", {
        "criterion": "gradient", "gradients": other_gradients(tmp_path), "amount": 0.5,
    }  # fmt: skip
    yield DataError, "cannot be read", {"criterion": "gradient", "gradients": tmp_path / "no.npz", "amount": 0.5}
    yield SpecError, "no layer is left", {"only": ["nothing*"], "amount": 0.5}
    yield GateMissedError, "misses the bound", {"amount": 0.95, "data": feeds(), "bound": Bound(min_sqnr=100.0)}


def test_bad_input_is_one_clear_error(tmp_path: Path) -> None:
    for kind, what, options in bad_calls(tmp_path):
        with pytest.raises(kind, match=what):
            sparsify(**options)
    with pytest.raises(ModelError, match="the model is quantized"):
        sparsifier.sparsify(quantized(), amount=0.5, measure=False)


def test_the_command_line(tmp_path: Path) -> None:
    path, out = tmp_path / "m.onnx", tmp_path / "s.onnx"
    onnx.save(network(), path)
    call = ["sparsify", str(path), "--amount", "0.8", "--criterion", "magnitude", "--scope", "global", "--no-measure"]
    ran = CliRunner().invoke(app, [*call, "-o", str(out), "--json"])
    assert ran.exit_code == 0, ran.output
    assert json.loads(ran.stdout)["decision"] == "sparse"
    assert out.stat().st_size < path.stat().st_size
    assert shares(load(out)).keys() == FUSED
    wrong = CliRunner().invoke(app, ["sparsify", str(path), "--amount", "2"])
    assert wrong.exit_code == 2 or isinstance(wrong.exception, SpecError)
