"""How far predicted latency is to be trusted, and what choosing by integer programming brings.

    python -m graphopt.models.benchmarks.assignments [MODEL ...] [--budget 60] [--output docs/assignments.md]

For each model: the latency model is learned from 8 or 16 assignments; ten random ones (half of them layer by layer,
half regions of neighbouring layers) are predicted and timed; then layers are chosen under bounds on the noise, by the
solver and by three simpler ways, and each choice is timed and its SQNR measured on other samples.
"""

from __future__ import annotations

import argparse
import glob
import sys
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path

import numpy as np

from graphopt import environment, latency, search, sensitivity, spec
from graphopt.analysis.placement import layers as find_layers
from graphopt.analysis.placement import place
from graphopt.analysis.shapes import Shapes
from graphopt.calibrate import calibrate
from graphopt.kernel_times import Subject, run_all
from graphopt.latency import LatencyModel
from graphopt.model import Model
from graphopt.models import zoo
from graphopt.optimizer import LOWERING, optimize
from graphopt.pipeline import Pipeline, Settings
from graphopt.samples import Samples
from graphopt.sensitivity import Sensitivity, decibels

MODELS = ("ppocr-rec", "efficientnet-lite0-dynamo", "ppocr-det")
RANDOM = 10
CALIBRATION, JUDGING = 8, 8
PARTS = (0.5, 0.25, 0.1, 0.03)
"""Bounds on the noise, as parts of that of the fastest choice without a bound."""

INTRODUCTION = """\
# Choosing layers: predicted latency, and the solver beside simpler ways

Made by `python -m graphopt.models.benchmarks.assignments --output docs/assignments.md`.

Latencies are ratios to the same model in float (canonical and lowered, as `optimize` leaves it), timed in the same
rounds by processor time, one thread.  Each choice is by the same measured tables and the same noise per layer:

- *solver*: integer programming, `graphopt.search.solve`;
- *greedy*: from float, time and again the layer that saves most time per noise, borders counted;
- *least noise first*: layers in the order of their noise, as long as the bound holds;
- *all int8*: every layer, where the bound is as wide as that.

"""


@dataclass(frozen=True)
class Tried:
    """An assignment: how it was made, its layers, predicted ratio and summed noise, and what was measured."""

    name: str
    bound: float
    int8: frozenset[str]
    predicted: float
    noise: float
    measured: float = float("nan")
    sqnr: float = float("nan")


@dataclass
class Case:
    """One zoo model, ready for choosing."""

    name: str
    canonical: Model
    make: Callable[[frozenset[str]], Model]
    layers: list[str]
    feeds: list[dict[str, np.ndarray]]
    judging: list[dict[str, np.ndarray]]
    built: dict[frozenset[str], Subject] = field(default_factory=dict)

    def subject(self, int8: frozenset[str]) -> Subject:
        """Return the model of an assignment, made once."""
        if int8 not in self.built:
            self.built[int8] = Subject(self.make(int8), int8)
        return self.built[int8]


def prepare(name: str) -> Case:
    """Return a zoo model in canonical form with a way to quantize some of its layers."""
    canonical = optimize(zoo.fetch(name), stage="canonical", measure=False).model
    feeds = list(zoo.feeds(name, 0, count=CALIBRATION))
    shapes = Shapes(canonical)
    found = [layer for layer in find_layers(canonical.graph, shapes, "cpu") if not layer.why_not]
    coded = place(canonical.graph, [layer.node for layer in found], shapes, "cpu", canonical.opset).coded.values()
    names = {c.tensor.name for c in coded}
    names |= {t.name for layer in found for t in (layer.node.inputs[0], layer.node.outputs[0])}
    samples = Samples(lambda: iter(feeds), f"{CALIBRATION} feeds of the zoo")
    settings = Settings(verify="off", known=calibrate(canonical, samples, sorted(names)))
    lowering = spec.parse(f"{LOWERING}, eliminate-dead")

    def make(int8: frozenset[str]) -> Model:
        only = tuple(glob.escape(label) for label in sorted(int8))
        first = [spec.PassStep("quantize-static", {"only": only})] if int8 else []
        return Pipeline([*first, *lowering]).run(canonical, samples=samples, settings=settings).model

    judging = list(zoo.feeds(name, 1, count=JUDGING))
    return Case(name, canonical, make, [layer.label for layer in found], feeds, judging)


