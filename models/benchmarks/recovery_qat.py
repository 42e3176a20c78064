"""What training with quantization brings back -> a table as markdown or JSON.

    python -m graphopt.models.benchmarks.recovery_qat digits
    python -m graphopt.models.benchmarks.recovery_qat efficientnet --json result.json

digits        all weights of the digits network in 4 bits, with a scale per output channel or one for the whole weight:
              rounded, and then distilled without labels; accuracy on its 600 test images, mean of three seeds.
              Control: the same 4-bit graph from random weights, trained as long.
efficientnet  EfficientNet-Lite0, every layer in int8, with ranges from calibration crops; then distilled without labels
              on crops of these and twenty more photographs.  Agreement with the float model on 2,000 crops of other
              photographs, with ORT's optimizations on and off, and of both with each other.
"""

from __future__ import annotations

import argparse
import json
import time
from collections.abc import Callable, Iterator, Mapping
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import onnx_graphsurgeon as gs

from graphopt.analysis.constants import array_of
from graphopt.analysis.placement import output_axis
from graphopt.codes import weight_code
from graphopt.data import load_samples
from graphopt.edit import label, make_node
from graphopt.model import Model, load
from graphopt.models import zoo
from graphopt.models.digits import demo_model, task
from graphopt.models.tasks import crops
from graphopt.optimizer import default_pipeline
from graphopt.pipeline import Pipeline
from graphopt.runtime import Session
from graphopt.targets import OUTPUT_AXIS
from graphopt.training import DistillSettings

Array = np.ndarray[Any, Any]
Feeds = dict[str, Array]

SEEDS = (0, 1, 2)
FOUR_BIT_OPSET, FOUR_BIT_IR = 21, 10

DIGITS = DistillSettings(
    epochs=5, batch=64, rate=2e-3, relative=False, weight_decay=0.0, temperature=2.0, evaluations=0
)
"""80 updates."""

CROPS = DistillSettings(
    steps=600,
    batch=8,
    rate=1e-2,
    weight_decay=0.0,
    output_loss="kl",
    temperature=1.0,
    learn_scales=False,
    evaluations=0,
)
"""Scales that are exact stay as they are."""

CLEAR = 0.05
"""Distance of the float model's two largest probabilities above which a crop counts as one that it is sure of."""

PTQ: Mapping[str, str] = {
    "int8": "quantize-static{ranges=mse}",
    "int8, rounded and corrected": "quantize-static{ranges=mse}, round-weights, correct-bias",
    "int8, exact scales": "quantize-static{ranges=mse, exact=true}, round-weights, correct-bias",
}
"""Post-training forms of all layers; the last one is trained."""


@dataclass
class Row:
    """One model: what it is, and its figures by name."""

    subject: str
    model: str
    figures: dict[str, float] = field(default_factory=dict)
    seconds: float = 0.0


def four_bits(model: Model, *, by_channel: bool = True, seed: int | None = None) -> Model:
    """Return a canonical model with the weights of all layers in int4.

    Args:
        model: in float32.
        by_channel: a scale per output channel, or one for the weight.
        seed: draw weights at random, as before any training, with biases 0; None: those of the model.
    """
    model = Pipeline(f"upgrade-opset{{to={FOUR_BIT_OPSET}}}").run(model).model
    model.shell.ir_version = max(model.shell.ir_version, FOUR_BIT_IR)
    rng = None if seed is None else np.random.default_rng(seed)
    nodes: list[gs.Node] = []
    for node in model.graph.nodes:
        values = array_of(node.inputs[1]) if node.op in OUTPUT_AXIS else None
        if values is not None and values.ndim > 1:
            values = values if rng is None else _fresh(node, values, rng)
            nodes.append(_decoded(node, values, output_axis(node) if by_channel else None))
        nodes.append(node)
    model.graph.nodes.clear()
    model.graph.nodes.extend(nodes)
    return Pipeline("eliminate-dead").run(load(model.proto)).model


