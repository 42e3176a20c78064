"""Sizes for trials of data movement: the axes of a reshape that belong together, numbers for what is not known."""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import TypeAlias

from graphopt.analysis.symbolic_expr import Expr, Size, Symbol

Shape: TypeAlias = Sequence[Size]
Entries: TypeAlias = Sequence[tuple[int, Size]]

_SMALL = (2, 3, 5, 7, 11, 13, 17, 19)
_LARGE = (1009, 2003, 3001, 4001, 5003, 6007, 7001, 8009, 9001, 10007, 11003, 12007, 13001, 14009, 15013, 16001)


@dataclass(frozen=True)
class Block:
    """Axes of a reshape whose sizes have one product.

    Attributes:
        read: axes of the input, -1 for a part of unknown size.
        made: axes of the output.
        sizes_read: numbers for a trial, empty where there are none.
        sizes_made: the same of the output.
    """

    read: tuple[int, ...]
    made: tuple[int, ...]
    sizes_read: tuple[int, ...] = ()
    sizes_made: tuple[int, ...] = ()


def stand_ins() -> Iterator[int]:
    """Yield small different sizes."""
    yield from _SMALL


def view_blocks(read: Shape, made: Shape) -> list[Block]:
    """Return the blocks of a reshape, as far as sizes tell; axes of size 1 are in none.

    Args:
        read: shape of the input, sizes as expressions.
        made: shape of the output.
    """
    symbols = sorted({s for size in (*read, *made) if isinstance(size, Expr) for p in size.terms for s in p}, key=_name)
    if len(symbols) > len(_LARGE):
        return []
    large = dict(zip(symbols, _LARGE, strict=False))
    one, other = _entries(read), _entries(made)
    left = [(i, _number(size, large)) for i, (_, size) in enumerate(one)]
    right = [(i, _number(size, large)) for i, (_, size) in enumerate(other)]
    found = list(_matched(left, right))
    taken = sum(len(b.read) for b in found), sum(len(b.made) for b in found)
    back = list(_matched(left[taken[0] :][::-1], right[taken[1] :][::-1]))
    blocks = [*found, *(Block(b.read[::-1], b.made[::-1]) for b in back[::-1])]
    small = dict(zip(symbols, _SMALL, strict=False))
    return [_sized(block, one, other, small) for block in blocks]


def factor(size: Expr) -> int:
    """Return by which number a size is a multiple of symbols, 1 where it is a sum."""
    if len(size.terms) != 1:
        return 1
    ((symbols, times),) = size.terms.items()
    return times if symbols and times > 1 else 1


def _entries(shape: Shape) -> list[tuple[int, Size]]:
    """Return (axis, size) but for sizes of 1; one with a known factor as two: what is unknown (axis -1), the factor."""
    found: list[tuple[int, Size]] = []
    for at, size in enumerate(shape):
        if isinstance(size, Expr) and (times := factor(size)) > 1:
            found += [(-1, Expr(dict.fromkeys(size.terms, 1))), (at, times)]
        elif size != 1:
            found.append((at, size))
    return found


def _name(symbol: Symbol) -> str:
    return symbol.name


def _matched(left: Sequence[tuple[int, int]], right: Sequence[tuple[int, int]]) -> Iterator[Block]:
    """Yield blocks from the front, as long as they close."""
    i = j = 0
    while i < len(left) and j < len(right):
        first, second = i, j
        a, b = left[i][1], right[j][1]
        i, j = i + 1, j + 1
        while a != b:
            if a < b and i < len(left):
                a, i = a * left[i][1], i + 1
            elif b < a and j < len(right):
                b, j = b * right[j][1], j + 1
            else:
                return
        yield Block(tuple(at for at, _ in left[first:i]), tuple(at for at, _ in right[second:j]))


def _sized(block: Block, read: Entries, made: Entries, numbers: Mapping[Symbol, int]) -> Block:
    """Return a block of axes, from one of places, with numbers for a trial where they have one product."""
    inside, outside = [read[i] for i in block.read], [made[i] for i in block.made]
    axes = tuple(at for at, _ in inside), tuple(at for at, _ in outside)
    sizes = [size for _, size in (*inside, *outside) if isinstance(size, Expr)]
    if not {s for size in sizes for product in size.terms for s in product} <= set(numbers):
        return Block(*axes)
    left = tuple(_number(size, numbers) for _, size in inside)
    right = tuple(_number(size, numbers) for _, size in outside)
    fits = min(*left, *right) > 0 and math.prod(left) == math.prod(right)
    return Block(*axes, left, right) if fits else Block(*axes)


def _number(size: Size, numbers: Mapping[Symbol, int]) -> int:
    """Return a size, each symbol replaced by a number."""
    if isinstance(size, int):
        return size
    return sum(factor * math.prod(numbers[s] for s in product) for product, factor in size.terms.items())
