"""What the commands that lose something have in common: options, the files they touch, how they end."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer
from rich.text import Text

from graphopt.arguments import load_plugins, shapes, thread_counts
from graphopt.console import emit
from graphopt.errors import SpecError
from graphopt.options import (
    AsJson,
    Batch,
    Contrib,
    CustomOps,
    DecisionsFile,
    MaxDrop,
    MaxLoss,
    Metric,
    MinAgreement,
    MinCosine,
    MinSqnr,
    Output,
    Plugins,
    Provider,
    Seconds,
    Seed,
    Shape,
    TimedThreads,
    WriteDecisions,
)

if TYPE_CHECKING:
    from graphopt.lossy import Finished
    from graphopt.model import Model
    from graphopt.quality import Bound


@dataclass(frozen=True, kw_only=True)
class Limits:
    """What may be asked of a result."""

    evaluate: Metric = None
    max_drop: MaxDrop = None
    min_sqnr: MinSqnr = None
    min_cosine: MinCosine = None
    min_agreement: MinAgreement = None
    max_loss: MaxLoss = None

    def bound(self, *, defaults: bool = True) -> Bound:
        """Return it; without, by `defaults`, what suits the outputs, or nothing.

        Raises:
            SpecError: a number is out of range, or a drop is of no metric.
        """
        from graphopt.quality import Bound  # noqa: PLC0415  (heavy imports only when needed)

        if self.max_drop is not None and self.evaluate is None:
            raise SpecError("--max-drop needs a metric", hint="--eval FILE.py:FUNCTION")
        return Bound(
            self.min_sqnr, self.min_cosine, self.min_agreement, self.evaluate, self.max_drop, self.max_loss, defaults
        )


@dataclass(frozen=True, kw_only=True)
class Common(Limits):
    """Options of `quantize`, `prune`, `factorize` and `sparsify`."""

    output: Output = None
    provider: Provider = "cpu"
    threads: TimedThreads = None
    contrib: Contrib = False
    budget: Seconds = 60.0
    decisions: DecisionsFile = None
    write_decisions: WriteDecisions = None
    shape: Shape = None
    batch: Batch = 1
    seed: Seed = 0
    custom_ops: CustomOps = None
    everything: Annotated[bool, typer.Option("--all", help="every row of the table")] = False
    plugin: Plugins = None
    as_json: AsJson = False

    def loaded(self, model: Path, **files: Path | str | None) -> Model:
        """Return the model, once it is sure that all files differ and that those to be written can be.

        Args:
            model: its file.
            **files: others that are read, by the names of their options.

        Raises:
            GraphoptError: a file cannot be read or written, or is named twice.
        """
        from graphopt import destinations  # noqa: PLC0415  (heavy imports only when needed)
        from graphopt.model import load  # noqa: PLC0415

        named = {f"--{name}": path for name, path in files.items()}
        own = {"--decisions": self.decisions, "--output": self.output, "--write-decisions": self.write_decisions}
        destinations.check({"MODEL": model, **named, **own}, self.output, self.write_decisions)
        load_plugins(list(self.plugin or ()))
        return load(model, custom_ops=self.custom_ops or ())

    def arguments(self) -> dict[str, Any]:
        """Return what the functions of all these commands take."""
        return {
            "bound": self.bound(), "provider": self.provider, "contrib": self.contrib, "budget": self.budget,
            "threads": thread_counts(list(self.threads or ())) or 1, "decisions": self.decisions, "batch": self.batch,
            "shapes": shapes(list(self.shape or ())), "seed": self.seed,
        }  # fmt: skip

    def finish(self, result: Finished[Any], shown: Any) -> None:
        """Write the model and its decisions where that was asked for, and print the report: `shown`, or JSON."""
        from graphopt.decisions import save_decisions  # noqa: PLC0415  (heavy imports only when needed)

        if self.output is not None:
            result.save(self.output)
        if self.write_decisions is not None:
            save_decisions(self.write_decisions, result.report.decisions or {})
        document = {**result.report.to_dict(), "output": str(self.output) if self.output else None}
        written = [f"wrote {self.output}" if self.output else "nothing written: give -o OUT"]
        written += [f"wrote {self.write_decisions}"] if self.write_decisions else []
        emit(document, self.as_json, shown, *map(Text, written))
