"""Writes the two references from what they describe: python docs/generate.py."""

import inspect
import subprocess
import sys
from collections.abc import Iterable, Iterator
from pathlib import Path
from types import UnionType
from typing import Annotated, Any, Literal, Union, get_args, get_origin

import yaml
from pydantic.fields import FieldInfo
from pydantic_core import PydanticUndefined

from spinlm.recipe.fields import Section, subsections
from spinlm.recipe.schema import MUTABLE_FIELDS, Recipe

DOCS = Path(__file__).parent
REFERENCE = """\
# Recipe reference

Every setting of a recipe, its type and its default. A name that is not here is refused, and so is a value of another
type; `spinlm plan RECIPE` looks at a whole recipe in a second. Any of them can be changed on the command line, as
`section.key=value`. [Recipes](recipes.md) has whole ones.

A type that says *or one for each iteration* takes a number, or a list with `selfplay.iterations` numbers. Settings
marked ⟳ say how a run is carried out, not what it computes: they may be changed while it is under way. Where the
default is –, the setting is absent, which `null` says, too.

"""
CLI = "# Command line\n\n`spinlm COMMAND --help` says the same.\n\n"


def recipe_reference() -> str:
    """The settings as Markdown, a table for each section."""
    return REFERENCE + "\n".join(_tables([Recipe], ""))


def _tables(sections: list[type[Section]], name: str) -> Iterator[str]:
    """A table of a section's settings, then those of the sections in it. Alternatives share one table."""
    yield f"## {name or 'The recipe'}\n"
    if len(sections) == 1 and sections[0].__doc__ and name:
        yield inspect.cleandoc(sections[0].__doc__) + "\n"
    yield "| setting | type | default | |"
    yield "|---|---|---|---|"
    inner = []
    for key in dict.fromkeys(key for section in sections for key in section.model_fields):
        path = f"{name}.{key}".lstrip(".")
        fields = {section: section.model_fields[key] for section in sections if key in section.model_fields}
        field = next(iter(fields.values()))
        if below := subsections(field.annotation):
            inner.append((below, path))
        kind = (
            f"[section](#{path.replace('.', '')})" if below else ", ".join(dict.fromkeys(map(_type, fields.values())))
        )
        if below and type(None) in get_args(field.annotation) and field.default is not None:
            kind += ", or `null`"
        mutable = " ⟳" if path in MUTABLE_FIELDS or path.rpartition(".")[0] in MUTABLE_FIELDS else ""
        help_text = _escaped(field.description or "")
        if len(fields) < len(sections):
            help_text += f" Only for {', '.join(_names(fields))}."
        yield f"| `{key}`{mutable} | {kind} | {_default(field, bool(below))} | {help_text} |"
    yield ""
    for below, path in inner:
        yield from _tables(below, path)


def _names(sections: Iterable[type[Section]]) -> list[str]:
    return [f"`{name}`" for section in sections for name in get_args(section.model_fields["name"].annotation)]


def _type(field: FieldInfo) -> str:
    return _kind(field.annotation) + "".join(map(_bound, field.metadata))


def _kind(annotation: Any) -> str:
    origin, arguments = get_origin(annotation), get_args(annotation)
    if origin is Annotated:
        return _kind(arguments[0]) + "".join(map(_bound, _metadata(arguments[1:])))
    if origin is Literal:
        return ", ".join(f"`{_yaml(one)}`" for one in arguments)
    if origin in (Union, UnionType):
        choices = [one for one in arguments if one is not type(None)]
        if any("<value>" in str(one) for one in choices):
            number = "number" in _kind(choices[0])
            return _kind(choices[0]) + (", or one for each iteration" if number else ", or a list of texts")
        return " or ".join(map(_kind, choices))
    if origin is list:
        return f"list of {_kind(arguments[0])}s"
    if origin is dict:
        return "mapping"
    return {str: "text", int: "whole number", float: "number", bool: "`true`, `false`"}[annotation]


def _metadata(annotations: tuple[Any, ...]) -> list[Any]:
    return [part for one in annotations for part in (one.metadata if isinstance(one, FieldInfo) else [one])]


def _bound(one: Any) -> str:
    for name, sign in (("gt", " >"), ("ge", " ≥"), ("lt", ", <"), ("le", ", ≤")):
        if (value := getattr(one, name, None)) is not None:
            return f"{sign} {value:g}"
    return ""


def _default(field: FieldInfo, section: bool) -> str:
    if field.default is PydanticUndefined:
        return "required"
    if section:
        return "absent" if field.default is None else ""
    return "–" if field.default is None else f"`{_yaml(field.default)}`"


def _escaped(text: str) -> str:
    return " ".join(text.split()).replace("|", "\\|")


def _yaml(value: Any) -> str:
    if isinstance(value, float):
        return f"{value:g}"
    return yaml.safe_dump(value, default_flow_style=True).removesuffix("...\n").strip()


def command_line() -> str:
    """The commands as Markdown, from what typer makes of them."""
    command = [sys.executable, "-m", "typer", "spinlm.cli.app", "utils", "docs", "--name", "spinlm"]
    written = subprocess.run(command, capture_output=True, text=True, check=True).stdout
    return CLI + written.split("\n", 1)[1].strip() + "\n"


PAGES = {"recipe-reference.md": recipe_reference, "cli.md": command_line}

if __name__ == "__main__":
    for name, page in PAGES.items():
        (DOCS / name).write_text(page(), encoding="utf-8")
