"""Where rows come from: files of several kinds, or a hub dataset, each as rows that can be read in any order."""

import csv
import json
import sys
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from spinlm.data.renderer import RowError
from spinlm.errors import DataError, shortened
from spinlm.recipe.schema import Data
from spinlm.utils.model_path import existing_path


@dataclass(frozen=True)
class Source:
    """Rows that can be read in any order."""

    where: str  # as the recipe names it
    name: str  # the same on every machine
    numbers: Sequence[int]  # of the rows, from 1; of lines, in a file of lines
    read: Callable[[int], Any]  # index to row; raises RowError

    def row(self, index: int) -> dict[str, Any]:
        row = self.read(index)
        if not isinstance(row, dict):
            raise RowError("not_an_object", f"the row is {kind_of(row)}, not an object with named values")
        return row


def open_source(data: Data, rows: int | None = None) -> Source:
    """Open what `data.path` names.

    Args:
        data: of the recipe.
        rows: of a .jsonl file, so many rows at most are looked for; None is all.

    Raises:
        DataError: there is no such file or dataset, or it cannot be read or is empty.
    """
    path = existing_path(data.path)
    if path is not None and path.is_dir():
        raise DataError(f"{data.path}: is a folder; name a file in it ({', '.join(_FILES)})")
    if path is None and names_a_file(data.path):
        raise DataError(f"{data.path}: no such file")
    if path is None:
        source = Source(data.path, data.path, *_hub(data))
    elif path.suffix.lower() not in _FILES:
        raise DataError(f"{data.path}: not a kind of file that can be read; known: {', '.join(_FILES)}")
    elif not path.is_file():
        raise DataError(f"{data.path}: is not a file")
    elif path.stat().st_size == 0:
        raise DataError(f"{data.path}: is empty")
    else:
        try:
            suffix = path.suffix.lower()
            numbers, read = _jsonl(path, rows) if suffix == ".jsonl" else _FILES[suffix](path)
        except OSError as error:
            raise DataError(f"{data.path}: cannot be read: {error}") from error
        source = Source(data.path, path.name, numbers, read)
    if not source.numbers:
        raise DataError(f"{data.path}: is empty: it has no rows")
    return source


def names_a_file(path: str) -> bool:
    """Whether a data path means a local file, there or not, and no dataset of the hub."""
    return path.startswith(("/", "./", "../", "~")) or Path(path).suffix.lower() in _FILES


_Rows = tuple[Sequence[int], Callable[[int], Any]]


def _jsonl(path: Path, rows: int | None = None) -> _Rows:
    numbers: list[int] = []
    offsets, offset = [], 0
    with path.open("rb") as file:
        for number, line in enumerate(file, start=1):
            if len(numbers) == rows:
                break
            if line.removeprefix(b"\xef\xbb\xbf").strip():
                numbers.append(number)
                offsets.append(offset)
            offset += len(line)

    def read(index: int) -> Any:
        with path.open("rb") as file:
            file.seek(offsets[index])
            line = file.readline()
        try:
            return json.loads(line.decode("utf-8-sig"))
        except UnicodeDecodeError as error:
            raise RowError("not_text", f"the line is not UTF-8: {error}") from error
        except (ValueError, RecursionError) as error:
            raise RowError("not_json", f"the line is not JSON: {error}") from error

    return numbers, read


def _json(path: Path) -> _Rows:
    try:
        rows = json.loads(path.read_text(encoding="utf-8-sig"))
    except (ValueError, RecursionError) as error:
        raise DataError(f"{path}: not JSON: {error}. A file with one object on each line is named .jsonl") from error
    if isinstance(rows, dict):
        lists = [rows[key] for key in ("data", "rows") if isinstance(rows.get(key), list)]
        rows = lists[0] if len(lists) == 1 else None
    if not isinstance(rows, list):
        raise DataError(f'{path}: must hold a list of objects, or an object with such a list under "data" or "rows"')
    return range(1, len(rows) + 1), rows.__getitem__


