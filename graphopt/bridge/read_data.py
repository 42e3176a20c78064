"""What the user calls training data -> units: arrays of rows, checked against the model's inputs, with their labels.

(feeds, labels)                        from Python or file.py:function; feeds by name, or in the order of the inputs
{"input": ..., "label": ...}           entries that are no inputs are labels
file.npz                               the same by the names of its arrays
"""

from __future__ import annotations

import contextlib
import random
import zipfile
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any, TypeAlias, TypeGuard

import numpy as np
import torch

from graphopt.bridge.row_store import Padded, Piece, RowStore, is_sparse
from graphopt.data import unchecked
from graphopt.errors import DataError, did_you_mean
from graphopt.model import Model, ValueSpec
from graphopt.sample_files import Member
from graphopt.samples import FeedChecker, Samples, check_value
from graphopt.tensors import is_float
from graphopt.training import TrainSettings

Array: TypeAlias = np.ndarray[Any, Any]
Labels: TypeAlias = "Any | dict[str, Any] | None"

LABEL_NAMES = ("label", "labels", "target", "targets", "y")
"""What an array of labels may be called where a file holds other arrays too."""


@dataclass(frozen=True)
class Unit:
    """Feeds as they came: some rows, or a whole feed of a model that has no rows.

    Attributes:
        feeds: input name -> array.
        labels: one array, one by output, or None.
        rows: along axis 0 of every array; 1 for a whole feed.
        signature: types of the feeds, then of the labels: equal where rows can share a batch.
    """

    feeds: dict[str, Piece]
    labels: Piece | dict[str, Piece] | None
    rows: int
    signature: tuple[object, ...]


@dataclass
class Read:
    """All units of some data, and how they are to be batched (as in `TrainingData`)."""

    units: list[Unit]
    rowwise: bool
    batch: int | None
    description: str
    notes: list[str] = field(default_factory=list)


def read_units(
    spec: Any, model: Model, settings: TrainSettings, store: RowStore, *, labelled: bool, wanted: bool = False,
    seed: int = 0,
) -> Read:  # fmt: skip
    """Read all data once.

    Args:
        spec: what the user gave.
        model: what the data are for.
        settings: `batch` is how `.npz` are cut for models that have no rows.
        store: holds the arrays.
        labelled: whether labels are needed.
        wanted: whether they are kept where there are any.
        seed: of what a loader shuffles by.

    Raises:
        DataError: unusable; says which sample, and what would do.
    """
    if spec is None:
        raise DataError("there are no samples to train on", hint="name them: .npz, a folder of .npz, file.py:function")
    reader = Reader(model, store, labelled=labelled, wanted=wanted or labelled)
    found = reader.source(spec, settings.batch)
    copies = not isinstance(spec, str | Path | Sequence | Mapping) or _is_function(spec)
    with _seeded(seed):
        units = [reader.unit(item, f"sample {i} of {found.description}", copies=copies) for i, item in enumerate(found)]
    return Read(_alike_labels(units) if reader.rowwise else units, reader.rowwise, reader.batch, found.description)


@contextlib.contextmanager
def _seeded(seed: int) -> Iterator[None]:
    """Seed what a user's function or loader may draw from, and leave it as it was found."""
    ours, theirs = random.getstate(), np.random.get_state()
    random.seed(seed)
    np.random.seed(seed % (1 << 32))
    try:
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(seed)
            yield
    finally:
        random.setstate(ours)
        np.random.set_state(theirs)


def _alike_labels(units: list[Unit]) -> list[Unit]:
    """Pad sequences of labels to the longest of those whose feeds are alike, so that these can share a batch."""
    widths: dict[object, int] = {}
    for unit in units:
        if _is_sequence(unit.labels):
            feeds = unit.signature[0]
            widths[feeds] = max(widths.get(feeds, 0), unit.labels.shape[1])
    return [_widened(unit, widths[unit.signature[0]]) if _is_sequence(unit.labels) else unit for unit in units]


def _is_sequence(labels: Piece | dict[str, Piece] | None) -> TypeGuard[Piece]:
    return labels is not None and not isinstance(labels, dict) and len(labels.shape) == 2 and labels.dtype.kind == "i"


def _widened(unit: Unit, width: int) -> Unit:
    assert _is_sequence(unit.labels)
    if unit.labels.shape[1] == width:
        return unit
    wide = Padded(unit.labels, width)
    return replace(unit, labels=wide, signature=(unit.signature[0], _types({"": wide})))


def _is_function(spec: Any) -> bool:
    return isinstance(spec, str | Path) and ".py:" in str(spec)


