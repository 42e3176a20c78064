"""Labelled tasks: does a model still do its job?

Each module has ``calibration()``, which yields feeds, and evaluation functions ``f(predict)`` that return one
score per test item, higher is better; ``predict(feeds) -> outputs`` runs the model under test. All is made
from a seed, the same on every run. There are three splits, and no item is in two: what calibrates, what chooses
between results (``selection()``, and functions whose names end so), and what judges. Functions named ``..._with``
take a reference model and return an evaluation function. Use them from the command line as
``--data models/tasks/ocr_rec.py:calibration --eval models/tasks/ocr_rec.py:lines_right``; the environment
variable ``GRAPHOPT_TASK_LIMIT`` makes every set smaller.
"""

from __future__ import annotations

import importlib
import os
from collections.abc import Callable, Mapping
from pathlib import Path
from types import ModuleType
from typing import Any, TypeVar

import numpy as np
import numpy.typing as npt

from graphopt.errors import DataError, ProviderError

Array = npt.NDArray[Any]
Feeds = dict[str, Array]
Predict = Callable[[Mapping[str, Array]], Mapping[str, Array]]
Scores = npt.NDArray[np.float64]
Reference = str | Path | Predict
"""A model file, or a ``predict`` function."""

T = TypeVar("T")

_LIMIT = "GRAPHOPT_TASK_LIMIT"


def item_limit(limit: int | None, default: int) -> int:
    """Return how many items to take: ``limit``, else ``$GRAPHOPT_TASK_LIMIT``, never above ``default``."""
    if limit is None:
        text = os.environ.get(_LIMIT, "")
        if text and not (text.isdecimal() and int(text) > 0):
            raise DataError(f"{_LIMIT} is '{text}', not a positive whole number")
        limit = int(text) if text else default
    return min(limit, default)


def require(module: str, package: str) -> ModuleType:
    """Import a module of the ``models`` extra; ``ProviderError`` tells what to install when it is missing."""
    try:
        return importlib.import_module(module)
    except ImportError as missing:
        hint = f"pip install {package}, or the extra: pip install 'graphopt[models]'"
        raise ProviderError(f"this task needs the package '{package}'", at=module, hint=hint) from missing


def answers_of(reference: Reference, ask: Callable[[Predict, Any, int], T]) -> Callable[[Any, int], T]:
    """Return what a reference model answers for a split and a count; it is asked once for each."""
    known: dict[tuple[Any, int], T] = {}

    def answers(split: Any, count: int) -> T:
        if (split, count) not in known:
            known[split, count] = ask(_opened(reference), split, count)
        return known[split, count]

    return answers


def _opened(reference: Reference) -> Predict:
    if callable(reference):
        return reference
    from graphopt.runtime import Session  # noqa: PLC0415 (tasks that only predict need no session)

    return Session(Path(reference)).run
