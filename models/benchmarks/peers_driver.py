"""One optimizer, one model, in a process of its own: how long each call takes, and the model that comes out.

    PYTHON peers_driver.py OPTIMIZER SOURCE TARGET [--calls 5] [--seconds 2] [--options JSON]

Run by `peers.py`, for peers with the Python of their environment: it imports the optimizer that is named and onnx,
nothing else.  A call goes from the path of a file (in the page cache by then) to a `ModelProto` in memory.  The
result is written to TARGET, the times and versions beside it to TARGET.json.
"""

from __future__ import annotations

import argparse
import importlib
import importlib.metadata
import json
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import onnx

Options = dict[str, Any]
Run = Callable[[Any, str, Options], onnx.ModelProto]
"""An optimizer's module, path of the model, options -> what it makes of the model."""


def graphopt(module: Any, source: str, options: Options) -> onnx.ModelProto:
    """The default pipeline; unless the options say otherwise, neither measured nor checked."""
    return module.optimize(source, **{"measure": False, "verify": "off", **options}).proto  # type: ignore[no-any-return]


def onnxslim(module: Any, source: str, options: Options) -> onnx.ModelProto:
    """Its `slim`, as its command runs it."""
    return module.slim(source, **options)  # type: ignore[no-any-return]


def onnxsim(module: Any, source: str, options: Options) -> onnx.ModelProto:
    """Its `simplify`."""
    return module.simplify(source, **options)[0]  # type: ignore[no-any-return]


def onnxoptimizer(module: Any, source: str, options: Options) -> onnx.ModelProto:
    """Its fuse and eliminate passes, to their fixpoint."""
    return module.optimize(onnx.load(source), fixed_point=True, **options)  # type: ignore[no-any-return]


def onnxscript(module: Any, source: str, options: Options) -> onnx.ModelProto:
    """Its `optimizer.optimize`."""
    return module.optimize(onnx.load(source), **options)  # type: ignore[no-any-return]


OPTIMIZERS: dict[str, tuple[str, Run]] = {
    "graphopt": ("graphopt.optimizer", graphopt),
    "onnxslim": ("onnxslim", onnxslim),
    "onnxsim": ("onnxsim", onnxsim),
    "onnxoptimizer": ("onnxoptimizer", onnxoptimizer),
    "onnxscript": ("onnxscript.optimizer", onnxscript),
}
"""Distribution -> module to import, and how to call it."""


def drive(name: str, source: str, target: Path, calls: int, seconds: float, options: Options) -> None:
    """Call an optimizer up to `calls` times, no further call begun after `seconds`; write what came of it."""
    module_name, run = OPTIMIZERS[name]
    module = importlib.import_module(module_name)
    taken: list[dict[str, float]] = []
    began = time.perf_counter()
    while not taken or (len(taken) < calls and time.perf_counter() - began < seconds):
        wall, cpu = time.perf_counter(), time.process_time()
        result = run(module, source, options)
        spent = {"wall": time.perf_counter() - wall, "cpu": time.process_time() - cpu}
        taken.append({**spent, "first": float(not taken)})
    target.write_bytes(result.SerializeToString())
    found = {"version": importlib.metadata.version(name), "calls": taken}
    Path(f"{target}.json").write_text(json.dumps(found), encoding="utf-8")


def main() -> None:
    """Read the command line and do it."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("optimizer", choices=OPTIMIZERS)
    parser.add_argument("source")
    parser.add_argument("target", type=Path)
    parser.add_argument("--calls", type=int, default=5)
    parser.add_argument("--seconds", type=float, default=2.0)
    parser.add_argument("--options", type=json.loads, default={})
    given = parser.parse_args()
    drive(given.optimizer, given.source, given.target, given.calls, given.seconds, given.options)


if __name__ == "__main__":
    main()
