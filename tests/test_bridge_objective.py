"""Losses of labels and teachers: equal to torch's own, from scores behind probabilities, and refused with a reason."""

from __future__ import annotations

import pytest

torch = pytest.importorskip("torch")

from pathlib import Path  # noqa: E402  (after the check for torch)
from typing import Any  # noqa: E402

import numpy as np  # noqa: E402
import onnx.parser  # noqa: E402
import torch.nn.functional as F  # noqa: E402, N812

from graphopt.bridge.batch import Batch  # noqa: E402
from graphopt.bridge.graph import TrainableGraph  # noqa: E402
from graphopt.bridge.objective import (  # noqa: E402
    Objective,
    Spread,
    cosine,
    distill_objective,
    kl,
    task_objective,
)
from graphopt.bridge.scores import scores  # noqa: E402
from graphopt.bridge.teacher import Teacher  # noqa: E402
from graphopt.errors import DataError, ModelError, SpecError  # noqa: E402
from graphopt.model import Model, load  # noqa: E402
from graphopt.training import DistillSettings, TrainSettings  # noqa: E402


@pytest.fixture(autouse=True)
def _one_thread() -> None:
    torch.set_num_threads(1)


def net(tail: str, *, opset: int = 17, shape: str = "N, 6, 4", out: str = "", seed: int = 0, name: str = "y") -> Model:
    """A model whose tensor `s` (rows, 6, 4) holds scores that `tail` makes the output of."""
    weights = ", ".join(f"{v:.4f}" for v in np.random.default_rng(seed).normal(size=16))
    text = f"""<ir_version: 8, opset_import: ["" : {opset}]>
    net (float[{shape}] x) => (float{out} {name}) <float[4, 4] w = {{{weights}}}> {{ s = MatMul(x, w) {tail} }}"""
    return load(onnx.parser.parse_model(text))


def batch_of(model: Model, labels: Any = None, rows: int = 3, scale: float = 1.0) -> Batch:
    rng = np.random.default_rng(1)
    feeds = {
        spec.name: torch.from_numpy(
            scale * rng.normal(size=[d if isinstance(d, int) else rows for d in spec.shape or ()]).astype(np.float32)
        )
        for spec in model.inputs
    }
    return Batch(feeds, None if labels is None else torch.as_tensor(labels), np.arange(rows))


def ran(model: Model, batch: Batch, taps: tuple[str, ...] = ()) -> dict[str, Any]:
    with torch.no_grad():
        found: dict[str, Any] = TrainableGraph(model, taps=taps).module(batch.feeds)
    return found


def loss_of(objective: Objective, model: Model, batch: Batch) -> Any:
    return objective(ran(model, batch, objective.taps), batch)["loss"]


CLASSES = np.array([[0, 1, 2, 3, 0, 1], [3, 2, 1, 0, -1, -100], [1, 1, 1, 1, 1, 1]])

SOFTMAX = "y = Softmax <axis = -1> (s)"
TAILS = {
    "scores": "y = Identity(s)",
    "softmax": SOFTMAX,
    "log": "y = LogSoftmax <axis = -1> (s)",
    "identity": "p = Softmax <axis = -1> (s) y = Identity(p)",
    "class axis": "c = Transpose <perm = [0, 2, 1]> (s) y = Softmax <axis = 1> (c)",
    "transposed": "p = Softmax <axis = -1> (s) y = Transpose <perm = [0, 2, 1]> (p)",
    "twice": "p = Softmax <axis = -1> (s) q = Transpose <perm = [2, 0, 1]> (p) y = Transpose <perm = [1, 2, 0]> (q)",
    "reshaped": "k = Constant <value = int64[2] {-1, 4}> () r = Reshape(s, k) p = Softmax <axis = 1> (r) "
    "l = Constant <value = int64[3] {-1, 6, 4}> () y = Reshape(p, l)",
    "reshaped, transposed": "k = Constant <value = int64[2] {-1, 4}> () r = Reshape(s, k) p = Softmax <axis = 1> (r) "
    "l = Constant <value = int64[3] {-1, 6, 4}> () q = Reshape(p, l) y = Transpose <perm = [0, 2, 1]> (q)",
    "written out": "e = Exp(s) k = Constant <value = int64[1] {-1}> () "
    "t = ReduceSum <keepdims = 1> (e, k) y = Div(e, t)",
}


