"""Building blocks of the recipe's schema: types of fields, and access to fields by name."""

from collections.abc import Iterator, Mapping
from typing import Annotated, Any, get_args

from pydantic import AfterValidator, BaseModel, ConfigDict, Discriminator, Field, JsonValue, Tag
from pydantic.fields import FieldInfo

from spinlm.utils.urls import url_fault


def _refuse_url(path: str) -> str:
    scheme, mark, _ = path.partition("://")
    if mark and scheme != "package":  # the message omits the URL: it may contain a password
        raise ValueError(f"{scheme}:// URLs are not supported: give a local path, or a hub id such as OWNER/NAME")
    return path


def _check_url(url: str) -> str:
    if fault := url_fault(url):
        raise ValueError(fault)
    return url


Positive = Annotated[float, Field(gt=0, allow_inf_nan=False)]
NonNegative = Annotated[float, Field(ge=0, allow_inf_nan=False)]
Fraction = Annotated[float, Field(ge=0, le=1)]
Count = Annotated[int, Field(ge=1)]
Seed = Annotated[int, Field(ge=0, lt=1 << 63)]
ModelOrPath = Annotated[str, Field(min_length=1), AfterValidator(_refuse_url)]
Url = Annotated[str, AfterValidator(_check_url)]
Options = dict[str, JsonValue]


def is_tag(part: Any) -> bool:
    """Return whether a part of an error's location names an alternative of a union, and not a field."""
    return isinstance(part, str) and part.startswith("<")


def value_or_list(value: Any) -> str:
    """Return the tag of a field that holds one value or a list."""
    return "<list>" if isinstance(value, list) else "<value>"


# A discriminator gives one error for a wrong value; a plain union would give one error for each alternative.
PerIteration = Annotated[
    Annotated[Positive, Tag("<value>")] | Annotated[list[Positive], Tag("<list>")], Discriminator(value_or_list)
]


class Section(BaseModel):
    model_config = ConfigDict(frozen=True, extra="forbid", strict=True, use_attribute_docstrings=True)


def subsections(annotation: Any) -> list[type[Section]]:
    """Return the sections that a field may hold: none, one, or several alternatives."""
    if isinstance(annotation, type):
        return [annotation] if issubclass(annotation, Section) else []
    return [section for part in get_args(annotation) for section in subsections(part)]


def iterate_fields(section: type[Section], prefix: str = "") -> Iterator[tuple[str, FieldInfo]]:
    """Yield the dotted name of every field, sections included, and the field."""
    for name, field in section.model_fields.items():
        yield f"{prefix}{name}", field
        for inner in subsections(field.annotation):
            yield from iterate_fields(inner, f"{prefix}{name}.")


def get_path(recipe: Section | Mapping[str, Any], path: str) -> Any:
    """Return the value of a field, such as `train.epochs`, of a recipe or of its plain data; None if it is absent."""
    value: Any = recipe
    for key in path.split("."):
        value = value.get(key) if isinstance(value, Mapping) else getattr(value, key, None)
    return value


def value_at(value: float | list[float], t: int) -> float:
    """Return the value of a per-iteration field at iteration t."""
    return value[t] if isinstance(value, list) else value
