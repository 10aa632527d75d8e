"""SampleFeatures a recipe: YAML, overrides from the command line, and a line of help for each thing that is wrong."""

import json
import re
from pathlib import Path
from typing import Any

import yaml
from pydantic import ValidationError

from spinlm.errors import RecipeError
from spinlm.recipe.schema import LIST, ONE, Recipe, Section
from spinlm.utils.model_path import existing_path
from spinlm.utils.suggest import nearest

LONGEST = 1_000_000  # bytes of a recipe


def load_recipe(path: Path, overrides: tuple[str, ...] | list[str] = ()) -> Recipe:
    """Read a YAML recipe, apply `section.key=value` overrides, and check it.

    `model.path`, `data.path` and `data.chat_template` that exist beside the recipe, or else in the current folder,
    become absolute.

    Raises:
        RecipeError: the file is missing or no YAML mapping, or a key or value is wrong.
    """
    if path.suffix.lower() in (".jsonl", ".parquet", ".csv") and path.exists():
        raise RecipeError(f"{path}: this is data; a recipe, which `spinlm init` writes, names it as data.path")
    try:
        with path.open("rb") as file:
            content = file.read(LONGEST + 1)
        text = content.decode()
    except FileNotFoundError:
        raise RecipeError(f"{path}: no such recipe. `spinlm init` writes one to start from") from None
    except (OSError, ValueError) as error:  # ValueError: not UTF-8, or a name that no file can have
        raise RecipeError(f"{path}: cannot be read as text: {error}") from None
    if len(content) > LONGEST:
        raise RecipeError(f"{path}: not a recipe: it has more than {LONGEST} bytes")
    values = parse_yaml(text, str(path))
    if not isinstance(values, dict):
        raise RecipeError(f"{path}: a recipe is a mapping of sections (model:, data:, …)")
    for override in overrides:
        _apply_override(values, override)
    _resolve_paths(values, path.resolve().parent)
    return parse_recipe(values, str(path))


def parse_recipe(values: dict[str, Any], where: str = "recipe") -> Recipe:
    """Check plain data against the recipe's schema.

    Raises:
        RecipeError: with one line for each thing that is wrong.
    """
    try:
        recipe = Recipe.model_validate(values)
    except ValidationError as error:
        lines = list(dict.fromkeys(_explain(item) for item in error.errors(include_url=False)))
        raise RecipeError("\n".join(f"{where}: {line}" for line in lines)) from None
    try:
        json.dumps(recipe.model_dump(mode="json"), ensure_ascii=False, allow_nan=False).encode()
    except ValueError as error:  # a lone surrogate, as in a name that is not UTF-8; NaN; a number without end
        raise RecipeError(f"{where}: holds a text or a number that cannot be written down: {error}") from None
    return recipe


class _Loader(yaml.SafeLoader):
    """YAML where `5e-7` is a number, as in YAML 1.2 and everywhere else.

    Errors are: a repeated or empty key; an alias, which recipes do not need and of which a few lines fill any memory; a
    whole number such as 010 or 1:30, which YAML 1.1 takes for 8 and 90.
    """

    def compose_node(self, parent: yaml.Node | None, index: int) -> yaml.Node | None:
        if self.check_event(yaml.AliasEvent):
            alias = self.peek_event()
            raise yaml.YAMLError(f"*{alias.anchor} (line {alias.start_mark.line + 1}): write out what it stands for")
        return super().compose_node(parent, index)

    def construct_yaml_int(self, node: yaml.ScalarNode) -> int:
        text = self.construct_scalar(node).lstrip("+-")
        if ":" in text or (text.startswith("0") and text.strip("0_").isdigit()):
            line = node.start_mark.line + 1
            raise yaml.YAMLError(f"{text} (line {line}): write it as a plain number, or as text in quotes")
        return int(super().construct_yaml_int(node))

    def construct_mapping(self, node: yaml.MappingNode, deep: bool = False) -> dict[Any, Any]:
        seen = set()
        for key_node, value_node in node.value:
            if not isinstance(key_node, yaml.ScalarNode):
                continue
            key, line = key_node.value, key_node.start_mark.line + 1
            if key in seen:
                raise yaml.YAMLError(f"the key {key!r} stands twice (line {line})")
            if isinstance(value_node, yaml.ScalarNode) and value_node.value == "" and value_node.style is None:
                raise yaml.YAMLError(
                    f"the key {key!r} has no value (line {line}): write null for none, or {{}} for a section with its "
                    "defaults"
                )
            seen.add(key)
        return super().construct_mapping(node, deep)


_EXPONENT = re.compile(r"^[-+]?[0-9][0-9_]*(\.[0-9_]*)?[eE][-+]?[0-9]+$")


