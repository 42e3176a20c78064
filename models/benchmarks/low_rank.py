"""What low rank loses by samples and by the weights alone, at equal rank; and what it gains in time.

    python -m graphopt.models.benchmarks.low_rank [--models NAME ...] [--no-gains] [--output docs/low-rank-figures.md]

Errors: every layer that can have factors gets a part of the rank from which on it takes less work as it is.  Each is
looked at alone (its output, on samples that chose nothing) and all together (the model's outputs).  Gains: `factorize`
within a bound, timed against the lossless model.
"""

from __future__ import annotations

import argparse
import itertools
import sys
import warnings
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import onnx
from onnx import TensorProto, helper, numpy_helper

from graphopt import environment
from graphopt.analysis.factorable import Factorable, find
from graphopt.factor_trials import Trials
from graphopt.factorizer import factorize
from graphopt.factors import Solved, Solver, in_parts
from graphopt.grams import collect
from graphopt.layer_inputs import Gram
from graphopt.model import Model, Source
from graphopt.models import digits, zoo
from graphopt.models.digits import task as digits_task
from graphopt.models.tasks import crops, magika_files, minilm_pairs, ocr_cls, ocr_det, ocr_rec
from graphopt.optimizer import DEFAULT_OPSET, default_pipeline
from graphopt.pipeline import Settings
from graphopt.quality import Bound
from graphopt.samples import Feeds, Samples

Array = np.ndarray[Any, Any]

PARTS = (0.25, 0.5, 0.75)
"""Of the rank from which on a layer takes less work as it is."""

CHOOSING, JUDGING, ROWS = 24, 8, 512


@dataclass(frozen=True)
class Task:
    """A model's samples, those that choose and those that judge, and a metric of labelled items."""

    choosing: Callable[[], Iterator[Feeds]]
    judging: Callable[[], Iterator[Feeds]]
    metric: Callable[..., Any] | None = None


TASKS: Mapping[str, Task] = {
    "minilm-torchscript": Task(minilm_pairs.calibration, minilm_pairs.selection, minilm_pairs.neighbour_right),
    "minilm-dynamo": Task(minilm_pairs.calibration, minilm_pairs.selection, minilm_pairs.neighbour_right),
    "efficientnet-lite0-torchscript": Task(crops.calibration, crops.selection, crops.top1_agreement),
    "ppocr-rec": Task(ocr_rec.calibration, ocr_rec.selection, ocr_rec.lines_right),
    "ppocr-det": Task(ocr_det.calibration, ocr_det.selection),
    "ppocr-cls": Task(ocr_cls.calibration, ocr_cls.selection),
    "digits": Task(digits_task.calibration, lambda: digits_images(256)),
    "magika": Task(magika_files.calibration, magika_files.selection, magika_files.type_right),
}


def digits_images(count: int) -> Iterator[Feeds]:
    """Yield labelled test images of digits, which neither trained nor chose."""
    with np.load(digits.demo_data()) as archive:
        images = archive["image"][:count]
    for start in range(0, count, 32):
        yield {"image": images[start : start + 32]}


INTRODUCTION = """\
# Low rank: figures

Made by `python -m graphopt.models.benchmarks.low_rank --output docs/low-rank-figures.md`.

## Errors at equal rank

Every MatMul, Gemm and ungrouped Conv of the canonical model gets factors, its rank a part of the one from which on the
layer takes less work as it is.  *layer*: relative error of a layer's centred output, the geometric mean over layers,
each alone; *outputs*: relative error of the model's outputs with all of them.  *weights*: singular values; *samples*:
activation-aware, by {choosing} samples.  All errors are of {judging} other samples.

"""

GAINS = """
## Gains

`factorize` within a bound, against the lossless model.  Time is a ratio with its 95 % interval, processor time of one
thread; the metric is of items that neither chose nor judged the ranks.

"""


