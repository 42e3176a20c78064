"""Samples changed a little each time they are seen, as a pure function of seed, epoch and the sample's number.

    flip=0.5  vflip=0.5              mirrored with this probability
    rotate=10                        degrees, at most, either way
    scale=0.2  shift=0.1             larger or smaller, moved: at most by this part of the size
    crop=0.8                         a window of at least this part of each side, made as large as the image
    cutout=0.3                       a rectangle of this part of each side is the image's mean
    noise=0.05                       normal, its deviation a part of the sample's range
    brightness=0.2  contrast=0.2     at most, as parts of the sample's range, of 1
    mixup=0.2                        mixed with another sample, by Beta(a, a) (Zhang et al. 2018)
    file.py:function                 function(feeds, rng) -> feeds, or (feeds, labels, rng) -> (feeds, labels)

Images are inputs of rank 4, NCHW or NHWC, of floats or bytes; all images of a sample are moved alike. Without images,
noise is for all float inputs. The teacher sees what the student sees.
"""

from __future__ import annotations

import inspect
import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any, TypeAlias

import numpy as np

from graphopt.bridge.images import MOVES, as_type, channels_last, cut_out, draw_map, is_image, moved, sizes
from graphopt.data import call_user, load_function
from graphopt.errors import DataError, SpecError, did_you_mean

Array: TypeAlias = np.ndarray[Any, Any]
Feeds: TypeAlias = dict[str, Array]
Labels: TypeAlias = "Array | dict[str, Array] | None"
Read: TypeAlias = Callable[[Array], tuple[Feeds, Labels]]

STRENGTHS: Mapping[str, tuple[float, float]] = {
    "flip": (0.5, 1.0), "vflip": (0.5, 1.0), "rotate": (10.0, 180.0), "scale": (0.2, 0.99), "shift": (0.1, 1.0),
    "crop": (0.8, 1.0), "cutout": (0.3, 1.0), "noise": (0.05, math.inf), "brightness": (0.2, math.inf),
    "contrast": (0.2, 1.0), "mixup": (0.2, math.inf),
}  # fmt: skip
"""Name -> strength where none is given, and the largest."""

_OF_IMAGES = frozenset({*MOVES, "cutout", "brightness", "contrast"})


@dataclass(frozen=True)
class Sample:
    """Samples that are about to be seen.

    Attributes:
        feeds: input name -> array.
        labels: as in `Batch`.
        index: int64 (rows,), their numbers.
        seed: of all that is drawn.
        epoch: counts from 0.
        rowwise: whether they stand along axis 0; else this is one whole feed.
    """

    feeds: Feeds
    labels: Labels
    index: Array
    seed: int
    epoch: int
    rowwise: bool

    def generators(self, rows: int) -> list[np.random.Generator]:
        """Return what draws for each of so many rows."""
        if self.rowwise:
            return [np.random.default_rng([self.seed, self.epoch, int(i), 0]) for i in self.index]
        return [np.random.default_rng([self.seed, self.epoch, int(self.index[0]), row]) for row in range(rows)]


