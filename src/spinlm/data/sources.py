"""The rows of a data set: of a .jsonl, .json, .csv or .parquet file, or of a hub data set, read in any order."""

import csv
import json
import sys
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from spinlm.errors import DataError, RowError, shortened
from spinlm.recipe.schema import Data
from spinlm.utils.model_path import existing_path


@dataclass(frozen=True)
class Source:
    """Rows that can be read in any order."""

    where: str  # the path or hub id in the recipe
    name: str  # the file's name or the hub id: equal on every machine
    numbers: Sequence[int]  # row numbers from 1; line numbers in a .jsonl or .csv file
    read: Callable[[int], Any]  # index to row; raises RowError

    def row(self, index: int) -> dict[str, Any]:
        """Return one row.

        Raises:
            RowError: the row cannot be read, or is not an object.
        """
        row = self.read(index)
        if not isinstance(row, dict):
            raise RowError("not_an_object", f"the row is {kind_of(row)}, not an object with named values")
        return row


def open_source(data: Data, max_rows: int | None = None) -> Source:
    """Open the file or hub data set that `data.path` names.

    Args:
        data: the recipe's data section.
        max_rows: of a .jsonl file, find only the first `max_rows` rows; None means all.

    Raises:
        DataError: the file or data set does not exist, cannot be read or is empty.
    """
    path = existing_path(data.path)
    if path is not None and path.is_dir():
        raise DataError(f"{data.path}: is a folder; name a file in it ({', '.join(_READERS)})")
    if path is None and names_a_file(data.path):
        raise DataError(f"{data.path}: no such file")
    if path is None:
        source = Source(data.path, data.path, *_hub(data))
    elif (suffix := path.suffix.lower()) not in _READERS:
        raise DataError(f"{data.path}: unsupported kind of file; supported: {', '.join(_READERS)}")
    elif not path.is_file():
        raise DataError(f"{data.path}: is not a file")
    elif path.stat().st_size == 0:
        raise DataError(f"{data.path}: is empty")
    else:
        try:
            numbers, read = _jsonl(path, max_rows) if suffix == ".jsonl" else _READERS[suffix](path)
        except OSError as error:
            raise DataError(f"{data.path}: cannot be read: {error}") from error
        source = Source(data.path, path.name, numbers, read)
    if not source.numbers:
        raise DataError(f"{data.path}: is empty: it has no rows")
    return source


def names_a_file(path: str) -> bool:
    """Return whether `data.path` means a local file (which may be missing), not a hub data set."""
    return path.startswith(("/", "./", "../", "~")) or Path(path).suffix.lower() in _READERS


_Rows = tuple[Sequence[int], Callable[[int], Any]]  # Source.numbers and Source.read


def _jsonl(path: Path, max_rows: int | None = None) -> _Rows:
    """Find the lines of a .jsonl file that are not blank; a line is parsed when it is read."""
    numbers: list[int] = []
    offsets, offset = [], 0
    with path.open("rb") as file:
        for number, line in enumerate(file, start=1):
            if len(numbers) == max_rows:
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
        raise DataError(f"{path}: not JSON: {error}. If each line is one object, name the file .jsonl") from error
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
    start = 1  # first line of the record; a quoted text may span several lines
    # Bytes that are not UTF-8 become lone surrogates. Columns refuses these, so a row is bad and not the whole file.
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
    _check_column_names(path, header)

    def read(index: int) -> Any:
        if len(records[index]) != len(header):
            raise RowError("wrong_width", f"the row has {len(records[index])} values for {len(header)} columns")
        return dict(zip(header, records[index], strict=True))

    return numbers[1:], read


def _parquet(path: Path) -> _Rows:
    import pyarrow as pa
    import pyarrow.parquet as pq

    try:
        # `datasets` would open the files that an image column names, and keep a copy of the data in its cache.
        file = pq.ParquetFile(path)
        # In batches, because Arrow cannot read a column of messages with more than 2 GB of text at once.
        table = pa.Table.from_batches(file.iter_batches(batch_size=1000), schema=file.schema_arrow)
    except (pa.ArrowException, OSError, ValueError) as error:
        raise DataError(f"{path}: not a readable Parquet file: {error}") from error
    _check_column_names(path, table.column_names)
    return range(1, len(table) + 1), lambda index: _values(table.slice(index, 1))


_READERS: dict[str, Callable[[Path], _Rows]] = {
    ".jsonl": _jsonl,
    ".json": _json,
    ".csv": _csv,
    ".parquet": _parquet,
}


def _values(row: Any) -> dict[str, Any]:
    """Return the only row of an Arrow table.

    Raises:
        RowError: unreadable.
    """
    values = {}
    for name, column in zip(row.column_names, row.columns, strict=True):
        try:
            (values[name],) = column.to_pylist()
        except Exception as error:  # not UTF-8, a date outside Python's range, an unknown time zone
            raise RowError("unreadable", f"{name!r} cannot be read: {error}") from error
    return values


def _check_column_names(path: Path, columns: Sequence[str]) -> None:
    for index, name in enumerate(columns):
        if name in columns[:index]:
            raise DataError(f"{path}: two columns have the same name, {shortened(repr(name))}")


def _hub(data: Data) -> _Rows:
    from datasets import load_dataset

    if "/" not in data.path:  # load_dataset("csv") and the like would read the files of the current folder
        raise DataError(f"{data.path}: no such file here. A data set of the hub is named OWNER/NAME")
    try:
        rows = load_dataset(data.path, name=data.subset, split=data.split, revision=data.revision)
        for name, feature in rows.features.items():
            if hasattr(feature, "decode"):  # an image or a sound: reading the row would open or download it
                rows = rows.cast_column(name, replace(feature, decode=False))
    except Exception as error:  # the hub client, its transport and the readers share no exception class
        raise DataError(
            f"{data.path}: no such file here, and no data set of this name could be read from the hub: {error}"
        ) from error

    def read(index: int) -> Any:
        try:
            return rows[index]
        except Exception as error:  # a feature's decoder may raise anything
            raise RowError("unreadable", f"it cannot be read: {error}") from error

    return range(1, len(rows) + 1), read


def kind_of(value: Any) -> str:
    """Return what a JSON value is, in words."""
    names = {type(None): "null", bool: "true or false", str: "text", list: "a list", dict: "an object"}
    return names.get(type(value), "a number" if isinstance(value, int | float) else type(value).__name__)
