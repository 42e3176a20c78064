"""Samples: what the user gives -> feeds, one after the other, as often as asked, never all in memory.

file.npz              an array per input; its first axis is cut into batches, or one feed per entry (rank + 1)
folder of .npz        one feed per file, by name
test_data_set_*       ONNX's own: input_0.pb, input_1.pb … (tensors, sequences, optionals); or their parent
file.py:function      a function that yields feeds (dicts)
a list of dicts, or a function, from Python
nothing               random feeds, see `random_feeds`
"""

from __future__ import annotations

import contextlib
import importlib.util
import itertools
import sys
import traceback
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence, Sized
from pathlib import Path
from types import ModuleType
from typing import Any, TypeAlias

from graphopt import sample_files
from graphopt.errors import DataError, did_you_mean
from graphopt.model import Model, ValueSpec
from graphopt.random_feeds import random_feeds
from graphopt.samples import FeedChecker, Feeds, Samples

Spec: TypeAlias = "str | Path | Samples | Mapping[str, Any] | Iterable[Mapping[str, Any]] | Callable[[], Any] | None"


def load_samples(
    spec: Spec, model: Model, *, batch: int = 1, seed: int = 0, shapes: Mapping[str, Sequence[int]] | None = None
) -> Samples:
    """Return the samples that `spec` names, each checked against the model's inputs when it is read.

    Args:
        spec: see the module's docstring; None makes random feeds.
        model: what they are for.
        batch: rows per feed where an `.npz` array is cut along its first axis.
        seed: of random feeds.
        shapes: input name -> shape, for random feeds.

    Raises:
        DataError: unusable; some faults show only when the samples are iterated.
    """
    if shapes and spec is not None:
        raise DataError("shapes are for random feeds; these samples have their own", hint="leave out --shape or --data")
    if batch < 1:
        raise DataError(f"a batch has at least one row, not {batch}")
    if spec is None:
        return random_feeds(model, seed=seed, shapes=shapes)
    checker = FeedChecker(model)
    made = unchecked(spec, checker.specs, batch=batch)
    return Samples(lambda: checker.checked(made), made.description, random=made.random)


def unchecked(spec: Spec, specs: Mapping[str, ValueSpec], *, batch: int = 1) -> Samples:
    """Return what `spec` names as it comes: items of functions and iterables need not be feeds.

    Args:
        spec: see the module's docstring.
        specs: the arrays that are read from files, by name.
        batch: rows per feed where an `.npz` array is cut along its first axis.

    Raises:
        DataError: unusable.
    """
    return _from_text(str(spec), specs, batch) if isinstance(spec, str | Path) else _from_python(spec)


def _from_text(spec: str, specs: Mapping[str, ValueSpec], batch: int) -> Samples:
    path = Path(spec)
    if path.is_dir():
        return sample_files.from_folder(path, specs)
    if path.is_file() and path.suffix == ".npz":
        return sample_files.from_npz(path, specs, batch)
    if path.is_file() and path.suffix == ".pb":
        raise DataError("one .pb file is one tensor", at=spec, hint="name the test_data_set_* folder it is in")
    file, separator, _ = spec.rpartition(":")
    if separator and file.endswith(".py"):
        return _from_function(load_function(spec), spec)
    if not path.exists():
        raise DataError("the samples do not exist", at=spec, hint=_nearby(path))
    hint = (
        f"write {spec}:FUNCTION"
        if path.suffix == ".py"
        else "use .npz, a folder of .npz, test_data_set_*, or file.py:function"
    )
    raise DataError("these samples are of no known form", at=spec, hint=hint)


def _nearby(path: Path) -> str:
    there = path.parent.iterdir() if path.parent.is_dir() else ()
    others = [p.name for p in there if p.is_dir() or p.suffix in (".npz", ".py")]
    return did_you_mean(path.name, others) or "use .npz, a folder of .npz, test_data_set_*, or file.py:function"