class Augmenter:
    """Applies augmentations.

    Args:
        steps: name -> strength, in order; what moves pixels comes first, all at once.
        hooks: functions of the user's by the text that names them; they come last.
    """

    def __init__(self, steps: Mapping[str, float], hooks: Mapping[str, Callable[..., Any]]) -> None:
        self._moves = {name: strength for name, strength in steps.items() if name in MOVES}
        self._others = {n: s for n, s in steps.items() if n not in MOVES and n != "mixup"}
        self._mixup = steps.get("mixup")
        self._hooks = {name: (hook, _takes_labels(hook)) for name, hook in hooks.items()}

    def __call__(self, sample: Sample, peers: Callable[[], Array], read: Read) -> tuple[Feeds, Labels]:
        """Return feeds and labels as they are to be seen.

        Args:
            sample: as they are.
            peers: returns the numbers of all samples of their shape, for mixup.
            read: returns feeds and labels of samples by number.

        Raises:
            DataError: labels that cannot follow.
            SpecError: an augmentation that is not for such inputs.
        """
        feeds, labels = dict(sample.feeds), sample.labels
        rows = max((a.shape[0] for a in feeds.values() if a.ndim), default=1)
        generators = sample.generators(rows)
        if self._moves:
            feeds = self._moved(feeds, labels, generators)
        if self._others:
            feeds = self._changed(feeds, generators)
        if self._mixup is not None:
            feeds, labels = self._mixed(self._mixup, sample, feeds, generators, peers, read)
        for name, (hook, takes_labels) in self._hooks.items():
            feeds, labels = _hooked(name, hook, takes_labels, sample, feeds, labels, generators)
        return feeds, labels

    def _moved(self, feeds: Feeds, labels: Labels, generators: list[np.random.Generator]) -> Feeds:
        images = {name: array for name, array in feeds.items() if is_image(array)}
        if not images:
            raise SpecError(f"'{next(iter(self._moves))}' is for images, and no input is of rank 4", at="augment")
        height, width = sizes(next(iter(images.values())).shape)
        for held in labels.values() if isinstance(labels, dict) else [labels]:
            if held is not None and held.ndim > 2 and {height, width} <= set(held.shape[1:]):
                raise DataError(
                    "labels of pixels would have to be moved with the pixels", at="augment",
                    hint="augment by file.py:function(feeds, labels, rng)",
                )  # fmt: skip
        maps = np.stack([draw_map(self._moves, rng, height, width) for rng in generators])
        return {**feeds, **{name: moved(array, maps[: len(array)]) for name, array in images.items()}}

    def _changed(self, feeds: Feeds, generators: list[np.random.Generator]) -> Feeds:
        images = [name for name, array in feeds.items() if is_image(array)]
        names = images or [name for name, array in feeds.items() if array.dtype.kind == "f" and array.ndim]
        wrong = next((step for step in self._others if step in _OF_IMAGES and not images), None)
        if wrong or not names:
            what = "images, and no input is of rank 4" if wrong else "floats, and no input has any"
            raise SpecError(f"'{wrong or next(iter(self._others))}' is for {what}", at="augment")
        for name in names:
            array = feeds[name]
            wide, out = array.astype(np.float32), np.empty_like(array)
            for row, rng in zip(range(len(array)), generators, strict=False):
                out[row] = as_type(self._one(wide[row], rng, array), array.dtype)
            feeds = {**feeds, name: out}
        return feeds

    def _one(self, values: Array, rng: np.random.Generator, batch: Array) -> Array:
        for step, strength in self._others.items():
            extent = float(values.max() - values.min()) if values.size else 0.0
            if step == "noise":
                values = values + rng.standard_normal(values.shape, np.float32) * np.float32(strength * extent)
            elif step == "brightness":
                values = values + np.float32(rng.uniform(-strength, strength) * extent)
            elif step == "contrast":
                mean = values.mean(dtype=np.float32)
                values = (values - mean) * np.float32(rng.uniform(1 - strength, 1 + strength)) + mean
            else:
                values = cut_out(values, strength, rng, last=channels_last(batch.shape))
        return values

    def _mixed(
        self, strength: float, sample: Sample, feeds: Feeds, generators: list[np.random.Generator],
        peers: Callable[[], Array], read: Read,
    ) -> tuple[Feeds, Labels]:  # fmt: skip
        if not sample.rowwise:
            raise SpecError("mixup mixes rows, and the model's inputs have none", at="augment")
        others = peers()
        partners = np.array([others[rng.integers(len(others))] for rng in generators])
        parts = np.array([rng.beta(strength, strength) for rng in generators])
        theirs, its_labels = read(partners)
        for name, array in feeds.items():
            if array.dtype.kind != "f" and array.dtype != np.uint8:
                raise SpecError(f"mixup mixes numbers; input '{name}' is of {array.dtype}", at="augment")
        mixed = {name: _between(array, theirs[name], parts) for name, array in feeds.items()}
        mine = sample.labels
        if isinstance(mine, dict) and isinstance(its_labels, dict):
            return mixed, {name: _mixed_labels(held, its_labels[name], parts) for name, held in mine.items()}
        if isinstance(mine, np.ndarray) and isinstance(its_labels, np.ndarray):
            return mixed, _mixed_labels(mine, its_labels, parts)
        return mixed, None


