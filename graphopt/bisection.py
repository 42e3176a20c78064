"""Which change of a pipeline breaks a model: the first n changes only, n by binary search."""

from __future__ import annotations

from graphopt.errors import SpecError
from graphopt.model import Source, load
from graphopt.pipeline import Pipeline, Run, Settings, StopPipelineError, make_reference
from graphopt.samples import Samples


def bisect(
    pipeline: Pipeline, model: Source, *, samples: Samples | None = None, settings: Settings | None = None
) -> str:
    """Find the first change that breaks the model; return it in words.

    Runs the pipeline with the first n changes only, n by binary search, each result checked against the original.

    Raises:
        SpecError: the whole pipeline breaks nothing.
    """
    base = Settings(**{**vars(settings or Settings()), "verify": "off", "on_failure": "stop", "reproducers": None})
    original = load(model)
    reference = make_reference(original, samples, base)

    def attempt(limit: int | None) -> tuple[bool, int, str]:
        run = Run(pipeline, original, samples, Settings(**{**vars(base), "limit": limit}))
        try:
            run.transform()
            result = run.finish()
        except StopPipelineError as error:
            return False, run.applied, f"{run.last_change} ({error.what})"
        fine = reference.check(result.model, exactness=run.exactness)
        return fine.ok, run.applied, f"{run.last_change} ({'; '.join(fine.failures)})"

    fine, total, what = attempt(None)
    if fine:
        raise SpecError("nothing to bisect: the whole pipeline keeps the outputs", hint="give the failing --data")
    low, high = 0, total
    while high - low > 1:
        middle = (low + high) // 2
        fine, _, found = attempt(middle)
        if fine:
            low = middle
        else:
            high, what = middle, found
    if high == total and total:
        _, _, what = attempt(high)
    return f"change {high} of {total}: {what}"
