"""Neighbours among sentences: is the nearest sentence one that says the same?

Every group holds four sentences that say the same thing in other words and another order; groups share words
(people, actions, things, places, times) with many others, so that only the whole meaning tells them apart.
"""

from __future__ import annotations

import functools
import tomllib
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt

from graphopt.models import zoo
from graphopt.models.tasks import Feeds, Predict, Scores, item_limit, require, text

TEST_SENTENCES, CALIBRATION_SENTENCES = 2000, 256
PER_GROUP, BATCH = 4, 16
_SEEDS: dict[text.Split, int] = {"calibration": 1111, "test": 1212}
_SLOTS = ("who", "action", "thing", "place", "when")


def calibration(limit: int | None = None) -> Iterator[Feeds]:
    """Yield batches of 16 sentences: ``input_ids`` and ``attention_mask``, N, length, int64."""
    yield from feeds([sentence for _, sentence in sentences("calibration", item_limit(limit, CALIBRATION_SENTENCES))])


def neighbour_right(predict: Predict, limit: int | None = None) -> Scores:
    """Return, for each of 2,000 sentences, 1.0 where the nearest other one (cosine) is of its group."""
    labelled = list(sentences("test", item_limit(limit, TEST_SENTENCES)))
    vectors = embed(predict, [sentence for _, sentence in labelled])
    groups = np.array([group for group, _ in labelled])
    likeness = vectors @ vectors.T
    np.fill_diagonal(likeness, -np.inf)
    return np.asarray(groups[likeness.argmax(axis=1)] == groups, np.float64)


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