def random_assignments(layers: Sequence[str], seed: int, count: int = RANDOM) -> list[frozenset[str]]:
    """Return assignments: every other one layer by layer, the others one region of neighbours."""
    rng = np.random.default_rng(seed)
    found = []
    for number in range(count):
        if number % 2:
            found.append(frozenset(layer for layer in layers if rng.random() < 0.5))
        else:
            begin = int(rng.integers(len(layers) - 2))
            found.append(frozenset(layers[begin : begin + int(rng.integers(3, len(layers)))]))
    return found


def least_noise_first(noise: Mapping[str, float], bound: float) -> frozenset[str]:
    """Return the layers of least noise, as many as keep the bound."""
    chosen: set[str] = set()
    total = 0.0
    for layer, value in sorted(noise.items(), key=lambda item: item[1]):
        if total + value > bound * (1 + 1e-9):
            break
        total += value
        chosen.add(layer)
    return frozenset(chosen)


def choices(costs: LatencyModel, noise: Mapping[str, float]) -> list[Tried]:
    """Return what each way chooses under each bound."""
    problem = costs.problem(noise)
    base, full = costs.predict(()), sum(noise.values())
    fastest = search.solve(problem, full)
    found = []
    for bound in (full, *(part * fastest.loss for part in PARTS)):
        picked = {
            "solver": search.solve(problem, bound).having("int8"),
            "greedy": search.greedy(problem, bound).having("int8"),
            "least noise first": least_noise_first(noise, bound),
        }
        if bound == full:
            picked["all int8"] = frozenset(noise)
        for name, int8 in picked.items():
            found.append(Tried(name, bound, int8, costs.predict(int8) / base, sum(noise[i] for i in int8)))
    return found


def measured(case: Case, tried: Sequence[Tried], budget: float) -> list[Tried]:
    """Return the assignments with their measured latency, relative to float in the same rounds, and SQNR."""
    nothing = frozenset[str]()
    subjects = [case.subject(int8) for int8 in dict.fromkeys([nothing, *(t.int8 for t in tried)])]
    run_all(subjects, case.feeds[:1], budget=budget, profile=False)
    base = case.subject(nothing).seconds
    layers = tuple(dict.fromkeys(t.int8 for t in tried))
    models = {int8: case.subject(int8).model for int8 in layers}
    noise = {i: sensitivity.noise_of(case.canonical, model, case.judging) for i, model in models.items()}
    ratios = {i: case.subject(i).seconds / base for i in layers}
    return [replace(t, measured=ratios[t.int8], sqnr=decibels(noise[t.int8])) for t in tried]


