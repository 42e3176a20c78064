"""Results as tables for a terminal (rich renderables); the numbers are the results' own."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from typing import TYPE_CHECKING, Any

from rich.console import RenderableType
from rich.table import Table
from rich.text import Text

if TYPE_CHECKING:
    pass


def grid(columns: Sequence[str], rows: Iterable[Mapping[str, Any]], numeric: Iterable[str] = ()) -> Table:
    """Return rows as a plain table; `numeric` columns are right-aligned."""
    right = set(numeric)
    table = Table(box=None, pad_edge=False, header_style="bold")
    for column in columns:
        table.add_column(column.replace("_", " "), justify="right" if column in right else "left", overflow="fold")
    for row in rows:
        table.add_row(*(_cell(row.get(column)) for column in columns))
    return table


def _cell(value: Any) -> str:
    if value is None:
        return "-"
    if isinstance(value, bool):
        return "yes" if value else "NO"
    if isinstance(value, float):
        return f"{value:.3g}"
    if isinstance(value, list | tuple):
        return ",".join("?" if v is None else str(v) for v in value)
    return str(value)


def lines(texts: Iterable[str], style: str = "") -> list[RenderableType]:
    """Return sentences that fold instead of being cut."""
    return [Text(text, style=style, overflow="fold") for text in texts]
