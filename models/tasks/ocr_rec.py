"""Reading lines of text with the PP-OCR recogniser: lines right, and characters right.

Lines that calibrate, choose and test have different seeds, and no text is in two of these sets.
"""

from __future__ import annotations

import functools
import itertools
import unicodedata
from collections.abc import Iterator

import numpy as np
import numpy.typing as npt
import onnx

from graphopt.errors import ModelError
from graphopt.models import zoo
from graphopt.models.tasks import Array, Feeds, Predict, Scores, item_limit, render, text
from graphopt.models.tasks.kept import kept
from graphopt.models.tasks.training_lines import Lines

TEST_LINES, SELECTION_LINES, CALIBRATION_LINES, FITTING_LINES, TRAINING_LINES = 2000, 500, 128, 2048, 16384
HEIGHT, WIDTH_STEP, BATCH, TRAINING_BATCH = 48, 80, 8, 16
_SEEDS: dict[text.Split, int] = {"calibration": 101, "selection": 111, "test": 202}
_TRAINING = Lines("ocr-rec", seed=121, calibration=_SEEDS["calibration"], height=HEIGHT, characters=0.5)
_CHUNK = 128  # lines drawn at a time, then batched by width
_TRAINING_CHUNK = 1024


def calibration(limit: int | None = None) -> Iterator[Feeds]:
    """Yield batches of up to 8 lines, ``x``: N, 3, 48, W with W a multiple of 80; 128 lines unless asked for more."""
    for _, feeds in _batches("calibration", item_limit(limit, max(limit or 0, CALIBRATION_LINES))):
        yield feeds


def fitting(limit: int | None = None) -> Iterator[Feeds]:
    """Yield the lines that calibrate and more of them, 2,048 in all: what weights are fitted to by least squares."""
    yield from calibration(item_limit(limit, FITTING_LINES))


def training(limit: int | None = None) -> Iterator[Feeds]:
    """Yield batches of up to 16 lines to train on, 16,384 unless asked for more; no text of theirs is in another split.

    Half are lines as those of the other splits, half are runs of random Chinese characters.
    """
    for _, feeds in _training(limit):
        yield feeds


def training_labelled(limit: int | None = None) -> Iterator[tuple[Feeds, npt.NDArray[np.int64]]]:
    """Yield the same with the classes of the characters, N x longest, filled up with -1.

    Lines with characters that the recogniser does not know are left out.
    """
    classes = {character: index for index, character in enumerate(characters())}
    for lines, feeds in _training(limit):
        spelt = [[classes.get(character, -1) for character in line.text] for _, line in lines]
        known = [row for row, labels in enumerate(spelt) if -1 not in labels]
        labels = np.full((len(known), max((len(spelt[row]) for row in known), default=0)), -1, np.int64)
        for filled, row in zip(labels, known, strict=True):
            filled[: len(spelt[row])] = spelt[row]
        if known:
            yield {"x": feeds["x"][known]}, labels


def _training(limit: int | None) -> Iterator[tuple[list[tuple[int, render.Line]], Feeds]]:
    lines = _TRAINING.first(item_limit(limit, max(limit or 0, TRAINING_LINES)))
    return _by_width(lines, _TRAINING_CHUNK, TRAINING_BATCH)


def selection(limit: int | None = None) -> Iterator[Feeds]:
    """Yield 500 lines that neither calibrate nor test, in batches of up to 8."""
    for _, feeds in _batches("selection", item_limit(limit, SELECTION_LINES)):
        yield feeds


def lines_right(predict: Predict, limit: int | None = None) -> Scores:
    """Return, for each of 2,000 lines, 1.0 where every character is right, else 0.0."""
    return _right(_readings(predict, "test", item_limit(limit, TEST_LINES)))


def lines_right_latin(predict: Predict, limit: int | None = None) -> Scores:
    """Return the same for 2,000 Latin lines."""
    return _right(_readings(predict, "test", item_limit(limit, TEST_LINES), "latin"))


def lines_right_chinese(predict: Predict, limit: int | None = None) -> Scores:
    """Return the same for 2,000 Chinese lines."""
    return _right(_readings(predict, "test", item_limit(limit, TEST_LINES), "chinese"))


