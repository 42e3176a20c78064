"""Samples -> batches of tensors: shuffled anew each epoch, as a pure function of seed and epoch.

The order of an epoch is a permutation of all rows; rows of one shape make batches in that order, and the batches are
permuted in turn. Several processes cut the same batches among themselves, so that together they see what one process
with as many times the batch sees; each batch says by `share` how much its mean counts for.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import replace
from functools import partial
from typing import Any, TypeAlias

import numpy as np

from graphopt.bridge.augment import Augmenter, Sample, augmenter
from graphopt.bridge.batch import Batch
from graphopt.bridge.label_check import LabelCheck, inner_tensors
from graphopt.bridge.read_data import Read, Unit, read_units
from graphopt.bridge.row_store import BUDGET, Piece, RowStore, gather
from graphopt.bridge.rowwise import Run, rows_move, rows_stand_alone
from graphopt.bridge.tensors import to_array, to_tensor
from graphopt.errors import DataError
from graphopt.model import Model
from graphopt.report import human_bytes
from graphopt.runtime import Session
from graphopt.samples import FeedChecker
from graphopt.training import TrainSettings

Array: TypeAlias = np.ndarray[Any, Any]

__all__ = ["Batch", "TrainingData", "load_training_data"]
Labels: TypeAlias = "Array | dict[str, Array] | None"

_CHUNK = 1024
"""Rows whose labels are looked at together."""

_SHAPES = 64
"""Shapes of samples, or whole feeds, whose labels are held against outputs before training; the rest is during it."""


class TrainingData:
    """Samples that are read in batches, as often as asked.

    Attributes:
        rows: how many samples; where a model's inputs are not batched along axis 0, a sample is a whole feed.
        batch: rows that the model takes at a time where that is fixed, else None.
        labelled: whether there are labels.
        description: in words, for reports.
        notes: what was left out, and why.
    """

    def __init__(
        self, units: Sequence[Unit], *, rowwise: bool, batch: int | None, description: str,
        chosen: Array | None = None, augment: Augmenter | None = None, notes: Sequence[str] = (),
    ) -> None:  # fmt: skip
        self._units = list(units)
        self._rowwise = rowwise
        self._augment = augment
        sizes = [unit.rows if rowwise else 1 for unit in self._units]
        self._unit_of = np.repeat(np.arange(len(sizes)), sizes)
        self._row_of = np.concatenate([np.arange(n) for n in sizes]) if sizes else np.empty(0, np.int64)
        self._chosen = np.arange(len(self._unit_of)) if chosen is None else np.sort(chosen)
        self.rows = len(self._chosen)
        self.batch = batch if rowwise else 1
        self.labelled = bool(self._units) and self._units[0].labels is not None
        self.description = description
        self.notes = list(notes)
        self._buckets = self._by_shape()

    def _by_shape(self) -> list[Array]:
        if not self._rowwise:
            return [self._chosen]  # each feed is read alone
        signatures: dict[object, int] = {}
        of_unit = np.array([signatures.setdefault(u.signature, len(signatures)) for u in self._units], np.int64)
        of_row = of_unit[self._unit_of[self._chosen]]
        order = np.argsort(of_row, kind="stable")
        cuts = np.flatnonzero(np.diff(of_row[order])) + 1
        return [self._chosen[part] for part in np.split(order, cuts)] if self.rows else []

    def batches(self, batch: int, world: int = 1) -> int:
        """Return how many batches an epoch has for each of `world` processes."""
        return sum(self._count(len(bucket), self.batch or batch, world) for bucket in self._buckets)

    @property
    def idle(self) -> int:
        """Samples that an epoch leaves out, since they do not fill the batch that the model takes."""
        return 0 if self.batch is None else sum(len(bucket) % self.batch for bucket in self._buckets)

    def _count(self, rows: int, batch: int, world: int) -> int:
        if self.batch is None:
            return -(-rows // (batch * world))
        return -(-(rows // batch) // world)

    def epoch(
        self, epoch: int, *, seed: int, batch: int, rank: int = 0, world: int = 1, start: int = 0
    ) -> Iterator[Batch]:
        """Yield the batches of one epoch.

        Args:
            epoch: counts from 0.
            seed: of the order, and of what augmentation draws.
            batch: rows; a model's fixed batch goes before it.
            rank: which of the processes this is.
            world: how many there are.
            start: batches that are left out, since they were seen before a run was broken off.
        """
        for index, share in self._plan(epoch, seed, self.batch or batch, rank, world)[start:]:
            yield self._read(index, share, seed, epoch)

    def _plan(self, epoch: int, seed: int, batch: int, rank: int, world: int) -> list[tuple[Array, float]]:
        """Return for each batch which rows it has, and its share."""
        rng = np.random.default_rng([seed, epoch])
        groups: list[Array] = []
        for bucket in self._buckets:
            order = rng.permutation(bucket)
            usable = len(order) if self.batch is None else len(order) // batch * batch
            groups += [order[i : min(i + batch * world, usable)] for i in range(0, usable, batch * world)]
        return [self._part(groups[int(i)], batch, rank, world) for i in rng.permutation(len(groups))]

    def _part(self, group: Array, batch: int, rank: int, world: int) -> tuple[Array, float]:
        """Return one process's rows of a step; one that gets none repeats rows that count for nothing."""
        if len(group) == batch * world:
            return group[rank * batch : (rank + 1) * batch], 1.0
        whole = [group] if self.batch is None else list(group.reshape(-1, batch))
        parts = np.array_split(group, world) if self.batch is None else [*whole, *[group[:0]] * (world - len(whole))]
        part = parts[rank]
        if not len(part):
            return group[: batch if self.batch else 1], 0.0
        return part, len(part) * world / len(group)

    def _read(self, index: Array, share: float, seed: int, epoch: int) -> Batch:
        feeds, labels = self.arrays(index)
        if self._augment is not None:
            drawn = Sample(feeds, labels, index, seed, epoch, rowwise=self._rowwise)
            feeds, labels = self._augment(drawn, lambda: self._peers(index), self.arrays)
        tensors = {name: to_tensor(array) for name, array in feeds.items()}
        if isinstance(labels, Mapping):
            return Batch(tensors, {n: to_tensor(a) for n, a in labels.items()}, index, share=share)
        return Batch(tensors, None if labels is None else to_tensor(labels), index, share=share)

    def _peers(self, index: Array) -> Array:
        """Return the samples of the shape of these."""
        return next(bucket for bucket in self._buckets if index[0] in bucket)

    def arrays(self, index: Array) -> tuple[dict[str, Array], Labels]:
        """Return feeds and labels of samples (int64 numbers below all that were read) as arrays, unaugmented."""
        first = self._units[int(self._unit_of[index[0]])]
        feeds = {name: self._gather(index, partial(_feed, name)) for name in first.feeds}
        return feeds, self.labels(index)

    def labels(self, index: Array) -> Labels:
        """Return labels of samples, all of one shape."""
        first = self._units[int(self._unit_of[index[0]])]
        if first.labels is None:
            return None
        if isinstance(first.labels, dict):
            return {name: self._gather(index, partial(_label, name)) for name in first.labels}
        return self._gather(index, partial(_label, ""))

    def _gather(self, index: Array, pick: Callable[[Unit], Piece]) -> Array:
        units = self._unit_of[index]
        if not self._rowwise:
            return pick(self._units[int(units[0])]).all()
        used, where = np.unique(units, return_inverse=True)
        return gather([pick(self._units[int(u)]) for u in used], where, self._row_of[index])

    def parted(
        self, part: float, *, judges: bool = False, seed: int = 0
    ) -> tuple[TrainingData, TrainingData | None, TrainingData | None]:
        """Return samples to train on, to choose by, and to judge by: disjoint, the last two not augmented.

        Args:
            part: of all samples, for each of the last two; None of both where that is 0, or fewer than 4 are left.
            judges: whether there is a third part.
            seed: of the choice.
        """
        size = int(self.rows * part)
        if self.batch is not None and self._rowwise:
            size = size // self.batch * self.batch
        others = 2 if judges else 1
        if size < 1 or self.rows - others * size < 4:
            return self, None, None
        order = np.random.default_rng([seed, 0x9A27]).permutation(self._chosen)
        chooses, rest = order[:size], order[size:]
        judging = self._only(rest[:size], augmented=False) if judges else None
        training = self._only(rest[size:] if judges else rest, augmented=True)
        return training, self._only(chooses, augmented=False), judging

    def subset(self, count: int, sampling: str = "random", seed: int = 0) -> TrainingData:
        """Return so many of the samples, drawn at random, or as often of each label as that has among all.

        Raises:
            DataError: `stratified` without one whole number per sample as its label.
        """
        if count >= self.rows:
            return self
        rng = np.random.default_rng([seed, 0x5B5E])
        if sampling == "random":
            return self._only(rng.permutation(self._chosen)[:count], augmented=True)
        kinds = self._kinds()
        order = rng.permutation(self.rows)
        order = order[np.argsort(kinds[order], kind="stable")]  # by label, at random within
        _, starts, sizes = np.unique(kinds[order], return_index=True, return_counts=True)
        rank = np.arange(self.rows) - np.repeat(starts, sizes)
        ahead = rng.permutation(len(sizes)) / len(sizes)  # which of two labels comes first where both are as due
        place = (rank + np.repeat(ahead, sizes)) / np.repeat(sizes, sizes)  # each label spread evenly over 0 to 1
        return self._only(self._chosen[order[np.argsort(place, kind="stable")[:count]]], augmented=True)

    def _kinds(self) -> Array:
        """Return the class of each sample, int64 (rows,).

        Raises:
            DataError: there is no one class per sample.
        """
        size = _CHUNK if self._rowwise else 1
        found: list[Array] = []
        for bucket in self._buckets:
            for start in range(0, len(bucket), size):
                labels = self.labels(bucket[start : start + size])
                if isinstance(labels, dict) and len(labels) == 1:
                    labels = next(iter(labels.values()))
                found.append(_classes(labels, len(bucket[start : start + size])))
        return np.concatenate(found)[np.argsort(np.concatenate(self._buckets))]

    def without_labels(self) -> TrainingData:
        """Return the same samples without their labels."""
        units = [replace(unit, labels=None, signature=unit.signature[:1]) for unit in self._units]
        return TrainingData(
            units, rowwise=self._rowwise, batch=self.batch, description=self.description, chosen=self._chosen,
            augment=self._augment, notes=self.notes,
        )  # fmt: skip

    def _only(self, samples: Array, *, augmented: bool) -> TrainingData:
        return TrainingData(
            self._units, rowwise=self._rowwise, batch=self.batch, description=self.description, chosen=samples,
            augment=self._augment if augmented else None, notes=self.notes,
        )  # fmt: skip

    def rows_alone(self, run: Run, outputs: Sequence[str]) -> bool:
        """Tell whether a model treats rows alone, as far as some of them show; one row at a time is alone anyway."""
        rows = self.batch or 2
        bucket = next((b for b in self._buckets if len(b) >= rows), None)
        if rows < 2 or bucket is None or not self._rowwise:
            return True
        feeds, _ = self.arrays(np.random.default_rng(0).permutation(bucket)[:rows])
        return rows_move(run, feeds, outputs, rows) if self.batch else rows_stand_alone(run, feeds, outputs)

    def check_labels(self, check: LabelCheck) -> None:
        """Look at all labels, the model being run on a sample of each shape, of the first `_SHAPES` of them.

        Raises:
            DataError: labels do not fit.
        """
        if not self._rowwise:
            for sample in self._chosen[:_SHAPES, None]:
                feeds, labels = self.arrays(sample)
                check(feeds, None, [] if labels is None else [labels])
            return
        for bucket in self._buckets[:_SHAPES]:
            rows = self.batch or 1
            feeds, _ = self.arrays(np.resize(bucket, rows))
            parts = (self.labels(bucket[i : i + _CHUNK]) for i in range(0, len(bucket), _CHUNK))
            check(feeds, rows, (part for part in parts if part is not None))

    @property
    def samples(self) -> Array:
        """Numbers of the samples, int64, in order."""
        return self._chosen

    def in_order(self, batch: int = 1) -> Iterator[dict[str, Array]]:
        """Yield the feeds, `batch` rows at a time or the model's fixed batch, in order by shape, unaugmented."""
        size = self.batch or batch
        for bucket in self._buckets:
            usable = len(bucket) if self.batch is None else len(bucket) // size * size
            for start in range(0, usable, size):
                yield self.arrays(bucket[start : min(start + size, usable)])[0]


