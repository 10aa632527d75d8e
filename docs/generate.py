"""Generate the references of recipe and command line from the code: python docs/generate.py."""

import inspect
from collections.abc import Iterable, Iterator
from pathlib import Path
from types import UnionType
from typing import Annotated, Any, Literal, Union, get_args, get_origin, get_type_hints

import yaml
from pydantic.fields import FieldInfo
from pydantic_core import PydanticUndefined
from typer.models import ArgumentInfo

from spinlm.cli.app import app
from spinlm.recipe.fields import Section, subsections
from spinlm.recipe.schema import MUTABLE_FIELDS, Recipe

DOCS = Path(__file__).parent
REFERENCE = """\
# Recipe reference

All settings of a recipe. An unknown setting or a value of another type is an error. Change a setting on the command
line with `section.key=value`. [Recipes](recipes.md) shows whole recipes.

A *list of float* has one value for each iteration. A setting marked ⟳ may change during a run, because it does not
change the result. The default – means absent; write it as `null`.

"""
CLI = """\
# Command line

`spinlm COMMAND --help` says the same. `spinlm --version` prints the version. Every command has `--help`.
"""
VALUES = {Path: " PATH", str: " TEXT", int: " N", float: " X", bool: ""}
"""Placeholders for the value of an option, by its type."""


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
        return ", ".join(f"`{_yaml(value)}`" for value in arguments)
    if origin in (Union, UnionType):
        choices = [choice for choice in arguments if choice is not type(None)]
        if any("<value>" in str(choice) for choice in choices):
            return f"{_kind(choices[0])}, or list of {'float' if 'float' in _kind(choices[0]) else 'str'}"
        return " or ".join(map(_kind, choices))
    if origin is list:
        return f"list of {_kind(arguments[0])}"
    if origin is dict:
        return "mapping"
    return {str: "str", int: "int", float: "float", bool: "`true`, `false`"}[annotation]


def _metadata(annotations: tuple[Any, ...]) -> list[Any]:
    return [part for item in annotations for part in (item.metadata if isinstance(item, FieldInfo) else [item])]


def _bound(constraint: Any) -> str:
    for name, sign in (("gt", " >"), ("ge", " ≥"), ("lt", ", <"), ("le", ", ≤")):
        if (value := getattr(constraint, name, None)) is not None:
            return f"{sign} {'2^63' if value == 1 << 63 else f'{value:g}'}"
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
    """The commands as Markdown, a table of arguments and options for each."""
    return CLI + "".join(line + "\n" for command in app.registered_commands for line in _command(command))


def _command(command: Any) -> Iterator[str]:
    """The section of one command, line by line, from the signature of its function."""
    yield f"\n## `spinlm {command.name or command.callback.__name__.replace('_', '-')}`\n"
    yield inspect.cleandoc(command.callback.__doc__) + "\n"
    yield "| argument or option | |"
    yield "|---|---|"
    hints = get_type_hints(command.callback, include_extras=True)
    for name, parameter in inspect.signature(command.callback).parameters.items():
        kind, info = get_args(hints[name])[:2]
        if isinstance(info, ArgumentInfo):
            names = name.upper()
        else:
            choices = f" {{{','.join(get_args(kind))}}}" if get_origin(kind) is Literal else None
            value = choices or next(VALUES[part] for part in (kind, *get_args(kind)) if part in VALUES)
            declared = [part for part in (info.default, *(info.param_decls or ())) if isinstance(part, str)]
            names = ", ".join(declared or [f"--{name.replace('_', '-')}"]) + value
        default = parameter.default
        required = default is inspect.Parameter.empty
        notes = "required" if required else "" if default in (None, False) else f"default: {default}"
        yield f"| `{names}` | {_escaped(info.help)}{f' ({notes})' if notes else ''} |"


PAGES = {"recipe-reference.md": recipe_reference, "cli.md": command_line}

if __name__ == "__main__":
    for name, page in PAGES.items():
        (DOCS / name).write_text(page(), encoding="utf-8")
