"""Load a recipe: YAML, overrides from the command line, and one line of help for each error."""

import json
import re
from collections.abc import Iterable, Sequence
from glob import escape
from pathlib import Path
from typing import Any

import yaml
from pydantic import ValidationError

from spinlm.errors import RecipeError
from spinlm.recipe.fields import Section, is_tag, iterate_fields, subsections
from spinlm.recipe.foreign_names import translate_key, translate_value
from spinlm.recipe.objective import OBJECTIVES
from spinlm.recipe.schema import Recipe
from spinlm.utils.model_path import existing_path, is_glob, matching_paths
from spinlm.utils.suggest import nearest

MAX_BYTES = 1_000_000  # of a recipe file
DATA_SUFFIXES = (".jsonl", ".ndjson", ".csv", ".tsv", ".parquet", ".arrow", ".gz", ".zst", ".bz2")


def load_recipe(path: Path, overrides: tuple[str, ...] | list[str] = ()) -> Recipe:
    """Read a YAML recipe, apply `section.key=value` overrides, and check it.

    `model.path`, `model.base`, `data.path` and `data.chat_template` become absolute if such a file exists next to
    the recipe, or else in the current folder.

    Raises:
        RecipeError: the file is missing or not a YAML mapping, or a key or value is wrong.
    """
    if path.suffix.lower() in DATA_SUFFIXES and path.exists():
        raise RecipeError(
            f"{path}: this is a data file. Give a recipe that names it as data.path; `spinlm init` writes one"
        )
    try:
        with path.open("rb") as file:
            content = file.read(MAX_BYTES + 1)
        text = content.decode()
    except FileNotFoundError:
        raise RecipeError(f"{path}: no such recipe. `spinlm init` writes one to start from") from None
    except (OSError, ValueError) as error:  # ValueError: not UTF-8, or a name that no file can have
        raise RecipeError(f"{path}: cannot be read as text: {error}") from None
    if len(content) > MAX_BYTES:
        raise RecipeError(f"{path}: not a recipe: it has more than {MAX_BYTES} bytes")
    values = parse_yaml(text, str(path))
    if not isinstance(values, dict):
        raise RecipeError(f"{path}: a recipe is a mapping of sections (model:, data:, …)")
    for override in overrides:
        _apply_override(values, override)
    _resolve_paths(values, path.resolve().parent)
    return parse_recipe(values, str(path))


def parse_recipe(values: dict[str, Any], where: str = "recipe") -> Recipe:
    """Check plain data against the recipe's schema.

    Args:
        values: the sections of the recipe.
        where: what error messages name as the source.

    Raises:
        RecipeError: with one line for each error.
    """
    try:
        recipe = Recipe.model_validate(values)
    except ValidationError as error:
        lines = list(dict.fromkeys(_explain(item) for item in error.errors(include_url=False)))
        raise RecipeError("\n".join(f"{where}: {line}" for line in lines)) from None
    try:
        json.dumps(recipe.model_dump(mode="json"), ensure_ascii=False, allow_nan=False).encode()
    except ValueError as error:  # a lone surrogate, as in a name that is not UTF-8; NaN or infinity
        raise RecipeError(f"{where}: contains a text or a number that JSON cannot represent: {error}") from None
    return recipe


