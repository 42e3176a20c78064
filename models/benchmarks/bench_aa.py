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
from graphopt.ratio import Ratio
from graphopt.timing import Bench, bench

INTRODUCTION = """\
# A model timed against itself

Made by `python -m graphopt.models.benchmarks.bench_aa --output docs/bench-aa.md`: `bench A A`, twenty times each.
The true ratio is 1; a 95 % interval should contain it in at least 18 of 20.

"""

HEADER = """\
| model | median, ms | clock | intervals with 1.0 | width: median | largest | ratios | seconds each | load average |
|---|---|---|---|---|---|---|---|---|
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
        return held([run.paired for run in self.runs])

    def rows(self) -> str:
        """Return the lines of the table: by the clock that decides, and by wall time."""
        clock = self.runs[0].to_dict()["clock"]
        lines = [self._row(clock, [run.paired for run in self.runs])]
        if clock != "wall":
            lines.append(self._row("wall", [run.wall for run in self.runs]))
        return "".join(lines)

    def _row(self, clock: str, found: list[Ratio]) -> str:
        widths = sorted(one.width for one in found)
        ratios = sorted(one.median for one in found)
        times = sorted(run.a.cpu if clock == "cpu" else run.a.median for run in self.runs)
        seconds = sum(run.seconds for run in self.runs) / len(self.runs)
        return (
            f"| {self.model} | {times[len(times) // 2] * 1e3:.2f} | {clock} | {held(found)} of {len(found)} "
            f"| {widths[len(widths) // 2]:.1%} | {widths[-1]:.1%} | {ratios[0]:.4f}–{ratios[-1]:.4f} "
            f"| {seconds:.0f} | {self.load[0]:.2f}–{self.load[1]:.2f} |\n"
        )


def held(found: list[Ratio]) -> int:
    """Return how many intervals contain 1.0."""
    return sum(one.low <= 1.0 <= one.high for one in found)


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
    text = HEADER + "".join(outcome.rows() for outcome in outcomes)
    text += (
        "\nClock `cpu` is the processor time of the one thread that runs the model, which is what `bench` goes by.\n"
    )
    text += f"\n{environment.summary(environment.describe(threads=1, provider='cpu'))}\n"
    print(text)
    print(f"{time.perf_counter() - started:.0f} s", file=sys.stderr)
    if options.output:
        options.output.write_text(INTRODUCTION + text, encoding="utf-8")
    if any(outcome.held < 0.9 * len(outcome.runs) for outcome in outcomes):
        sys.exit(1)


if __name__ == "__main__":
    main()
