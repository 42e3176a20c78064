"""Einsum as the operators that it stands for, wherever that is one product.

    one operand                         ab->ba, ab->a                ->  Transpose, ReduceSum
    every letter in one operand         bthd,hd->bthd                ->  Mul
    no letter of one operand alone      btd,btd->bt                  ->  ReduceSum(Mul)
    else, with something summed over    bthd,bshd->bhts, td,df->tf   ->  MatMul of batch, rows, summed; summed, columns

Letters that only one operand has and the output lacks are summed first.  Letters of a kind (rows, columns, summed) are
joined by Reshape where there are several.  The order of the operands is the one that takes fewer Transposes.  Outer
products (nothing summed) stay: ORT runs them as fast.  Measured against ORT's own Einsum (ORT 1.31, one thread): 0.24
for ReduceSum(Mul), 0.72 to 0.94 for products; MatMul also takes part in further fusions, Einsum in none.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, ClassVar, TypeAlias

import numpy as np

from graphopt.pattern import Op, Value
from graphopt.registry import register
from graphopt.rewrite import Match, RefusedError, Rule, RulePass

Size: TypeAlias = "int | str | None"

Known: TypeAlias = "Mapping[str, Size | Unproved]"

UNUSED = "ABCDEFGHIJKLMNOPQRSTUVWXYZ"


@dataclass(frozen=True)
class Term:
    """A tensor with a letter for each axis."""

    value: Value
    letters: str

    def summed(self, op: Op, gone: Sequence[str]) -> Term:
        """Return it without some letters."""
        axes = [i for i, letter in enumerate(self.letters) if letter in gone]
        if not axes:
            return self
        left = "".join(letter for letter in self.letters if letter not in gone)
        return Term(op.ReduceSum(self.value, axes=axes, keepdims=0), left)

    def ordered(self, op: Op, letters: str) -> Term:
        """Return it with its letters in this order."""
        if letters == self.letters:
            return self
        perm = [self.letters.index(letter) for letter in letters]
        return Term(op.Transpose(self.value, perm=perm), letters)


def terms(m: Match, *operands: Value) -> tuple[list[str], str]:
    """Return the letters of each operand and of the output, `...` spelled out.

    Raises:
        RefusedError: the equation has a diagonal, or an ellipsis whose axes are unknown or of several operands.
    """
    equation = m["einsum"].param("equation")
    text = (equation.decode() if isinstance(equation, bytes) else str(equation)).replace(" ", "")
    left, arrow, right = text.partition("->")
    given = left.split(",")
    if not arrow:
        names = sorted({c for c in left if c.isalpha()})
        right = ("..." if "..." in left else "") + "".join(c for c in names if left.count(c) == 1)
    if "..." in text:
        free = [c for c in UNUSED if c not in text]
        at = [i for i, term in enumerate(given) if "..." in term]
        rank = operands[at[0]].rank if len(at) == 1 else None
        if rank is None:
            raise RefusedError("an ellipsis of several operands, or of unknown rank")
        spelled = "".join(free[: rank - len(given[at[0]]) + 3])
        given[at[0]], right = given[at[0]].replace("...", spelled), right.replace("...", spelled)
    if len(given) != len(operands) or any(len(set(t)) != len(t) for t in (*given, right)):
        raise RefusedError("a letter comes twice in one term")
    return given, right


@dataclass(frozen=True)
class Unproved:
    """Two sizes of one letter that may differ: one may be 1, and broadcast."""

    one: Size
    other: Size


def sizes(a: Value, b: Value, given: Sequence[str]) -> dict[str, Size | Unproved]:
    """Return the size of each letter.

    Raises:
        RefusedError: a rank is unknown.
    """
    found: dict[str, Size | Unproved] = {}
    for value, letters in zip((a, b), given, strict=True):
        shape = value.shape
        if shape is None or len(shape) != len(letters):
            raise RefusedError("the rank of an operand is unknown")
        for letter, size in zip(letters, shape, strict=True):
            one = found.get(letter, size)
            same = letter not in found or (size is not None and one == size)
            found[letter] = size if same or isinstance(one, Unproved) else Unproved(one, size)
    return found


class EinsumOfOne(Rule):
    """Einsum(x) -> Transpose(ReduceSum(x))"""

    min_opset = 12

    @staticmethod
    def pattern(op: Op, x: Value) -> Value:
        return op.Einsum(x, name="einsum")

    @staticmethod
    def rewrite(op: Op, x: Value, m: Match) -> Value:
        given, right = terms(m, x)
        made = Term(x, given[0]).summed(op, [c for c in given[0] if c not in right]).ordered(op, right)
        return op.Identity(x) if made.value is x else made.value

    @staticmethod
    def examples(rng: np.random.Generator) -> dict[str, Any]:
        """Transposes and sums."""
        equations = ["abc->cab", "abc->b", "ab c -> abc", "abc->", "a...->...a", "cba"]
        return {"x": (2, 3, 4), "einsum.equation": equations[rng.integers(len(equations))]}


class EinsumOfTwo(Rule):
    """Einsum(x, y) -> MatMul, Mul or ReduceSum(Mul) of both, with Transposes and Reshapes"""

    min_opset = 12

    @staticmethod
    def pattern(op: Op, x: Value, y: Value) -> Value:
        return op.Einsum(x, y, name="einsum")

    @staticmethod
    def rewrite(op: Op, x: Value, y: Value, m: Match) -> Value:
        given, right = terms(m, x, y)
        known = sizes(x, y, given)
        pair = []
        for value, own, other in ((x, given[0], given[1]), (y, given[1], given[0])):
            gone = [c for c in own if c not in right and c not in other]
            pair.append(Term(value, own).summed(op, gone))
        made = _product(op, pair[0], pair[1], right, known)
        return made.ordered(op, right).value

    @staticmethod
    def examples(rng: np.random.Generator) -> dict[str, Any]:
        """Products of every kind."""
        fixed = dict(zip("abcdefg", (2, 3, 4, 5, 2, 3, 1), strict=True))
        equations = [
            "bac,bdc->bad", "abc,cd->abd", "abc,dc->abd", "abcd,abde->abce", "abcd,aebd->abce", "abc,abc->ab",
            "abc,c->ab", "bcd,cd->bcd", "abc,bcd->ad", "abc,dbc->da", "a b, b c", "...b,bc->...c",
            "abc,ade->bd", "abc,cde->abde", "ab,abc->ac", "a,ab->b", "abcd,acd->bac", "ab,cd->abcd",
            "abcd,abcde->abe", "aebc,abcd->aed", "cd,abc->abd", "abg,gc->abc",
        ]  # fmt: skip
        equation = equations[rng.integers(len(equations))]
        left = equation.replace(" ", "").split("->")[0].split(",")[:2]
        shapes = [tuple(fixed[c] for c in term.replace("...", "de")) for term in left]
        return {"x": shapes[0], "y": shapes[1], "einsum.equation": equation}


def _product(op: Op, a: Term, b: Term, right: str, known: Known) -> Term:
    """Return the product of two, in some order of letters.

    Raises:
        RefusedError: it is an outer product, or letters would be joined whose sizes are unknown.
    """
    both = [c for c in a.letters if c in b.letters]
    alone = [[c for c in t.letters if c not in both] for t in (a, b)]
    over = [c for c in both if c not in right]
    if not over and all(alone):
        raise RefusedError("an outer product, which Einsum does as fast")
    if not over or not any(alone):
        large, small = (a, b) if not alone[1] else (b, a)
        return _times(op, large, small).summed(op, over)
    plans = [_Plan(x, y, right, over) for x, y in ((a, b), (b, a))]
    best = min(plans, key=lambda p: p.transposes(right))
    return best.build(op, known)


def _times(op: Op, large: Term, small: Term) -> Term:
    """Return the elementwise product; every letter of `small` is one of `large`."""
    arranged = small.ordered(op, "".join(c for c in large.letters if c in small.letters))
    first = next((i for i, c in enumerate(large.letters) if c in small.letters), len(large.letters))
    axes = [i - first for i, c in enumerate(large.letters) if c not in small.letters and i > first]
    value = op.Unsqueeze(arranged.value, axes=axes) if axes else arranged.value
    return Term(large.value * value, large.letters)


class _Plan:
    """A MatMul of two terms, one way round.

    Letters: `batch` of both and the output, `rows` of the left one, `over` summed, `columns` of the right one.
    """

    def __init__(self, left: Term, right: Term, output: str, over: Sequence[str]) -> None:
        self.left, self.right = left, right
        both = [c for c in output if c in left.letters and c in right.letters]
        self.batch = "".join(both)
        self.rows = "".join(c for c in output if c in left.letters and c not in both)
        self.columns = "".join(c for c in output if c in right.letters and c not in both)
        kept = [c for c in right.letters if c in over]
        self.over = "".join(kept if right.letters.endswith("".join(kept)) else [c for c in left.letters if c in over])

    def transposes(self, output: str) -> int:
        """Return how many Transposes it takes."""
        wanted = (
            (self.left.letters, self.batch + self.rows + self.over),
            (self.right.letters, self.batch + self.over + self.columns),
            (output, self.batch + self.rows + self.columns),
        )
        return sum(have != want for have, want in wanted)

    def build(self, op: Op, known: Known) -> Term:
        """Return the product as nodes.

        Without batch letters and with one that is summed, the left operand's rows may stay as many axes as they are.
        """
        for letter in self.over:
            size = known[letter]
            if isinstance(size, Unproved):
                raise RefusedError(f"the sizes of '{letter}' are not proved equal: {size.one} and {size.other}")
        left = self.left.ordered(op, self.batch + self.rows + self.over).value
        right = self.right.ordered(op, self.batch + self.over + self.columns).value
        kept, letters = len(self.batch), self.rows + self.columns
        if not self.batch and len(self.over) == 1:
            kept, letters = len(self.rows), self.columns
            whole = len(letters) < 2
            right = right if whole else _joined(op, right, 0, (self.over, self.columns), known)
        else:
            whole = len(self.rows) == len(self.columns) == 1
            left = _joined(op, left, kept, (self.rows, self.over), known)
            right = _joined(op, right, kept, (self.over, self.columns), known)
        made = op.MatMul(left, right)
        if not whole:
            made = op.Reshape(made, shape=[0] * kept + _sizes([_width(c, known) for c in letters]))
        return Term(made, self.batch + self.rows + self.columns)


def _joined(op: Op, value: Value, kept: int, groups: Sequence[str], known: Known) -> Value:
    """Return a tensor with each group of letters joined to one axis, behind `kept` axes that stay."""
    if all(len(g) == 1 for g in groups):
        return value
    return op.Reshape(value, shape=[0] * kept + _sizes([_width(g, known) for g in groups]))


def _width(letters: str, known: Known) -> int | None:
    """Return the size of letters joined, None where it is unknown."""
    found = [known[c] for c in letters]
    return math.prod(s for s in found if isinstance(s, int)) if all(isinstance(s, int) for s in found) else None


def _sizes(found: Sequence[int | None]) -> list[int]:
    """Return the target of a Reshape.

    Raises:
        RefusedError: more than one size is unknown.
    """
    if sum(s is None for s in found) > 1:
        raise RefusedError("more than one size that a Reshape needs is unknown")
    return [-1 if s is None else s for s in found]


@register
@dataclass(frozen=True)
class ExpandEinsum(RulePass):
    """Write Einsum as MatMul, Mul, ReduceSum, Transpose and Reshape.

    Exact, keeps the signature.  Refuses diagonals, outer products, three and more operands, and sizes that are not
    proved equal where Einsum would broadcast a 1.
    """

    name: ClassVar[str] = "expand-einsum"
    optional: ClassVar[bool] = True
    rules: ClassVar = (EinsumOfOne, EinsumOfTwo)
