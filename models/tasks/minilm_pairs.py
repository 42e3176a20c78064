"""Neighbours among sentences: is the nearest sentence one that says the same?

Every group holds four sentences that say the same thing in other words and another order; groups share words
(people, actions, things, places, times) with many others, so that only the whole meaning tells them apart.
Beside these labels, vectors and neighbours can be compared with those of a reference model.
"""

from __future__ import annotations

import functools
import tomllib
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt

from graphopt.models import zoo
from graphopt.models.tasks import Feeds, Predict, Reference, Scores, answers_of, item_limit, require, text

TEST_SENTENCES, SELECTION_SENTENCES, CALIBRATION_SENTENCES = 2000, 512, 256
_COUNTS = {"calibration": CALIBRATION_SENTENCES, "selection": SELECTION_SENTENCES, "test": TEST_SENTENCES}
PER_GROUP, BATCH = 4, 16
_SEEDS: dict[text.Split, int] = {"calibration": 1111, "selection": 1121, "test": 1212}
_SLOTS = ("who", "action", "thing", "place", "when")


def calibration(limit: int | None = None) -> Iterator[Feeds]:
    """Yield batches of 16 sentences: ``input_ids`` and ``attention_mask``, N, length, int64."""
    yield from feeds([sentence for _, sentence in sentences("calibration", item_limit(limit, CALIBRATION_SENTENCES))])


def selection(limit: int | None = None) -> Iterator[Feeds]:
    """Yield 512 sentences of groups that neither calibrate nor test, in batches of 16."""
    yield from feeds([sentence for _, sentence in sentences("selection", item_limit(limit, SELECTION_SENTENCES))])


def neighbour_right(predict: Predict, limit: int | None = None) -> Scores:
    """Return, for each of 2,000 sentences, 1.0 where the nearest other one (cosine) is of its group."""
    return _neighbour_right(predict, "test", item_limit(limit, TEST_SENTENCES))


def neighbour_right_selection(predict: Predict, limit: int | None = None) -> Scores:
    """Return the same for the 512 sentences that choose."""
    return _neighbour_right(predict, "selection", item_limit(limit, SELECTION_SENTENCES))


def cosine_with(reference: Reference, split: text.Split = "test") -> Callable[..., Scores]:
    """Return an evaluation function: the cosine of each sentence's vector with the reference model's.

    Args:
        reference: a model file that takes ``input_ids`` and ``attention_mask``, or a ``predict`` function.
        split: whose sentences.
    """
    known = answers_of(reference, _vectors)

    def likeness(predict: Predict, limit: int | None = None) -> Scores:
        """Return a cosine per sentence."""
        count = item_limit(limit, _COUNTS[split])
        return np.asarray((_vectors(predict, split, count) * known(split, count)).sum(axis=1))

    return likeness


def neighbours_kept_with(reference: Reference, split: text.Split = "test") -> Callable[..., Scores]:
    """Return an evaluation function: is the nearest other sentence the one that the reference model finds?

    Arguments are those of ``cosine_with``.
    """
    known = answers_of(reference, _vectors)

    def kept(predict: Predict, limit: int | None = None) -> Scores:
        """Return 1.0 per sentence whose nearest other one (cosine) stays, else 0.0."""
        count = item_limit(limit, _COUNTS[split])
        same = nearest(_vectors(predict, split, count)) == nearest(known(split, count))
        return np.asarray(same, np.float64)

    return kept


def cosine(predict: Predict, limit: int | None = None) -> Scores:
    """Return, for each of 2,000 sentences, the cosine of its vector with that of the zoo's MiniLM."""
    return _minilm_cosine("test")(predict, limit)


def cosine_selection(predict: Predict, limit: int | None = None) -> Scores:
    """Return the same for the 512 sentences that choose."""
    return _minilm_cosine("selection")(predict, limit)


