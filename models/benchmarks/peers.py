"""graphopt beside its peers, on the zoo's models, in one run: nodes, latency, errors, and the optimizers' own time.

    python -m venv peers
    peers/bin/pip install onnxslim==0.1.98 onnxsim==0.8.1 onnxoptimizer==0.4.2 onnxscript==0.7.2 onnxruntime
    python -m graphopt.models.benchmarks.peers --python peers/bin/python --output docs/peers.md [MODEL ...]

Each optimizer runs in processes of its own (`peers_driver.py`), so that a crash or a hang is a row of the table.
What comes out is judged in a further process (`peers_judge.py`), and the models that give the original's outputs are
timed together (`peers_timing.py`).  With `--cache FOLDER` finished models are kept, and a run that was cut short
goes on from there; empty the folder when the optimizers change.
"""

from __future__ import annotations

import argparse
import json
import shutil
import subprocess
import sys
import tempfile
import time
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from graphopt import environment
from graphopt.models import zoo
from graphopt.models.benchmarks.peers_table import OURS, Row, document
from graphopt.models.benchmarks.peers_timing import Plan, ratios

PEERS = ("onnxslim", "onnxsim", "onnxoptimizer", "onnxscript")
THREADS = (1, 2)
FEEDS = 2
DRIVER = Path(__file__).with_name("peers_driver.py")
JUDGE = ["-m", "graphopt.models.benchmarks.peers_judge"]

SHAPES: Mapping[str, Mapping[str, tuple[int, ...]]] = {
    "ppocr-det": {"x": (1, 3, 480, 480)},
    "ppocr-rec": {"x": (4, 3, 48, 320)},
    "ppocr-cls": {"x": (6, 3, 48, 192)},
    "minilm-torchscript": {"input_ids": (8, 64), "attention_mask": (8, 64)},
    "minilm-dynamo": {"input_ids": (8, 64), "attention_mask": (8, 64)},
}
"""Shapes of the inputs of models with open dimensions, where not the zoo's own."""


@dataclass(frozen=True)
class Settings:
    """How to run.

    Attributes:
        python: the Python of the peers' environment.
        limit: seconds that a process of an optimizer may take.
        turns: processes of each optimizer, in turn with the others.
        budget: seconds that graphopt may measure, for each number of threads.
        plan: how long latencies are measured, per number of threads.
    """

    python: str
    limit: float = 120.0
    turns: int = 2
    budget: float = 40.0
    plan: Plan = field(default_factory=Plan)


def shapes_of(model: str) -> dict[str, tuple[int, ...]]:
    """Return the shape of each input that a zoo model is run with here."""
    return {name: values.shape for name, values in next(zoo.feeds(model, shapes=SHAPES.get(model))).items()}


def drive(
    python: str, optimizer: str, source: Path, target: Path, limit: float, options: Mapping[str, Any] | None = None
) -> dict[str, Any]:
    """Run one optimizer in a process; return its version and times, or status and reason."""
    command = [python, str(DRIVER), optimizer, str(source), str(target)]
    command += ["--calls", "1", "--options", json.dumps(options)] if options else []
    try:
        done = subprocess.run(command, capture_output=True, timeout=limit, check=False, cwd=target.parent)
    except subprocess.TimeoutExpired:
        return {"status": "time limit", "why": f"longer than {limit:.0f} s"}
    result = Path(f"{target}.json")
    if done.returncode != 0 or not result.exists():
        lines = done.stderr.decode(errors="replace").strip().splitlines()
        why = lines[-1] if lines else ""
        return {"status": "crash", "why": f"exit {done.returncode}: {why}"[:200]}
    found: dict[str, Any] = json.loads(result.read_text(encoding="utf-8"))
    return found


def optimize_all(model: str, folder: Path, settings: Settings) -> dict[str, Row]:
    """Run every optimizer on a model, in turns; a row each, the results as files in `folder`."""
    rows = {name: Row() for name in (OURS, *PEERS)}
    source = zoo.fetch(model)
    for _ in range(settings.turns):
        for name, row in rows.items():
            if row.status != "ok":
                continue
            python = sys.executable if name == OURS else settings.python
            found = drive(python, name, source, folder / f"{name}.onnx", settings.limit)
            row.calls += found.pop("calls", [])
            row.update(found)
    return rows


def judge_all(model: str, folder: Path, names: list[str]) -> dict[str, dict[str, Any]]:
    """Judge the files of these names; one that takes the process down is judged so, and the others go on."""
    judged: dict[str, dict[str, Any]] = {}
    while left := [name for name in names if name not in judged]:
        request = {
            "model": model, "source": str(zoo.fetch(model)), "shapes": shapes_of(model), "seed": 0, "feeds": FEEDS,
            "candidates": {name: str(folder / f"{name}.onnx") for name in left},
        }  # fmt: skip
        path = folder / "request.json"
        path.write_text(json.dumps(request), encoding="utf-8")
        command = [sys.executable, *JUDGE, str(path)]
        done = subprocess.run(command, capture_output=True, text=True, check=False)
        for line in done.stdout.splitlines():
            found = json.loads(line)
            judged[found.pop("name")] = found
        if done.returncode != 0:
            fallen = next(name for name in left if name not in judged)
            why = f"takes the process down (exit {done.returncode}): {done.stderr.strip()[-120:]}"
            judged[fallen] = {"status": "broken", "why": why}
    return judged