@pytest.mark.parametrize("tail", TAILS)
def test_cross_entropy_is_of_the_scores_behind_the_output(tail: str) -> None:
    model = net(TAILS[tail])
    batch = batch_of(model, CLASSES)
    inner = ran(model, batch, ("s",))["s"]
    wanted = F.cross_entropy(inner.flatten(0, 1), torch.from_numpy(np.where(CLASSES < 0, -100, CLASSES)).flatten())
    found = loss_of(task_objective(model, TrainSettings()), model, batch)
    assert float(found) == pytest.approx(float(wanted), rel=1e-5)  # the last digits of float32
    objective = task_objective(model, TrainSettings())
    assert (tail in ("scores", "written out")) == (not objective.taps)


def test_softmax_of_old_opsets_is_over_all_axes_behind() -> None:
    model = net("y = Softmax <axis = 1> (s)", opset=11, out="[N, 6, 4]")
    batch = batch_of(model)
    score = scores(model)["y"]
    values, axis = score.read(ran(model, batch, score.taps), torch.Size([3, 6, 4]))
    assert values.shape == (3, 24)
    assert torch.allclose(values.softmax(1).view(3, 6, 4), ran(model, batch)["y"], atol=1e-6)
    assert axis == 1
    last = scores(net("y = Softmax <axis = 2> (s)", opset=11))["y"]
    values, axis = last.read(ran(model, batch, ("s",)), torch.Size([3, 6, 4]))
    assert (values.shape, axis) == ((3, 6, 4), 2)


def test_gradients_survive_probabilities_that_underflow() -> None:
    model = net(SOFTMAX)
    batch = batch_of(model, CLASSES, scale=1e3)
    bridge = TrainableGraph(model, taps=("s",))
    loss = task_objective(model, TrainSettings())(bridge.module(batch.feeds), batch)["loss"]
    loss.backward()
    gradient = bridge.parameters["w"].grad
    assert torch.isfinite(loss)
    assert float(loss.detach()) > 100
    assert float(gradient.abs().min()) > 1


def test_label_smoothing_and_soft_labels() -> None:
    model = net(SOFTMAX)
    labels = np.abs(CLASSES % 4)
    inner = ran(model, batch_of(model), ("s",))["s"].flatten(0, 1)
    smooth = loss_of(task_objective(model, TrainSettings(label_smoothing=0.2)), model, batch_of(model, labels))
    wanted = F.cross_entropy(inner, torch.from_numpy(labels).flatten(), label_smoothing=0.2)
    assert float(smooth) == pytest.approx(float(wanted), rel=1e-5)
    soft = np.random.default_rng(0).dirichlet(np.ones(4), size=(3, 6)).astype(np.float32)
    found = loss_of(task_objective(model, TrainSettings()), model, batch_of(model, soft))
    assert float(found) == pytest.approx(float(F.cross_entropy(inner, torch.from_numpy(soft).flatten(0, 1))), rel=1e-5)
    hard = loss_of(task_objective(model, TrainSettings()), model, batch_of(model, np.eye(4, dtype=np.int64)[labels]))
    assert float(hard) == pytest.approx(float(F.cross_entropy(inner, torch.from_numpy(labels).flatten())), rel=1e-5)


def test_sigmoid_gives_binary_cross_entropy() -> None:
    model = net("y = Sigmoid(s)")
    labels = np.random.default_rng(0).integers(0, 2, (3, 6, 4))
    inner = ran(model, batch_of(model), ("s",))["s"]
    wanted = F.binary_cross_entropy_with_logits(inner, torch.from_numpy(labels).float())
    terms = task_objective(model, TrainSettings())(ran(model, batch_of(model), ("s",)), batch_of(model, labels))
    assert float(terms["binary-cross-entropy"]) == float(terms["loss"]) == pytest.approx(float(wanted), rel=1e-5)
    unknown = labels.copy()
    unknown[0] = -1
    found = loss_of(task_objective(model, TrainSettings()), model, batch_of(model, unknown))
    wanted = F.binary_cross_entropy_with_logits(inner[1:], torch.from_numpy(labels[1:]).float())
    assert float(found) == pytest.approx(float(wanted), rel=1e-5)


