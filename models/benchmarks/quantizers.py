"""graphopt's `quantize` beside ORT's tools and NNCF: time, quality on held-out items and size, in one run.

    python -m venv quantizers
    quantizers/bin/pip install onnxruntime==1.31.1 onnx==1.23.2 onnx_ir==1.1.0 nncf==3.4.0
    python -m graphopt.models.benchmarks.quantizers --python quantizers/bin/python --cache FOLDER \
        --output docs/quantization-figures.md [MODEL ...]

Every quantizer gets the same calibration samples and runs in a process of its own (`quantizers_driver.py`), so that a
crash is a row of the table.  What comes out is judged on items that neither calibrated nor chose anything
(`quantizers_judge.py`), then all models of a line are timed together.  The cache keeps models, scores and timings: a
run goes on where one was cut short, and `--again graphopt` makes only graphopt's anew.
"""

from __future__ import annotations

import argparse
import hashlib
import json
import shutil
import subprocess
import sys
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np

from graphopt import environment
from graphopt.metric import evaluate_pair
from graphopt.models import zoo
from graphopt.models.benchmarks.peers import SHAPES, shapes_of
from graphopt.models.benchmarks.peers_timing import Plan, times
from graphopt.models.benchmarks.quantizers_cases import CASES, Case
from graphopt.models.benchmarks.quantizers_driver import ALL_METHODS, FLOAT, LOSSLESS, METHODS
from graphopt.models.benchmarks.quantizers_table import Row, document

DRIVER = Path(__file__).with_name("quantizers_driver.py")
JUDGE = ["-m", "graphopt.models.benchmarks.quantizers_judge"]
EVERY = 4
"""Where a calibrator runs out of memory it gets every fourth feed."""


@dataclass(frozen=True)
class Settings:
    """How to run.

    Attributes:
        python: the Python of the peers' environment.
        cache: folder that keeps what was made.
        limit: seconds that a quantizer may take.
        memory: GB that a peer may take.
        items: of each metric at most; 0 for all.
        plan: how long latencies are measured.
    """

    python: str
    cache: Path
    limit: float = 1800.0
    memory: float = 11.0
    items: int = 0
    plan: Plan = field(default_factory=lambda: Plan(seconds=15.0))


def slug(method: str) -> str:
    """Return the name of a method's files."""
    return method.lower().replace(" ", "-").replace(",", "")


def methods_of(model: str) -> list[str]:
    """Return the methods that a model is tried with."""
    return list(ALL_METHODS if CASES[model].transformer else METHODS)


def write_feeds(case: Case, folder: Path) -> None:
    """Write the calibration feeds, once."""
    if folder.exists():
        return
    partial = folder.with_suffix(".part")
    shutil.rmtree(partial, ignore_errors=True)
    partial.mkdir(parents=True)
    for index, feed in enumerate(case.calibration(case.items)):
        np.savez(partial / f"{index:05}.npz", **feed)
    partial.rename(folder)


def make(model: str, method: str, settings: Settings) -> None:
    """Run a method on a model, unless the cache has its result or its failure."""
    folder = settings.cache / model
    target = folder / f"{slug(method)}.onnx"
    told = Path(f"{target}.json")
    if told.exists():
        return
    print(f"{model}: {method}", file=sys.stderr)
    failure = _drive(model, method, target, settings, 1)
    if failure and "memory" in failure:
        again = _drive(model, method, target, settings, EVERY)
        if not again:
            found = json.loads(told.read_text(encoding="utf-8"))
            note = f"one sample in {EVERY}: all take more than {settings.memory:g} GB"
            found["done"] = ", ".join(filter(None, (found["done"], note)))
            told.write_text(json.dumps(found), encoding="utf-8")
        failure = again
    if failure:
        target.unlink(missing_ok=True)
        told.write_text(json.dumps({"status": "failed", "why": failure}), encoding="utf-8")


