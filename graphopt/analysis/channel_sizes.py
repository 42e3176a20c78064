"""Sizes for trials of data movement: the axes of a reshape that belong together, numbers for what is not known."""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import TypeAlias

from graphopt.analysis.symbolic_expr import Expr, Size, Symbol

Shape: TypeAlias = Sequence[Size]

_SMALL = (2, 3, 5, 7, 11, 13, 17, 19)
_LARGE = (1009, 2003, 3001, 4001, 5003, 6007, 7001, 8009, 9001, 10007, 11003, 12007, 13001, 14009, 15013, 16001)


@dataclass(frozen=True)
class Block:
    """Axes of a reshape whose sizes have one product.

    Attributes:
        read: axes of the input.
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
    left = [(at, _number(size, large)) for at, size in enumerate(read) if size != 1]
    right = [(at, _number(size, large)) for at, size in enumerate(made) if size != 1]
    found = list(_matched(left, right))
    taken = sum(len(b.read) for b in found), sum(len(b.made) for b in found)
    back = list(_matched(left[taken[0] :][::-1], right[taken[1] :][::-1]))
    blocks = [*found, *(Block(b.read[::-1], b.made[::-1]) for b in back[::-1])]
    small = dict(zip(symbols, _SMALL, strict=False))
    return [_sized(block, read, made, small) for block in blocks]


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


def _sized(block: Block, read: Shape, made: Shape, numbers: Mapping[Symbol, int]) -> Block:
    """Return a block with numbers for a trial, where they have one product."""
    if not set(_symbols(block, read, made)) <= set(numbers):
        return block
    left = tuple(_number(read[at], numbers) for at in block.read)
    right = tuple(_number(made[at], numbers) for at in block.made)
    fits = min(*left, *right) > 0 and math.prod(left) == math.prod(right)
    return Block(block.read, block.made, left, right) if fits else block


def _symbols(block: Block, read: Shape, made: Shape) -> Iterator[Symbol]:
    for size in (*(read[at] for at in block.read), *(made[at] for at in block.made)):
        if isinstance(size, Expr):
            yield from (s for product in size.terms for s in product)


def _number(size: Size, numbers: Mapping[Symbol, int]) -> int:
    """Return a size, each symbol replaced by a number."""
    if isinstance(size, int):
        return size
    return sum(factor * math.prod(numbers[s] for s in product) for product, factor in size.terms.items())
