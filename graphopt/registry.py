"""Pass name -> class: the built-ins, entry points of other distributions, and users' own files."""

from __future__ import annotations

import dataclasses
import hashlib
import importlib
import importlib.metadata
import importlib.util
import re
import sys
import traceback
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from types import ModuleType
from typing import TypeVar

from graphopt.base import Pass
from graphopt.errors import SpecError, did_you_mean

ENTRY_POINTS = "graphopt.passes"
"""Entry-point group in which other distributions name modules (or classes) that register passes."""

_BUILT_IN = "graphopt.passes"
_NAME = re.compile(r"[a-z][a-z0-9]*(-[a-z0-9]+)*")

_passes: dict[str, type[Pass]] = {}
_plugins: dict[Path, tuple[str, list[str]]] = {}
_loaded: set[str] = set()
_scanned = False

PassClass = TypeVar("PassClass", bound=type[Pass])


def register(cls: PassClass) -> PassClass:
    """Add a pass to those that pipelines can name; a class decorator, above `@dataclass(frozen=True)`.

    Raises:
        SpecError: no `Pass`, not a frozen dataclass, no docstring, no `name` in kebab case, or a name taken.
    """
    where = f"class {cls.__module__}.{cls.__qualname__}"
    if not (isinstance(cls, type) and issubclass(cls, Pass)):
        raise SpecError("only subclasses of graphopt.Pass can be registered", at=where)
    params = cls.__dict__.get("__dataclass_params__")
    if params is None or not params.frozen:
        raise SpecError(
            "a pass must be a frozen dataclass", at=where, hint="put @dataclass(frozen=True) below @register"
        )
    if not _has_docstring(cls):
        raise SpecError("a pass needs a docstring", at=where, hint="its first line says what it does to the graph")
    if not isinstance(cls.name, str) or not _NAME.fullmatch(cls.name):
        raise SpecError(
            f"{cls.name!r} is not a pass name",
            at=where,
            hint='name: ClassVar[str] = "lower-case-with-hyphens"',
        )
    _check_options(cls, where)
    taken = _passes.get(cls.name)
    if taken is not None and (taken.__module__, taken.__qualname__) != (cls.__module__, cls.__qualname__):
        raise SpecError(
            f"two passes are called '{cls.name}'",
            at=f"{where} and class {taken.__module__}.{taken.__qualname__}",
            hint="give one of them another name",
        )
    _passes[cls.name] = cls
    return cls


def _has_docstring(cls: type[Pass]) -> bool:
    """Tell whether the author wrote one: dataclasses make up the signature where none is."""
    text = cls.__dict__.get("__doc__") or ""
    return bool(text.strip()) and not text.startswith(f"{cls.__name__}(")


def _check_options(cls: type[Pass], where: str) -> None:
    for option in dataclasses.fields(cls):
        if option.default is dataclasses.MISSING and option.default_factory is dataclasses.MISSING:
            raise SpecError(f"option '{option.name}' has no default", at=where, hint="every option needs one")


def get(name: str) -> type[Pass]:
    """Return the pass called `name`.

    Raises:
        SpecError: there is none.
    """
    _load_built_ins()
    _load_entry_points()
    if name not in _passes:
        known = all_passes()
        raise SpecError(
            f"there is no pass '{name}'",
            hint=did_you_mean(name, known) or f"the passes: {', '.join(known)}; your own come with --plugin",
        )
    return _passes[name]


def all_passes() -> dict[str, type[Pass]]:
    """Return every pass by name, in alphabetical order; loads built-ins and entry points once.

    Raises:
        SpecError: they cannot be loaded.
    """
    _load_built_ins()
    _load_entry_points()
    return dict(sorted(_passes.items()))


def _load_built_ins() -> None:
    try:
        importlib.import_module(_BUILT_IN)
    except ModuleNotFoundError as error:
        if error.name != _BUILT_IN:
            raise
        framework = Path(__file__).parent
        raise SpecError(
            "graphopt was imported from a source tree that is not installed, so its passes are missing",
            at=str(framework),
            hint="run the `graphopt` command, or start Python in another folder, or `pip install -e .` here",
        ) from error


def _load_entry_points() -> None:
    global _scanned  # noqa: PLW0603  (the registry is the one thing that is global)
    if _scanned:
        return
    for entry in importlib.metadata.entry_points(group=ENTRY_POINTS):
        key = f"{entry.name}={entry.value}"
        if key in _loaded:
            continue
        with _explained(f"entry point '{entry.name}' ({entry.value})", "upgrade or uninstall the package that has it"):
            thing = entry.load()
            if isinstance(thing, type) and issubclass(thing, Pass):
                register(thing)
        _loaded.add(key)
    _scanned = True