def _fresh(layer: gs.Node, values: Array, rng: np.random.Generator) -> Array:
    """Return random weights (He et al. 2015); the layer's bias becomes 0."""
    if len(layer.inputs) > 2 and (bias := array_of(layer.inputs[2])) is not None:
        layer.inputs[2] = gs.Constant(f"{label(layer)}/bias", np.zeros_like(bias))
    inputs = values.size // values.shape[output_axis(layer)]
    return np.asarray(rng.standard_normal(values.shape) * np.sqrt(2.0 / inputs), np.float32)


def _decoded(layer: gs.Node, values: Array, axis: int | None) -> gs.Node:
    """Let a layer read its weight from 4-bit codes; return what decodes them."""
    code = weight_code(values, axis, bits=4, method="mse")
    name = label(layer)
    made = gs.Variable(f"{name}/weight", np.float32, list(values.shape))
    codes = gs.Constant(f"{name}/codes", code.quantize(values))
    scale = gs.Constant(f"{name}/scale", np.asarray(code.scale))
    layer.inputs[1] = made
    attrs = {} if axis is None else {"axis": axis % values.ndim}
    return make_node("DequantizeLinear", [codes, scale], [made], attrs, name=f"{name}/DQ")


def digits() -> Iterator[Row]:
    """Yield what becomes of the digits network in 4 bits."""
    from graphopt.bridge.recover import distill  # noqa: PLC0415  (imports torch)

    teacher = load(demo_model())
    canonical = Pipeline(default_pipeline(17, "canonical").steps).run(teacher).model

    answers = _answers(teacher)

    def row(name: str, models: list[Model], seconds: float = 0.0) -> Row:
        right = [float(np.mean(task.accuracy(Session(model, threads=1).run))) for model in models]
        noise = [np.square(answers - _answers(model)).sum() / np.square(answers).sum() for model in models]
        figures = {"accuracy": float(np.mean(right)), "least": min(right), "most": max(right)}
        figures["SQNR, dB"] = -10 * float(np.log10(max(np.mean(noise), 1e-15)))
        return Row("digits", name, {**figures, "file": models[0].emitted_bytes() / teacher.emitted_bytes()}, seconds)

    def trained(name: str, students: list[Model]) -> Row:
        started = time.process_time()
        data = [feeds for feeds, _ in task.train()]
        models = [
            distill(student, teacher, data, DIGITS, seed=seed, held_out=0.0).model
            for student, seed in zip(students, SEEDS, strict=True)
        ]
        return row(name, models, (time.process_time() - started) / len(SEEDS))

    yield row("float", [teacher])
    for scales, by_channel in (("a scale per channel", True), ("one scale per weight", False)):
        four = four_bits(canonical, by_channel=by_channel)
        yield row(f"4 bits, {scales}, rounded", [four])
        yield trained(f"4 bits, {scales}, trained", [four] * len(SEEDS))
    yield trained("control: 4 bits from random weights", [four_bits(canonical, seed=seed) for seed in SEEDS])


def _answers(model: Model) -> Array:
    """Return the logits of the calibration images, which train nothing here."""
    session = Session(model, threads=1)
    return np.concatenate([session.run(feeds)["logits"] for feeds in task.calibration()])


def efficientnet(limit: int = crops.TEST_CROPS, keep: Path | None = None) -> Iterator[Row]:
    """Yield what becomes of EfficientNet-Lite0 in int8; `keep` is a folder for the models."""
    from graphopt.bridge.recover import distill  # noqa: PLC0415  (imports torch)

    path = zoo.fetch("efficientnet-lite0-torchscript")
    teacher = load(path)
    samples = load_samples(list(crops.calibration()), teacher)
    wanted = _logits(teacher, "all", limit)
    model = teacher
    canonical = default_pipeline(17, "canonical")
    for name, passes in PTQ.items():
        file = None if keep is None else keep / f"{name.replace(', ', '-').replace(' ', '-')}.onnx"
        if file is not None and file.exists():
            model = load(file)
        else:
            model = Pipeline(f"{canonical}, {passes}, eliminate-dead").run(path, samples=samples).model
            model.save(file) if file is not None else None
        yield _judged(name, model, wanted)
    started = time.process_time()
    done = distill(model, teacher, list(crops.training()), CROPS)
    if keep is not None:
        done.model.save(keep / "trained.onnx")
    row = _judged("int8, exact scales, trained", done.model, wanted)
    row.seconds = time.process_time() - started
    yield row


