"""What training brings back on the digits: cut channels, zeros; and the same graphs trained from scratch.

    python -m graphopt.models.benchmarks.recovery_digits -o digits.md --json digits.json

Every row is a pipeline, judged on the 600 test images; calibration (200) and training images (997) are others.  The
control has the same graph, masks, training and number of updates; only its weights are drawn anew.
"""

from __future__ import annotations

import argparse
import json
from collections.abc import Callable, Iterator, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import numpy as np

from graphopt.analysis.constants import array_of
from graphopt.analysis.cost import costs
from graphopt.data import load_samples
from graphopt.environment import describe
from graphopt.model import Model
from graphopt.models.digits import demo_model, task
from graphopt.pipeline import Pipeline, Settings
from graphopt.runtime import Session
from graphopt.sparse_layers import SparseLayer, find
from graphopt.sparse_marks import marks

Array = np.ndarray[Any, Any]

SEEDS = (0, 1, 2)
DATA = f"{task.__file__}:train"
IMAGES = {"image": (1, 1, 8, 8)}

UPDATES = {"70 % of MACs cut": 200, "90 % zeros": 960}
"""Of every row that is trained, in all: 14 and 69 epochs of 897 images in batches of 64, where the original had 80."""

SAID = (
    "batch=64, rate=4e-3, relative=false, warmup=0.1, batch_norm=train, evaluations=0.5, "
    "augment=['rotate=8', 'scale=0.1', 'shift=0.06', 'noise=0.025']"
)
"""Options of all trainings: what the original was trained with, as far as its images go."""

HOW = f"data='{DATA}', teacher='{demo_model()}', {SAID}"

PLAIN = "repeat(simplify-shapes, fold-constants, eliminate-identity, eliminate-dead)"
"""Shapes as numbers; normalisation stays where it is, so that the control can be trained at all."""

CHANNELS = "prune-channels{ratio=0.7, of=macs, criterion=obs, round_to=4}"
FITTED = f"{CHANNELS}, reconstruct-weights"
SPARSE = "sparsify-weights{amount=0.9}"
STAGES, EACH = 6, 30
"""Steps in which zeros grow, and updates of each."""


@dataclass(frozen=True)
class Row:
    """A result.

    Attributes:
        case: what was cut.
        way: how it was trained.
        seed: of the run.
        right: part of the test images whose largest logit is the label's.
        macs: multiplications for one image.
        zeros: part of the elements of the weights that may be sparse.
        parameters: elements of all weights that are not zero.
        updates: of the weights.
        seconds: that the pipeline took, on whatever else the machine had to do.
    """

    case: str
    way: str
    seed: int
    right: float
    macs: int
    zeros: float
    parameters: int
    updates: int
    seconds: float


def distilled(updates: int, schedule: str = "cosine") -> str:
    """Return the training step."""
    return f"distill{{{HOW}, steps={updates}, schedule={schedule}}}"


def gradual(updates: int) -> str:
    """Return the schedule of zeros: they grow at an even rate of learning, which then falls."""
    zeros = "sparsify-weights{amount={from=0.0, to=0.9}}"
    growing = f"gradual{{times={STAGES}}}({zeros}, {distilled(EACH, 'constant')})"
    return f"{growing}, {distilled(updates - STAGES * EACH)}"


@dataclass
class Runner:
    """Runs and judges pipelines with one seed.

    Attributes:
        seed: of all that is random.
        done: told of every row.
    """

    seed: int
    done: Callable[[Row], None]

    def rows(self) -> None:
        """Run all."""
        original = Pipeline(PLAIN).run(demo_model(), settings=Settings(verify="off")).model
        self.judged("original", "as it came", original, 0, 0.0)
        case, updates = "70 % of MACs cut", UPDATES["70 % of MACs cut"]
        self.run(case, "not trained", original, CHANNELS, 0)
        self.run(case, "fitted by reconstruct-weights", original, FITTED, 0)
        self.control(case, self.run(case, "distilled", original, f"{CHANNELS}, {distilled(updates)}", updates))
        case, updates = "90 % zeros", UPDATES["90 % zeros"]
        self.run(case, "not trained", original, SPARSE, 0)
        self.control(case, self.run(case, "gradual, distilled", original, gradual(updates), updates))

    def control(self, case: str, cut: Model) -> None:
        """Train the graph and the zeros of a result from other weights."""
        self.run(case, "from scratch", drawn_anew(cut, self.seed), distilled(UPDATES[case]), UPDATES[case])

    def run(self, case: str, way: str, model: Model, pipeline: str, updates: int) -> Model:
        """Return what a pipeline makes of a model, judged."""
        settings = Settings(verify="off", on_failure="stop", seed=self.seed)
        samples = load_samples(list(task.calibration()), model)
        found = Pipeline(pipeline).run(model, samples=samples, settings=settings)
        self.judged(case, way, found.model, updates, found.report.seconds)
        return found.model

    def judged(self, case: str, way: str, model: Model, updates: int, seconds: float) -> None:
        """Judge a model."""
        right = float(np.mean(task.accuracy(Session(model, threads=1).run)))
        layers = list(sparse_layers(model))
        sizes = [(int(np.sum(layer.values() == 0)), layer.values().size) for layer in layers]
        macs = costs(model, inputs=IMAGES).macs
        held = [c.values for c in model.constants() if c.dtype == np.float32]
        self.done(Row(
            case, way, self.seed, right, int(macs or 0), sum(z for z, _ in sizes) / sum(s for _, s in sizes),
            sum(int(np.count_nonzero(values)) for values in held), updates, round(seconds, 1),
        ))  # fmt: skip


