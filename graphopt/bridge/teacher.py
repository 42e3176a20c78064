"""The model that a student learns from: its tensors for a batch, by ORT or by torch, kept where they can be."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import Any, Literal, TypeAlias

import numpy as np
import torch

from graphopt.bridge.batch import Batch
from graphopt.bridge.rowwise import rows_move
from graphopt.bridge.tensors import to_array, to_tensor
from graphopt.errors import DataError, ModelError, did_you_mean
from graphopt.model import Model
from graphopt.runtime import Session

Array: TypeAlias = np.ndarray[Any, Any]

BUDGET = 1 << 30
"""Bytes of answers that are kept, unless the caller says otherwise."""


class Teacher:
    """Runs a model on batches.

    Args:
        model: the teacher.
        tensors: what is wanted of it; `also` adds to that.
        runs_in: `ort`, or `torch` (the bridge, in evaluation mode).
        threads: of ORT.
        cache: keep what it said of each sample and say it again: only where a sample is fed the same each time, and
            only for one set of training data, since samples are told apart by their numbers.
        budget: bytes that may be kept; samples beyond are run each time.

    Attributes:
        notes: why nothing is kept, where that was asked for.
    """

    def __init__(
        self, model: Model, tensors: Sequence[str] = (), *, runs_in: Literal["ort", "torch"] = "ort", threads: int = 1,
        cache: bool = False, budget: int = BUDGET,
    ) -> None:  # fmt: skip
        self.model = model
        self.tensors: list[str] = []
        self.notes: list[str] = []
        self._runs_in, self._threads = runs_in, threads
        self._cache, self._left = cache, budget
        self._known: dict[int, dict[str, Array]] = {}
        self._checked = False
        self._inputs = {spec.name: spec for spec in (*model.inputs, *model.optional_inputs)}
        self._needed = [spec.name for spec in model.inputs]
        self._batch = fixed_batch(model)
        self._run: Callable[[Mapping[str, Array]], dict[str, Array]] | None = None
        self.also(tensors)

    def also(self, tensors: Iterable[str]) -> None:
        """Ask for more tensors.

        Raises:
            DataError: the model has none of that name.
        """
        for name in tensors:
            if name not in self.tensors:
                known = {t.name for n in self.model.graph.nodes for t in n.outputs} | set(self._inputs)
                if name not in known:
                    raise DataError(f"the teacher has no tensor '{name}'", hint=did_you_mean(name, known))
                self.tensors.append(name)
                self._run = None
                self._known.clear()

    def __call__(self, batch: Batch) -> dict[str, torch.Tensor]:
        """Return the tensors for a batch, without gradients.

        Raises:
            DataError: the batch does not feed what the teacher needs.
        """
        numbers = [int(i) for i in batch.index]
        if self._cache and all(i in self._known for i in numbers):
            return {n: to_tensor(_joined([self._known[i][n] for i in numbers])) for n in self.tensors}
        feeds = self._feeds(batch)
        values = self._answer(feeds, len(numbers))
        if self._cache:
            self._check(feeds, len(numbers))
        if self._cache:
            self._keep(numbers, values)
        return {name: to_tensor(values[name]) for name in self.tensors}

    def _feeds(self, batch: Batch) -> dict[str, Array]:
        missing = [name for name in self._needed if name not in batch.feeds]
        if missing:
            raise DataError(
                f"the teacher's input '{missing[0]}' is not fed", hint=f"the student's are: {', '.join(batch.feeds)}"
            )
        return {name: to_array(value) for name, value in batch.feeds.items() if name in self._inputs}

    def _answer(self, feeds: Mapping[str, Array], rows: int) -> dict[str, Array]:
        if self._run is None:
            self._run = self._runner()
        size = self._batch
        if size is None or rows == size or any(not v.shape or v.shape[0] != rows for v in feeds.values()):
            return self._run(feeds)
        parts = []
        for start in range(0, rows, size):
            here = np.minimum(np.arange(start, start + size), rows - 1)  # the last row again where they do not fill it
            found = self._run({name: value[here] for name, value in feeds.items()})
            parts.append({name: value[: rows - start] for name, value in found.items()})
        return {name: np.concatenate([part[name] for part in parts]) for name in self.tensors}

    def _runner(self) -> Callable[[Mapping[str, Array]], dict[str, Array]]:
        names = list(self.tensors)
        if self._runs_in == "ort":
            fed = [name for name in names if name in self._inputs]
            made = [name for name in names if name not in self._inputs]
            session = Session(self.model, threads=self._threads, extra_outputs=made)
            return lambda feeds: {**{n: feeds[n] for n in fed}, **session.run(feeds, made)}
        from graphopt.bridge.graph import TrainableGraph  # noqa: PLC0415 (ORT needs none)

        outputs = {spec.name for spec in self.model.outputs}
        module = TrainableGraph(self.model, taps=[n for n in names if n not in outputs]).module.eval()

        def run(feeds: Mapping[str, Array]) -> dict[str, Array]:
            with torch.no_grad():
                found = module({name: to_tensor(value) for name, value in feeds.items()})
            return {name: to_array(found[name]) for name in names}

        return run

    def _check(self, feeds: Mapping[str, Array], rows: int) -> None:
        """See on the first batch with several rows whether what is wanted can be kept by row."""
        if self._checked or rows < 2:
            return
        self._checked = True
        if not rows_move(lambda fed: self._answer(fed, rows), feeds, self.tensors, rows):
            self._cache = False
            self._known.clear()
            self.notes.append("the teacher runs each time: what is asked of it does not have one row per sample")

    def _keep(self, numbers: Sequence[int], values: Mapping[str, Array]) -> None:
        several = len(numbers) > 1
        for place, number in enumerate(numbers):
            if number in self._known or self._left <= 0:
                continue
            row = {n: v[place : place + 1].copy() if several else v for n, v in values.items()}
            self._left -= sum(value.nbytes for value in row.values())
            self._known[number] = row


def _joined(rows: list[Array]) -> Array:
    """Return rows one below the other; what came of a single row is as it was, and may have no axes."""
    return rows[0] if len(rows) == 1 else np.concatenate(rows)


def fixed_batch(model: Model) -> int | None:
    """Return the number of rows that all inputs have where it is fixed, else None."""
    firsts = {spec.shape[0] if spec.shape else None for spec in model.inputs}
    first = firsts.pop() if len(firsts) == 1 else None
    return first if isinstance(first, int) else None


def check_same_task(student: Model, teacher: Model) -> None:
    """Refuse a teacher that needs what the student is not fed.

    Raises:
        ModelError: names the input.
    """
    fed = [spec.name for spec in student.inputs]
    for spec in teacher.inputs:
        if spec.name not in fed:
            raise ModelError(
                f"the teacher's input '{spec.name}' is none of the student's", at=str(teacher.path or "teacher"),
                hint=did_you_mean(spec.name, fed) or f"the student's are: {', '.join(fed) or 'none'}",
            )  # fmt: skip
