"""Options of a command made from the fields of data classes, so that each is written down once.

`offers(common=Common, settings=DistillSettings)` gives a command, in place of its parameters of these names, one option
per field.  A field whose type is annotated for typer is taken as it stands; of others, the option is named after the
field, has its default, and as help its line of `Attributes:` in the docstring.
"""

from __future__ import annotations

import functools
import inspect
import re
import typing
from collections.abc import Callable, Iterator
from dataclasses import Field, fields
from typing import Annotated, Any

import typer

_SHORT = {float: "X", int: "N", str: "WORD"}


def offers(**groups: type[Any]) -> Callable[[Callable[..., None]], Callable[..., None]]:
    """Return a decorator: parameters of these names are made from options, one per field of their class."""

    def decorate(command: Callable[..., None]) -> Callable[..., None]:
        made = {group: list(_parameters(kind)) for group, kind in groups.items()}
        hints = typing.get_type_hints(command, include_extras=True)
        signature = inspect.signature(command)
        own = [p.replace(annotation=hints[p.name]) for p in signature.parameters.values() if p.name not in groups]
        parameters = [*own, *(parameter for group in made.values() for parameter in group)]

        @functools.wraps(command)
        def run(**given: Any) -> None:
            for group, kind in groups.items():
                values = {parameter.name: given.pop(parameter.name) for parameter in made[group]}
                named = {name: tuple(v) if isinstance(v, list) else v for name, v in values.items() if v is not None}
                given[group] = kind(**named)
            command(**given)

        run.__signature__ = signature.replace(parameters=parameters)  # type: ignore[attr-defined]  # typer reads it
        run.__annotations__ = {p.name: p.annotation for p in parameters}
        return run

    return decorate


def described(kind: type[Any]) -> dict[str, str]:
    """Return what each field means: the entries of `Attributes:` in the docstrings of a class and those above it."""
    found: dict[str, str] = {}
    for cls in reversed(kind.__mro__):
        _, _, attributes = (inspect.cleandoc(cls.__doc__ or "")).partition("Attributes:\n")
        for names, text in re.findall(r"^ {4}([\w, ]+): (.*(?:\n {8}.*)*)", attributes, re.MULTILINE):
            found.update(dict.fromkeys(names.split(", "), re.sub(r"\s+", " ", text).rstrip(".")))
    return found


def _parameters(kind: type[Any]) -> Iterator[inspect.Parameter]:
    hints, helps = typing.get_type_hints(kind, include_extras=True), described(kind)
    for one in fields(kind):
        ready = typing.get_origin(hints[one.name]) is Annotated
        annotation = hints[one.name] if ready else _option(one, helps[one.name])
        default = None if isinstance(one.default, tuple) else one.default
        yield inspect.Parameter(one.name, inspect.Parameter.KEYWORD_ONLY, default=default, annotation=annotation)


def _option(one: Field[Any], text: str) -> Any:
    """Return the type of an option, annotated for typer, by the field's default."""
    default: Any = one.default
    name, kind = "--" + one.name.replace("_", "-"), type(default)
    if kind is bool:
        return Annotated[bool, typer.Option(f"{name}/--no-{name[2:]}", help=text)]
    if kind is tuple:
        return Annotated[list[str] | None, typer.Option(name, metavar="TEXT", help=f"{text}; may be repeated")]
    return Annotated[kind, typer.Option(name, metavar=_SHORT[kind], help=text, show_default=default != "")]
