"""Telling upright lines of text from those turned by 180 degrees, with the PP-OCR direction classifier."""

from __future__ import annotations

from collections.abc import Iterator

import numpy as np

from graphopt.models.tasks import Feeds, Predict, Scores, item_limit, render, text

TEST_LINES, CALIBRATION_LINES = 2000, 256
HEIGHT, WIDTH, BATCH = 48, 192, 16
_SEEDS: dict[text.Split, int] = {"calibration": 303, "test": 404}


def calibration(limit: int | None = None) -> Iterator[Feeds]:
    """Yield batches of 16 lines, half of them turned, ``x``: N, 3, 48, 192."""
    for feeds, _ in _batches("calibration", item_limit(limit, CALIBRATION_LINES)):
        yield feeds


def rotation_right(predict: Predict, limit: int | None = None) -> Scores:
    """Return, for each of 2,000 lines, 1.0 where the class (0 upright, 1 turned) is right, else 0.0."""
    scores = []
    for feeds, turned in _batches("test", item_limit(limit, TEST_LINES)):
        probabilities = next(iter(predict(feeds).values()))
        scores.append(probabilities.argmax(axis=1) == turned)
    return np.concatenate(scores).astype(np.float64)


def _batches(split: text.Split, count: int) -> Iterator[tuple[Feeds, list[int]]]:
    for start in range(0, count, BATCH):
        pictures, turned = [], []
        for index in range(start, min(start + BATCH, count)):
            rng = np.random.default_rng([_SEEDS[split], index])
            picture = render.line(rng, split).picture
            turned.append(int(rng.integers(2)))
            pictures.append(picture[::-1, ::-1] if turned[-1] else picture)
        yield {"x": render.network_input(pictures, HEIGHT, WIDTH)}, turned