def measured(threads: int) -> str:
    """Return what the result of the measuring default for so many threads is called."""
    return f"{OURS}-{threads}"


def run_model(model: str, settings: Settings) -> dict[str, Row]:
    """Return the finished row of every optimizer on a model."""
    with tempfile.TemporaryDirectory(prefix="graphopt-peers-") as temporary:
        folder = Path(temporary)
        rows = optimize_all(model, folder, settings)
        extra = {n: _measure(model, n, folder, settings) for n in THREADS}
        made = [name for name, row in rows.items() if row.status == "ok"]
        made += [measured(n) for n, found in extra.items() if "status" not in found]
        judged = judge_all(model, folder, made)
        for n, found in extra.items():
            _join(rows[OURS], judged.pop(measured(n), found))
        for name, found in judged.items():
            rows[name].update({**found, "error": _worst(rows[name].error, found.get("error"))})
        good = [name for name, row in rows.items() if row.runs_right]
        feed = next(zoo.feeds(model, 0, shapes=SHAPES.get(model)))
        for n in THREADS:
            files = {name: folder / f"{measured(n) if name == OURS else name}.onnx" for name in good}
            files = {name: path for name, path in files.items() if path.exists()}  # what failed is told in its row
            for name, ratio in ratios({"": zoo.fetch(model), **files}, feed, n, settings.plan).items():
                rows[name].latency[n] = ratio.to_dict()
    return rows


def _measure(model: str, threads: int, folder: Path, settings: Settings) -> dict[str, Any]:
    """Run graphopt's default, measuring for so many threads at the shapes that are timed."""
    options = {
        "measure": True, "verify": "end", "threads": threads, "shapes": shapes_of(model), "budget": settings.budget
    }  # fmt: skip
    target = folder / f"{measured(threads)}.onnx"
    return drive(sys.executable, OURS, zoo.fetch(model), target, 3 * settings.limit, options)


def _join(row: Row, found: Mapping[str, Any]) -> None:
    """Add to graphopt's row what was found of a result that it measured: the worst counts."""
    row.error = _worst(row.error, found.get("error"))
    if row.status == "ok" and found.get("status", "ok") != "ok":
        row.status, row.why = found["status"], found["why"]


def _worst(a: float | None, b: float | None) -> float | None:
    known = [value for value in (a, b) if value is not None]
    return max(known, default=None)


def finished(model: str, settings: Settings, cache: Path | None) -> dict[str, Row]:
    """Return the rows of a model, out of the cache where it has them."""
    kept = cache / f"{model}.json" if cache else None
    if kept is not None and kept.exists():
        return {name: Row.from_dict(row) for name, row in json.loads(kept.read_text(encoding="utf-8")).items()}
    rows = run_model(model, settings)
    if kept is not None:
        text = json.dumps({name: row.to_dict() for name, row in rows.items()}, indent=1)
        partial = kept.with_suffix(".part")
        partial.write_text(text, encoding="utf-8")
        partial.replace(kept)
    return rows


def main() -> None:
    """Run the models asked for, print the tables, and write them where asked."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("models", nargs="*", metavar="MODEL", help="names in the zoo [default: all]")
    parser.add_argument("--python", required=True, help="Python of the peers' environment")
    parser.add_argument("--seconds", type=float, default=Plan.seconds, help="of timing per model and thread count")
    parser.add_argument("--limit", type=float, default=Settings.limit, help="seconds that an optimizer may take")
    parser.add_argument("--budget", type=float, default=Settings.budget, help="seconds that graphopt may measure")
    parser.add_argument("--turns", type=int, default=Settings.turns, help="processes of each optimizer")
    parser.add_argument("--cache", type=Path, help="folder that keeps finished models")
    parser.add_argument("--output", type=Path, help="write the tables into this Markdown file")
    given = parser.parse_args()
    python = shutil.which(given.python)
    if python is None:
        parser.error(f"no such Python: {given.python}")
    if given.cache:
        given.cache.mkdir(parents=True, exist_ok=True)
    settings = Settings(
        str(Path(python).absolute()), given.limit, given.turns, given.budget, Plan(seconds=given.seconds)
    )
    results: dict[str, dict[str, Row]] = {}
    began = time.perf_counter()
    for model in given.models or zoo.names():
        results[model] = finished(model, settings, given.cache)
        times = {name: round(row.seconds * 1e3) for name, row in results[model].items() if row.calls}
        took = time.perf_counter() - began
        print(f"{model}: optimizers' times {times} ms; {took:.0f} s since the start", file=sys.stderr, flush=True)
    text = document(results, environment.summary(environment.describe(provider="cpu")))
    print(text)
    if given.output:
        given.output.write_text(text, encoding="utf-8")


if __name__ == "__main__":
    main()
