"""Finding lines of text on a page with the PP-OCR detector: F1 of boxes, or overlap of maps, per page.

The network gives, per pixel, how sure it is to see the core of a line (differentiable binarization, Liao et
al. 2020). Here a core is a connected region above 0.3; its upright bounding box, grown by the usual amount,
is the box found. Lines on these pages are upright, so no rotated boxes are needed.
"""

from __future__ import annotations

import functools
from collections.abc import Callable, Iterator, Sequence

import numpy as np
from scipy import ndimage

from graphopt.models import zoo
from graphopt.models.tasks import Array, Feeds, Predict, Reference, Scores, answers_of, item_limit, render, text
from graphopt.models.tasks.kept import kept

TEST_PAGES, SELECTION_PAGES, CALIBRATION_PAGES = 2000, 128, 32
_COUNTS = {"calibration": CALIBRATION_PAGES, "selection": SELECTION_PAGES, "test": TEST_PAGES}
SIZE = 384  # pixels; a multiple of 32
THRESHOLD, BOX_THRESHOLD, UNCLIP, MIN_SIDE = 0.3, 0.5, 1.6, 3
OVERLAP = 0.5  # intersection over union from which a box counts as found
_SEEDS: dict[text.Split, int] = {"calibration": 505, "selection": 515, "test": 606}


def calibration(limit: int | None = None) -> Iterator[Feeds]:
    """Yield pages one by one, ``x``: 1, 3, 384, 384."""
    yield from feeds("calibration", item_limit(limit, CALIBRATION_PAGES))


def selection(limit: int | None = None) -> Iterator[Feeds]:
    """Yield 128 pages that neither calibrate nor test, one by one."""
    yield from feeds("selection", item_limit(limit, SELECTION_PAGES))


def box_f1(predict: Predict, limit: int | None = None) -> Scores:
    """Return, for each of 2,000 pages, the F1 of the boxes found against the boxes drawn."""
    return _box_f1(predict, "test", item_limit(limit, TEST_PAGES))


def box_f1_selection(predict: Predict, limit: int | None = None) -> Scores:
    """Return the same for the 128 pages that choose."""
    return _box_f1(predict, "selection", item_limit(limit, SELECTION_PAGES))


def map_iou_with(reference: Reference, split: text.Split = "test") -> Callable[..., Scores]:
    """Return an evaluation function: how far does what lies above 0.3 overlap what lies above it for the reference?

    Args:
        reference: a model file with input ``x`` (1, 3, 384, 384), or a ``predict`` function.
        split: whose pages.
    """
    known = answers_of(reference, lambda predict, part, count: list(_packed_maps(predict, part, count)))

    def map_iou(predict: Predict, limit: int | None = None) -> Scores:
        """Return, per page, intersection over union of the two sets of pixels; 1.0 where both are empty."""
        count = item_limit(limit, _COUNTS[split])
        pairs = zip(known(split, count), _packed_maps(predict, split, count), strict=True)
        return np.array([_overlap_of_bits(a, b) for a, b in pairs])

    return map_iou


def map_iou(predict: Predict, limit: int | None = None) -> Scores:
    """Return, for each of 2,000 pages, the overlap with the map of the zoo's detector."""
    return _detector_iou("test")(predict, limit)


def map_iou_selection(predict: Predict, limit: int | None = None) -> Scores:
    """Return the same for the 128 pages that choose."""
    return _detector_iou("selection")(predict, limit)


def feeds(split: text.Split, count: int) -> Iterator[Feeds]:
    """Yield the pages of a split as the network takes them, one by one."""
    for picture, _ in pages(split, count):
        yield {"x": render.network_input([picture], SIZE, SIZE)}


def pages(split: text.Split, count: int) -> Iterator[tuple[render.Picture, list[render.Box]]]:
    """Yield the pages of a split with their boxes, the same every time."""
    for index in range(count):
        yield _page(split, index)


@kept(lambda page: page[0].nbytes)
def _page(split: text.Split, index: int) -> tuple[render.Picture, list[render.Box]]:
    return render.page(np.random.default_rng([_SEEDS[split], index]), split, SIZE)


def found_boxes(probability: Array) -> list[render.Box]:
    """Return the boxes in a probability map (height, width) as (left, top, right, bottom) in pixels."""
    height, width = probability.shape
    regions, count = ndimage.label(probability > THRESHOLD)
    means = ndimage.mean(probability, regions, range(1, count + 1))
    boxes = []
    for (rows, columns), mean in zip(ndimage.find_objects(regions), means, strict=True):
        tall, wide = rows.stop - rows.start, columns.stop - columns.start
        if mean < BOX_THRESHOLD or min(tall, wide) < MIN_SIDE:
            continue
        grow = round(UNCLIP * tall * wide / (2 * (tall + wide)))
        left, top = max(0, columns.start - grow), max(0, rows.start - grow)
        boxes.append((left, top, min(width, columns.stop + grow), min(height, rows.stop + grow)))
    return boxes


def f1(found: Sequence[render.Box], true: Sequence[render.Box]) -> float:
    """Return the F1 of boxes matched one to one, best overlap first; 1.0 when there are none on both sides."""
    if not found or not true:
        return float(len(found) == len(true))
    overlaps = np.array([[_overlap(a, b) for b in true] for a in found])
    matched = 0
    while overlaps.max() >= OVERLAP:
        row, column = np.unravel_index(overlaps.argmax(), overlaps.shape)
        overlaps[row, :] = overlaps[:, column] = 0.0
        matched += 1
    return 2.0 * matched / (len(found) + len(true))


def _box_f1(predict: Predict, split: text.Split, count: int) -> Scores:
    scores = []
    for picture, boxes in pages(split, count):
        output = predict({"x": render.network_input([picture], SIZE, SIZE)})
        scores.append(f1(found_boxes(next(iter(output.values()))[0, 0]), boxes))
    return np.array(scores)


def _packed_maps(predict: Predict, split: text.Split, count: int) -> Iterator[Array]:
    """Yield per page which pixels lie above the threshold, eight in a byte."""
    for feed in feeds(split, count):
        yield np.packbits(next(iter(predict(feed).values())) > THRESHOLD)


def _overlap_of_bits(a: Array, b: Array) -> float:
    either = int(np.bitwise_count(a | b).sum())
    return int(np.bitwise_count(a & b).sum()) / either if either else 1.0


@functools.cache
def _detector_iou(split: text.Split) -> Callable[..., Scores]:
    return map_iou_with(zoo.fetch("ppocr-det"), split)


def _overlap(a: render.Box, b: render.Box) -> float:
    width = min(a[2], b[2]) - max(a[0], b[0])
    height = min(a[3], b[3]) - max(a[1], b[1])
    if width <= 0 or height <= 0:
        return 0.0
    both = width * height
    areas = sum((box[2] - box[0]) * (box[3] - box[1]) for box in (a, b))
    return both / (areas - both)
