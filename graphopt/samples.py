"""Feeds that stream: `Samples`, and the check of each feed against a model's inputs."""

from __future__ import annotations

import itertools
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from typing import Any, TypeAlias

import numpy as np

from graphopt.errors import DataError, did_you_mean
from graphopt.model import Model, ValueSpec

Feeds: TypeAlias = dict[str, Any]
"""Input name -> array; a list for sequences, None for an optional that is left out."""


class Samples:
    """Feeds that can be iterated any number of times; each pass reads them anew.

    Attributes:
        description: in words, for reports.
        random: whether they were made up for want of data.
    """

    def __init__(self, make: Callable[[], Iterator[Feeds]], description: str, *, random: bool = False) -> None:
        self._make = make
        self.description = description
        self.random = random

    def __iter__(self) -> Iterator[Feeds]:
        return self._make()

    def limit(self, count: int) -> Samples:
        """Return the first `count` feeds only."""
        described = f"the first {count} of {self.description}"
        return Samples(lambda: itertools.islice(self._make(), count), described, random=self.random)

    def first(self) -> Feeds:
        """Return the first feed.

        Raises:
            DataError: there is none.
        """
        for feed in self:
            return feed
        raise DataError("the samples are empty", at=self.description)

    def __repr__(self) -> str:
        return f"<Samples: {self.description}>"


class FeedChecker:
    """Compares feeds with a model's inputs."""

    def __init__(self, model: Model) -> None:
        self.specs = {spec.name: spec for spec in model.inputs}
        self.optional = {spec.name: spec for spec in model.optional_inputs}

    def checked(self, samples: Iterable[Feeds]) -> Iterator[Feeds]:
        """Yield each feed when it fits.

        Raises:
            DataError: there is no feed, or one does not fit; says which and what would.
        """
        count = 0
        for feed in samples:
            yield self.check(feed, f"sample {count}")
            count += 1
        if not count:
            raise DataError("the samples are empty", at=getattr(samples, "description", None))

    def check(self, feed: Any, where: str) -> Feeds:
        """Return the feed with strings as objects and numbers in native byte order; nothing else is converted."""
        if not isinstance(feed, Mapping):
            raise DataError(
                f"a feed is a dict, not {type(feed).__name__}", at=where, hint="yield dicts: input name -> array"
            )
        known = {**self.specs, **self.optional}
        for name in feed:
            if name not in known:
                hint = did_you_mean(str(name), known) or f"its inputs: {', '.join(known) or 'none'}"
                raise DataError(f"the model has no input '{name}'", at=where, hint=hint)
        for name in self.specs:
            if name not in feed:
                raise DataError(
                    f"input '{name}' is not fed", at=where, hint=f"the model needs: {', '.join(self.specs)}"
                )
        return {name: check_value(known[name], value, f"{where}, input '{name}'") for name, value in feed.items()}


def check_value(spec: ValueSpec, value: Any, where: str) -> Any:
    """Return a value for an input, in native byte order.

    Raises:
        DataError: of another type or shape.
    """
    if spec.kind != "tensor":
        return value
    if isinstance(value, bool | int | float | str | list | tuple) or value is None:
        raise DataError(
            f"an array is needed, not {type(value).__name__}",
            at=where,
            hint=f"numpy.asarray(value, {_type_name(spec.dtype)!r})",
        )
    array = _native(np.asarray(value), spec.dtype)
    if spec.dtype is not None and array.dtype != spec.dtype:
        wanted = _type_name(spec.dtype)
        raise DataError(
            f"type {array.dtype} where the model takes {wanted}", at=where, hint=f"convert it: array.astype({wanted!r})"
        )
    if spec.shape is not None and not fits(array.shape, spec.shape):
        shown = ",".join("?" if d is None else str(d) for d in spec.shape)
        raise DataError(
            f"shape {list(array.shape)} where the model takes [{shown}]",
            at=where,
            hint=_shape_hint(array.shape, spec.shape),
        )
    return array


def _native(array: np.ndarray[Any, Any], wanted: np.dtype[Any] | None) -> np.ndarray[Any, Any]:
    if array.dtype.kind in "SU" and wanted is not None and wanted.kind in "OSU":
        return array.astype(object)
    if (
        array.dtype.kind == "V"
        and wanted is not None
        and wanted.kind == "V"
        and array.dtype.itemsize == wanted.itemsize
    ):
        return array.view(wanted)  # .npz cannot name bfloat16 and its like
    if not array.dtype.isnative:
        return array.astype(array.dtype.newbyteorder("="))
    return array


def _type_name(dtype: np.dtype[Any] | None) -> str:
    return "any type" if dtype is None else "str" if dtype.kind in "OSU" else dtype.name


def fits(shape: Sequence[int], wanted: Sequence[int | str | None]) -> bool:
    """Tell whether an array's shape is one that `wanted` describes."""
    return len(shape) == len(wanted) and all(
        not isinstance(w, int) or w == have for have, w in zip(shape, wanted, strict=True)
    )


def _shape_hint(shape: Sequence[int], wanted: Sequence[int | str | None]) -> str | None:
    if len(shape) + 1 == len(wanted) and fits(shape, wanted[1:]):
        return "the batch axis is missing: array[None]"
    if len(shape) == 4 and fits([shape[0], shape[3], shape[1], shape[2]], wanted):
        return "the channels stand last: array.transpose(0, 3, 1, 2)"
    if len(shape) == 4 and fits([shape[0], shape[2], shape[3], shape[1]], wanted):
        return "the channels stand second: array.transpose(0, 2, 3, 1)"
    return None
