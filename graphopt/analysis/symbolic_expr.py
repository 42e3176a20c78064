"""Sizes that are not known yet: integer polynomials over symbols, in one normal form.

    a * 2 + a  ->  3*a        (2*a + 1) // 2  ->  a        (a - 1) // 2 + 1  ->  ((a + 1)//2)

A size is an `int` where it is a number, else an `Expr`.  Two sizes that compare equal are equal whatever the
symbols stand for; two that do not may be equal all the same.  Symbols are axes of tensors, so they are not
negative, and what has no polynomial form (floor division, minimum …) becomes a symbol that is called like its
text: the same expression is the same symbol.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from functools import cached_property
from typing import Any, NamedTuple, TypeAlias

MOST_TERMS = 16
"""Terms and factors from which on an expression is not followed any more."""


LONGEST = 1000
"""Characters of a symbol's name."""

LARGEST = 1 << 48
"""Factors from which on int64 might wrap around."""


class TooComplexError(ValueError):
    """An expression has outgrown what is worth knowing."""


class Symbol(NamedTuple):
    """An unknown integer: its name, the least that it can be (None: not known), and what it is the minimum … of."""

    name: str
    low: int | None = 0
    parts: tuple[Any, ...] = ()


Product: TypeAlias = tuple[Symbol, ...]


class Expr:
    """A polynomial that is not a number: products of symbols (sorted) -> their factors."""

    def __init__(self, terms: Mapping[Product, int]) -> None:
        self.terms = terms

    @cached_property
    def text(self) -> str:
        """The normal form; equal texts are equal sizes."""
        found = ""
        for product, factor in sorted(self.terms.items(), key=lambda item: (not item[0], item[0])):
            sign = " - " if factor < 0 else " + "
            names = "*".join(s.name for s in product)
            size = "" if abs(factor) == 1 and names else str(abs(factor))
            found += f"{sign}{size}{'*' if size and names else ''}{names}"
        return found[3:] if found.startswith(" + ") else "-" + found[3:]

    def __eq__(self, other: object) -> bool:
        return self is other or (isinstance(other, Expr) and self.terms == other.terms)

    def __hash__(self) -> int:
        return hash(self.text)

    def __repr__(self) -> str:
        return self.text


Size: TypeAlias = int | Expr


def symbol(name: str, low: int | None = 0, parts: tuple[Size, ...] = ()) -> Expr:
    """Return the expression that is one symbol.

    Raises:
        TooComplexError: its name is longer than anybody reads.
    """
    if len(name) > LONGEST:
        raise TooComplexError
    return Expr({(Symbol(name, low, parts),): 1})


def _terms(a: Size) -> Mapping[Product, int]:
    if isinstance(a, Expr):
        return a.terms
    return {(): a} if a else {}


def _size(terms: Mapping[Product, int]) -> Size:
    kept = {product: factor for product, factor in terms.items() if factor}
    if not kept:
        return 0
    if len(kept) == 1 and () in kept:
        return kept[()]
    if len(kept) > MOST_TERMS or max(len(product) for product in kept) > MOST_TERMS:
        raise TooComplexError
    if max(abs(factor) for factor in kept.values()) > LARGEST:
        raise TooComplexError
    return Expr(kept)


def add(a: Size, b: Size) -> Size:
    """Return a + b."""
    if isinstance(a, int) and isinstance(b, int):
        return a + b
    total = dict(_terms(a))
    for product, factor in _terms(b).items():
        total[product] = total.get(product, 0) + factor
    return _size(total)


def negative(a: Size) -> Size:
    """Return -a."""
    return -a if isinstance(a, int) else Expr({product: -factor for product, factor in a.terms.items()})


def subtract(a: Size, b: Size) -> Size:
    """Return a - b."""
    return add(a, negative(b))


def multiply(a: Size, b: Size) -> Size:
    """Return a * b."""
    if isinstance(a, int) and isinstance(b, int):
        return a * b
    total: dict[Product, int] = {}
    for left, x in _terms(a).items():
        for right, y in _terms(b).items():
            product = tuple(sorted(left + right)) if left and right else left or right
            total[product] = total.get(product, 0) + x * y
    return _size(total)


def product(sizes: Iterable[Size]) -> Size:
    """Return the product of all sizes."""
    total: Size = 1
    for size in sizes:
        total = multiply(total, size)
    return total


def quotient(a: Size, b: Size) -> Size | None:
    """Return q with a = q * b in normal form, None where there is none (or it is not seen)."""
    if a == b and b != 0:
        return 1
    divisor = _terms(b)
    if len(divisor) != 1:
        return None
    ((taken, by),) = divisor.items()
    found: dict[Product, int] = {}
    for factors, count in _terms(a).items():
        rest = _without(factors, taken)
        if rest is None or count % by:
            return None
        found[rest] = count // by
    return _size(found)


