"""Telling file types from content with magika.

The network sees the first and the last 1,024 bytes of a file, white space stripped from its two ends, padded
with 256; labels come from the configuration in magika's package.
"""

from __future__ import annotations

import functools
import json
from collections.abc import Iterator
from typing import Any

import numpy as np
import numpy.typing as npt

from graphopt.models import zoo
from graphopt.models.tasks import Feeds, Predict, Scores, file_types, item_limit, text

TEST_FILES, SELECTION_FILES, CALIBRATION_FILES = 2048, 512, 256
BATCH = 16
_SEEDS: dict[text.Split, int] = {"calibration": 909, "selection": 919, "test": 1010}


def calibration(limit: int | None = None) -> Iterator[Feeds]:
    """Yield batches of 16 files, ``bytes``: N, 2048, int32."""
    for feeds, _ in _batches("calibration", item_limit(limit, CALIBRATION_FILES)):
        yield feeds


def selection(limit: int | None = None) -> Iterator[Feeds]:
    """Yield 512 files that neither calibrate nor test, in batches of 16."""
    for feeds, _ in _batches("selection", item_limit(limit, SELECTION_FILES)):
        yield feeds


def type_right(predict: Predict, limit: int | None = None) -> Scores:
    """Return, for each of 2,048 files, 1.0 where the likeliest type is the file's, else 0.0."""
    return _type_right(predict, "test", item_limit(limit, TEST_FILES))


def type_right_selection(predict: Predict, limit: int | None = None) -> Scores:
    """Return the same for the 512 files that choose."""
    return _type_right(predict, "selection", item_limit(limit, SELECTION_FILES))


@functools.cache
def labels() -> tuple[str, ...]:
    """Return the network's classes in order."""
    return tuple(_configuration()["target_labels_space"])


def tokens(content: bytes) -> npt.NDArray[np.int32]:
    """Return what the network sees of a file: 2,048 numbers, 0 to 255 or 256 for padding."""
    size, block, padding = (int(_configuration()[key]) for key in ("beg_size", "block_size", "padding_token"))
    row = np.full(2 * size, padding, np.int32)
    first = content[:block].lstrip()[:size]
    last = content[-block:].rstrip()[-size:]
    row[: len(first)] = np.frombuffer(first, np.uint8)
    row[2 * size - len(last) :] = np.frombuffer(last, np.uint8)
    return row


def files(split: text.Split, count: int) -> Iterator[tuple[str, bytes]]:
    """Yield label and content of a split's files, the same every time; the types take turns."""
    kinds = file_types.types()
    for index in range(count):
        label = kinds[index % len(kinds)]
        yield label, file_types.make(label, np.random.default_rng([_SEEDS[split], index]))


def _type_right(predict: Predict, split: text.Split, count: int) -> Scores:
    names = labels()
    scores = []
    for feeds, true in _batches(split, count):
        best = next(iter(predict(feeds).values())).argmax(axis=1)
        scores += [float(names[int(index)] == label) for index, label in zip(best, true, strict=True)]
    return np.array(scores)


def _batches(split: text.Split, count: int) -> Iterator[tuple[Feeds, list[str]]]:
    batch: list[tuple[str, bytes]] = []
    for index, item in enumerate(files(split, count), start=1):
        batch.append(item)
        if len(batch) == BATCH or index == count:
            yield {"bytes": np.stack([tokens(content) for _, content in batch])}, [label for label, _ in batch]
            batch = []


@functools.cache
def _configuration() -> dict[str, Any]:
    configuration: dict[str, Any] = json.loads(zoo.fetch("magika-config").read_text("utf-8"))
    return configuration
