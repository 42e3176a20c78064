"""What a structure takes: shapes to run at, and which numbers."""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True)
class Input:
    """One input of a network.

    Attributes:
        shape: to export and run at.
        second: another shape that it takes; the same where nothing is dynamic.
        high: whole numbers from 1 to below this; 0 for floats.
    """

    shape: tuple[int, ...]
    second: tuple[int, ...]
    high: int = 0

    @property
    def dynamic(self) -> list[int]:
        """Axes that may change."""
        return [axis for axis, (one, other) in enumerate(zip(self.shape, self.second, strict=True)) if one != other]
