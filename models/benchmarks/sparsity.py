"""What zeros cost: criteria and patterns beside each other, on held-out items -> docs/sparsity-figures.md.

    python -m graphopt.models.benchmarks.sparsity [MODEL]... -o docs/sparsity-figures.md

Each model goes through the canonical stage, then `sparsify-weights`; nothing is trained.  Samples that fit and samples
that judge are disjoint.
"""

from __future__ import annotations

import argparse
import functools
import gzip
import json
import time
from collections.abc import Callable, Mapping
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import numpy as np

from graphopt.data import load_samples
from graphopt.models import zoo
from graphopt.models.benchmarks.quantizers_cases import CASES
from graphopt.models.digits import demo_model, task
from graphopt.optimizer import optimize
from graphopt.pipeline import Pipeline, Settings
from graphopt.runtime import Session

HALF = (
    "amount=0.5,criterion=magnitude", "amount=0.5,criterion=wanda", "amount=0.5,criterion=sparsegpt",
    'criterion=magnitude,pattern="2:4"', 'criterion=wanda,pattern="2:4"', 'criterion=sparsegpt,pattern="2:4"',
)  # fmt: skip
"""Half of all weights, in different ways."""

MORE = tuple(
    f"amount={amount},criterion={criterion}" for amount in (0.7, 0.8, 0.9) for criterion in ("magnitude", "sparsegpt")
)


@dataclass(frozen=True)
class Subject:
    """A model, what is tried on it, the samples that fit, and what judges: metric by name."""

    model: Callable[[], Path]
    specs: tuple[str, ...]
    samples: Callable[[], Any]
    metrics: Mapping[str, Callable[..., Any]]


@dataclass(frozen=True)
class Row:
    """A result: shares of zeros, metrics by name, bytes as dense file, as it is saved, and that by gzip."""

    model: str
    spec: str
    metrics: dict[str, float]
    dense: int
    file: int
    zipped: int
    seconds: float


def subjects() -> dict[str, Subject]:
    """Return what is compared."""
    found = {"digits": Subject(demo_model, (*HALF, *MORE), task.calibration, {"right": task.accuracy})}
    for name in ("efficientnet-lite0-torchscript", "minilm-torchscript"):
        case = CASES[name]
        model, samples = functools.partial(zoo.fetch, name), functools.partial(case.calibration, case.items)
        found[name] = Subject(model, HALF, samples, case.metrics)
    return found


def rows(name: str, subject: Subject, items: int | None, done: Callable[[Row], None]) -> None:
    """Make and judge each result of one model, the float model first, on so many items (None: all)."""
    base = optimize(subject.model(), stage="canonical", measure=False).model
    samples = load_samples(list(subject.samples()), base)
    settings = Settings(verify="off", on_failure="stop")
    for spec in ("", *subject.specs):
        started = time.perf_counter()
        model = (
            base
            if not spec
            else Pipeline(f"sparsify-weights{{{spec}}}").run(base, samples=samples, settings=settings).model
        )
        seconds = time.perf_counter() - started
        predict = Session(model, threads=1).run
        metrics = {title: float(np.mean(metric(predict, limit=items))) for title, metric in subject.metrics.items()}
        dense, file = (model.emit(compact=compact).SerializeToString(deterministic=True) for compact in (False, True))
        done(Row(name, spec, metrics, len(dense), len(file), len(gzip.compress(file, 6)), seconds))


def table(found: list[Row]) -> str:
    """Return the results as Markdown, a table for each model."""
    parts = []
    for name in dict.fromkeys(row.model for row in found):
        own = [row for row in found if row.model == name]
        titles = list(own[0].metrics)
        lines = [f"## {name}", "", "| zeros | " + " | ".join(titles) + " | dense MB | saved MB | by gzip MB | s |"]
        lines.append("|---|" + "---:|" * (len(titles) + 4))
        for row in own:
            cells = [f"{row.metrics[title]:.4g}" for title in titles]
            cells += [f"{size / 1e6:.2f}" for size in (row.dense, row.file, row.zipped)]
            lines.append("| " + " | ".join([_said(row.spec), *cells, f"{row.seconds:.0f}"]) + " |")
        parts.append("\n".join(lines))
    return "\n\n".join(parts)


def _said(spec: str) -> str:
    """Return options in words."""
    if not spec:
        return "none (float)"
    options = dict(part.split("=") for part in spec.replace('"', "").split(","))
    much = options.get("pattern") or f"{float(options['amount']):.0%}"
    return f"{much} {options['criterion']}"


HEAD = """# What zeros cost

Made by `python -m graphopt.models.benchmarks.sparsity`; nothing is trained.  Amounts are spread over the layers
(`spread=global`): by size for magnitude, by the noise that each layer makes at the outputs for Wanda and SparseGPT,
which is fitted layer after layer to what the float model gives.  N:M takes the same part of every layer that has enough
inputs.  Metrics are on held-out items: accuracy for the digits; for the others, agreement with the float model on 2,000
items.  Sizes: all weights dense; as saved, in sparse form where that is smaller; that compressed by gzip.  ONNX Runtime
takes the same time for all of them.  `s`: seconds that the pass took, on two cores shared with other work.

"""


def main() -> None:
    """Run the comparison."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("models", nargs="*")
    parser.add_argument("-o", "--output", type=Path)
    parser.add_argument(
        "--rows", type=Path, help="results of earlier runs, one JSON document a line; new ones are added"
    )
    parser.add_argument("--items", type=int, help="that judge at most")
    given = parser.parse_args()
    known = subjects()
    found = []
    if given.rows is not None and given.rows.exists():
        found = [Row(**json.loads(line)) for line in given.rows.read_text().splitlines()]

    def done(row: Row) -> None:
        found.append(row)
        print(json.dumps(asdict(row)), flush=True)
        if given.rows is not None:
            with given.rows.open("a") as file:
                file.write(json.dumps(asdict(row)) + "\n")

    for name in given.models or known:
        rows(name, known[name], given.items, done)
    if given.output is not None:
        order = list(known)
        given.output.write_text(HEAD + table(sorted(found, key=lambda row: order.index(row.model))) + "\n")


if __name__ == "__main__":
    main()
