"""How far outputs are from a reference with other values for some constants of a model: one session for all trials.

measure = output_noise(model, reference, samples, ["code0_scale"])
measure({"code0_scale": np.float32(0.01)})        # sum |y - reference|² / sum |reference|², over samples and outputs
"""

from __future__ import annotations

import itertools
from collections.abc import Callable, Collection, Mapping
from typing import Any, TypeAlias

import numpy as np
import onnx_graphsurgeon as gs

from graphopt.edit import drop_declared, replace_uses
from graphopt.errors import DataError
from graphopt.model import Model
from graphopt.runtime import Session
from graphopt.samples import Samples
from graphopt.tensors import is_float

Array: TypeAlias = np.ndarray[Any, Any]
Measure: TypeAlias = Callable[[Mapping[str, Array]], float]


def output_noise(
    model: Model, reference: Model, samples: Samples, names: Collection[str], *, limit: int = 0, threads: int = 1
) -> Measure:
    """Return a function from values of constants to the noise at the outputs.

    Outputs that are no floats are left out; each of the others counts relative to its own size.

    Args:
        model: as it is now; not changed.
        reference: computes what is wanted; takes the same feeds.
        samples: feeds, kept in memory: set a limit.
        names: constants of the main graph; values of all that are not given stay as they are.
        limit: feeds read at most (0: all).
        threads: of the sessions.

    Raises:
        DataError: there are no samples.
    """
    feeds = list(itertools.islice(samples, limit or None))
    if not feeds:
        raise DataError("there are no samples to compare outputs on", hint="give --data")
    exact = Session(reference, threads=threads)
    wanted = [_floats(exact.run(feed)) for feed in feeds]
    power = {name: sum(float(np.square(w[name]).sum()) for w in wanted) for name in wanted[0]}
    open_model, held = _with_inputs(model, names)
    session = Session(open_model, threads=threads)

    def measure(values: Mapping[str, Array]) -> float:
        constants = held | {name: np.asarray(values[name], held[name].dtype) for name in values}
        noise = dict.fromkeys(power, 0.0)
        for feed, target in zip(feeds, wanted, strict=True):
            found = _floats(session.run({**feed, **constants}))
            for name, value in target.items():
                noise[name] += float(np.square(found[name] - value).sum())
        return sum(noise[name] / power[name] if power[name] else noise[name] for name in power)

    return measure


def _floats(outputs: Mapping[str, Any]) -> dict[str, Array]:
    """Return the outputs that are arrays of floats, as float64; what is not finite counts as 0."""
    arrays = {name: value for name, value in outputs.items() if isinstance(value, np.ndarray)}
    return {
        name: np.nan_to_num(value.astype(np.float64), nan=0.0, posinf=0.0, neginf=0.0)
        for name, value in arrays.items()
        if is_float(value.dtype)
    }


def _with_inputs(model: Model, names: Collection[str]) -> tuple[Model, dict[str, Array]]:
    """Return a copy of a model that takes these constants as inputs, and their values."""
    copy = model.copy()
    constants = {
        t.name: t for n in copy.graph.nodes for t in n.inputs if isinstance(t, gs.Constant) and t.name in set(names)
    }
    held = {name: np.asarray(constant.values) for name, constant in constants.items()}
    for name, constant in constants.items():
        variable = gs.Variable(name, held[name].dtype, list(held[name].shape))
        replace_uses(constant, variable)
        copy.graph.inputs.append(variable)
    drop_declared(copy.graph, {id(c) for c in constants.values()})
    return copy, held