def _judged(name: str, model: Model, wanted: Array) -> Row:
    fused, plain = (_logits(model, level, len(wanted)) for level in ("all", "off"))
    noise = float(np.square(wanted - fused).sum() / np.square(wanted).sum())
    sure = _distances(wanted) > CLEAR
    figures = {
        "agreement, optimized": _same(fused, wanted), "agreement, as written": _same(plain, wanted),
        "of both": _same(fused, plain), f"optimized, clear ({np.mean(sure):.0%})": _same(fused[sure], wanted[sure]),
        "SQNR, dB": -10 * float(np.log10(noise)),
    }  # fmt: skip
    return Row("efficientnet-lite0", name, figures)


def _distances(logits: Array) -> Array:
    """Return how far apart the two largest probabilities of each row are."""
    odds = np.exp(logits - logits.max(axis=1, keepdims=True))
    two = np.partition(odds / odds.sum(axis=1, keepdims=True), -2, axis=1)[:, -2:]
    return np.asarray(two[:, 1] - two[:, 0])


def _logits(model: Model, level: Any, count: int) -> Array:
    session = Session(model, optimization=level, threads=1)
    return np.concatenate([next(iter(session.run(feeds).values())) for feeds in crops.feeds("test", count)])


def _same(one: Array, other: Array) -> float:
    return float(np.mean(one.argmax(axis=1) == other.argmax(axis=1)))


SUBJECTS: Mapping[str, Callable[..., Iterator[Row]]] = {"digits": digits, "efficientnet": efficientnet}


def table(rows: list[Row]) -> str:
    """Return rows as markdown, a table for each subject."""
    lines: list[str] = []
    for subject in dict.fromkeys(row.subject for row in rows):
        mine = [row for row in rows if row.subject == subject]
        names = list(dict.fromkeys(name for row in mine for name in row.figures))
        lines += [
            f"## {subject}",
            "",
            f"| model | {' | '.join(names)} | trained for, s |",
            "|---" * (len(names) + 2) + "|",
        ]
        for row in mine:
            figures = [_shown(name, row.figures.get(name)) for name in names]
            lines.append(f"| {row.model} | {' | '.join(figures)} | {f'{row.seconds:.0f}' if row.seconds else ''} |")
        lines.append("")
    return "\n".join(lines)


def _shown(name: str, value: float | None) -> str:
    if value is None:
        return ""
    return f"{value:.1f}" if name.endswith("dB") else f"{100 * value:.2f} %"


def main() -> None:
    """Measure and print."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("subjects", nargs="*", choices=[[], *SUBJECTS], help="all by default")
    parser.add_argument("--limit", type=int, default=crops.TEST_CROPS, help="test crops")
    parser.add_argument(
        "--keep", type=Path, help="folder for the models of efficientnet; those that are there are not made again"
    )
    parser.add_argument("--json", type=Path, help="write the figures there, too")
    given = parser.parse_args()
    rows: list[Row] = []
    for subject in given.subjects or SUBJECTS:
        options = {"limit": given.limit, "keep": given.keep} if subject == "efficientnet" else {}
        for row in SUBJECTS[subject](**options):
            print(f"{row.subject}: {row.model}: {row.figures}", flush=True)
            rows.append(row)
    print("\n" + table(rows))
    if given.json is not None:
        given.json.write_text(json.dumps([asdict(row) for row in rows], indent=1) + "\n")


if __name__ == "__main__":
    main()