def _drive(model: str, method: str, target: Path, settings: Settings, every: int) -> str:
    """Run the driver; return why it failed, or ''."""
    folder, ours = target.parent, ALL_METHODS[method][0] == "graphopt"
    options = {"bound": dict(CASES[model].bound), "shapes": shapes_of(model), "transformer": CASES[model].transformer}
    command = [sys.executable if ours else settings.python, str(DRIVER), method, str(folder / f"{slug(FLOAT)}.onnx")]
    command += [str(folder / "feeds"), str(target), "--every", str(every), "--options", json.dumps(options)]
    command += [] if ours else ["--memory", str(settings.memory)]
    try:
        done = subprocess.run(command, capture_output=True, timeout=settings.limit, check=False, cwd=folder)
    except subprocess.TimeoutExpired:
        return f"longer than {settings.limit:.0f} s"
    text = done.stderr.decode(errors="replace")
    target.with_suffix(".log").write_text(text, encoding="utf-8")
    if done.returncode == 0:
        return ""
    if done.returncode == -9 or "MemoryError" in text or "allocate memory" in text or "bad_alloc" in text:
        return f"more memory than {settings.memory:g} GB"
    lines = [line for line in text.strip().splitlines() if line.strip()]
    return f"exit {done.returncode}: {lines[-1] if lines else ''}"[:250]


def judge_all(model: str, settings: Settings) -> None:
    """Score the models that have no scores yet; one that takes the process down is judged so, and the others go on."""
    folder = settings.cache / model
    while left := [path for path in _made(folder) if not path.with_suffix(".scores.json").exists()]:
        print(f"{model}: judging {', '.join(path.stem for path in left)}", file=sys.stderr)
        command = [sys.executable, *JUDGE, model, str(settings.items), *map(str, left)]
        done = subprocess.run(command, capture_output=True, text=True, check=False)
        if done.returncode != 0:
            fallen = next(path for path in left if not path.with_suffix(".scores.json").exists())
            found = {
                "status": "broken",
                "why": f"takes the process down (exit {done.returncode}): {_last(done.stderr)}",
            }
            fallen.with_suffix(".scores.json").write_text(json.dumps(found), encoding="utf-8")


def _last(text: str) -> str:
    return text.strip().splitlines()[-1][:160] if text.strip() else ""


def _made(folder: Path) -> list[Path]:
    names = [FLOAT, *methods_of(folder.name)]
    return [path for name in names if (path := folder / f"{slug(name)}.onnx").exists()]


def time_all(model: str, settings: Settings) -> None:
    """Time all models that run, together, unless these very files were timed before."""
    folder = settings.cache / model
    paths = {path.stem: path for path in _made(folder) if _runs(path)}
    prints = {name: hashlib.sha256(path.read_bytes()).hexdigest() for name, path in paths.items()}
    kept = folder / "times.json"
    if kept.exists() and json.loads(kept.read_text(encoding="utf-8"))["files"] == prints:
        return
    print(f"{model}: timing {', '.join(paths)}", file=sys.stderr)
    found = times(paths, next(zoo.feeds(model, 0, shapes=SHAPES.get(model))), 1, settings.plan)
    bases = {"unmodified": slug(FLOAT), "lossless": slug(LOSSLESS)}
    ratios = {
        name: {what: found.ratio(base, name).to_dict() for what, base in bases.items() if base in paths}
        for name in paths if name != slug(FLOAT)
    }  # fmt: skip
    told = {"files": prints, "ratios": ratios, "machine": environment.describe(threads=1, provider="cpu")}
    kept.write_text(json.dumps(told), encoding="utf-8")


def _runs(path: Path) -> bool:
    told = path.with_suffix(".scores.json")
    return told.exists() and json.loads(told.read_text(encoding="utf-8"))["status"] != "broken"