def _without(factors: Product, taken: Product) -> Product | None:
    rest = list(factors)
    for one in taken:
        if one not in rest:
            return None
        rest.remove(one)
    return tuple(rest)


def floor_divide(a: Size, b: Size) -> Size:
    """Return a // b, rounded down."""
    if isinstance(a, int) and isinstance(b, int):
        return a // b
    exact = quotient(a, b)
    if exact is not None:
        return exact
    if not isinstance(b, int):
        return symbol(f"({_operand(a)}//{_operand(b)})", 0 if at_most(0, a) and _positive(b) else None)
    whole: dict[Product, int] = {}
    rest: dict[Product, int] = {}
    for factors, count in _terms(a).items():
        if not factors:
            whole[factors], left = divmod(count, b)
            rest[factors] = left
        elif count % b == 0:
            whole[factors] = count // b
        else:
            rest[factors] = count
    remainder = _size(rest)
    if isinstance(remainder, int):
        return add(_size(whole), remainder // b)
    least = low(remainder)
    part = symbol(f"({_operand(remainder)}//{b})", None if least is None or b < 0 else least // b)
    return add(_size(whole), part)


def ceil_divide(a: Size, b: int) -> Size:
    """Return a / b, rounded up, for b > 0."""
    return floor_divide(add(a, b - 1), b)


def modulo(a: Size, b: Size) -> Size:
    """Return a - (a // b) * b."""
    return subtract(a, multiply(floor_divide(a, b), b))


def _operand(a: Size) -> str:
    text = str(a)
    return f"({text})" if " " in text else text


def minimum(a: Size, b: Size) -> Size:
    """Return the smaller of two."""
    if at_most(a, b):
        return a
    if at_most(b, a):
        return b
    lows = low(a), low(b)
    return _of_two("min", a, b, None if None in lows else min(low(a) or 0, low(b) or 0))


def maximum(a: Size, b: Size) -> Size:
    """Return the larger of two."""
    if at_most(a, b):
        return b
    if at_most(b, a):
        return a
    lows = [least for least in (low(a), low(b)) if least is not None]
    return _of_two("max", a, b, max(lows, default=None))


def _of_two(name: str, a: Size, b: Size, least: int | None) -> Size:
    """Return a symbol for an operation for which neither order, nor grouping, nor saying a thing twice matters."""
    parts = {str(part): part for size in (a, b) for part in _parts(name, size)}
    if len(parts) == 1:
        return next(iter(parts.values()))
    return symbol(f"{name}({', '.join(sorted(parts))})", least, tuple(parts[text] for text in sorted(parts)))


def _parts(name: str, a: Size) -> tuple[Size, ...]:
    """Return what `a` is the minimum … of, or `a` itself."""
    if isinstance(a, Expr) and len(a.terms) == 1:
        ((factors, count),) = a.terms.items()
        if count == 1 and len(factors) == 1 and factors[0].name.startswith(f"{name}("):
            return factors[0].parts
    return (a,)


def broadcast(a: Size, b: Size) -> Size | None:
    """Return the size of two axes broadcast together, None where they do not fit."""
    if b in (a, 1):
        return a
    if a == 1:
        return b
    if isinstance(a, int) and isinstance(b, int):
        return None
    for size in (a, b):
        if isinstance(size, int):
            return size
    for size in (a, b):  # what cannot be 1 is what the other fits itself to
        if (low(size) or 0) > 1:
            return size
    return _of_two("broadcast", a, b, 0)


def low(a: Size) -> int | None:
    """Return the least that `a` can be, None where nothing is known."""
    if isinstance(a, int):
        return a
    total = 0
    for factors, count in a.terms.items():
        if not factors:
            total += count
            continue
        if count < 0:
            return None
        least = count
        for one in factors:
            if one.low is None or (one.low < 0 and len(factors) > 1):
                return None
            least *= one.low
        total += least
    return total


def at_most(a: Size, b: Size) -> bool:
    """Tell whether a <= b, whatever the symbols stand for."""
    least = 0 if a == b else low(subtract(b, a))
    return least is not None and least >= 0


def equal(a: Size, b: Size) -> bool | None:
    """Tell whether a == b, None where that depends on the symbols."""
    if a == b:
        return True
    difference = subtract(a, b)
    if isinstance(difference, int):
        return difference == 0
    return False if _positive(difference) or _positive(negative(difference)) else None


def less(a: Size, b: Size) -> bool | None:
    """Tell whether a < b, None where that depends on the symbols."""
    difference = subtract(b, a)
    if _positive(difference):
        return True
    return False if at_most(b, a) else None


def _positive(a: Size) -> bool:
    return (low(a) or 0) > 0
