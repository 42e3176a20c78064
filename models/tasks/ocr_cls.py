"""Telling upright lines of text from those turned by 180 degrees, with the PP-OCR direction classifier."""

from __future__ import annotations

import itertools
from collections.abc import Iterator

import numpy as np
import numpy.typing as npt

from graphopt.models.tasks import Feeds, Predict, Scores, item_limit, render, text
from graphopt.models.tasks.kept import kept
from graphopt.models.tasks.training_lines import Lines

TEST_LINES, SELECTION_LINES, CALIBRATION_LINES, TRAINING_LINES = 2000, 1000, 256, 8192
HEIGHT, WIDTH, BATCH = 48, 192, 16
_SEEDS: dict[text.Split, int] = {"calibration": 303, "selection": 313, "test": 404}
_TRAINING = Lines("ocr-cls", seed=323, calibration=_SEEDS["calibration"], height=HEIGHT, widest=WIDTH)


def calibration(limit: int | None = None) -> Iterator[Feeds]:
    """Yield batches of 16 lines, half of them turned, ``x``: N, 3, 48, 192."""
    for feeds, _ in _batches("calibration", item_limit(limit, CALIBRATION_LINES)):
        yield feeds


def training(limit: int | None = None) -> Iterator[Feeds]:
    """Yield batches of 16 lines to train on, 8,192 unless asked for more; no text of theirs is in another split."""
    for feeds, _ in training_labelled(limit):
        yield feeds


def training_labelled(limit: int | None = None) -> Iterator[tuple[Feeds, npt.NDArray[np.int64]]]:
    """Yield the same with the classes (0 upright, 1 turned), N."""
    lines = enumerate(_TRAINING.first(item_limit(limit, max(limit or 0, TRAINING_LINES))))
    while part := list(itertools.islice(lines, BATCH)):
        turned = [int(np.random.default_rng([_TRAINING.seed, index, 1]).integers(2)) for index, _ in part]
        pictures = [
            _turned(line.picture) if turn else line.picture for turn, (_, line) in zip(turned, part, strict=True)
        ]
        yield {"x": render.network_input(pictures, HEIGHT, WIDTH)}, np.array(turned, np.int64)


def selection(limit: int | None = None) -> Iterator[Feeds]:
    """Yield 1,000 lines that neither calibrate nor test, in batches of 16."""
    for feeds, _ in _batches("selection", item_limit(limit, SELECTION_LINES)):
        yield feeds


def rotation_right(predict: Predict, limit: int | None = None) -> Scores:
    """Return, for each of 2,000 lines, 1.0 where the class (0 upright, 1 turned) is right, else 0.0."""
    return _rotation_right(predict, "test", item_limit(limit, TEST_LINES))


def rotation_right_selection(predict: Predict, limit: int | None = None) -> Scores:
    """Return the same for the 1,000 lines that choose."""
    return _rotation_right(predict, "selection", item_limit(limit, SELECTION_LINES))


def _rotation_right(predict: Predict, split: text.Split, count: int) -> Scores:
    scores = []
    for feeds, turned in _batches(split, count):
        probabilities = next(iter(predict(feeds).values()))
        scores.append(probabilities.argmax(axis=1) == turned)
    return np.concatenate(scores).astype(np.float64)


def _batches(split: text.Split, count: int) -> Iterator[tuple[Feeds, list[int]]]:
    for start in range(0, count, BATCH):
        items = [_item(split, index) for index in range(start, min(start + BATCH, count))]
        pictures = [picture for picture, _ in items]
        yield {"x": render.network_input(pictures, HEIGHT, WIDTH)}, [turned for _, turned in items]


@kept(lambda item: item[0].nbytes)
def _item(split: text.Split, index: int) -> tuple[render.Picture, int]:
    """Return a line, and 1 where it is turned, else 0."""
    rng = np.random.default_rng([_SEEDS[split], index])
    picture = render.line(rng, split).picture
    turned = int(rng.integers(2))
    return _turned(picture) if turned else picture, turned


def _turned(picture: render.Picture) -> render.Picture:
    return np.ascontiguousarray(picture[::-1, ::-1])