@pytest.mark.parametrize(
    ("loss", "function"), [("mse", F.mse_loss), ("l1", F.l1_loss), ("smooth-l1", F.smooth_l1_loss)]
)
def test_losses_of_values(loss: str, function: Any) -> None:
    model = net("y = Relu(s)")
    labels = np.random.default_rng(0).normal(size=(3, 6, 4)).astype(np.float32)
    batch = batch_of(model, labels)
    wanted = function(ran(model, batch)["y"], torch.from_numpy(labels))
    assert float(loss_of(task_objective(model, TrainSettings(loss=loss)), model, batch)) == pytest.approx(float(wanted))
    if loss == "mse":
        assert float(loss_of(task_objective(model, TrainSettings()), model, batch)) == pytest.approx(float(wanted))


@pytest.mark.parametrize("tail", [SOFTMAX, "p = Softmax <axis = -1> (s) y = Transpose <perm = [1, 0, 2]> (p)"])
@pytest.mark.parametrize("loss", ["auto", "ctc"])
def test_ctc_of_padded_sequences(tail: str, loss: str) -> None:
    model = net(tail)
    labels = np.array([[1, 2, 3], [2, -1, -1], [3, 3, 0]])
    batch = batch_of(model, labels)
    inner = ran(model, batch, ("s",))["s"]
    wanted = F.ctc_loss(
        inner.log_softmax(-1).transpose(0, 1), torch.tensor([1, 2, 3, 2, 3, 3]), torch.tensor([6, 6, 6]),
        torch.tensor([3, 1, 2]),
    )  # fmt: skip
    found = loss_of(task_objective(model, TrainSettings(loss=loss)), model, batch)
    assert float(found) == pytest.approx(float(wanted), rel=1e-5)


@pytest.mark.parametrize("rows", [[], [1]])
def test_one_score_per_row_is_a_yes_or_no(rows: list[int]) -> None:
    from graphopt.bridge.losses import Case, fitting

    scores_, labels = torch.randn(5, *rows), torch.tensor([0, 1, 1, 0, 1])
    assert fitting(Case("logits", scores_, scores_, None, "", labels)) == "binary-cross-entropy"
    assert float(kl(scores_, scores_ + 1, None, "", 1.0)) > 0.01
    assert float(kl(scores_, scores_ + 1, None, "", 1.0)) == float(kl(scores_, scores_ + 1, None, "sigmoid", 1.0))


PIXELS = """<ir_version: 8, opset_import: ["" : 17]> pixels (float[N, 5, 3, 3] x) => (float[N, 3, 3, 3] y)
<float[3, 5, 1, 1] w = {{1,2,3,4,5,6,7,8,9,10,11,12,13,14,15}}> {{ c = Conv(x, w) {} }}"""


@pytest.mark.parametrize(
    ("tail", "axis"), [("y = Identity(c)", 1), ("y = Transpose <perm = [0, 2, 3, 1]> (c)", 3)], ids=["NCHW", "NHWC"]
)
def test_classes_of_pixels_are_the_channels_of_the_last_layer(tail: str, axis: int) -> None:
    model = load(onnx.parser.parse_model(PIXELS.format(tail)))
    labels = np.random.default_rng(0).integers(0, 3, (2, 3, 3))
    batch = batch_of(model, labels, rows=2)  # all sizes are three: only the graph tells which are the classes
    wanted = F.cross_entropy(ran(model, batch)["y"].movedim(axis, 1), torch.from_numpy(labels))
    assert float(loss_of(task_objective(model, TrainSettings()), model, batch)) == pytest.approx(float(wanted))


def test_a_loss_of_the_user(tmp_path: Path) -> None:
    file = tmp_path / "task.py"
    file.write_text("def own(outputs, labels):\n    return (outputs['y'].mean() - labels.float().mean()) ** 2\n"
                    "def wrong(outputs, labels):\n    return outputs['y']\n")  # fmt: skip
    model = net("y = Relu(s)")
    batch = batch_of(model, CLASSES)
    found = loss_of(task_objective(model, TrainSettings(loss=f"{file}:own")), model, batch)
    assert float(found) == pytest.approx((float(ran(model, batch)["y"].mean()) - CLASSES.mean()) ** 2, rel=1e-4)
    with pytest.raises(DataError, match="not one number"):
        loss_of(task_objective(model, TrainSettings(loss=f"{file}:wrong")), model, batch)


