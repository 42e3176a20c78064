"""Inner tensors of student and teacher that are to be alike, by name, with a projection where one has more channels."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field

import torch

from graphopt.analysis.shapes import infer
from graphopt.bridge.start_from import Channels, channels_left
from graphopt.errors import SpecError, did_you_mean
from graphopt.model import Model
from graphopt.training import DistillSettings


@dataclass
class TapTerm:
    """One pair of tensors.

    Attributes:
        student: name in the student.
        teacher: name in the teacher.
        axis: of the channels, None where nobody told.
        weight: (teacher's channels, student's): the projection; None where the widths are equal.
    """

    student: str
    teacher: str
    axis: int | None = None
    weight: torch.nn.Parameter | None = None
    parameters: list[torch.nn.Parameter] = field(default_factory=list)

    def __post_init__(self) -> None:
        self.parameters = [] if self.weight is None else [self.weight]

    def projected(self, values: torch.Tensor) -> torch.Tensor:
        """Return the student's tensor with the teacher's width."""
        if self.weight is None or self.axis is None:
            return values
        return (values.movedim(self.axis, -1) @ self.weight.to(values.device).T).movedim(-1, self.axis)


def feature_taps(student: Model, teacher: Model, settings: DistillSettings) -> list[TapTerm]:
    """Return the pairs that the settings name.

    Raises:
        SpecError: no such tensor, or shapes that no projection makes alike.
    """
    if not settings.taps:
        return []
    own, other = _tensors(student), _tensors(teacher)
    shapes = infer(student), infer(teacher)
    terms = []
    for text in settings.taps:
        first, second = _names(text, own, other)
        pair = [s.of(t[n]).shape for s, t, n in zip(shapes, (own, other), (first, second), strict=True)]
        terms.append(_term(first, second, pair))
    left = channels_left(student, teacher) if any(term.weight is not None for term in terms) else {}
    for term in terms:
        known = left.get(term.student)
        if known is not None and known.axis == term.axis:
            _start_at(term.weight, known)
    return terms


def _start_at(weight: torch.nn.Parameter | None, left: Channels) -> None:
    """Let a pruned student's channels start as those of the teacher that they are."""
    if weight is not None and tuple(weight.shape) == (left.width, len(left.indices)):
        with torch.no_grad():
            weight.zero_()
            weight[torch.from_numpy(left.indices), torch.arange(len(left.indices))] = 1.0


def _tensors(model: Model) -> dict[str, object]:
    graph = model.graph
    return {t.name: t for t in (*graph.inputs, *(t for n in graph.nodes for t in n.outputs)) if t.name}


def _names(text: str, own: dict[str, object], other: dict[str, object]) -> tuple[str, str]:
    """Return the two names of `student=teacher` (names may hold = themselves), or of one name for both."""
    if text in own and text in other:
        return text, text
    cuts = [i for i, sign in enumerate(text) if sign == "="]
    for cut in cuts:
        if text[:cut] in own and text[cut + 1 :] in other:
            return text[:cut], text[cut + 1 :]
    first, _, second = text.partition("=")
    second = second or first
    for who, name, known in (("student", first, own), ("teacher", second, other)):
        if name not in known:
            raise SpecError(
                f"the {who} has no tensor '{name}'", at="taps",
                hint=did_you_mean(name, known) or "a tap is NAME, or STUDENT=TEACHER where names differ",
            )  # fmt: skip
    raise AssertionError(text)


def _term(first: str, second: str, pair: Sequence[tuple[int | str | None, ...] | None]) -> TapTerm:
    own, other = pair
    if own is None or other is None:
        return TapTerm(first, second)
    both = list(zip(own, other, strict=False))
    differ = [i for i, (a, b) in enumerate(both) if isinstance(a, int) and isinstance(b, int) and a != b]
    if len(own) != len(other) or len(differ) > 1:
        raise SpecError(
            f"tap '{first}' of shape {list(own)} and '{second}' of shape {list(other)}", at="taps",
            hint="taps may differ in one size, that of the channels",
        )  # fmt: skip
    if not differ:
        return TapTerm(first, second)
    axis = differ[0]
    return TapTerm(first, second, axis, _projection(int(own[axis] or 0), int(other[axis] or 0)))


def _projection(inputs: int, outputs: int) -> torch.nn.Parameter:
    """Return a projection to start from: random, of unit gain, the same for the same widths."""
    drawn = torch.randn(outputs, inputs, generator=torch.Generator().manual_seed(outputs * 65_537 + inputs))
    return torch.nn.Parameter(drawn / inputs**0.5)
