"""What training brings back after channels were cut: quality, work, size, time, and what the training took.

    python -m graphopt.models.benchmarks.recovery --cache FOLDER --output docs/training-figures.md [--only cls,rec]

Each case (`recovery_cases.py`) is two commands, `graphopt prune` and `graphopt distill`, run as a user runs them.
The original, the cut and the trained model are judged on the same test items, which neither trained nor chose, and
timed beside what `optimize` makes of the original without loss.  The cache keeps what was made: a second run judges
and times what is missing, and `--again cls` makes a case anew.
"""

from __future__ import annotations

import argparse
import json
import os
import resource
import shutil
import subprocess
import sys
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from graphopt import environment
from graphopt.analysis.cost import costs
from graphopt.model import load
from graphopt.models.benchmarks.quantizers import compared
from graphopt.models.benchmarks.quantizers_judge import Remembering
from graphopt.models.benchmarks.recovery_cases import CASES, TASKS, Case, Command
from graphopt.models.benchmarks.recovery_table import Result, Stage, document
from graphopt.optimizer import optimize
from graphopt.timing import Prepared, quick_ratio

LOSSLESS = "lossless"


@dataclass(frozen=True)
class Bench:
    """One case and its folder of the cache.

    Attributes:
        name: of the case.
        folder: of its files.
        limit: test items of each metric, None for all.
        timing: seconds of timing per model; 0 leaves timings as they are.
    """

    name: str
    folder: Path
    limit: int | None = None
    timing: float = 10.0

    @property
    def case(self) -> Case:
        """What is run."""
        return CASES[self.name]

    def run(self) -> None:
        """Make, judge and time what is missing."""
        self.folder.mkdir(parents=True, exist_ok=True)
        if not self._file("original").exists():
            shutil.copyfile(self.case.model(), self._file("original"))
        if not self._file(LOSSLESS).exists():
            optimize(self._file("original"), measure=False).save(self._file(LOSSLESS))
        for stage, command in self.case.commands.items():
            if not self._file(stage).exists():
                self._write(f"{stage}.made.json", _run(command, self.folder))
        for stage in self.case.stages:
            self._judge(stage)
            if self.timing:
                self._time(stage)

    def result(self) -> Result:
        """Return all that the cache has of the case."""
        reference = self._scores("original")
        stages = {
            stage: Stage(
                metrics=compared(reference, self._scores(stage)), macs=self._macs(stage),
                bytes=self._file(stage).stat().st_size, made=self._read(f"{stage}.made.json"),
                latency=self._read(f"{stage}.time.json"),
            )
            for stage in self.case.stages
        }  # fmt: skip
        return Result(self.case, stages)

    def _judge(self, stage: str) -> None:
        told = self.folder / f"{stage}.scores.npz"
        if not told.exists():
            predict = Remembering(self._file(stage))
            scores = {name: np.asarray(metric(predict, self.limit)) for name, metric in self.case.metrics.items()}
            np.savez(told, allow_pickle=False, **scores)

    def _time(self, stage: str) -> None:
        if not (self.folder / f"{stage}.time.json").exists():
            feed = Prepared((dict(self.case.feed()),), "one feed")
            ratio = quick_ratio(self._file(LOSSLESS), self._file(stage), feed, budget_s=self.timing, threads=1)
            self._write(f"{stage}.time.json", ratio.to_dict())

    def _macs(self, stage: str) -> int:
        """Return the work of a model; that of the original in its lossless form, whose shapes are all known."""
        stage = LOSSLESS if stage == "original" else stage
        shapes = {name: np.shape(value) for name, value in self.case.feed().items()}
        return int(costs(load(self._file(stage)), inputs=shapes).macs)

    def _scores(self, stage: str) -> Mapping[str, Any]:
        with np.load(self.folder / f"{stage}.scores.npz", allow_pickle=False) as kept:
            return dict(kept)

    def _file(self, stage: str) -> Path:
        return self.folder / f"{stage}.onnx"

    def _write(self, name: str, found: Mapping[str, Any]) -> None:
        (self.folder / name).write_text(json.dumps(found), encoding="utf-8")

    def _read(self, name: str) -> Mapping[str, Any]:
        path = self.folder / name
        found: Mapping[str, Any] = json.loads(path.read_text(encoding="utf-8")) if path.exists() else {}
        return found


def _run(command: Command, folder: Path) -> dict[str, Any]:
    """Run a command as a user does; return the time that it took, in seconds, and what its report says."""
    told = [word.replace(TASKS, f"{Path(__file__).parents[1] / 'tasks'}/") for word in command.words]
    print(" ".join(["graphopt", *told]), file=sys.stderr, flush=True)
    before, begun = _processor(), time.monotonic()
    done = subprocess.run(
        [sys.executable, "-m", "graphopt", *told, "--json"], cwd=folder, check=False, stdout=subprocess.PIPE,
        env={**os.environ, **command.environment}, text=True,
    )  # fmt: skip
    if done.returncode:
        sys.exit(f"{command}: exit code {done.returncode}\n{done.stdout}")
    report = json.loads(done.stdout)
    kept = {name: report.get(name) for name in ("rows", "trained", "parameters", "reason", "notes")}
    return {"wall": time.monotonic() - begun, "processor": _processor() - before, **kept}


def _processor() -> float:
    """Return the seconds of processor time that ended child processes took."""
    used = resource.getrusage(resource.RUSAGE_CHILDREN)
    return used.ru_utime + used.ru_stime


def _names(text: str, parser: argparse.ArgumentParser) -> list[str]:
    names = [name for name in text.split(",") if name]
    for name in names:
        if name not in CASES:
            parser.error(f"no such case: {name}; there are {', '.join(CASES)}")
    return names


def main(arguments: Sequence[str] | None = None) -> None:
    """Run the cases asked for, print the page, and write it where asked."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--cache", type=Path, required=True, help="folder that keeps models, scores and timings")
    parser.add_argument("--only", default=",".join(CASES), help="cases to work on, with commas [default: all]")
    parser.add_argument("--again", default="", help="cases that are made anew, with commas")
    parser.add_argument("--limit", type=int, help="test items of each metric, for a quick look")
    parser.add_argument("--timing", type=float, default=10.0, help="seconds of timing per model; 0 for none")
    parser.add_argument("--output", type=Path, help="write the section into this Markdown file")
    given = parser.parse_args(arguments)
    for name in _names(given.again, parser):
        shutil.rmtree(given.cache / name, ignore_errors=True)
    results = []
    for name in CASES:
        bench = Bench(name, given.cache.absolute() / name, given.limit, given.timing)
        if name in _names(given.only, parser):
            bench.run()
        if all((bench.folder / f"{stage}.scores.npz").exists() for stage in bench.case.stages):
            results.append(bench.result())
    text = document(results, environment.summary(environment.describe(threads=1, provider="cpu")))
    print(text)
    if given.output:
        _put(given.output, text)


BEGIN, END = "<!-- recovery: begin -->\n", "<!-- recovery: end -->\n"


def _put(page: Path, text: str) -> None:
    """Write the section between its marks; other sections of the page stay."""
    old = page.read_text(encoding="utf-8") if page.exists() else f"# Training: figures\n\n{BEGIN}{END}"
    if BEGIN not in old:
        old = f"{old.rstrip()}\n\n{BEGIN}{END}"
    head, _, rest = old.partition(BEGIN)
    page.write_text(f"{head}{BEGIN}{text}{END}{rest.partition(END)[2]}", encoding="utf-8")


if __name__ == "__main__":
    main()