def lines_right_selection(predict: Predict, limit: int | None = None) -> Scores:
    """Return the same for the 500 lines that choose."""
    return _right(_readings(predict, "selection", item_limit(limit, SELECTION_LINES)))


def character_accuracy(predict: Predict, limit: int | None = None) -> Scores:
    """Return, for each of 2,000 lines, 1 - edit distance / length of the longer text."""
    readings = _readings(predict, "test", item_limit(limit, TEST_LINES))
    return np.array([1.0 - edit_distance(read, true) / max(len(read), len(true)) for read, true in readings])


def decode(probabilities: Array) -> list[str]:
    """Return the texts of a batch (N, steps, characters): best per step, repeats and blanks dropped (CTC)."""
    alphabet = characters()
    texts = []
    for best in probabilities.argmax(axis=2):
        kept = best[(best != 0) & (np.diff(best, prepend=0) != 0)]
        texts.append("".join(alphabet[index] for index in kept))
    return texts


@functools.cache
def characters() -> tuple[str, ...]:
    """Return what each class stands for: blank, the list in the model's metadata, space."""
    model = onnx.load(str(zoo.fetch("ppocr-rec")), load_external_data=False)
    listed = [entry.value for entry in model.metadata_props if entry.key == "character"]
    if not listed:
        raise ModelError("the recogniser's metadata holds no 'character' list", at="ppocr-rec")
    return ("", *listed[0].splitlines(), " ")


def edit_distance(a: str, b: str) -> int:
    """Return how many characters must be inserted, deleted or replaced to turn ``a`` into ``b``."""
    row = list(range(len(b) + 1))
    for i, left in enumerate(a, start=1):
        diagonal, row[0] = row[0], i
        for j, right in enumerate(b, start=1):
            diagonal, row[j] = row[j], min(row[j] + 1, row[j - 1] + 1, diagonal + (left != right))
    return row[-1]


def samples(split: text.Split, count: int, script: text.Script | None = None) -> Iterator[render.Line]:
    """Yield the first lines of a split, or of one script in it; the same every time."""
    indices = (i for i in itertools.count() if script in {None, render.script_of(_generator(split, i))})
    for index in itertools.islice(indices, count):
        yield _line(split, index)


def _generator(split: text.Split, index: int) -> np.random.Generator:
    return np.random.default_rng([_SEEDS[split], index])


@kept(lambda line: line.picture.nbytes)
def _line(split: text.Split, index: int) -> render.Line:
    return render.line(_generator(split, index), split)


def _right(readings: list[tuple[str, str]]) -> Scores:
    return np.array([float(read == true) for read, true in readings])


def _readings(
    predict: Predict, split: text.Split, count: int, script: text.Script | None = None
) -> list[tuple[str, str]]:
    """Return (text read, true text) per line.

    Full-width forms count as plain ones, spaces at the ends not at all.
    """
    readings = [("", "")] * count
    for lines, feeds in _batches(split, count, script):
        read = decode(next(iter(predict(feeds).values())))
        for (index, line), seen in zip(lines, read, strict=True):
            readings[index] = (unicodedata.normalize("NFKC", seen).strip(), line.text)
    return readings


def _batches(
    split: text.Split, count: int, script: text.Script | None = None
) -> Iterator[tuple[list[tuple[int, render.Line]], Feeds]]:
    """Yield lines of about the same width with their index, and the feed they make."""
    return _by_width(samples(split, count, script), _CHUNK, BATCH)


def _by_width(
    lines: Iterator[render.Line], chunk: int, batch: int
) -> Iterator[tuple[list[tuple[int, render.Line]], Feeds]]:
    """Yield batches of lines of about the same width, out of one chunk after the other."""
    drawn = enumerate(lines)
    while taken := list(itertools.islice(drawn, chunk)):
        by_width: dict[int, list[tuple[int, render.Line]]] = {}
        for item in taken:
            steps = -(-render.scaled_width(item[1].picture, HEIGHT) // WIDTH_STEP)
            by_width.setdefault(steps * WIDTH_STEP, []).append(item)
        for width, group in sorted(by_width.items()):
            for start in range(0, len(group), batch):
                part = group[start : start + batch]
                x = render.network_input([line.picture for _, line in part], HEIGHT, width)
                yield part, {"x": x}