class _Dumper(yaml.SafeDumper):
    """YAML that `_Loader` reads as it was: a text such as `12e4567`, a commit maybe, is quoted."""


_Loader.add_constructor("tag:yaml.org,2002:int", _Loader.construct_yaml_int)

for _kind in (_Loader, _Dumper):
    _kind.add_implicit_resolver("tag:yaml.org,2002:float", _EXPONENT, list("-+0123456789"))


def as_yaml(recipe: dict[str, Any]) -> str:
    """A recipe, given as plain data, as a file that `load_recipe` reads."""
    return yaml.dump(recipe, Dumper=_Dumper, sort_keys=False, allow_unicode=True)


def parse_yaml(text: str, where: str) -> Any:
    """The value of YAML that anybody may have written.

    Raises:
        RecipeError: it is none.
    """
    try:
        return yaml.load(text, Loader=_Loader)
    except yaml.scanner.ScannerError as error:
        line = error.problem_mark.line if error.problem_mark else 0
        if "".join(text.splitlines()[line : line + 1]).lstrip(" ").startswith("\t"):
            raise RecipeError(f"{where}: line {line + 1} begins with a tab: indent with spaces: {error}") from None
        raise RecipeError(f"{where}: not valid YAML: {error}") from None
    except (yaml.YAMLError, ValueError, LookupError, AttributeError, TypeError, OverflowError) as error:  # a tag amiss
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
        hint = " Put the whole override in quotes, so that the shell leaves it alone" if text.endswith(":") else ""
        raise RecipeError(f"{error}.{hint}" if hint else str(error)) from None


def _resolve_paths(values: dict[str, Any], folder: Path) -> None:
    for section, key in (("model", "path"), ("data", "path"), ("data", "chat_template")):
        block = values.get(section)
        if not isinstance(block, dict):
            continue
        value = block.get(key)
        if not isinstance(value, str) or "\n" in value or "{" in value:
            continue
        try:
            here = Path(value).expanduser()
        except RuntimeError as error:  # ~name of a user that does not exist
            raise RecipeError(f"{section}.{key}: {value}: {error}") from None
        # Absolute, so that the run can be continued, and asked, from any folder.
        found = next(filter(None, (existing_path(str(path)) for path in (folder / here, here))), None)
        if found is not None or value.startswith("~"):
            block[key] = str((found or here).absolute())


def _explain(item: Any) -> str:
    location = [part for part in item["loc"] if part not in (ONE, LIST)]
    dotted = ".".join(str(part) for part in location)
    match item["type"]:
        case "extra_forbidden":
            return f"{dotted}: unknown key{_suggest([str(part) for part in location])}"
        case "missing":
            return f"{dotted}: missing"
        case "value_error":
            return str(item["ctx"]["error"])
        case "model_type" | "model_attributes_type":
            return f"{dotted}: should be a section with keys, got {_show(item['input'])}"
    message = item["msg"][0].lower() + item["msg"][1:] + (" (or a list)" if ONE in item["loc"] else "")
    hint = ""
    if item["type"] == "string_type" and isinstance(item["input"], int | float):
        hint = "; put it in quotes to make it text"
    if item["type"] == "float_type" and isinstance(item["input"], str) and _is_number(item["input"]):
        hint = "; leave the quotes out"
    secret = "" if "server" in location else f", got {_show(item['input'])}"  # a password or a key may be in it
    return f"{dotted}: {message.replace('input should', 'should')}{secret}{hint}"


def _suggest(location: list[str]) -> str:
    """What may have been meant by an unknown key: one with a similar name here, or the same name in another section."""
    *sections, key = location
    known = list(_section(sections).model_fields)
    elsewhere = [name for name in Recipe.model_fields if key in getattr(_section([name]), "model_fields", {})]
    if 0 < len(elsewhere) <= 2:
        return f"; did you mean {' or '.join(f'{name}.{key}' for name in elsewhere)}?"
    if near := nearest(key, known):
        return f"; did you mean {near}?"
    return f"; known: {', '.join(known)}"


def _section(names: list[str]) -> Any:
    """The class of a section of the recipe; None for a field that is none."""
    model: Any = Recipe
    for name in names:
        annotation = model.model_fields[name].annotation
        choices = [annotation, *getattr(annotation, "__args__", ())]
        model = next((one for one in choices if isinstance(one, type) and issubclass(one, Section)), None)
    return model


def _show(value: Any) -> str:
    try:
        text = json.dumps(value, default=str, ensure_ascii=False)
    except TypeError:  # keys that JSON has not
        text = repr(value)
    except ValueError:  # a value that holds itself, a number without end
        text = f"a value of the type {type(value).__name__}"
    return text[:80].encode("utf-8", "backslashreplace").decode()


def _is_number(text: str) -> bool:
    try:
        float(text)
    except ValueError:
        return False
    return True