def _from_python(spec: Any) -> Samples:
    if isinstance(spec, Samples):
        return spec
    if isinstance(spec, Mapping):
        return Samples(lambda: iter([dict(spec)]), "1 feed")
    if callable(spec):
        return _from_function(spec, getattr(spec, "__name__", "function"))
    if isinstance(spec, Iterator):
        raise DataError(
            "samples are read more than once, and an iterator gives them once only",
            hint="pass a list, or the generator function itself instead of its result",
        )
    if not isinstance(spec, Iterable):
        raise DataError(f"samples cannot be of type {type(spec).__name__}", hint="pass a path or a list of dicts")
    count = f"{len(spec)} feeds" if isinstance(spec, Sized) else "feeds"
    return Samples(lambda: iter(spec), f"{count} from Python")


def _from_function(function: Callable[[], Any], name: str) -> Samples:
    def make() -> Iterator[Feeds]:
        found = call_user(function, name)
        if isinstance(found, Mapping):
            found = [found]
        if not isinstance(found, Iterable):
            raise DataError(
                f"the function returned {type(found).__name__}, not feeds",
                at=name,
                hint="yield dicts: input name -> array",
            )
        iterator = iter(found)
        end = object()
        while (feed := call_user(next, name, iterator, end)) is not end:
            yield feed

    return Samples(make, f"feeds of {name}")


_numbers = itertools.count(1)


def load_function(spec: str) -> Callable[..., Any]:
    """Return the function that `file.py:function` names; the file is imported anew under a name of its own.

    Raises:
        DataError: no such file or function, or the file does not import; says where in it.
    """
    file, separator, name = spec.rpartition(":")
    if not separator or not file.endswith(".py") or not name:
        raise DataError("a function is named as file.py:function", at=spec)
    path = Path(file)
    if not path.is_file():
        raise DataError("the file does not exist", at=file, hint=_nearby_python(path))
    module = _import_file(path, spec)
    found = getattr(module, name, None)
    if found is None:
        names = [n for n, value in vars(module).items() if callable(value) and not n.startswith("_")]
        raise DataError(
            f"the file has no function '{name}'",
            at=file,
            hint=did_you_mean(name, names) or f"it has: {', '.join(names) or 'none'}",
        )
    if not callable(found):
        raise DataError(f"'{name}' is not a function", at=file)
    return found  # type: ignore[no-any-return]


def _nearby_python(path: Path) -> str | None:
    others = [p.name for p in path.parent.glob("*.py")] if path.parent.is_dir() else []
    return did_you_mean(path.name, others)


def _import_file(path: Path, spec: str) -> ModuleType:
    unique = f"graphopt_user_{path.stem}_{next(_numbers)}"
    located = importlib.util.spec_from_file_location(unique, path)
    assert located is not None
    assert located.loader is not None
    module = importlib.util.module_from_spec(located)
    sys.modules[unique] = module  # dataclasses and pickling look the module up
    folder = str(path.resolve().parent)
    sys.path.append(folder)  # last: its neighbours can be imported and hide nothing
    try:
        call_user(located.loader.exec_module, spec, module)
    except DataError:
        del sys.modules[unique]
        raise
    finally:
        sys.path.remove(folder)
    return module


def call_user(function: Callable[..., Any], where: str, *args: Any) -> Any:
    """Call a function of the user's; its exceptions become a DataError that names file and line.

    Raises:
        DataError: the function raised anything but a DataError.
    """
    try:
        with contextlib.redirect_stdout(sys.stderr):  # standard output is for the result
            return function(*args)
    except DataError:
        raise
    except (Exception, SystemExit) as error:
        last = _last_user_frame(error)
        raise DataError(f"the function failed: {type(error).__name__}: {error}", at=where, hint=last) from error


def _last_user_frame(error: BaseException) -> str | None:
    if isinstance(error, SyntaxError) and error.filename:
        return f"{error.filename}, line {error.lineno}: {(error.text or '').strip()}"
    own = str(Path(__file__).parent)
    frames = [f for f in traceback.extract_tb(error.__traceback__) if not f.filename.startswith((own, "<"))]
    if not frames:
        return None
    return f"{frames[-1].filename}, line {frames[-1].lineno}, in {frames[-1].name}: {frames[-1].line}"