def _feed(name: str, unit: Unit) -> Piece:
    return unit.feeds[name]


def _label(name: str, unit: Unit) -> Piece:
    held = unit.labels[name] if isinstance(unit.labels, dict) else unit.labels
    assert held is not None  # units that share a batch have the same labels
    return held


def _classes(labels: Labels, rows: int) -> Array:
    if labels is None or isinstance(labels, dict):
        raise DataError("the samples cannot be stratified: there is no one label per sample", hint=_STRATIFIED)
    kinds = labels
    if labels.dtype.kind == "f" and labels.ndim == 2 and labels.shape[1] > 1:
        kinds = labels.argmax(axis=1)
    if kinds.dtype.kind not in "iu" or kinds.size != rows:
        raise DataError(f"the samples cannot be stratified by labels of shape {list(labels.shape)}", hint=_STRATIFIED)
    return kinds.reshape(-1).astype(np.int64)


_STRATIFIED = "it takes one whole number per sample (or its one-hot row) as the label; or sampling=random"


def load_training_data(
    spec: Any, model: Model, settings: TrainSettings, *, seed: int = 0, labelled: bool, budget: int = BUDGET
) -> TrainingData:
    """Read samples for training, once; whatever they are, rows come out in any order, the same for the same seed.

    Args:
        spec: an `.npz` (arrays of the inputs; those that are no inputs are labels), a folder of them, ONNX test data,
            file.py:function, or from Python an iterable, DataLoader or function; items are feeds or (feeds, labels).
        model: what they are for.
        settings: subset, sampling, augment and batch are used.
        seed: of the subset, and of what a loader shuffles by while it is read.
        labelled: whether labels are needed.
        budget: bytes held in memory; the rest goes to a temporary file.

    Raises:
        DataError: unusable, empty, not finite, or without the labels that are needed.
    """
    augment = augmenter(settings.augment) if settings.augment else None
    store = RowStore(budget)
    drawn = settings.subset > 0 and settings.sampling == "stratified"
    read = read_units(spec, model, settings, store, labelled=labelled, wanted=labelled or drawn, seed=seed)
    if not any(unit.rows for unit in read.units):
        raise DataError("the training data are empty", at=read.description)
    notes = [*read.notes, *([f"{human_bytes(store.spilled)} of data in a temporary file"] if store.spilled else [])]
    _look(read, model, settings, notes, labelled=labelled)
    data = TrainingData(
        read.units, rowwise=read.rowwise, batch=read.batch, description=read.description, notes=notes,
        augment=augment,
    )  # fmt: skip
    data = data.subset(settings.subset, settings.sampling, seed) if settings.subset else data
    if not data.batches(settings.batch):
        raise DataError(
            f"{data.rows} samples do not fill one batch of {data.batch}, which the model takes", at=read.description
        )
    if data.idle:
        data.notes.append(f"{data.idle} of {data.rows} samples, other ones each epoch, do not fill a batch")
    data = data if labelled else data.without_labels()
    if augment is not None:
        first = next(data.epoch(0, seed=seed, batch=2))  # what is not for such data is refused now
        feeds = {name: to_array(tensor) for name, tensor in first.feeds.items()}
        FeedChecker(model).check(feeds, f"what {', '.join(settings.augment)} makes of the samples")
    return data


def _look(read: Read, model: Model, settings: TrainSettings, notes: list[str], *, labelled: bool) -> None:
    """Run the model on some of the data: are rows independent, and do the labels fit?"""
    checks = labelled and ":" not in settings.loss
    if not (checks or (read.rowwise and read.batch != 1)):
        return
    session = Session(model, extra_outputs=inner_tensors(model) if checks else ())
    data = TrainingData(read.units, rowwise=read.rowwise, batch=read.batch, description=read.description)
    outputs = [spec.name for spec in model.outputs]
    if not data.rows_alone(lambda feeds: session.run(feeds, outputs), outputs):
        read.rowwise, read.batch = False, None
        data = TrainingData(read.units, rowwise=False, batch=None, description=read.description)
        notes.append("rows along the inputs' first axis are not independent samples: each feed is a batch of its own")
    if checks:
        data.check_labels(LabelCheck(model, session.run, settings.loss))
