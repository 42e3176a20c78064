"""One quantizer, one model, in a process of its own: what it makes of the model, and how long that takes.

    PYTHON quantizers_driver.py METHOD SOURCE FEEDS TARGET [--every 4] [--memory GIGABYTES] [--options JSON]

Run by `quantizers.py`, for peers with the Python of their environment: it imports the one that is named, NumPy and
onnx, nothing else.  FEEDS is a folder of .npz files, one feed each.  The result is written to TARGET, and beside it
TARGET.json: version, seconds, peak memory, and what had to be done to the model first.
"""

from __future__ import annotations

import argparse
import importlib
import importlib.metadata
import json
import resource
import tempfile
import time
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
import onnx
from onnx import version_converter

LEAST_OPSET, NEW_OPSET = 13, 17
"""Per-channel QuantizeLinear came with opset 13; models below are converted first, or what is written is invalid."""

FLOAT, LOSSLESS = "float", "graphopt lossless"
"""The unmodified model, and what `graphopt optimize` makes of it."""

Feed = dict[str, Any]
Run = Callable[["Task"], str]
"""Quantizes, and says what had to be done to the model first."""


def read_feeds(folder: Path, every: int = 1) -> Iterator[Feed]:
    """Yield the feeds of a folder in order, or one in so many."""
    for path in sorted(folder.glob("*.npz"))[::every]:
        with np.load(path, allow_pickle=False) as file:
            yield dict(file)


@dataclass(frozen=True)
class Task:
    """What a method works on.

    Attributes:
        source: the model, for peers in an opset that they can quantize.
        feeds: folder of calibration feeds.
        target: where to write the result.
        folder: for files meanwhile.
        every: how many feeds one is taken of.
        options: `transformer` (NNCF), `bound` and `shapes` (graphopt).
    """

    source: Path
    feeds: Path
    target: Path
    folder: Path
    every: int
    options: Mapping[str, Any]


def upgraded(source: Path, folder: Path) -> tuple[Path, str]:
    """Return the model in an opset that has per-channel quantization, and what was done for it ('' if nothing)."""
    model = onnx.load(str(source))
    opset = next(entry.version for entry in model.opset_import if entry.domain in {"", "ai.onnx"})
    if opset >= LEAST_OPSET:
        return source, ""
    converted = version_converter.convert_version(model, NEW_OPSET)
    converted.ir_version = max(converted.ir_version, 8)
    path = folder / "upgraded.onnx"
    onnx.save(converted, str(path))
    return path, f"opset {opset} raised to {NEW_OPSET}"


def preprocessed(source: Path, folder: Path) -> tuple[Path, str]:
    """Return the model as ORT's documentation wants it before its `quantize_static`: folded, shapes inferred."""
    shape_inference = importlib.import_module("onnxruntime.quantization.shape_inference")
    path = folder / "preprocessed.onnx"
    for skipped in (False, True):
        try:
            shape_inference.quant_pre_process(str(source), str(path), skip_symbolic_shape=skipped)
        except Exception as error:  # noqa: BLE001 (a peer may fail in any way; the next attempt says what it leaves out)
            why = f"{type(error).__name__}"
            continue
        return path, "preprocessed without symbolic shapes, which fail" if skipped else "preprocessed"
    return source, f"not preprocessed, which fails: {why}"


class _Reader:
    """Feeds as ORT's calibrators take them."""

    def __init__(self, task: Task) -> None:
        self._feeds = read_feeds(task.feeds, task.every)

    def get_next(self) -> Feed | None:
        return next(self._feeds, None)


def ort_static(method: str) -> Run:
    """Return ORT's `quantize_static` with a calibration method: QDQ, u8 activations, s8 weights per channel."""

    def run(task: Task) -> str:
        quantization = importlib.import_module("onnxruntime.quantization")
        path, done = preprocessed(task.source, task.folder)
        quantization.quantize_static(
            str(path), str(task.target), _Reader(task), per_channel=True,
            activation_type=quantization.QuantType.QUInt8, weight_type=quantization.QuantType.QInt8,
            calibrate_method=quantization.CalibrationMethod[method],
        )  # fmt: skip
        return done

    return run


def ort_dynamic(task: Task) -> str:
    """ORT's `quantize_dynamic` with its defaults."""
    quantization = importlib.import_module("onnxruntime.quantization")
    path, done = preprocessed(task.source, task.folder)
    quantization.quantize_dynamic(str(path), str(task.target))
    return done


def ort_nbits(bits: int) -> Run:
    """Return ORT's `MatMulNBitsQuantizer` with its default algorithm, in blocks of 32."""

    def run(task: Task) -> str:
        module = importlib.import_module("onnxruntime.quantization.matmul_nbits_quantizer")
        config = module.DefaultWeightOnlyQuantConfig(block_size=32, bits=bits)
        made = module.MatMulNBitsQuantizer(onnx.load(str(task.source)), algo_config=config)
        made.process()
        made.model.save_model_to_file(str(task.target), False)
        return ""

    return run