def test_labels_by_output_add_up() -> None:
    model = load(
        onnx.parser.parse_model("""<ir_version: 8, opset_import: ["" : 17]>
    two (float[N, 4] x) => (float[N, 4] a, float[N, 4] b, int64[N, 1] c)
    { a = Softmax <axis = 1> (x) b = Relu(x) c = ArgMax <axis = 1> (x) }""")
    )
    batch = batch_of(model)
    one, two = torch.tensor([0, 1, 2]), torch.zeros(3, 4)
    objective = task_objective(model, TrainSettings())
    outputs = {**batch.feeds, "a": batch.feeds["x"].softmax(1), "b": batch.feeds["x"].relu()}
    batch.labels = {"a": one, "b": two}
    terms = objective(outputs, batch)
    assert set(terms) == {"cross-entropy", "mse", "loss"}
    assert float(terms["loss"]) == pytest.approx(float(terms["cross-entropy"] + terms["mse"]))
    batch.labels = {"c": one}
    with pytest.raises(DataError, match="'c', which no loss fits"):
        objective(outputs, batch)
    batch.labels = one
    assert float(objective(outputs, batch)["loss"]) == pytest.approx(float(terms["cross-entropy"]))


def task(model: Model, labels: Any, **settings: Any) -> Any:
    return loss_of(task_objective(model, TrainSettings(**settings)), model, batch_of(model, labels))


BAD_LABELS: dict[str, tuple[str, Any, dict[str, Any], str]] = {
    "none": (SOFTMAX, None, {}, "labels are missing"),
    "range": (SOFTMAX, CLASSES + 1, {}, "label 4 where there are 4 classes"),
    "negative": (SOFTMAX, CLASSES - 5, {}, "label -105"),
    "shape": (SOFTMAX, CLASSES[:, :5], {"loss": "cross-entropy"}, "shape \\[3, 5\\] do not fit"),
    "probabilities": (SOFTMAX, np.full((3, 6, 4), 0.5, np.float32), {}, "do not sum to 1"),
    "answers": ("y = Sigmoid(s)", np.full((3, 6, 4), 2.0, np.float32), {}, "a label is 2"),
    "values": ("y = Relu(s)", np.zeros((3, 4), np.float32), {"loss": "mse"}, "do not fit"),
    "too many": (SOFTMAX, np.ones((3, 7), np.int64), {"loss": "ctc"}, "7 labels in a row for 6 steps"),
    "rows": (SOFTMAX, np.ones((2, 3), np.int64), {"loss": "ctc"}, "2 rows of labels"),
}


@pytest.mark.parametrize("what", BAD_LABELS)
def test_labels_that_do_not_fit(what: str) -> None:
    tail, labels, settings, message = BAD_LABELS[what]
    with pytest.raises(DataError, match=message):
        task(net(tail), labels, **settings)


def test_smoothing_is_for_classes() -> None:
    with pytest.raises(SpecError, match="label smoothing"):
        task_objective(net("y = Relu(s)"), TrainSettings(loss="mse", label_smoothing=0.1))
    with pytest.raises(SpecError, match="label smoothing"):
        task(net("y = Relu(s)"), np.zeros((3, 6, 4), np.float32), label_smoothing=0.1)


def test_outputs_that_no_loss_fits() -> None:
    text = '<ir_version: 8, opset_import: ["" : 17]> a (float[N, 4] x) => (int64[N, 1] y) { y = ArgMax <axis = 1> (x) }'
    model = load(onnx.parser.parse_model(text))
    with pytest.raises(ModelError, match="none is of floats"):
        task_objective(model, TrainSettings())
    with pytest.raises(ModelError, match="none is of floats"):
        distill_objective(model, Teacher(model), DistillSettings())


def by_hand(student: Any, teacher: Any, temperature: float) -> float:
    p, q = (torch.softmax(v.double() / temperature, -1) for v in (teacher, student))
    return float(temperature**2 * (p * (p.log() - q.log())).sum(-1).mean())


@pytest.mark.parametrize("tail", TAILS)
@pytest.mark.parametrize("its", ["softmax", "transposed, scores"])
def test_kl_is_between_scores_whatever_follows_them(tail: str, its: str) -> None:
    transposed = tail in ("class axis", "transposed", "reshaped, transposed")
    model = net(TAILS[tail], seed=1)
    if its == "softmax":
        teacher = net(TAILS["transposed"] if transposed else SOFTMAX)
    else:
        teacher = net("y = Transpose <perm = [0, 2, 1]> (s)" if transposed else "y = Identity(s)")
    objective = distill_objective(model, Teacher(teacher), DistillSettings(temperature=3.0, output_loss="kl"))
    batch = batch_of(model)
    found = objective(ran(model, batch, objective.taps), batch)
    wanted = by_hand(ran(model, batch, ("s",))["s"], ran(teacher, batch, ("s",))["s"], 3.0)
    assert float(found["distill"]) == pytest.approx(wanted, rel=1e-4)  # differences of float32 logarithms