def _csv(path: Path) -> _Rows:
    csv.field_size_limit(sys.maxsize)  # the default refuses long texts
    records: list[list[str]] = []
    numbers = []
    start = 1  # the line on which the record begins; text in quotes may span several
    # What is not UTF-8 becomes lone surrogates, which no text may hold: so its row is refused and not the file.
    with path.open(encoding="utf-8-sig", errors="surrogateescape", newline="") as file:
        reader = csv.reader(file, strict=True)
        try:
            for record in reader:
                if record:
                    records.append(record)
                    numbers.append(start)
                start = reader.line_num + 1
        except csv.Error as error:
            raise DataError(f"{path}, line {start}: not CSV: {error}") from error
    header = records.pop(0) if records else []
    _check_names(path, header)

    def read(index: int) -> Any:
        if len(records[index]) != len(header):
            raise RowError("wrong_width", f"the row has {len(records[index])} values for {len(header)} columns")
        return dict(zip(header, records[index], strict=True))

    return numbers[1:], read


def _parquet(path: Path) -> _Rows:
    import pyarrow as pa
    import pyarrow.parquet as pq

    try:
        # Not through `datasets`, which would open what a column of images names, and keep a copy in its cache.
        file = pq.ParquetFile(path)
        # In batches, as a column of messages with more than 2 GB of text cannot be read at once.
        table = pa.Table.from_batches(file.iter_batches(batch_size=1000), schema=file.schema_arrow)
    except (pa.ArrowException, OSError, ValueError) as error:
        raise DataError(f"{path}: not a Parquet file that can be read: {error}") from error
    _check_names(path, table.column_names)
    return range(1, len(table) + 1), lambda index: _values(table.slice(index, 1))


_FILES: dict[str, Callable[[Path], _Rows]] = {".jsonl": _jsonl, ".json": _json, ".csv": _csv, ".parquet": _parquet}


def _values(row: Any) -> dict[str, Any]:
    """The row of an Arrow table that has one."""
    values = {}
    for name, column in zip(row.column_names, row.columns, strict=True):
        try:
            (values[name],) = column.to_pylist()
        except Exception as error:  # not UTF-8, a date that Python has not, a time zone that nobody knows
            raise RowError("unreadable", f"{name!r} cannot be read: {error}") from error
    return values


def _check_names(path: Path, columns: Sequence[str]) -> None:
    """
    Raises:
        DataError: two columns have the same name.
    """
    seen: set[str] = set()
    for name in columns:
        if name in seen:
            raise DataError(f"{path}: two columns have the same name, {shortened(repr(name))}")
        seen.add(name)


def _hub(data: Data) -> _Rows:
    from datasets import load_dataset

    if "/" not in data.path:  # a name alone may be one of the library's readers, which takes what lies in this folder
        raise DataError(f"{data.path}: no such file here. A dataset of the hub is named OWNER/NAME")
    try:
        rows = load_dataset(data.path, name=data.subset, split=data.split, revision=data.revision)
        for name, feature in rows.features.items():
            if hasattr(feature, "decode"):  # an image or a sound, which would be opened, or fetched
                rows = rows.cast_column(name, replace(feature, decode=False))
    except Exception as error:  # the hub client, its transport and the readers have no common family
        raise DataError(
            f"{data.path}: no such file here, and the hub did not give a dataset of that name: {error}"
        ) from error

    def read(index: int) -> Any:
        try:
            return rows[index]
        except Exception as error:  # whatever a feature's decoder raises
            raise RowError("unreadable", f"it cannot be read: {error}") from error

    return range(1, len(rows) + 1), read


def kind_of(value: Any) -> str:
    names = {type(None): "null", bool: "true or false", str: "text", list: "a list", dict: "an object"}
    return names.get(type(value), "a number" if isinstance(value, int | float) else type(value).__name__)