def plugin_of(name: str) -> Path | None:
    """Return the file or folder that a plugin's pass came from, None for other passes."""
    return next((path for path, (_, names) in _plugins.items() if name in names), None)


def load_plugin(path: str | Path) -> list[str]:
    """Load passes from a user's `.py` file, or from every `.py` file of a folder; return their names.

    Files are loaded under names of their own, so neither a folder called `passes` nor two files of the same
    name get in the way.  In a folder, files may import each other relatively (`from .other import …`); those
    whose name starts with an underscore are only loaded that way.  An unchanged file is loaded once.

    Raises:
        SpecError: no such file, an error in it, or no pass in it.
    """
    path = Path(path).expanduser().resolve()
    files = _plugin_files(path)
    state = hashlib.sha256(b"\0".join(file.read_bytes() for file in files)).hexdigest()
    if path in _plugins and _plugins[path][0] == state:
        return list(_plugins[path][1])
    before = dict(_passes)
    try:
        modules = _import_folder(path, files) if path.is_dir() else [_import_file(_plugin_name(path), path)]
    except SpecError:
        _passes.clear()
        _passes.update(before)
        raise
    prefix = modules[0].__name__.partition(".")[0]
    names = sorted(n for n, c in _passes.items() if c.__module__.partition(".")[0] == prefix)
    if not names:
        raise SpecError("the plugin registers no pass", at=str(path), hint="put @graphopt.register above its classes")
    _plugins[path] = (state, names)
    return list(names)


def _plugin_files(path: Path) -> list[Path]:
    if path.is_dir():
        files = sorted(path.glob("*.py"))
        if not files:
            raise SpecError("the plugin folder has no .py file", at=str(path))
        return files
    if not path.is_file():
        raise SpecError("there is no such plugin", at=str(path), hint="give a .py file or a folder of them")
    if path.suffix != ".py":
        raise SpecError("a plugin is a .py file or a folder of them", at=str(path))
    return [path]


def _plugin_name(path: Path) -> str:
    """Return a module name that nothing else has: path digest, then a readable part."""
    stem = re.sub(r"\W", "_", path.stem)
    return f"graphopt_plugin_{hashlib.sha256(str(path).encode()).hexdigest()[:12]}_{stem}"


def _import_folder(folder: Path, files: list[Path]) -> list[ModuleType]:
    package = _plugin_name(folder)
    for name in [n for n in sys.modules if n == package or n.startswith(f"{package}.")]:
        del sys.modules[name]
    start = folder / "__init__.py"
    if start.exists():
        modules = [_import_file(package, start, folder)]
    else:
        spec = importlib.util.spec_from_loader(package, None, is_package=True)
        assert spec is not None
        module = importlib.util.module_from_spec(spec)
        module.__path__ = [str(folder)]
        sys.modules[package] = module
        modules = [module]
    for file in files:
        if not file.name.startswith("_"):
            with _explained(str(file)):
                modules.append(importlib.import_module(f"{package}.{file.stem}"))
    return modules


def _import_file(name: str, file: Path, folder: Path | None = None) -> ModuleType:
    places = None if folder is None else [str(folder)]
    spec = importlib.util.spec_from_file_location(name, file, submodule_search_locations=places)
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    sys.modules[name] = module
    try:
        with _explained(str(file)):
            spec.loader.exec_module(module)
    except SpecError:
        del sys.modules[name]
        raise
    return module


@contextmanager
def _explained(where: str, hint: str | None = None) -> Iterator[None]:
    """Turn whatever foreign code raises into a SpecError that names its line."""
    try:
        yield
    except SpecError as error:
        if error.at is None:
            error.at = where
        raise
    except Exception as error:  # foreign code may raise anything
        frames = traceback.extract_tb(error.__traceback__)
        line = frames[-1].lineno if frames else None
        if isinstance(error, SyntaxError):
            line = error.lineno
        place = (
            f"{where}, line {line}"
            if frames and (frames[-1].filename == where or isinstance(error, SyntaxError))
            else where
        )
        if "relative import" in str(error):
            hint = "files that import each other are loaded by giving their folder as the plugin"
        raise SpecError(f"the plugin fails to load: {type(error).__name__}: {error}", at=place, hint=hint) from error
