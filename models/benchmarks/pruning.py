"""Pruning without training: quality and latency over what is removed, by criterion and by repair.

    python -m graphopt.models.benchmarks.pruning --cache FOLDER --output docs/pruning-figures.md [--only digits,cls]

For each case (`pruning_cases.py`): channels are cut by each criterion until a part of the MACs is gone, the layers
behind are left alone, get their biases corrected, or are fitted anew by least squares; blocks are left out in the same
way.  Every model is lowered as `optimize` lowers, judged on test items that no step of it saw, and timed beside the
lossless model.  The cache keeps it all: a run goes on where one was cut short (`--seconds` ends one early), the page is
put together from what there is, and `--again obs` makes the points of one criterion anew.
"""

from __future__ import annotations

import argparse
import json
import sys
import time
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from graphopt import environment
from graphopt.analysis.cost import costs
from graphopt.errors import GraphoptError
from graphopt.model import Model, load
from graphopt.models.benchmarks.pruning_cases import BEST, CASES, CURVE, Case, Point, points
from graphopt.models.benchmarks.pruning_page import Curves, Made, document, write_plots
from graphopt.models.benchmarks.quantizers import compared
from graphopt.models.benchmarks.quantizers_judge import Remembering
from graphopt.optimizer import LOWERING, optimize
from graphopt.pipeline import Pipeline, Settings
from graphopt.samples import Samples
from graphopt.timing import Prepared, quick_ratio

LOWERED = Pipeline(f"{LOWERING}, eliminate-dead")
UNCHECKED = Settings(verify="off", on_failure="stop")
QUICK = 100
"""Test items of a quick look."""