@pytest.mark.parametrize(
    ("tail", "name", "kind"),
    [(SOFTMAX, "y", "kl"), ("logits = Identity(s)", "logits", "kl"), ("y = Relu(s)", "y", "mse")],
)
def test_auto_is_kl_for_probabilities_and_logits_and_mse_for_the_rest(tail: str, name: str, kind: str) -> None:
    model, other = net(tail, name=name), net(tail, name=name, seed=1)
    found = {}
    for output_loss in ("auto", "kl", "mse", "cosine"):
        batch = batch_of(model)
        objective = distill_objective(model, Teacher(other), DistillSettings(output_loss=output_loss))
        found[output_loss] = float(objective(ran(model, batch, objective.taps), batch)["loss"])
    assert found["auto"] == found[kind]
    assert len(set(found.values())) == 3


def test_a_student_like_its_teacher_has_no_loss_and_no_gradient() -> None:
    for tail in (SOFTMAX, "y = Sigmoid(s)", "y = Relu(s)"):
        model = net(tail)
        batch = batch_of(model)
        objective = distill_objective(model, Teacher(model), DistillSettings(taps=("s",)))
        bridge = TrainableGraph(model, taps=objective.taps)
        loss = objective(bridge.module(batch.feeds), batch)["loss"]
        loss.backward()
        # ORT and torch add up in another order: rounding of float32, squared
        assert abs(float(loss.detach())) < 1e-6
        assert float(bridge.parameters["w"].grad.abs().max()) < 1e-5


def test_sigmoid_kl_by_hand() -> None:
    s, t = torch.tensor([[0.3, -2.0]]), torch.tensor([[1.0, 0.5]])
    p, q = torch.sigmoid(t / 2), torch.sigmoid(s / 2)
    wanted = 4 * (p * (p / q).log() + (1 - p) * ((1 - p) / (1 - q)).log()).mean()
    assert float(kl(s, t, None, "sigmoid", 2.0)) == pytest.approx(float(wanted), rel=1e-5)


def test_mse_and_cosine_do_not_depend_on_scale() -> None:
    rng = np.random.default_rng(0)
    s, t = (torch.from_numpy(rng.normal(size=(5, 7)).astype(np.float32)) for _ in range(2))
    assert Spread().add(t).scale == pytest.approx(float(t.var(correction=0)), rel=1e-6)
    assert Spread().add(t[:2]).add(t[2:]).scale == pytest.approx(Spread().add(t).scale, rel=1e-9)
    assert Spread().add(t * 100).scale == pytest.approx(1e4 * Spread().add(t).scale, rel=1e-5)
    assert Spread().add(torch.full((2,), 3.0)).scale == pytest.approx(9.0)  # nothing varies: its power
    assert Spread().add(torch.zeros(2)).scale == 1.0
    assert float(cosine(s * 3, t)) == pytest.approx(1 - float(F.cosine_similarity(s, t).mean()), rel=1e-5)


@pytest.mark.parametrize("taps", [(), ("s",)])
def test_once_measured_a_batch_is_the_mean_of_its_parts(taps: tuple[str, ...]) -> None:
    """So that accumulated batches, and those of several processes, are one large batch."""
    model, settings = net("y = Identity(s)", seed=1), DistillSettings(output_loss="mse", taps=taps)
    whole = batch_of(model, rows=6)
    whole.feeds["x"][3:] *= 5.0  # halves of other variance
    halves = [Batch({"x": whole.feeds["x"][part]}, None, whole.index[part]) for part in (slice(3), slice(3, 6))]
    objective = distill_objective(model, Teacher(net("y = Identity(s)")), settings)
    bridge = TrainableGraph(model, taps=objective.taps)

    def losses() -> list[float]:
        return [float(objective(bridge.module(b.feeds), b)["loss"].detach()) for b in (whole, *halves)]

    together, one, other = losses()
    assert abs(together - (one + other) / 2) > 0.05 * together
    objective.measure((bridge.module(b.feeds), b) for b in (whole,))
    again, one, other = losses()
    assert again == pytest.approx(together, rel=1e-5)
    assert again == pytest.approx((one + other) / 2, rel=1e-5)