def sparse_layers(model: Model) -> Iterator[SparseLayer]:
    """Yield the weights that `sparsify-weights` takes."""
    for graph in model.graphs():
        yield from find(model, graph)[0]


def drawn_anew(model: Model, seed: int) -> Model:
    """Return a copy with weights as before any training; zeros of sparse weights stay.

    Weights by He and others, 2015 (fan-in, for ReLU); biases 0; normalisation: scale 1, shift 0, mean 0, variance 1.
    """
    out = model.copy()
    rng = np.random.default_rng([seed, 1])
    sparse = {node.inputs[port].name for node in model.nodes() for port in marks(model.metadata(node))}
    norms = {id(t): fill for n in out.nodes() if n.op == "BatchNormalization"
             for t, fill in zip(n.inputs[1:], (1.0, 0.0, 0.0, 1.0), strict=True)}  # fmt: skip
    layers = [node for node in out.nodes() if node.op in ("Conv", "Gemm", "MatMul", "BatchNormalization")]
    for node in layers:
        for port, tensor in enumerate(node.inputs):
            held = array_of(tensor)
            if held is None or held.dtype != np.float32 or not held.ndim:
                continue
            if id(tensor) in norms:
                tensor.values = np.full_like(held, norms[id(tensor)])
            elif held.ndim > 1:
                fan_in = held[0].size if node.op == "Conv" or node.attrs.get("transB") else held.shape[0]
                new = rng.normal(size=held.shape) * np.sqrt(2.0 / fan_in)
                tensor.values = np.where((held == 0) & (tensor.name in sparse), 0.0, new).astype(np.float32)
            elif port == 2:
                tensor.values = np.zeros_like(held)
    return out


def table(rows: Sequence[Row]) -> str:
    """Return the mean over seeds of each case as Markdown."""
    lines = ["| digits CNN | trained | right | lowest to highest seed | MACs | weights not 0 | updates |",
             "|---|---|---:|---:|---:|---:|---:|"]  # fmt: skip
    for case, way in dict.fromkeys((row.case, row.way) for row in rows):
        own = [row for row in rows if (row.case, row.way) == (case, way)]
        right = [100 * row.right for row in own]
        spread = f"{min(right):.2f} to {max(right):.2f}" if len(own) > 1 else "–"
        macs, held = np.mean([row.macs for row in own]), np.mean([row.parameters for row in own])
        lines.append(
            f"| {case} | {way} | {np.mean(right):.2f} % | {spread} | {macs / 1e6:.2f} M | {held / 1e3:.0f} k "
            f"| {own[0].updates} |"
        )
    return "\n".join(lines) + "\n"


def main() -> None:
    """Run it for all seeds."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("-o", "--output", type=Path)
    parser.add_argument("--json", type=Path)
    parser.add_argument("--seeds", type=int, nargs="*", default=list(SEEDS))
    parser.add_argument("--rows", type=Path, help="results, one JSON document a line; those of other seeds count too")
    given = parser.parse_args()
    earlier = given.rows.read_text().splitlines() if given.rows is not None and given.rows.exists() else []
    rows = [row for line in earlier if (row := Row(**json.loads(line))).seed not in given.seeds]

    def done(row: Row) -> None:
        rows.append(row)
        print(json.dumps(asdict(row)), flush=True)
        if given.rows is not None:
            with given.rows.open("a") as file:
                file.write(json.dumps(asdict(row)) + "\n")

    for seed in given.seeds:
        Runner(seed, done).rows()
    rows.sort(key=lambda row: row.seed)
    document = {"rows": [asdict(row) for row in rows], "training": SAID, "environment": describe()}
    if given.json is not None:
        given.json.write_text(json.dumps(document, indent=1) + "\n", encoding="utf-8")
    if given.output is not None:
        given.output.write_text(table(rows), encoding="utf-8")
    print(table(rows))


if __name__ == "__main__":
    main()