def nncf(preset: str) -> Run:
    """Return NNCF's `quantize` with a preset."""

    def run(task: Task) -> str:
        module = importlib.import_module("nncf")
        kind = module.ModelType.TRANSFORMER if task.options.get("transformer") else None
        result = module.quantize(
            onnx.load(str(task.source)), module.Dataset(list(read_feeds(task.feeds, task.every))),
            preset=module.QuantizationPreset[preset], model_type=kind,
        )  # fmt: skip
        onnx.save(result, str(task.target))
        return ""

    return run


def lossless(task: Task) -> str:
    """Graphopt's `optimize`, measured on this machine at the shapes that are timed."""
    optimizer = importlib.import_module("graphopt.optimizer")
    shapes = {name: tuple(shape) for name, shape in task.options["shapes"].items()}
    optimizer.optimize(str(task.source), threads=1, shapes=shapes, budget=20.0).save(task.target)
    return ""


def ours(task: Task) -> str:
    """Call `quantize` of graphopt with the bound of the case."""
    return _ours(task, task.options["bound"], data=str(task.feeds))


def our_weights(form: str, bound: Mapping[str, Any], *, samples: bool, **options: Any) -> Run:
    """Return graphopt's `quantize` for weights only, with the samples or without."""

    def run(task: Task) -> str:
        return _ours(
            task, bound if samples else {}, data=str(task.feeds) if samples else None, weight_only=form, **options
        )

    return run


def _ours(task: Task, bound: Mapping[str, Any], **options: Any) -> str:
    quantizer = importlib.import_module("graphopt.quantizer")
    limits = importlib.import_module("graphopt.quality").Bound(**bound)
    result = quantizer.quantize(str(task.source), bound=limits, **options)
    result.model.save(task.target)
    report = result.report
    return report.form if report.decision == "quantized" else f"the lossless model: {report.reason}"[:300]


METHODS: dict[str, tuple[str, Run]] = {
    LOSSLESS: ("graphopt", lossless),
    "graphopt quantize": ("graphopt", ours),
    "ORT static MinMax": ("onnxruntime", ort_static("MinMax")),
    "ORT static Percentile": ("onnxruntime", ort_static("Percentile")),
    "ORT static Entropy": ("onnxruntime", ort_static("Entropy")),
    "ORT dynamic": ("onnxruntime", ort_dynamic),
    "NNCF mixed": ("nncf", nncf("MIXED")),
    "NNCF performance": ("nncf", nncf("PERFORMANCE")),
}
"""Name -> distribution, and how to call it."""

LOOSE = {"min_cosine": 0.9}
"""The form is asked for by name: what it costs stands in the table."""

WEIGHT_METHODS: dict[str, tuple[str, Run]] = {
    "graphopt int8 weights": ("graphopt", our_weights("int8", LOOSE, samples=False)),
    "graphopt int4 weights, samples": ("graphopt", our_weights("int4", LOOSE, samples=True, block=32)),
    "graphopt int4 weights": ("graphopt", our_weights("int4", LOOSE, samples=False, block=32)),
    "ORT int8 weights": ("onnxruntime", ort_nbits(8)),
    "ORT int4 weights": ("onnxruntime", ort_nbits(4)),
}
"""The same for weights only, activations in float."""

ALL_METHODS = {**METHODS, **WEIGHT_METHODS}


def drive(method: str, task: Task) -> None:
    """Run one method and write what came of it."""
    distribution, run = ALL_METHODS[method]
    raised = ""
    began = time.perf_counter()
    if distribution != "graphopt":
        path, raised = upgraded(task.source, task.folder)
        task = replace(task, source=path)
    done = run(task)
    found = {
        "version": f"{distribution} {importlib.metadata.version(distribution)}",
        "seconds": time.perf_counter() - began,
        "memory": resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024,
        "done": ", ".join(filter(None, (raised, done))),
    }
    Path(f"{task.target}.json").write_text(json.dumps(found), encoding="utf-8")


def main() -> None:
    """Read the command line and do it."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("method", choices=ALL_METHODS)
    parser.add_argument("source", type=Path)
    parser.add_argument("feeds", type=Path)
    parser.add_argument("target", type=Path)
    parser.add_argument("--every", type=int, default=1, help="take one feed in so many")
    parser.add_argument("--memory", type=float, help="GB of address space that the process may take")
    parser.add_argument("--options", type=json.loads, default={})
    given = parser.parse_args()
    if given.memory:
        resource.setrlimit(resource.RLIMIT_AS, (int(given.memory * 1e9),) * 2)
    with tempfile.TemporaryDirectory(prefix="quantizers-") as folder:
        task = Task(given.source, given.feeds, given.target, Path(folder), given.every, given.options)
        drive(given.method, task)


if __name__ == "__main__":
    main()