def neighbours_kept(predict: Predict, limit: int | None = None) -> Scores:
    """Return, for each of 2,000 sentences, 1.0 where its neighbour is the one that the zoo's MiniLM finds, else 0.0."""
    return _minilm_neighbours("test")(predict, limit)


def neighbours_kept_selection(predict: Predict, limit: int | None = None) -> Scores:
    """Return the same for the 512 sentences that choose."""
    return _minilm_neighbours("selection")(predict, limit)


def nearest(vectors: npt.NDArray[np.float64]) -> npt.NDArray[np.int64]:
    """Return for each unit vector (N, size) which other one is nearest."""
    likeness = vectors @ vectors.T
    np.fill_diagonal(likeness, -np.inf)
    return np.asarray(likeness.argmax(axis=1), np.int64)


def embed(predict: Predict, texts: list[str]) -> npt.NDArray[np.float64]:
    """Return a unit vector for each text (N, 384)."""
    vectors = np.concatenate([next(iter(predict(feed).values())) for feed in feeds(texts)]).astype(np.float64)
    return np.asarray(vectors / np.linalg.norm(vectors, axis=1, keepdims=True))


def feeds(texts: list[str]) -> Iterator[Feeds]:
    """Yield the texts in batches of 16, padded to the longest of the batch."""
    tokenizer = _tokenizer()
    for start in range(0, len(texts), BATCH):
        encoded = [entry.ids for entry in tokenizer.encode_batch(texts[start : start + BATCH])]
        ids = np.zeros((len(encoded), max(map(len, encoded))), np.int64)  # 0 is the padding token
        mask = np.zeros_like(ids)
        for row, entry in enumerate(encoded):
            ids[row, : len(entry)] = entry
            mask[row, : len(entry)] = 1
        yield {"input_ids": ids, "attention_mask": mask}


def sentences(split: text.Split, count: int) -> Iterator[tuple[int, str]]:
    """Yield number of group and sentence; the groups of a split are distinct, and in no other split."""
    rng = np.random.default_rng(_SEEDS[split])
    seen: set[str] = set()
    while len(seen) * PER_GROUP < count:
        rows = {slot: int(rng.integers(len(_table()[slot]))) for slot in _SLOTS}
        key = repr(rows)
        if key in seen or not text.in_split(key, split):
            continue
        for order in _table()["orders"][: count - len(seen) * PER_GROUP]:
            said = {slot: str(rng.choice(_table()[slot][row])) for slot, row in rows.items()}
            sentence = order.format(**{slot: _lowered(slot, words) for slot, words in said.items()})
            yield len(seen), sentence[0].upper() + sentence[1:]
        seen.add(key)


def _neighbour_right(predict: Predict, split: text.Split, count: int) -> Scores:
    groups = np.array([group for group, _ in sentences(split, count)])
    return np.asarray(groups[nearest(_vectors(predict, split, count))] == groups, np.float64)


def _vectors(predict: Predict, split: text.Split, count: int) -> npt.NDArray[np.float64]:
    return embed(predict, [sentence for _, sentence in sentences(split, count)])


@functools.cache
def _minilm_cosine(split: text.Split) -> Callable[..., Scores]:
    return cosine_with(zoo.fetch("minilm-torchscript"), split)


@functools.cache
def _minilm_neighbours(split: text.Split) -> Callable[..., Scores]:
    return neighbours_kept_with(zoo.fetch("minilm-torchscript"), split)


def _lowered(slot: str, words: str) -> str:
    return words[0].lower() + words[1:] if slot == "who" else words


@functools.cache
def _table() -> dict[str, Any]:
    with Path(__file__).with_name("sentences.toml").open("rb") as stream:
        return tomllib.load(stream)


@functools.cache
def _tokenizer() -> Any:
    tokenizer = require("tokenizers", "tokenizers").Tokenizer.from_file(str(zoo.fetch("minilm-tokenizer")))
    tokenizer.no_padding()
    tokenizer.no_truncation()
    return tokenizer