def rows(model: str, settings: Settings) -> dict[str, Row]:
    """Return the row of every method on a model, out of what the cache holds."""
    folder = settings.cache / model
    base = folder / f"{slug(FLOAT)}.onnx"
    reference = _scores(base)
    timed = folder / "times.json"
    ratios = json.loads(timed.read_text(encoding="utf-8"))["ratios"] if timed.exists() else {}
    found = {}
    for method in methods_of(model):
        path = folder / f"{slug(method)}.onnx"
        row = Row()
        for told in (Path(f"{path}.json"), path.with_suffix(".scores.json")):
            if told.exists() and row.status == "ok":
                row.update(json.loads(told.read_text(encoding="utf-8")))
        if path.exists():
            row.size = path.stat().st_size / base.stat().st_size
        row.latency = ratios.get(path.stem, {})
        row.metrics = compared(reference, _scores(path))
        if Path(f"{path}.json").exists():
            found[method] = row
    return found


def _scores(path: Path) -> dict[str, Any]:
    kept = path.with_suffix(".scores.npz")
    if not kept.exists():
        return {}
    with np.load(kept, allow_pickle=False) as file:
        return dict(file)


def compared(reference: Mapping[str, Any], candidate: Mapping[str, Any]) -> dict[str, dict[str, Any]]:
    """Return, by metric, both means, the drop and its paired interval."""

    def score(predict: Any) -> Any:
        return predict({})["scores"]

    return {
        name: evaluate_pair(
            score, name, lambda _, n=name: {"scores": reference[n]}, lambda _, n=name: {"scores": candidate[n]}
        ).to_dict()
        for name in candidate if name in reference
    }  # fmt: skip


def forget(methods: Iterable[str], model: str, settings: Settings) -> None:
    """Remove what the cache holds of some methods on a model."""
    for method in methods:
        for path in (settings.cache / model).glob(f"{slug(method)}.*"):
            path.unlink()


def prepare(model: str, settings: Settings) -> None:
    """Put the model and its calibration feeds into the cache."""
    folder = settings.cache / model
    folder.mkdir(parents=True, exist_ok=True)
    if not (folder / f"{slug(FLOAT)}.onnx").exists():
        shutil.copyfile(zoo.fetch(model), folder / f"{slug(FLOAT)}.onnx")
    write_feeds(CASES[model], folder / "feeds")


def main() -> None:
    """Run the models asked for, print the tables, and write them where asked."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("models", nargs="*", metavar="MODEL", help=f"of {', '.join(CASES)} [default: all]")
    parser.add_argument("--python", required=True, help="Python of the peers' environment")
    parser.add_argument("--cache", type=Path, required=True, help="folder that keeps models, scores and timings")
    parser.add_argument("--only", action="append", metavar="METHOD", help=f"of {', '.join(ALL_METHODS)} [default: all]")
    parser.add_argument("--again", action="append", default=[], metavar="METHOD", help="make these anew")
    parser.add_argument("--items", type=int, default=0, help="of each metric at most, for a quick look")
    parser.add_argument("--seconds", type=float, default=15.0, help="of timing per model")
    parser.add_argument("--limit", type=float, default=Settings.limit, help="seconds that a quantizer may take")
    parser.add_argument("--no-timing", action="store_true", help="make and judge; leave timings as they are")
    parser.add_argument("--output", type=Path, help="write the tables into this Markdown file")
    given = parser.parse_args()
    python = shutil.which(given.python)
    if python is None:
        parser.error(f"no such Python: {given.python}")
    for name in (*given.again, *(given.only or ())):
        if name not in ALL_METHODS:
            parser.error(f"no such method: {name}")
    plan = Plan(seconds=given.seconds)
    settings = Settings(str(Path(python).absolute()), given.cache.absolute(), given.limit, items=given.items, plan=plan)
    results = {}
    for model in given.models or CASES:
        prepare(model, settings)
        forget(given.again, model, settings)
        for method in methods_of(model):
            if not given.only or method in given.only:
                make(model, method, settings)
        judge_all(model, settings)
        if not given.no_timing:
            time_all(model, settings)
        results[model] = rows(model, settings)
    text = document(results, environment.summary(environment.describe(threads=1, provider="cpu")))
    print(text)
    if given.output:
        given.output.write_text(text, encoding="utf-8")


if __name__ == "__main__":
    main()