class Reader:
    """Turns items into units.

    Attributes:
        rowwise: whether all inputs are batched along axis 0, as far as their types tell.
        batch: rows that the model takes where that is fixed and the same for all inputs.
    """

    def __init__(self, model: Model, store: RowStore, *, labelled: bool, wanted: bool) -> None:
        self._store, self._labelled, self._wanted = store, labelled, wanted
        self._inputs = {spec.name: spec for spec in model.inputs}
        self._outputs = [spec.name for spec in model.outputs]
        for spec in self._inputs.values():
            if spec.kind != "tensor":
                raise DataError(f"input '{spec.name}' is a {spec.kind}, which training does not feed")
        firsts = [spec.shape[0] if spec.shape else None for spec in self._inputs.values()]
        fixed = {first for first in firsts if isinstance(first, int)}
        self._one_symbol = len({first for first in firsts if first is not None}) == 1
        scalar = any(spec.shape == () for spec in self._inputs.values())
        self.rowwise = not scalar and (not fixed or (len(fixed) == 1 and all(isinstance(f, int) for f in firsts)))
        self.batch = fixed.pop() if self.rowwise and fixed else None
        shown = model if not self.rowwise else _any_rows(self._inputs)
        self._checker = FeedChecker(model)
        if isinstance(shown, dict):
            self._checker.specs = shown

    def source(self, spec: Any, batch: int) -> Samples:
        """Return the items that a spec names, arrays of labels in files among them."""
        specs = dict(self._checker.specs)
        if isinstance(spec, str | Path):
            for file in _archives(Path(spec)):
                specs.update(_label_specs(file, specs))
        return unchecked(spec, specs, batch=batch if self.rowwise else 1)

    def unit(self, item: Any, where: str, *, copies: bool) -> Unit:
        """Return an item as a unit; `copies` where its arrays may be written to later."""
        feeds, labels = self._parts(item, where)
        feeds = {name: _array(value, copies=copies) for name, value in feeds.items()}
        feeds = {name: self._checked(name, value, where) for name, value in feeds.items()}
        self._checker.check({n: (v if not is_sparse(v) else _like(v)) for n, v in feeds.items()}, where)
        labels = self._labels(labels, where, copies=copies)
        rows = self._rows(feeds, labels, where) if self.rowwise else 1
        kept = {name: self._store.keep(value) for name, value in feeds.items()}
        if isinstance(labels, dict):
            held: Any = {name: self._store.keep(value) for name, value in labels.items()}
        else:
            held = None if labels is None else self._store.keep(labels)
        of_labels = held if isinstance(held, dict) else {} if held is None else {"": held}
        return Unit(kept, held, rows, (_types(kept), _types(of_labels)))

    def _parts(self, item: Any, where: str) -> tuple[dict[str, Any], Labels]:
        if isinstance(item, Mapping):
            return self._split(item, where)
        names = list(self._inputs)
        if not isinstance(item, tuple | list):
            item = (item,)
        first = item[0] if item else None
        if isinstance(first, Mapping) and len(item) in (1, 2):
            feeds, labels = self._split(first, where) if len(item) == 1 else (dict(first), item[1])
            return feeds, labels
        if len(item) not in (len(names), len(names) + 1):
            raise DataError(
                f"an item of {len(item)} parts for a model of {len(names)} inputs", at=where,
                hint="yield (feeds, labels), feeds being a dict: input name -> array",
            )  # fmt: skip
        return dict(zip(names, item, strict=False)), item[-1] if len(item) > len(names) else None

    def _split(self, item: Mapping[str, Any], where: str) -> tuple[dict[str, Any], Labels]:
        """Part an item's entries into feeds and labels."""
        known = {*self._inputs, *self._checker.optional}
        feeds = {name: value for name, value in item.items() if name in known}
        rest = {name: value for name, value in item.items() if name not in known}
        if not rest:
            return feeds, None
        missing = [name for name in self._inputs if name not in feeds]
        if missing:
            hint = did_you_mean(missing[0], rest) or f"the model needs: {', '.join(self._inputs)}"
            raise DataError(f"input '{missing[0]}' is not fed", at=where, hint=hint)
        of_outputs = {name: value for name, value in rest.items() if name in self._outputs}
        if of_outputs:
            return feeds, of_outputs
        named = [name for name in rest if name.lower() in LABEL_NAMES] or list(rest)
        if len(named) > 1 and self._wanted:
            raise DataError(
                f"which of these are the labels: {', '.join(named)}?", at=where,
                hint="call one 'label', or each after the output that it is for",
            )  # fmt: skip
        return feeds, rest[named[0]]

    def _checked(self, name: str, value: Any, where: str) -> Any:
        spec = self._checker.specs.get(name) or self._checker.optional.get(name)
        if spec is not None and not is_sparse(value):
            value = check_value(spec, value, f"{where}, input '{name}'")
        _finite(value, f"{where}, input '{name}'")
        return value

    def _labels(self, labels: Labels, where: str, *, copies: bool) -> Labels:
        if labels is None and self._labelled:
            raise DataError("the labels are missing", at=where, hint=_LABELS_HINT)
        if labels is None or not self._wanted:
            return None
        if isinstance(labels, Mapping):
            unknown = [name for name in labels if name not in self._outputs]
            if unknown or not labels:
                shown = ", ".join(self._outputs)
                hint = did_you_mean(unknown[0], self._outputs) if unknown else None
                raise DataError(
                    f"labels for '{unknown[0]}', which is no output" if unknown else "the labels are missing",
                    at=where, hint=hint or f"its outputs: {shown}",
                )  # fmt: skip
            return {name: _label(value, f"{where}, labels of '{name}'", copies) for name, value in labels.items()}
        return _label(labels, f"{where}, labels", copies)

    def _rows(self, feeds: Mapping[str, Any], labels: Labels, where: str) -> int:
        counts = {name: int(value.shape[0]) if value.shape else 0 for name, value in feeds.items()}
        if not all(value.shape for value in feeds.values()) or (len(set(counts.values())) > 1 and not self._one_symbol):
            self.rowwise, self.batch = False, None  # no rows that all inputs share
            return 1
        if len(set(counts.values())) > 1:
            listed = ", ".join(f"'{name}' {count}" for name, count in counts.items())
            raise DataError(f"the inputs have different numbers of rows: {listed}", at=where)
        rows = next(iter(counts.values()))
        for name, value in (labels if isinstance(labels, dict) else {"labels": labels}).items():
            if value is not None and (not value.shape or value.shape[0] != rows):
                have = value.shape[0] if value.shape else "a single value"
                raise DataError(f"{have} in '{name}' for {rows} rows of feeds", at=where,
                                hint="labels have one entry per row")  # fmt: skip
        return rows