class _Loader(yaml.SafeLoader):
    """YAML in which `5e-7` is a number, as in YAML 1.2.

    Refused are repeated keys, keys without a value, aliases (nested ones can fill any memory), and integers such as 010
    and 1:30, which YAML 1.1 reads as 8 and 90.
    """

    def compose_node(self, parent: yaml.Node | None, index: int) -> yaml.Node | None:
        if self.check_event(yaml.AliasEvent):
            alias = self.peek_event()
            raise yaml.YAMLError(
                f"*{alias.anchor} (line {alias.start_mark.line + 1}): aliases are not supported. Repeat the value"
            )
        return super().compose_node(parent, index)

    def construct_yaml_int(self, node: yaml.ScalarNode) -> int:
        text = self.construct_scalar(node).lstrip("+-")
        if ":" in text or (text.startswith("0") and text.strip("0_").isdigit()):
            line = node.start_mark.line + 1
            raise yaml.YAMLError(f"{text} (line {line}): write a plain number, or text in quotes")
        return int(super().construct_yaml_int(node))

    def construct_mapping(self, node: yaml.MappingNode, deep: bool = False) -> dict[Any, Any]:
        seen = set()
        for key_node, value_node in node.value:
            if not isinstance(key_node, yaml.ScalarNode):
                continue
            key, line = key_node.value, key_node.start_mark.line + 1
            if key in seen:
                raise yaml.YAMLError(f"the key {key!r} appears twice (line {line})")
            if isinstance(value_node, yaml.ScalarNode) and value_node.value == "" and value_node.style is None:
                raise yaml.YAMLError(
                    f"the key {key!r} has no value (line {line}): write null for none, or {{}} for a section with its "
                    "defaults"
                )
            seen.add(key)
        return super().construct_mapping(node, deep)


_EXPONENT = re.compile(r"^[-+]?[0-9][0-9_]*(\.[0-9_]*)?[eE][-+]?[0-9]+$")


class _Dumper(yaml.SafeDumper):
    """YAML that `_Loader` reads back unchanged: a text such as `12e4567`, perhaps a commit, is quoted."""


_Loader.add_constructor("tag:yaml.org,2002:int", _Loader.construct_yaml_int)

for _kind in (_Loader, _Dumper):
    _kind.add_implicit_resolver("tag:yaml.org,2002:float", _EXPONENT, list("-+0123456789"))


def as_yaml(recipe: dict[str, Any]) -> str:
    """Return a recipe's plain data as text that `load_recipe` reads."""
    return yaml.dump(recipe, Dumper=_Dumper, sort_keys=False, allow_unicode=True)


def parse_yaml(text: str, where: str) -> Any:
    """Parse untrusted YAML.

    Raises:
        RecipeError: it is not valid YAML.
    """
    try:
        return yaml.load(text, Loader=_Loader)
    except (yaml.YAMLError, ValueError, LookupError, AttributeError, TypeError, OverflowError) as error:
        raise RecipeError(f"{where}: not valid YAML: {error}") from None
    except RecursionError:
        raise RecipeError(f"{where}: not valid YAML: nested too deeply") from None


def _apply_override(values: dict[str, Any], override: str) -> None:
    key, equals, text = override.partition("=")
    if not equals or not key.strip() or not text.strip():
        raise RecipeError(f"override {override!r}: write section.key=value, for example train.epochs=1 or lora=null")
    *sections, last = key.strip().lstrip("-").split(".")
    target = values
    for section in sections:
        if target.get(section) is None:
            target[section] = {}
        target = target[section]
        if not isinstance(target, dict):
            raise RecipeError(f"override {override!r}: {section} is not a section")
    try:
        target[last] = parse_yaml(text, f"override {override!r}")
    except RecipeError as error:
        hint = " Put the whole override in quotes, so that the shell does not split it" if text.endswith(":") else ""
        raise RecipeError(f"{error}.{hint}" if hint else str(error)) from None


def _resolve_paths(values: dict[str, Any], folder: Path) -> None:
    for section, key in (("model", "path"), ("model", "base"), ("data", "path"), ("data", "chat_template")):
        block = values.get(section)
        if not isinstance(block, dict):
            continue
        value = block.get(key)
        if isinstance(value, list):
            block[key] = [_absolute(path, folder, f"{section}.{key}") for path in value]
        elif value is not None:
            block[key] = _absolute(value, folder, f"{section}.{key}")


def _absolute(value: Any, folder: Path, key: str) -> Any:
    """Make a path absolute, so that later commands work from any folder. Other values are returned unchanged."""
    if not isinstance(value, str) or "\n" in value or "{" in value:
        return value
    try:
        here = Path(value).expanduser()
    except RuntimeError as error:  # ~name of a user that does not exist
        raise RecipeError(f"{key}: {value}: {error}") from None
    found = next(filter(None, (existing_path(str(path)) for path in (folder / here, here))), None)
    if found is None and is_glob(value) and not here.is_absolute():
        patterns = (str(Path(escape(str(base))) / here) for base in (folder, Path.cwd()))
        return next((pattern for pattern in patterns if matching_paths(pattern)), value)
    return str((found or here).absolute()) if found is not None or value.startswith("~") else value


