"""What was decided by measuring, as a file that repeats it without measuring.

A `Selection` is a choice among what a pipeline may do: optional passes left out, options set, single sites skipped.
`Decisions` are a selection applied to its pipeline, with everything else the result depends on: replayed by the same
version of graphopt on the same model they give the same file, byte for byte.

    {"graphopt": "0.1.0", "structure": "5f3a…", "result": "optimized", "pipeline": "upgrade-opset{to=17}, …",
     "skip": [["lower-affine", "conv7", "Mul + Add -> BatchNormalization"]],
     "provider": "cpu", "threads": 1, "contrib": false, "seed": 0}
"""

from __future__ import annotations

import importlib.metadata
import json
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import asdict, dataclass, field, fields, replace
from pathlib import Path
from typing import Any, Literal, get_args

from graphopt import registry, spec
from graphopt.base import Target
from graphopt.errors import GraphoptError, SpecError, did_you_mean
from graphopt.external import atomic_write
from graphopt.fingerprint import structure_of
from graphopt.model import Model, Snapshot
from graphopt.pipeline import Pipeline, Settings, Site

Outcome = Literal["optimized", "canonicalized", "input kept"]

AGAIN = "optimize without it and write new decisions"


@dataclass(frozen=True)
class Selection:
    """Which optional passes of a pipeline run, how, and where not.

    Attributes:
        off: names of passes left out.
        options: pass name -> options that differ from the pipeline's.
        skip: single changes left out.
    """

    off: frozenset[str] = frozenset()
    options: Mapping[str, Mapping[str, Any]] = field(default_factory=dict)
    skip: frozenset[Site] = frozenset()

    def without(self, *names: str) -> Selection:
        """Return this selection with further passes left out."""
        return replace(self, off=self.off | set(names), skip=frozenset(s for s in self.skip if s[0] not in names))

    def with_(self, name: str, options: Mapping[str, Any] | None = None) -> Selection:
        """Return this selection with a pass that runs everywhere, with `options` or its usual ones."""
        others = {k: v for k, v in self.options.items() if k != name}
        chosen = {**others, name: options} if options else others
        return Selection(self.off - {name}, chosen, frozenset(s for s in self.skip if s[0] != name))

    def skipping(self, sites: Iterable[Site]) -> Selection:
        """Return this selection with these changes left out, too."""
        return replace(self, skip=self.skip | frozenset(sites))

    def applied(self, pipeline: Pipeline) -> Pipeline | None:
        """Return the pipeline that does what is selected; None where no step is left."""
        steps = tuple(self._steps(pipeline.steps))
        if steps == pipeline.steps:
            return pipeline
        return Pipeline(steps) if steps else None

    def _steps(self, steps: Iterable[spec.Step]) -> Iterator[spec.Step]:
        for step in steps:
            if not isinstance(step, spec.PassStep):
                inner = tuple(self._steps(step.steps))
                if inner:
                    yield replace(step, steps=inner)
            elif step.name not in self.off:
                yield replace(step, options={**step.options, **self.options.get(step.name, {})})