@dataclass(frozen=True)
class Outcome:
    """What was found out about one model."""

    name: str
    costs: LatencyModel
    noise: Sensitivity
    random: list[Tried]
    chosen: list[Tried]
    seconds: float
    load: float

    @property
    def errors(self) -> list[float]:
        """Predicted over measured, less 1, of the random assignments."""
        return [t.predicted / t.measured - 1.0 for t in self.random]

    def text(self) -> str:
        """Return the model's part of the page."""
        off = [abs(e) for e in self.errors]
        lines = [
            f"## {self.name}\n",
            f"{len(self.costs.layers)} layers; float {self.costs.predict(()) * 1e3:.2f} ms; learned from"
            f" {len(self.costs.measured)} models; noise of all layers together over the sum of their own:"
            f" {self.noise.additivity:.2f}; {self.seconds:.0f} s, load average {self.load:.1f}.\n",
            f"Random assignments: error mean {np.mean(off):.1%}, largest {np.max(off):.1%};"
            f" {sum(e <= 0.1 for e in off)} of {len(off)} within 10 %.\n",
            "| int8 layers | predicted | measured | error |\n|---|---|---|---|",
            *(
                f"| {len(t.int8)} | {t.predicted:.3f} | {t.measured:.3f} | {e:+.1%} |"
                for t, e in zip(self.random, self.errors, strict=True)
            ),
            "\n| bound on noise, dB | choice | int8 layers | predicted | measured | SQNR predicted, dB | measured |",
            "|---|---|---|---|---|---|---|",
            *(
                f"| {decibels(t.bound):.1f} | {t.name} | {len(t.int8)} | {t.predicted:.3f} | {t.measured:.3f}"
                f" | {decibels(t.noise):.1f} | {t.sqnr:.1f} |"
                for t in self.chosen
            ),
        ]
        return "\n".join(lines) + "\n\n"


def examine(name: str, budget: float, seed: int) -> Outcome:
    """Learn, predict, choose and measure for one model."""
    begun = time.perf_counter()
    say: Callable[[str], None] = lambda text: print(f"{name}: {text}", file=sys.stderr)  # noqa: E731
    case = prepare(name)
    costs = latency.measure(case.canonical, case.make, case.layers, case.feeds[:1], budget=budget, progress=say)
    noise = sensitivity.measure(case.canonical, case.make, case.layers, case.feeds, progress=say)
    base = costs.predict(())
    drawn = [
        Tried("random", float("inf"), int8, costs.predict(int8) / base, 0.0)
        for int8 in random_assignments(case.layers, seed)
    ]
    say("timing assignments")
    found = measured(case, [*drawn, *choices(costs, noise)], budget)
    load = (environment.load_average() or [0.0])[0]
    return Outcome(name, costs, noise, found[: len(drawn)], found[len(drawn) :], time.perf_counter() - begun, load)


def summary(outcomes: Sequence[Outcome]) -> str:
    """Return one table: for each model and bound, measured latency of each way."""
    names = ("solver", "greedy", "least noise first", "all int8")
    lines = [
        "| model | noise bound, dB | " + " | ".join(names) + " | random: mean error | largest |",
        "|---" * (len(names) + 4) + "|",
    ]
    for outcome in outcomes:
        off = [abs(e) for e in outcome.errors]
        for bound in dict.fromkeys(t.bound for t in outcome.chosen):
            by_name = {t.name: t for t in outcome.chosen if t.bound == bound}
            cells = [f"{by_name[n].measured:.3f} at {by_name[n].sqnr:.1f} dB" if n in by_name else "–" for n in names]
            row = [outcome.name, f"{decibels(bound):.1f}", *cells, f"{np.mean(off):.1%}", f"{np.max(off):.1%}"]
            lines.append(f"| {' | '.join(row)} |")
    return "\n".join(lines) + "\n\n"


def main() -> None:
    """Measure, print the tables, and write them where asked."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("models", nargs="*", default=list(MODELS), help="names in the zoo")
    parser.add_argument("--budget", type=float, default=60.0, help="seconds of timing for each step of each model")
    parser.add_argument("--seed", type=int, default=0, help="of the random assignments")
    parser.add_argument("--output", type=Path, help="write the tables into this Markdown file")
    options = parser.parse_args()
    outcomes = []
    for name in options.models:
        outcomes.append(examine(name, options.budget, options.seed))
        print(outcomes[-1].text(), flush=True)
    text = summary(outcomes) + "".join(outcome.text() for outcome in outcomes)
    text += f"{environment.summary(environment.describe(threads=1, provider='cpu'))}\n"
    print(summary(outcomes))
    if options.output:
        options.output.write_text(INTRODUCTION + text, encoding="utf-8")


if __name__ == "__main__":
    main()