def _types(pieces: Mapping[str, Piece]) -> tuple[object, ...]:
    return tuple(sorted((name, piece.shape[1:], piece.dtype.str) for name, piece in pieces.items()))


_LABELS_HINT = "yield (feeds, labels), or put an array 'label' beside the inputs; distilling needs none"


def _any_rows(specs: Mapping[str, ValueSpec]) -> dict[str, ValueSpec]:
    """Return the inputs' types with any number of rows: data are regrouped to what the model takes."""
    return {n: replace(s, shape=None if s.shape is None else (None, *s.shape[1:])) for n, s in specs.items()}


def _archives(path: Path) -> list[Path]:
    """Return the first .npz that a path stands for, whose arrays those of all are like."""
    if path.is_dir():
        return sorted(p for p in path.iterdir() if p.suffix == ".npz")[:1]
    return [path] if path.suffix == ".npz" and path.is_file() else []


def _label_specs(path: Path, inputs: Mapping[str, ValueSpec]) -> Iterator[tuple[str, ValueSpec]]:
    """Yield types of the arrays of a file that are no inputs, cut as the inputs are."""
    try:
        archive = zipfile.ZipFile(path)
    except (zipfile.BadZipFile, OSError) as error:
        raise DataError(f"not an .npz file: {error}", at=str(path)) from error
    with archive:
        infos = {i.filename.removesuffix(".npy"): i for i in archive.infolist() if i.filename.endswith(".npy")}
        ranks = {n: len(s.shape) for n, s in inputs.items() if s.shape is not None}
        held = {n: Member(archive, i, path) for n, i in infos.items()}
        entries = any(n in held and len(held[n].shape) == rank + 1 for n, rank in ranks.items())
        for name, member in held.items():
            rank = len(member.shape) - entries
            if name not in inputs and rank >= 1:
                yield name, ValueSpec(name, None, (None,) * rank)


def _array(value: Any, *, copies: bool) -> Any:
    """Return tensors as arrays, sparse matrices and anything else as they are."""
    if is_sparse(value):
        return value.copy() if copies else value
    if hasattr(value, "detach"):
        value = value.detach().cpu().numpy()
    return np.array(value) if copies and isinstance(value, np.ndarray) else value


def _label(value: Any, where: str, copies: bool) -> Array:
    value = _array(value, copies=copies)
    array = np.atleast_1d(value.toarray() if is_sparse(value) else value)
    if array.dtype.kind not in "iufb" and not is_float(array.dtype):
        raise DataError(f"labels are numbers, not {array.dtype}", at=where, hint="number the classes from 0")
    if array.dtype.kind in "iub":
        array = array.astype(np.int64)
    _finite(array, where)
    return array


def _like(matrix: Any) -> Array:
    """Return an array of a sparse matrix's shape and type that takes no memory."""
    return np.broadcast_to(np.zeros((), matrix.dtype), matrix.shape)


def _finite(value: Any, where: str) -> None:
    array = value.data if is_sparse(value) else value
    if isinstance(array, np.ndarray) and is_float(array.dtype) and not np.isfinite(array).all():
        count = int(array.size - np.isfinite(array).sum())
        raise DataError(f"{count} of {array.size} values are NaN or infinite", at=where, hint="clean the data first")
