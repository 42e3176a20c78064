"""What samples told of a model's tensors: statistics that merge, and that a file can hold.

Counts are integers, so that merging in any order gives exactly what one run over all samples gives.  Sums are float64:
they agree to rounding.  Running averages depend on the order of the samples by definition, and merge in that order.
"""

from __future__ import annotations

import copy
import json
import zipfile
from collections import defaultdict
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, TypeAlias

import numpy as np
import numpy.typing as npt

from graphopt.errors import DataError, did_you_mean
from graphopt.external import atomic_write
from graphopt.histogram import Histogram, within
from graphopt.ranges import Range, find_range

Array: TypeAlias = npt.NDArray[Any]

FORMAT = 1
"""Of saved files."""

_HEADER = "calibration"
_SAFE = 1e15
"""Values up to which (and down to its inverse) squares are summed in float32."""
_ROW = 4096
"""Values that are summed in float32; their sums are added in float64."""


@dataclass
class Channels:
    """Statistics of each index of one axis (all 1-D, float64 but `count`)."""

    low: Array
    high: Array
    total: Array
    squares: Array
    count: Array

    @classmethod
    def of(cls, values: Array, axis: int) -> Channels:
        """Return the statistics of float32 values; those that are not finite are left out."""
        others = tuple(i for i in range(values.ndim) if i != axis)
        finite = np.isfinite(values)
        if finite.all():
            count = np.full(values.shape[axis], values.size // max(values.shape[axis], 1))
            where: Any = True
        else:
            count, where, values = finite.sum(axis=others), finite, np.where(finite, values, 0)
        return cls(
            values.min(axis=others, initial=np.inf, where=where).astype(np.float64),
            values.max(axis=others, initial=-np.inf, where=where).astype(np.float64),
            values.sum(axis=others, dtype=np.float64),
            np.square(values, dtype=np.float64).sum(axis=others),
            count.astype(np.int64),
        )

    def merge(self, other: Channels) -> None:
        """Add another's values.

        Raises:
            DataError: it has another number of channels.
        """
        if len(self.low) != len(other.low):
            raise DataError(f"the channel axis is {len(self.low)} long in one sample and {len(other.low)} in another")
        self.low, self.high = np.minimum(self.low, other.low), np.maximum(self.high, other.high)
        self.total, self.squares = self.total + other.total, self.squares + other.squares
        self.count = self.count + other.count

    def settled(self, values: Array) -> Array:
        """Return values with 0 where a channel has none."""
        return np.where(self.count > 0, values, 0.0)


class TensorStatistics:
    """Statistics of one tensor.

    Attributes:
        axis: of the channels that have statistics of their own, None for none.
        histogram: of all finite values.
        samples: how many were added, those without values among them.
        total: sum of the finite values; `squares` of their squares.
        nans: how many values were NaN; `infinities` infinite or beyond float32.
    """

    def __init__(self, axis: int | None = None) -> None:
        self.axis = axis
        self.histogram = Histogram()
        self.channels: Channels | None = None
        self.samples = 0
        self.total = 0.0
        self.squares = 0.0
        self.nans = 0
        self.infinities = 0
        self._ranges: dict[tuple[str, str], Range] = {}

    def add(self, values: Array, limit: int | None = None, phase: int = 0) -> None:
        """Add a sample's values: floats of any type and shape.

        Args:
            values: the tensor.
            limit: about how many of them the histogram takes; extremes and sums are of all.
            phase: where taking every n-th begins.

        Raises:
            DataError: it has no such channel axis, or another number of channels than before.
        """
        self.samples += 1
        self._ranges.clear()
        if not values.size:
            return
        with np.errstate(over="ignore"):
            values = np.ascontiguousarray(values, np.float32)
        flat = values.reshape(-1)
        low, high = float(flat.min()), float(flat.max())
        if not np.isfinite([low, high]).all():
            finite = np.isfinite(flat)
            nans = int(np.isnan(flat).sum())
            self.nans += nans
            self.infinities += flat.size - int(finite.sum()) - nans
            flat = flat[finite]
            low, high = float(flat.min(initial=np.inf)), float(flat.max(initial=-np.inf))
        self.histogram.add(flat, low, high, limit=limit, phase=phase)
        self._add_sums(flat, max(-low, high))
        if self.axis is not None:
            self._add_channels(values, self.axis)

    def _add_sums(self, flat: Array, largest: float) -> None:
        kind: Any = np.float32 if 1 / _SAFE < largest < _SAFE else np.float64
        whole = flat.size // _ROW * _ROW
        for rows in (flat[:whole].reshape(-1, _ROW), flat[whole:].reshape(1, -1)):
            self.total += float(np.einsum("ij->i", rows, dtype=kind, casting="same_kind").sum(dtype=np.float64))
            squares = np.einsum("ij,ij->i", rows, rows, dtype=kind, casting="same_kind")
            self.squares += float(squares.sum(dtype=np.float64))

    def _add_channels(self, values: Array, axis: int) -> None:
        if not -values.ndim <= axis < values.ndim:
            raise DataError(f"channels along axis {axis} of a tensor of rank {values.ndim}")
        found = Channels.of(values, axis % values.ndim)
        if self.channels is None:
            self.channels = found
        else:
            self.channels.merge(found)

    def merge(self, other: TensorStatistics) -> None:
        """Add the statistics of later samples."""
        self._ranges.clear()
        self.histogram.merge(other.histogram)
        self.samples += other.samples
        self.total += other.total
        self.squares += other.squares
        self.nans += other.nans
        self.infinities += other.infinities
        if self.axis != other.axis:
            raise DataError(f"channels along axis {self.axis} and along axis {other.axis} do not merge")
        if self.channels is None:
            self.channels = copy.deepcopy(other.channels)
        elif other.channels is not None:
            self.channels.merge(other.channels)

    def range(self, method: str, **options: Any) -> Range:
        """Return the range that a method of `ranges.METHODS` picks; kept, since those that search for it take long.

        Raises:
            DataError: there are no finite values.
            SpecError: no such method or option.
        """
        key = method, repr(sorted(options.items()))
        if key not in self._ranges:
            self._ranges[key] = find_range(self.histogram, method, **options)
        return self._ranges[key]

    def to_arrays(self) -> dict[str, Array]:
        """Return the state as arrays."""
        out = {f"histogram.{key}": array for key, array in self.histogram.to_arrays().items()}
        out["integers"] = np.array([self.samples, self.nans, self.infinities], np.int64)
        out["sums"] = np.array([self.total, self.squares])
        out["axis"] = np.array([] if self.axis is None else [self.axis], np.int64)
        if self.channels is not None:
            out.update({f"channels.{key}": array for key, array in vars(self.channels).items()})
        return out

    @classmethod
    def from_arrays(cls, arrays: Mapping[str, Array]) -> TensorStatistics:
        """Return what `to_arrays` made the arrays of."""
        out = cls(*arrays["axis"].tolist())
        out.histogram = Histogram.from_arrays(within(arrays, "histogram"))
        out.samples, out.nans, out.infinities = arrays["integers"].tolist()
        out.total, out.squares = arrays["sums"].tolist()
        channels = within(arrays, "channels")
        out.channels = Channels(**channels) if channels else None
        return out

    def problem(self) -> str | None:
        """Return what is odd about the values, None if nothing is."""
        held = self.histogram
        bad = [(self.nans, "NaN"), (self.infinities, "infinite")]
        said = " and ".join(f"{count:,} {what}" for count, what in bad if count)
        if not held.count:
            return f"no finite values: {said}" if said else "no values: empty in every sample"
        if said:
            return f"{said} of {held.count + self.nans + self.infinities:,} values, left out"
        if held.low == held.high:
            return f"constant: always {held.low:.6g}"
        if max(-held.low, held.high) < np.finfo(np.float32).tiny:
            return f"all values are denormal: none is larger than {max(-held.low, held.high):.3g}"
        return None


class Calibration:
    """Statistics of tensors over samples (made by `calibrate`).

    Attributes:
        tensors: name -> statistics.
        skipped: name -> why there are none.
        source: tells which model the tensors are of; only statistics of one model merge.
    """

    def __init__(self, source: str = "") -> None:
        self.tensors: dict[str, TensorStatistics] = {}
        self.skipped: dict[str, str] = {}
        self.source = source

    @property
    def names(self) -> list[str]:
        """The tensors that have statistics."""
        return list(self.tensors)

    @property
    def samples(self) -> int:
        """How many samples were run."""
        return max((held.samples for held in self.tensors.values()), default=0)

    def range(self, name: str, method: str = "min-max", **options: Any) -> Range:
        """Return the range of a tensor that a method of `ranges.METHODS` picks.

        Raises:
            DataError: no such tensor, or it has no finite values.
            SpecError: no such method or option.
        """
        try:
            return self._of(name).range(method, **options)
        except DataError as error:
            if error.at is not None:
                raise
            raise DataError(error.what, at=f"tensor '{name}'", hint=self.problems(name)) from error

    def mean(self, name: str) -> float:
        """Return the mean of the finite values, 0 without any."""
        held = self._of(name)
        return held.total / max(held.histogram.count, 1)

    def second_moment(self, name: str) -> float:
        """Return the mean of the squares of the finite values, 0 without any."""
        held = self._of(name)
        return held.squares / max(held.histogram.count, 1)

    def channel_low(self, name: str) -> Array:
        """Return the smallest finite value of each channel (float64), 0 without any."""
        held = self._channels(name)
        return held.settled(held.low)

    def channel_high(self, name: str) -> Array:
        """Return the largest finite value of each channel (float64), 0 without any."""
        held = self._channels(name)
        return held.settled(held.high)

    def channel_mean(self, name: str) -> Array:
        """Return the mean of each channel (float64)."""
        held = self._channels(name)
        return held.total / np.maximum(held.count, 1)

    def channel_second_moment(self, name: str) -> Array:
        """Return the mean square of each channel (float64)."""
        held = self._channels(name)
        return held.squares / np.maximum(held.count, 1)

    def problems(self, name: str) -> str | None:
        """Return what is odd about a tensor's values (constant, NaN, infinite, empty, skipped), None if nothing is."""
        return self.skipped[name] if name in self.skipped else self._of(name).problem()

    def infinite(self, name: str) -> bool:
        """Tell whether a tensor had values that are infinite or no number."""
        found = self._of(name)
        return bool(found.nans or found.infinities)

    def merge(self, later: Calibration) -> Calibration:
        """Return the statistics of both; those of `later` come after, which matters for running averages only.

        Raises:
            DataError: they are of different models, or of other channel axes.
        """
        merged = copy.deepcopy(self)
        merged.absorb(later)
        return merged

    def absorb(self, later: Calibration) -> None:
        """Add the statistics of later samples to these."""
        if self.source != later.source:
            raise DataError("statistics of different models do not merge")
        for name, held in later.tensors.items():
            self._changed(name, lambda mine, held=held: mine.merge(held), held.axis)  # type: ignore[misc]
        for name, why in later.skipped.items():
            if name not in self.tensors:
                self.skipped[name] = why

    def add(
        self, name: str, values: Array, axis: int | None = None, *, limit: int | None = None, phase: int = 0
    ) -> None:
        """Add a sample's values of a tensor (see `TensorStatistics.add`)."""
        self._changed(name, lambda held: held.add(values, limit, phase), axis)

    def _changed(self, name: str, change: Callable[[TensorStatistics], None], axis: int | None) -> None:
        if name not in self.tensors:
            self.tensors[name] = TensorStatistics(axis)
            self.skipped.pop(name, None)
        try:
            change(self.tensors[name])
        except DataError as error:
            raise DataError(error.what, at=f"tensor '{name}'", hint=error.hint) from error

    def save(self, path: str | Path) -> None:
        """Write everything to an .npz file, atomically; it holds plain arrays only.

        Raises:
            ModelError: the file cannot be written.
        """
        header = {"format": FORMAT, "source": self.source, "tensors": self.names, "skipped": self.skipped}
        arrays = {_HEADER: np.frombuffer(json.dumps(header).encode(), np.uint8)}
        for number, held in enumerate(self.tensors.values()):
            arrays.update({f"{number}.{key}": array for key, array in held.to_arrays().items()})
        with atomic_write(Path(path)) as file:
            np.savez_compressed(file, **arrays)  # type: ignore[arg-type]

    @classmethod
    def load(cls, path: str | Path) -> Calibration:
        """Return what `save` wrote.

        Raises:
            DataError: no such file, or not one that `save` wrote.
        """
        path = Path(path)
        if not path.is_file():
            raise DataError("no such calibration", at=str(path))
        try:
            with np.load(path, allow_pickle=False) as file:
                arrays = dict(file.items())
            header = json.loads(arrays.pop(_HEADER).tobytes())
            if header["format"] != FORMAT:
                raise DataError(
                    f"a calibration of format {header['format']}; this version reads {FORMAT}", at=str(path)
                )
            out = cls(header["source"])
            out.skipped = dict(header["skipped"])
            parts: dict[str, dict[str, Array]] = defaultdict(dict)
            for key, array in arrays.items():
                number, _, rest = key.partition(".")
                parts[number][rest] = array
            for number, name in enumerate(header["tensors"]):
                out.tensors[name] = TensorStatistics.from_arrays(parts[str(number)])
        except (OSError, ValueError, KeyError, TypeError, zipfile.BadZipFile, EOFError) as error:
            raise DataError("not a saved calibration, or a damaged one", at=str(path), hint="delete it") from error
        return out

    def _of(self, name: str) -> TensorStatistics:
        if name in self.skipped:
            raise DataError(f"tensor '{name}' was not calibrated", at=name, hint=self.skipped[name])
        if name not in self.tensors:
            raise DataError(f"tensor '{name}' was not calibrated", at=name, hint=did_you_mean(name, self.tensors))
        return self.tensors[name]

    def _channels(self, name: str) -> Channels:
        held = self._of(name)
        if held.axis is None:
            raise DataError(f"the channels of tensor '{name}' were not asked for", at=name, hint="name it in channels")
        if held.channels is None:
            raise DataError(f"tensor '{name}' has no channels", at=name, hint=held.problem())
        return held.channels
