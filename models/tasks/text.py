"""Lines of text to read: Latin and Chinese, with words, numbers, dates, prices and addresses.

The recogniser knows 6,625 characters, mostly Chinese, so half of the lines are Chinese: words of daily life
and, because no word list covers the alphabet, runs of characters from all 3,755 of GB 2312's first level.
"""

from __future__ import annotations

import functools
import tomllib
import zlib
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Literal

import numpy as np

Split = Literal["calibration", "selection", "test"]
"""Items that calibrate, that choose between results, and that judge: no item is in two of them."""
Script = Literal["latin", "chinese"]

_SHARES: tuple[Split, ...] = ("calibration", "test", "test", "test", "selection", "test", "test", "test")

_Maker = Callable[[np.random.Generator], str]
_DOMAINS = ("com", "org", "net", "de", "cn")


def in_split(text: str, split: Split) -> bool:
    """Return whether a text belongs to the split; every text belongs to exactly one."""
    return _SHARES[zlib.crc32(text.encode()) % len(_SHARES)] == split


def line(rng: np.random.Generator, script: Script, split: Split) -> str:
    """Return a random line of text that belongs to the split."""
    return _drawn(rng, _LATIN if script == "latin" else _CHINESE, split)


def characters(rng: np.random.Generator, split: Split) -> str:
    """Return 4 to 10 random characters of GB 2312's first level, a text that belongs to the split."""
    return _drawn(rng, (_characters,), split)


def _drawn(rng: np.random.Generator, kinds: Sequence[_Maker], split: Split) -> str:
    while True:
        text = kinds[int(rng.integers(len(kinds)))](rng)
        if in_split(text, split):
            return text


def words(rng: np.random.Generator, count: int) -> list[str]:
    """Return ``count`` English words in lower case."""
    return _pick(rng, _listed("english"), count, count)


@functools.cache
def _listed(language: str) -> tuple[str, ...]:
    with Path(__file__).with_name("words.toml").open("rb") as stream:
        return tuple(tomllib.load(stream)[language].split())


def _pick(rng: np.random.Generator, words: Sequence[str], low: int, high: int) -> list[str]:
    return [words[int(i)] for i in rng.integers(len(words), size=int(rng.integers(low, high + 1)))]


def _phrase(rng: np.random.Generator) -> str:
    text = " ".join(_pick(rng, _listed("english"), 2, 4))
    return (text, text.capitalize(), text.title(), text.upper())[int(rng.integers(4))]


def _date(rng: np.random.Generator) -> str:
    year, month, day = rng.integers(1950, 2050), rng.integers(1, 13), rng.integers(1, 29)
    return f"{_phrase(rng)} {year}-{month:02d}-{day:02d}"


def _price(rng: np.random.Generator) -> str:
    words = " ".join(_pick(rng, _listed("english"), 1, 2)).capitalize()
    return f"{words}: ${rng.integers(1, 2000)}.{rng.integers(100):02d}"


def _phone(rng: np.random.Generator) -> str:
    return f"Tel {rng.integers(100, 1000)}-{rng.integers(100, 1000)}-{rng.integers(1000, 10000)}"


def _mail(rng: np.random.Generator) -> str:
    user, host = _pick(rng, _listed("english"), 2, 2)
    return f"{user}{rng.integers(2, 99)}@{host}.{_DOMAINS[int(rng.integers(len(_DOMAINS)))]}"


def _chinese_phrase(rng: np.random.Generator) -> str:
    return "".join(_pick(rng, _listed("chinese"), 2, 5))


def _chinese_number(rng: np.random.Generator) -> str:
    return f"{''.join(_pick(rng, _listed('chinese'), 1, 2))}{rng.integers(1, 10000)}元"


def _chinese_date(rng: np.random.Generator) -> str:
    year, month, day = rng.integers(1950, 2050), rng.integers(1, 13), rng.integers(1, 29)
    return f"{year}年{month}月{day}日{''.join(_pick(rng, _listed('chinese'), 1, 1))}"


def _characters(rng: np.random.Generator) -> str:
    return "".join(_pick(rng, _common_characters(), 4, 10))


@functools.cache
def _common_characters() -> tuple[str, ...]:
    """Return the 3,755 characters of GB 2312's first level: lead bytes B0..D7."""
    codes = [bytes((lead, trail)) for lead in range(0xB0, 0xD8) for trail in range(0xA1, 0xFF)]
    return tuple(code.decode("gb2312") for code in codes if code < b"\xd7\xfa")


_LATIN: tuple[_Maker, ...] = (_phrase, _phrase, _phrase, _date, _price, _phone, _mail)
_CHINESE: tuple[_Maker, ...] = (
    _chinese_phrase,
    _chinese_phrase,
    _chinese_number,
    _chinese_date,
    _characters,
    _characters,
)
