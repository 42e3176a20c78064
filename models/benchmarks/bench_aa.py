"""How far `bench` is to be trusted: a model timed against itself, again and again.

    python -m graphopt.models.benchmarks.bench_aa [MODEL ...] [--runs 20] [--output docs/bench-aa.md]

Both sides are the same file, so the ratio is 1: at least 18 of 20 intervals must contain it, and none should be
wider than 5 % for a model that takes 10 ms or more.
"""

from __future__ import annotations

import argparse
import sys
import time
from dataclasses import dataclass
from pathlib import Path

from graphopt import environment
from graphopt.models import zoo
from graphopt.timing import Bench, bench

HEADER = """\
| model | median, ms | intervals with 1.0 | width: median | width: largest | ratios | seconds each | load average |
|---|---|---|---|---|---|---|---|
"""


@dataclass(frozen=True)
class Outcome:
    """All runs of one model, with the load average (1 minute) before and after."""

    model: str
    runs: tuple[Bench, ...]
    load: tuple[float, float]

    @property
    def held(self) -> int:
        """Intervals that contain 1.0."""
        return sum(run.interval[0] <= 1.0 <= run.interval[1] for run in self.runs)

    def row(self) -> str:
        """Return the line of the table."""
        widths = sorted(run.paired.width for run in self.runs)
        ratios = sorted(run.ratio for run in self.runs)
        medians = sorted(run.a.median for run in self.runs)
        seconds = sum(run.seconds for run in self.runs) / len(self.runs)
        return (
            f"| {self.model} | {medians[len(medians) // 2] * 1e3:.2f} | {self.held} of {len(self.runs)} "
            f"| {widths[len(widths) // 2]:.1%} | {widths[-1]:.1%} | {ratios[0]:.4f}–{ratios[-1]:.4f} "
            f"| {seconds:.0f} | {self.load[0]:.2f}–{self.load[1]:.2f} |\n"
        )


def measure(name: str, runs: int, seed: int) -> Outcome:
    """Time a zoo model against itself `runs` times, each with a seed of its own."""
    path = zoo.fetch(name)
    feeds = list(zoo.feeds(name, seed, count=2))
    found = []
    loads = []
    for number in range(runs):
        found.append(bench(path, path, feeds, seed=seed + number))
        loads.append((environment.load_average() or [0.0])[0])
        one = found[-1].paired
        print(f"{name} {number + 1}/{runs}: {one}, width {one.width:.2%}, {found[-1].seconds:.0f} s", file=sys.stderr)
    return Outcome(name, tuple(found), (min(loads), max(loads)))


def main() -> None:
    """Measure, print the table, and write it where asked."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("models", nargs="*", default=["ppocr-det", "resnet50"], help="names in the zoo")
    parser.add_argument("--runs", type=int, default=20)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--output", type=Path, help="write the table into this Markdown file")
    options = parser.parse_args()
    started = time.perf_counter()
    outcomes = [measure(name, options.runs, options.seed) for name in options.models]
    text = HEADER + "".join(outcome.row() for outcome in outcomes)
    text += f"\n{environment.summary(environment.describe(threads=1, provider='cpu'))}\n"
    print(text)
    print(f"{time.perf_counter() - started:.0f} s", file=sys.stderr)
    if options.output:
        options.output.write_text(f"# A model timed against itself\n\n{text}", encoding="utf-8")
    if any(outcome.held < 0.9 * len(outcome.runs) for outcome in outcomes):
        sys.exit(1)


if __name__ == "__main__":
    main()
