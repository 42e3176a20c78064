"""How well quantized models do their task: scores per item of each metric.

    python -m graphopt.models.benchmarks.quantizers_judge MODEL LIMIT FILE ...

Run by `quantizers.py` in a process of its own, since a broken model may take ONNX Runtime down with it: the scores of
FILE.onnx go to FILE.scores.npz as they are made, or why there are none to FILE.scores.json.
"""

from __future__ import annotations

import hashlib
import json
import sys
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
import onnx

from graphopt.errors import GraphoptError
from graphopt.models.benchmarks.quantizers_cases import CASES
from graphopt.runtime import Session

LARGEST_KEPT = 1 << 20
"""Bytes of outputs that are remembered of a feed: metrics of one task often ask for the same."""


class Remembering:
    """A model's `predict` that runs each feed once, where the outputs are small."""

    def __init__(self, path: Path) -> None:
        self._run = Session(path).run
        self._known: dict[bytes, dict[str, Any]] = {}

    def __call__(self, feeds: Mapping[str, Any]) -> dict[str, Any]:
        """Return the outputs."""
        digest = hashlib.blake2b(digest_size=16)
        for name, values in feeds.items():
            digest.update(f"{name} {values.shape} {values.dtype}".encode())
            digest.update(np.ascontiguousarray(values).data)
        key = digest.digest()
        if key in self._known:
            return self._known[key]
        outputs = self._run(feeds)
        if sum(values.nbytes for values in outputs.values()) <= LARGEST_KEPT:
            self._known[key] = outputs
        return outputs


def judge(model: str, path: Path, limit: int | None) -> dict[str, str]:
    """Write the scores of one file; return status and reason."""
    found = {"status": "ok", "why": ""}
    try:
        onnx.checker.check_model(str(path))
    except onnx.checker.ValidationError as error:  # ORT may run it all the same
        found = {"status": "invalid", "why": _line(error)}
    try:
        predict = Remembering(path)
        scores = {name: np.asarray(metric(predict, limit)) for name, metric in CASES[model].metrics.items()}
    except GraphoptError as error:
        return {"status": "broken", "why": _line(error)}
    np.savez(path.with_suffix(".scores.npz"), **scores)  # type: ignore[arg-type]  # its other keyword is a flag
    return found


def _line(error: Exception) -> str:
    return " ".join(str(error).split())[:200]


def main() -> None:
    """Judge the files named."""
    model, limit, *files = sys.argv[1:]
    for name in files:
        path = Path(name)
        found = judge(model, path, int(limit) or None)
        path.with_suffix(".scores.json").write_text(json.dumps(found), encoding="utf-8")


if __name__ == "__main__":
    main()