@dataclass(frozen=True)
class Decisions:
    """Everything that a result depends on besides the model.

    Attributes:
        graphopt: the version that decided.
        structure: fingerprint of the model's graph; weights may be others.
        result: what is returned: what the pipeline makes (for `canonicalized` without optional passes), or the input.
        pipeline: text form, with the options chosen and without what was left out.
        skip: changes left out, as (pass, where, what).
        provider, threads, contrib, seed: what passes are told.
    """

    graphopt: str
    structure: str
    result: Outcome
    pipeline: str
    skip: tuple[Site, ...] = ()
    provider: str = "cpu"
    threads: int = 1
    contrib: bool = False
    seed: int = 0

    @classmethod
    def of(
        cls, model: Model | Snapshot, pipeline: Pipeline | None, selection: Selection, settings: Settings,
        result: Outcome,
    ) -> Decisions:  # fmt: skip
        """Return what stands behind a result; `pipeline` is the one that made it (None: nothing was run)."""
        target = settings.target
        return cls(
            graphopt=version(), structure=structure_of(model), result=result,
            pipeline=str(pipeline) if pipeline else "", skip=tuple(sorted(selection.skip)),
            provider=target.provider, threads=target.threads, contrib=target.contrib, seed=settings.seed,
        )  # fmt: skip

    def to_dict(self) -> dict[str, Any]:
        """Return plain values for JSON."""
        return {**asdict(self), "skip": [list(site) for site in self.skip]}

    def check(self, model: Model) -> None:
        """Make sure that they were made for a model of this structure, by this version, with passes that exist.

        Raises:
            SpecError: they were not.
        """
        if self.graphopt != version():
            raise SpecError(f"the decisions are of graphopt {self.graphopt}; this is {version()}", hint=AGAIN)
        if self.structure != structure_of(model):
            raise SpecError("the decisions were made for a model of another structure", hint=AGAIN)
        if self.pipeline:
            Pipeline(self.pipeline)
        for name, _, _ in self.skip:
            registry.get(name)

    def settings(self, settings: Settings) -> Settings:
        """Return `settings` with what was decided in them."""
        here = settings.target.here
        target = Target(self.provider, self.threads, self.contrib, here)
        return replace(settings, skip=frozenset(self.skip), target=target, seed=self.seed)


def version() -> str:
    """Return graphopt's version."""
    return importlib.metadata.version("graphopt")


def save_decisions(path: str | Path, document: Mapping[str, Any]) -> None:
    """Write decisions, as they stand in a report, as a JSON file, atomically.

    Raises:
        ModelError: the file cannot be written.
    """
    path = Path(path)
    with atomic_write(path.resolve() if path.is_symlink() else path) as file:
        file.write((json.dumps(document, indent=2) + "\n").encode())


def read_decisions(path: str | Path) -> Decisions:
    """Return the decisions of a file: one that `--write-decisions` made, or a report of `optimize --json`.

    Raises:
        SpecError: no such file, or not decisions.
    """
    path = Path(path)
    try:
        document = json.loads(path.read_text(encoding="utf-8"))
    except OSError as error:
        raise SpecError(f"cannot read the decisions: {error.strerror}", at=str(path)) from error
    except ValueError as error:
        raise SpecError("the decisions file is not JSON", at=str(path)) from error
    if isinstance(document, dict) and isinstance(document.get("decisions"), dict):
        document = document["decisions"]
    try:
        return _from_document(document)
    except SpecError as error:
        error.at = str(path)
        raise


def checked(decisions: Decisions, model: Model, path: str | Path | None = None) -> Decisions:
    """Return the decisions if they fit the model.

    Raises:
        SpecError: they do not; it names the file.
    """
    try:
        decisions.check(model)
    except GraphoptError as error:
        where = str(path) if path is not None else "the decisions"
        raise SpecError(error.what, at=where, hint=error.hint or AGAIN) from error
    return decisions


def _from_document(document: Any) -> Decisions:
    if not isinstance(document, dict):
        raise SpecError("not a decisions file", hint="--write-decisions FILE makes one")
    known = {f.name: f.type for f in fields(Decisions)}
    for name in document:
        if name not in known:
            raise SpecError(f"unknown entry '{name}' in the decisions", hint=did_you_mean(name, known) or AGAIN)
    missing = [name for name in ("graphopt", "structure", "result", "pipeline") if name not in document]
    if missing:
        raise SpecError(f"the decisions lack '{missing[0]}'", hint="--write-decisions FILE makes them")
    types = {"str": str, "int": int, "bool": bool}
    for name, value in document.items():
        wanted = types.get(str(known[name]))
        if wanted is not None and type(value) is not wanted:
            raise SpecError(f"'{name}' in the decisions is not of type {wanted.__name__}", hint=AGAIN)
    if document["result"] not in get_args(Outcome):
        raise SpecError(f"'result' is one of {', '.join(get_args(Outcome))}", hint=AGAIN)
    skip = document.get("skip", [])
    if not all(isinstance(s, list) and len(s) == 3 and all(isinstance(p, str) for p in s) for s in skip):
        raise SpecError("'skip' holds [pass, where, what] entries", hint=AGAIN)
    return Decisions(**{**document, "skip": tuple((a, b, c) for a, b, c in skip)})
