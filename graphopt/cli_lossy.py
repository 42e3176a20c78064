"""What the commands `quantize`, `prune`, `factorize` and `sparsify` do alike."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Any

from rich.text import Text

from graphopt.console import emit
from graphopt.errors import SpecError

if TYPE_CHECKING:
    from graphopt.lossy import Finished
    from graphopt.quality import Bound


def bound_of(
    min_sqnr: float | None, min_cosine: float | None, min_agreement: float | None, evaluate: str | None,
    max_drop: str | None, max_loss: float | None,
) -> Bound:  # fmt: skip
    """Return what the options ask of a result.

    Raises:
        SpecError: a number is out of range, or a drop is of no metric.
    """
    from graphopt.quality import Bound  # noqa: PLC0415  (heavy imports only when needed)

    if max_drop is not None and evaluate is None:
        raise SpecError("--max-drop needs a metric", hint="--eval FILE.py:FUNCTION")
    return Bound(min_sqnr, min_cosine, min_agreement, evaluate, max_drop, max_loss)


def finish(
    result: Finished[Any], shown: Any, *, output: Path | None, write_decisions: Path | None, as_json: bool
) -> None:
    """Write the model and its decisions where that was asked for, and print the report: `shown`, or JSON."""
    from graphopt.decisions import save_decisions  # noqa: PLC0415  (heavy imports only when needed)

    if output is not None:
        result.save(output)
    if write_decisions is not None:
        save_decisions(write_decisions, result.report.decisions or {})
    document = {**result.report.to_dict(), "output": str(output) if output else None}
    written = [f"wrote {output}" if output else "nothing written: give -o OUT"]
    written += [f"wrote {write_decisions}"] if write_decisions else []
    emit(document, as_json, shown, *map(Text, written))