def augmenter(texts: tuple[str, ...]) -> Augmenter:
    """Return the augmentations that texts name (see the module).

    Raises:
        SpecError: unknown, or a strength out of range.
        DataError: the user's function cannot be loaded.
    """
    steps: dict[str, float] = {}
    hooks: dict[str, Callable[..., Any]] = {}
    for text in texts:
        if ".py:" in text:
            hooks[text] = load_function(text)
            continue
        name, _, given = text.partition("=")
        if name not in STRENGTHS:
            hint = did_you_mean(name, STRENGTHS) or f"one of: {', '.join(STRENGTHS)}, or file.py:function"
            raise SpecError(f"unknown augmentation '{name}'", at="augment", hint=hint)
        if name in steps:
            raise SpecError(f"'{name}' is named twice", at="augment")
        steps[name] = _strength(name, given)
    return Augmenter(steps, hooks)


def _strength(name: str, text: str) -> float:
    usual, largest = STRENGTHS[name]
    if not text:
        return usual
    try:
        value = float(text)
    except ValueError:
        value = math.nan
    if not 0.0 < value <= largest or math.isinf(value):
        bounds = "above 0" if math.isinf(largest) else f"above 0 and at most {largest:g}"
        raise SpecError(f"the strength of '{name}' is {bounds}, not {text}", at="augment", hint=f"{name}={usual:g}")
    return value


def _takes_labels(hook: Callable[..., Any]) -> bool:
    try:
        return len(inspect.signature(hook).parameters) >= 3
    except (TypeError, ValueError):
        return False


def _hooked(
    name: str, hook: Callable[..., Any], takes_labels: bool, sample: Sample, feeds: Feeds, labels: Labels,
    generators: list[np.random.Generator],
) -> tuple[Feeds, Labels]:  # fmt: skip
    """Return what a user's function makes of each row (with no batch axis), or of a whole feed."""
    if not sample.rowwise:
        return _called(name, hook, takes_labels, feeds, labels, generators[0])
    found = []
    for row, rng in enumerate(generators):
        mine = {n: a[row].copy() for n, a in labels.items()} if isinstance(labels, dict) else labels
        mine = mine[row].copy() if isinstance(mine, np.ndarray) else mine
        found.append(_called(name, hook, takes_labels, {n: a[row].copy() for n, a in feeds.items()}, mine, rng))
    out = {n: _stacked(name, n, [row[n] for row, _ in found], array) for n, array in feeds.items()}
    if labels is None or not takes_labels:
        return out, labels
    rows: list[Any] = [row for _, row in found]
    if isinstance(labels, dict):
        return out, {n: _stacked(name, n, [row[n] for row in rows], labels[n]) for n in labels}
    return out, _stacked(name, "labels", rows, labels)


def _called(
    name: str, hook: Callable[..., Any], takes_labels: bool, feeds: Feeds, labels: Labels, rng: np.random.Generator
) -> tuple[Feeds, Labels]:
    """Call a user's function on one sample."""
    found = call_user(hook, name, feeds, labels, rng) if takes_labels else call_user(hook, name, feeds, rng)
    given, labels = found if takes_labels and isinstance(found, tuple) and len(found) == 2 else (found, labels)
    if not isinstance(given, Mapping) or set(given) != set(feeds):
        what = f"a dict of {', '.join(map(str, given))}" if isinstance(given, Mapping) else type(given).__name__
        raise DataError(f"the augmentation returned {what}", at=name, hint=f"return a dict of {', '.join(feeds)}")
    return dict(given), labels


def _stacked(hook: str, name: str, rows: list[Any], like: Array) -> Array:
    """Return rows as one array of the type of what went in; their shape may have changed, for all alike."""
    arrays = [np.asarray(row) for row in rows]
    if len({array.shape for array in arrays}) > 1:
        listed = ", ".join(sorted({str(list(array.shape)) for array in arrays}))
        raise DataError(f"the augmentation gives '{name}' in several shapes: {listed}", at=hook)
    out = np.stack(arrays).astype(like.dtype)
    if out.dtype.kind == "f" and not np.isfinite(out).all():
        raise DataError(f"the augmentation makes values of '{name}' that are NaN or infinite", at=hook)
    return out


def _mixed_labels(mine: Array, theirs: Array, parts: Array) -> Array:
    if mine.dtype.kind != "f":
        raise DataError("mixup mixes labels, and these are whole numbers", at="augment",
                        hint="give the probabilities of all classes, or distill without labels")  # fmt: skip
    return _between(mine, theirs, parts)


def _between(a: Array, b: Array, parts: Array) -> Array:
    part = parts.reshape(-1, *[1] * (a.ndim - 1)).astype(np.float32)
    return as_type(a.astype(np.float32) * part + b.astype(np.float32) * (1 - part), a.dtype)