def test_alpha_mixes_teacher_and_labels() -> None:
    model, teacher = net(SOFTMAX, seed=1), Teacher(net(SOFTMAX))
    batch = batch_of(model, CLASSES)
    terms = {}
    for alpha in (0.0, 0.3, 1.0):
        objective = distill_objective(model, teacher, DistillSettings(alpha=alpha))
        terms[alpha] = objective(ran(model, batch, objective.taps), Batch(batch.feeds, batch.labels, batch.index))
    assert set(terms[0.0]) == {"task", "loss"}
    assert set(terms[1.0]) == {"distill", "loss"}
    mixed = 0.3 * terms[1.0]["loss"] + 0.7 * terms[0.0]["loss"]
    assert float(terms[0.3]["loss"]) == pytest.approx(float(mixed), rel=1e-5)
    objective = distill_objective(model, teacher, DistillSettings(alpha=0.3))
    with pytest.raises(DataError, match="labels are missing"):
        objective(ran(model, batch, objective.taps), batch_of(model))


@pytest.mark.parametrize("option", [{"label_smoothing": 0.1}, {"loss": "mse"}])
def test_options_of_labels_without_labels(option: dict[str, Any]) -> None:
    with pytest.raises(SpecError, match="alpha = 1"):
        distill_objective(net(SOFTMAX), Teacher(net(SOFTMAX)), DistillSettings(**option))


CONV = """<ir_version: 8, opset_import: ["" : 17]> conv (float[N, 2, 5, 5] x) => (float[N, {width}] y)
<float[{width}, 2, 3, 3] w = {{{weights}}}>
{{ features = Conv(x, w) r = Relu(features) g = GlobalAveragePool(r) y = Flatten(g) }}"""


def conv(width: int, seed: int = 0) -> Model:
    weights = ", ".join(f"{v:.4f}" for v in np.random.default_rng(seed).normal(size=width * 18))
    return load(onnx.parser.parse_model(CONV.format(width=width, weights=weights)))


@pytest.mark.parametrize("tap_loss", ["mse", "cosine"])
def test_taps_of_other_widths_are_compared_through_a_projection_that_learns(tap_loss: str) -> None:
    student, teacher = conv(3, seed=1), conv(5)
    student.graph.outputs[0].name = teacher.graph.outputs[0].name = "y"
    settings = DistillSettings(alpha=0.0, taps=("features", "r=r"), tap_loss=tap_loss, tap_weight=2.0, loss="mse")
    objective = distill_objective(student, Teacher(teacher), settings)
    assert [tuple(p.shape) for p in objective.parameters] == [(5, 3), (5, 3)]
    assert objective.taps == ("features", "r")
    batch = batch_of(student, np.zeros((3, 3), np.float32))
    bridge = TrainableGraph(student, taps=objective.taps)
    optimizer = torch.optim.Adam([*bridge.parameters.values(), *objective.parameters], 0.05)
    first = 0.0
    for _ in range(30):
        terms = objective(bridge.module(batch.feeds), batch)
        first = first or float(terms["taps"].detach())
        parts = terms["task"] + 2 * terms["taps"]
        assert float(terms["loss"].detach()) == pytest.approx(float(parts.detach()), rel=1e-5)
        optimizer.zero_grad()
        terms["loss"].backward()
        optimizer.step()
    assert float(terms["taps"].detach()) < 0.7 * first


@pytest.mark.parametrize(
    ("tap", "message"),
    [("feature", "did you mean 'features'"), ("features=rr", "teacher has no tensor 'rr'"), ("w2=r", "student has no")],
)
def test_unknown_taps(tap: str, message: str) -> None:
    with pytest.raises(SpecError) as error:
        distill_objective(conv(3), Teacher(conv(3)), DistillSettings(taps=(tap,)))
    assert message in str(error.value)


def test_taps_that_no_projection_makes_alike() -> None:
    with pytest.raises(SpecError, match="tap 'features' of shape"):
        distill_objective(conv(3), Teacher(conv(3)), DistillSettings(taps=("features=y",)))