def main(arguments: Sequence[str] | None = None) -> None:
    """Measure, and write the page."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").split("\n", 1)[0])
    parser.add_argument("--models", nargs="*", default=list(TASKS), choices=list(TASKS))
    parser.add_argument("--no-gains", action="store_true")
    parser.add_argument("--budget", type=float, default=20.0, help="seconds of timing for each gain")
    parser.add_argument("--output", type=Path)
    asked = parser.parse_args(arguments)
    page = INTRODUCTION.format(choosing=CHOOSING, judging=JUDGING) + ERROR_HEAD
    for name in asked.models:
        for row in errors(name):
            page += row
            print(row, end="", file=sys.stderr, flush=True)
    if not asked.no_gains:
        page += GAINS + GAIN_HEAD
        for case in cases():
            page += (row := gain(case, asked.budget))
            print(row, end="", file=sys.stderr, flush=True)
    page += f"\n{_told()}\n"
    if asked.output is None:
        print(page)
    else:
        asked.output.write_text(page)


def _told() -> str:
    found = environment.describe()
    return f"ONNX Runtime {found['packages'].get('onnxruntime', '')}, {found['cpu']}."


ERROR_HEAD = """\
| model | layers | rank | layer, weights | layer, samples | ratio | outputs, weights | outputs, samples | ratio |
|---|---|---|---|---|---|---|---|---|
"""


def errors(name: str) -> Iterator[str]:
    """Yield a row for each part of the rank."""
    task = TASKS[name]
    canonical = default_pipeline(DEFAULT_OPSET, "canonical").run(
        digits.demo_model() if name == "digits" else zoo.fetch(name), settings=Settings(verify="off")
    ).model  # fmt: skip
    choosing, judging = _limited(task.choosing, CHOOSING), _limited(task.judging, JUDGING)
    layers = [layer for layer in find(canonical.graph) if not layer.why]
    trials = Trials(canonical, [layer.label for layer in layers], judging)
    aware, held = _solved(canonical, layers, choosing), _moments(canonical, layers, judging)
    plain = {layer.label: Solver({}).solve(layer, layer.splits[0]) for layer in layers}
    for part in PARTS:
        ranks = {layer.label: max(1, round(part * layer.splits[0].limit)) for layer in layers}
        found = []
        for solved in (plain, aware):
            alone = [layer_error(solved[k], rank, held[k]) for k, rank in ranks.items() if k in held]
            together = trials.noise({k: (solved[k], rank) for k, rank in ranks.items()})
            found += [float(np.exp(np.mean(np.log(np.maximum(alone, 1e-9))))), float(np.sqrt(together))]
        layer, outputs = found[2] / found[0], found[3] / found[1]
        yield (
            f"| {name} | {len(layers)} | {part:g} | {found[0]:.3f} | {found[2]:.3f} | {layer:.2f} "
            f"| {found[1]:.3f} | {found[3]:.3f} | {outputs:.2f} |\n"
        )


def _limited(make: Callable[[], Iterator[Feeds]], count: int) -> Samples:
    feeds = list(itertools.islice(make(), count))
    return Samples(lambda: iter(feeds), f"{count} samples")


def _solved(model: Model, layers: Sequence[Factorable], samples: Samples) -> dict[str, Solved]:
    found = {}
    for part, requests in in_parts([(layer, layer.splits[:1]) for layer in layers]):
        grams = collect(model, samples, {str(i): r for i, r in enumerate(requests)}, rows=ROWS)
        solver = Solver({requests[int(i)]: gram for i, gram in grams.items()})
        found.update({layer.label: solver.solve(layer, splits[0]) for layer, splits in part})
    return found


def _moments(model: Model, layers: Sequence[Factorable], samples: Samples) -> dict[str, Gram]:
    asked = {layer.label: layer.request(layer.splits[0]) for layer in layers}
    requests = {name: found[0] for name, found in asked.items() if found is not None}
    return collect(model, samples, requests, rows=ROWS)


def layer_error(solved: Solved, rank: int, gram: Gram) -> float:
    """Return the relative error of a layer's centred output by factors of a rank, on rows that a Gram matrix is of."""
    basis = solved.spectrum.basis[:, :rank]
    covariance = gram.covariance()
    if gram.matrix.shape[-1] != solved.split.size[1] or solved.split.size[0] == solved.split.size[1]:
        matrix = np.asarray(solved.spectrum.matrix, np.float64)
        lost = matrix - (matrix @ basis) @ basis.T
        whole, left = (float(np.sum((covariance @ m) * m)) for m in (matrix, lost))
        return float(np.sqrt(max(left, 0.0) / whole)) if whole > 0.0 else 0.0
    whole = float(np.trace(covariance))
    kept = float(np.einsum("ik,ij,jk->", basis, covariance, basis, optimize=True))
    return float(np.sqrt(max(whole - kept, 0.0) / whole)) if whole > 0.0 else 0.0