@dataclass(frozen=True)
class Plan:
    """How to run.

    Attributes:
        cache: folder that keeps what was made.
        quick: few points, few items, for a look.
        timing: seconds of timing per model; 0 leaves timings as they are.
        until: `time.monotonic()` from which on no further point begins.
    """

    cache: Path
    quick: bool = False
    timing: float = 3.0
    until: float = float("inf")

    @property
    def late(self) -> bool:
        """Whether no further point may begin."""
        return time.monotonic() >= self.until

    def points(self, case: Case) -> list[Point]:
        """Return the points that are made."""
        found = list(points(case))
        if not self.quick:
            return found
        ends = {case.ratios[0], case.ratios[len(case.ratios) // 2], 1.0, 2.0}
        return [p for p in found if p.amount in ends]

    def limit(self, point: Point | None) -> int | None:
        """Return how many test items judge a point, None for all."""
        if self.quick:
            return QUICK
        return None if point is None or not point.items else point.items


class Bench:
    """One case and its folder of the cache."""

    def __init__(self, name: str, plan: Plan) -> None:
        self.case, self.plan = CASES[name], plan
        self.folder = plan.cache / name
        self.folder.mkdir(parents=True, exist_ok=True)
        self.canonical, self.lossless = self.folder / "canonical.onnx", self.folder / "lossless.onnx"
        if not self.lossless.exists():
            optimize(self.case.model(), stage="canonical", measure=False).save(self.canonical)
            LOWERED.run(self.canonical, settings=UNCHECKED).save(self.lossless)
        self.feed = dict(self.case.feed())

    def run(self) -> None:
        """Make, judge and time every point that the cache does not have."""
        for point in self.plan.points(self.case):
            if not self.plan.late:
                self.make(point)
        for point in self.plan.points(self.case):
            if self.plan.timing and not self.plan.late and point.repair == BEST:
                self.time(point)

    def make(self, point: Point) -> None:
        """Make a model and judge it."""
        told = self._told(point)
        if told.exists():
            return
        print(f"{self.folder.name}: {point.steps}", file=sys.stderr)
        begun = time.perf_counter()
        samples = Samples(lambda: (dict(f) for f in self.case.calibration(self.case.items)), "calibration items")
        try:
            pruned = Pipeline(point.steps).run(self.canonical, samples=samples, settings=UNCHECKED)
            seconds = time.perf_counter() - begun
            LOWERED.run(pruned.model, settings=UNCHECKED).save(self._file(point))
        except GraphoptError as error:
            told.write_text(json.dumps({"why": " ".join(str(error).split())[:250]}), encoding="utf-8")
            return
        scores = self._scores(self._file(point), self.plan.limit(point))
        np.savez(told.with_suffix(".npz"), allow_pickle=False, **scores)
        found = {
            "macs": self._macs(pruned.model) / self._macs(load(self.canonical)),
            "size": pruned.model.weight_bytes() / load(self.canonical).weight_bytes(),
            "seconds": seconds,
        }
        told.write_text(json.dumps(found), encoding="utf-8")
        if point.repair != BEST:
            self._file(point).unlink()

    def time(self, point: Point) -> None:
        """Time a model beside the lossless one; only the numbers are kept of it."""
        file = self._file(point)
        if not file.exists():
            return
        ratio = quick_ratio(
            self.lossless, file, Prepared((self.feed,), "one feed"), budget_s=self.plan.timing, threads=1
        )
        found = json.loads(self._told(point).read_text(encoding="utf-8"))
        found["latency"] = ratio.to_dict()
        self._told(point).write_text(json.dumps(found), encoding="utf-8")
        file.unlink()

    def results(self) -> Curves:
        """Return all that the cache has of the case."""
        made = []
        for point in points(self.case):
            told = self._told(point)
            if told.exists():
                found = json.loads(told.read_text(encoding="utf-8"))
                metrics = compared(self.reference(point), self._kept(told)) if "macs" in found else {}
                made.append(Made(point, metrics, **found))
        return Curves(self.case.title, tuple(self.case.metrics), made)

    def reference(self, point: Point) -> dict[str, Any]:
        """Return the scores of the lossless model on the items that judged a point, measured once."""
        limit = self.plan.limit(point)
        file = self.folder / f"lossless-{limit or 'all'}.npz"
        if not file.exists():
            np.savez(file, allow_pickle=False, **self._scores(self.lossless, limit))
        return self._kept(file)

    def forget(self, criteria: Iterable[str]) -> None:
        """Remove what the cache has of some criteria."""
        for point in points(self.case):
            if point.criterion in criteria:
                for path in (self._told(point), self._told(point).with_suffix(".npz"), self._file(point)):
                    path.unlink(missing_ok=True)

    def _scores(self, model: Path, limit: int | None) -> dict[str, Any]:
        predict = Remembering(model)
        return {name: np.asarray(metric(predict, limit)) for name, metric in self.case.metrics.items()}

    def _macs(self, model: Model) -> int:
        return costs(model, inputs={name: np.shape(value) for name, value in self.feed.items()}).macs

    def _told(self, point: Point) -> Path:
        return self.folder / f"{point.slug}.json"

    def _file(self, point: Point) -> Path:
        return self.folder / f"{point.slug}.onnx"

    @staticmethod
    def _kept(file: Path) -> dict[str, Any]:
        with np.load(file.with_suffix(".npz"), allow_pickle=False) as kept:
            return dict(kept)


def chosen(text: str | None, known: Mapping[str, Any], parser: argparse.ArgumentParser) -> list[str]:
    """Return the names in a list with commas, all where there is none; an unknown one ends the program."""
    names = [n for n in (text or "").split(",") if n] or list(known)
    for name in names:
        if name not in known:
            parser.error(f"no such case: {name}; there are {', '.join(known)}")
    return names


def main() -> None:
    """Run the cases asked for, print the page, and write it where asked."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--cache", type=Path, required=True, help="folder that keeps models, scores and timings")
    parser.add_argument("--only", help=f"cases to work on, with commas: {','.join(CASES)} [default: all]")
    parser.add_argument("--quick", action="store_true", help=f"two ratios, {QUICK} items: for a look (own cache)")
    parser.add_argument("--seconds", type=float, default=float("inf"), help="begin no further point after so many")
    parser.add_argument("--timing", type=float, default=3.0, help="seconds of timing per model; 0 for none")
    parser.add_argument("--again", default="", help="criteria whose points are made anew, with commas")
    parser.add_argument("--output", type=Path, help="write the page into this Markdown file, plots beside it")
    given = parser.parse_args()
    cache = (given.cache / "quick" if given.quick else given.cache).absolute()
    plan = Plan(cache, given.quick, given.timing, time.monotonic() + given.seconds)
    for name in chosen(given.only, CASES, parser):
        bench = Bench(name, plan)
        bench.forget(given.again.split(","))
        bench.run()
    known = [name for name in CASES if (cache / name / "lossless.onnx").exists()]
    curves = {name: Bench(name, plan).results() for name in known}
    text = document(curves, environment.summary(environment.describe(threads=1, provider="cpu")), CURVE)
    print(text)
    if given.output:
        write_plots(curves, given.output)
        given.output.write_text(text, encoding="utf-8")


if __name__ == "__main__":
    main()