def test_a_teacher_of_another_task() -> None:
    teacher = net(SOFTMAX)
    teacher.graph.inputs[0].name = "z"
    with pytest.raises(ModelError, match="input 'z' is none of the student's"):
        distill_objective(net(SOFTMAX), Teacher(teacher), DistillSettings())
    two = load(
        onnx.parser.parse_model("""<ir_version: 8, opset_import: ["" : 17]>
    two (float[N, 6, 4] x) => (float[N, 6, 4] a, float[N, 6, 4] b) { a = Relu(x) b = Softmax(x) }""")
    )
    with pytest.raises(ModelError, match="other outputs: a, b"):
        distill_objective(net(SOFTMAX), Teacher(two), DistillSettings())
    model = net(SOFTMAX)
    objective = distill_objective(model, Teacher(net(TAILS["transposed"])), DistillSettings())
    outputs = ran(model, batch_of(model), objective.taps)
    with pytest.raises(ModelError, match="student's 'y' is"):
        objective(outputs, batch_of(model))


def test_a_teacher_in_torch_says_what_one_in_ort_says() -> None:
    model = conv(4)
    batch = batch_of(model)
    one, other = (Teacher(model, ["y", "features"], runs_in=runs)(batch) for runs in ("ort", "torch"))
    for name in ("y", "features"):
        # two implementations of one convolution in float32
        assert torch.allclose(one[name], other[name], rtol=1e-4, atol=1e-5)
        assert not other[name].requires_grad


def counted(teacher: Teacher, monkeypatch: pytest.MonkeyPatch) -> list[int]:
    calls: list[int] = []
    before = Teacher._answer

    def answer(self: Teacher, feeds: Any, rows: int) -> Any:
        calls.append(rows)
        return before(self, feeds, rows)

    monkeypatch.setattr(Teacher, "_answer", answer)
    return calls


def part(batch: Batch, index: list[int]) -> Batch:
    return Batch({name: value[index] for name, value in batch.feeds.items()}, None, np.array(index))


def test_a_teacher_says_again_what_it_said(monkeypatch: pytest.MonkeyPatch) -> None:
    model = conv(4)
    teacher = Teacher(model, ["y", "features"], cache=True)
    calls = counted(teacher, monkeypatch)
    batch = batch_of(model, rows=6)
    whole = teacher(batch)
    asked = len(calls)
    again = teacher(part(batch, [5, 0, 3]))
    assert len(calls) == asked
    assert torch.equal(again["features"], whole["features"][[5, 0, 3]])
    teacher.also(["r"])
    assert set(teacher(part(batch, [1, 2]))) == {"y", "features", "r"}
    assert len(calls) > asked


def test_a_teacher_keeps_no_more_than_its_budget(monkeypatch: pytest.MonkeyPatch) -> None:
    teacher = Teacher(conv(4), ["y"], cache=True, budget=40)
    batch = batch_of(conv(4), rows=6)
    whole = teacher(batch)["y"]
    calls = counted(teacher, monkeypatch)
    assert torch.equal(teacher(part(batch, [0, 1]))["y"], whole[:2])
    assert calls == []
    assert torch.allclose(teacher(part(batch, [1, 5]))["y"], whole[[1, 5]], atol=1e-6)  # batches of another size
    assert calls == [2]


def test_a_tensor_without_rows_is_not_kept() -> None:
    model = net("t = Transpose <perm = [1, 0, 2]> (s) y = Relu(t)", shape="N, 3, 4")
    teacher = Teacher(model, ["y"], cache=True)
    batch = batch_of(model, rows=3)  # three rows of three steps: the shape does not tell them apart
    first = teacher(batch)["y"]
    assert teacher.notes
    assert torch.equal(teacher(part(batch, [2, 1, 0]))["y"], first[:, [2, 1, 0]])


def test_a_teacher_with_a_batch_of_its_own() -> None:
    free, fixed = net(SOFTMAX), net(SOFTMAX, shape="2, 6, 4")
    batch = batch_of(free, rows=5)
    wanted, found = (Teacher(model, ["y", "s"])(batch) for model in (free, fixed))
    for name in wanted:
        assert torch.allclose(wanted[name], found[name], atol=1e-6)  # kernels may differ by the number of rows


def test_unknown_tensor_of_a_teacher() -> None:
    with pytest.raises(DataError, match="no tensor 'feature'"):
        Teacher(conv(3), ["feature"])