@dataclass(frozen=True)
class Case:
    """A model to be factorised within a bound."""

    name: str
    model: Source
    samples: list[Feeds]
    asked: Mapping[str, Any]
    metric: Callable[..., Any]

    @property
    def bound(self) -> str:
        """What is asked, in words."""
        return ", ".join(f"{name.replace('_', ' ')} {value}" for name, value in self.asked.items())


def cases() -> Iterator[Case]:
    """Yield the models whose gains are measured."""
    yield digits_case()
    for name, asked in (
        ("minilm-torchscript", {"max_error": 0.1}), ("efficientnet-lite0-torchscript", {"max_error": 0.2}),
        ("magika", {"max_error": 0.1}),
    ):  # fmt: skip
        task = TASKS[name]
        assert task.metric is not None
        samples = list(itertools.islice(itertools.chain(task.choosing(), task.judging()), 2 * CHOOSING))
        yield Case(name, zoo.fetch(name), samples, asked, task.metric)


def digits_case(width: int = 2048) -> Case:
    """Return a classifier of digits, 64 inputs and two wide hidden layers, trained by scikit-learn."""
    from sklearn.datasets import load_digits  # noqa: PLC0415  (development only)
    from sklearn.neural_network import MLPClassifier  # noqa: PLC0415

    images, labels = load_digits(return_X_y=True)
    images = np.asarray(images / 16, np.float32)
    order = np.random.default_rng(0).permutation(len(images))
    train, test = order[:1000], order[1000:]
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # it has not converged: it need not
        trained = MLPClassifier((width, width), max_iter=6, random_state=0, batch_size=100)
        trained.fit(images[train], labels[train])

    def right(predict: Any) -> Array:
        return np.asarray(predict({"x": images[test]})["y"].argmax(axis=1) == labels[test], np.float64)

    samples: list[Feeds] = [{"x": images[train[i : i + 20]]} for i in range(0, len(train), 20)]
    return Case(f"digits, 64-{width}-{width}-10", _network(trained), samples, {"max_error": 0.02}, right)


def _network(trained: Any) -> onnx.ModelProto:
    nodes, held, last = [], [], "x"
    for i, (weight, bias) in enumerate(zip(trained.coefs_, trained.intercepts_, strict=True)):
        made = "y" if i == len(trained.coefs_) - 1 else f"h{i}"
        held += [numpy_helper.from_array(np.asarray(v, np.float32), f"{n}{i}") for n, v in (("w", weight), ("b", bias))]
        nodes.append(helper.make_node("Gemm", [last, f"w{i}", f"b{i}"], [made], made))
        if made != "y":
            nodes.append(helper.make_node("Relu", [made], [f"r{i}"]))
        last = f"r{i}"
    infos = [helper.make_tensor_value_info(n, TensorProto.FLOAT, ["N", s]) for n, s in (("x", 64), ("y", 10))]
    graph = helper.make_graph(nodes, "digits", infos[:1], infos[1:], held)
    return helper.make_model(graph, opset_imports=[helper.make_opsetid("", 17)], ir_version=8)


GAIN_HEAD = """\
| model | bound | layers with factors | error | MACs | bytes | time | metric before | after |
|---|---|---|---|---|---|---|---|---|
"""


def gain(case: Case, budget: float) -> str:
    """Return a row."""
    from graphopt.metric import evaluate_pair  # noqa: PLC0415
    from graphopt.model import load  # noqa: PLC0415
    from graphopt.runtime import Session  # noqa: PLC0415

    result = factorize(load(case.model), data=case.samples, bound=Bound(), budget=budget, **case.asked)
    report = result.report
    if report.decision != "factorized":
        return f"| {case.name} | {case.bound} | none: {report.reason} | | | | 1 | | |\n"
    assert report.timing is not None
    made = sum(row.form != "whole" for row in report.layers)
    macs = (report.macs_after or 0) / max(report.macs_before or 1, 1)
    ratio = report.timing.overall
    pair = evaluate_pair(case.metric, case.name, Session(load(case.model)).run, Session(result.model).run, max_drop=1.0)
    return (
        f"| {case.name} | {case.bound} | {made} of {len(report.layers)} | {report.error or 0.0:.3f} | {macs:.2f} "
        f"| {report.bytes_after / report.bytes_before:.2f} | {ratio.median:.3f} ({ratio.low:.3f} to {ratio.high:.3f}) "
        f"| {pair.reference:.4f} | {pair.candidate:.4f} |\n"
    )


if __name__ == "__main__":
    main()