def _explain(error: Any) -> str:
    """Say in one line what a validation error of pydantic means: what, where, what to do."""
    location, kind, value = error["loc"], error["type"], error["input"]
    path = _dotted(location)
    match kind:
        case "extra_forbidden":
            *sections, key = location
            return f"{'.'.join(filter(None, (_dotted(sections), str(key))))}: {_unknown_key(sections, str(key))}"
        case "missing":
            return f"{path}: missing"
        case "value_error":
            return ": ".join(filter(None, [path, str(error["ctx"]["error"])]))
        case "model_type" | "model_attributes_type":
            return f"{path}: should be a section with keys, got {_show(value)}"
        case "union_tag_invalid":
            known, name = ", ".join(OBJECTIVES), value["name"]
            hint = translate_value(f"{path}.name", name)
            return f"{path}.name: should be one of {known}, got {_show(name)}" + (f". {hint}" if hint else "")
    message = error["msg"][0].lower() + error["msg"][1:] + (" (or a list)" if "<value>" in location else "")
    hint = ""
    if kind == "string_type" and isinstance(value, int | float):
        hint = "; put it in quotes to make it text"
    if kind == "float_type" and isinstance(value, str) and _is_number(value):
        hint = "; remove the quotes"
    if kind == "literal_error" and (translation := translate_value(path, value)):
        hint = f"; use {translation}"
    shown = "" if "server" in location else f", got {_show(value)}"  # settings of a server may contain a password
    return f"{path}: {message.replace('input should', 'should')}{shown}{hint}"


def _dotted(location: Iterable[Any]) -> str:
    return ".".join(str(part) for part in location if not is_tag(part))


def _unknown_key(sections: Sequence[Any], key: str) -> str:
    """Name what an unknown key may stand for: the same name in another section, or a similar name in this one."""
    section = _section_at(sections)
    owners = [name for name, objective in OBJECTIVES.items() if key in objective.model_fields]
    if sections and sections[0] == "objective" and owners:
        name = sections[-1].strip("<>")
        return (
            f"not a setting of {name}, only of {', '.join(owners)}. Remove it, or replace the whole section on the "
            f"command line: 'objective={{name: {name}}}'"
        )
    if translation := translate_key(key):
        return f"unknown key: {translation}" if " " in translation else f"unknown key; use {translation}"
    elsewhere = dict.fromkeys(name for name, _ in iterate_fields(Recipe) if name.rpartition(".")[2] == key)
    known = list(section.model_fields)
    if 0 < len(elsewhere) <= 2:
        typo = nearest(key, known, cutoff=0.8)  # data.prompt may mean data.prompts, too
        return f"unknown key; did you mean {' or '.join([*([typo] if typo else []), *elsewhere])}?"
    parts = [name for name in known if (name in key or key in name) and min(len(name), len(key)) > 2]
    if near := parts or [name for name in [nearest(key, known, cutoff=0.8)] if name]:
        return f"unknown key; did you mean {' or '.join(near)}?"
    return f"unknown key; known: {', '.join(known)}"


def _section_at(location: Iterable[Any]) -> type[Section]:
    """Return the class of a section, given its location in the recipe."""
    section: type[Section] = Recipe
    for part in location:
        if is_tag(part):
            section = OBJECTIVES[part.strip("<>")]
        else:
            section = subsections(section.model_fields[part].annotation)[0]
    return section


def _show(value: Any) -> str:
    try:
        text = json.dumps(value, default=str, ensure_ascii=False)
    except TypeError:  # a key that JSON cannot have
        text = repr(value)
    except ValueError:  # a value that contains itself, or a number with too many digits
        text = f"a value of the type {type(value).__name__}"
    return text[:80].encode("utf-8", "backslashreplace").decode()


def _is_number(text: str) -> bool:
    try:
        float(text)
    except ValueError:
        return False
    return True
