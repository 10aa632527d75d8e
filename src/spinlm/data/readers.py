"""Readers of data files. Each finds the rows of one file, and reads them in any order."""

import csv
import io
import json
import sys
from collections.abc import Callable, Sequence
from functools import partial
from pathlib import Path, PurePath
from typing import Any, BinaryIO

from spinlm.errors import DataError, RowError, shortened

Rows = tuple[Sequence[int], Callable[[int], Any]]
"""Row numbers from 1 (line numbers in a text file), and a function from index to row, which raises RowError."""

_COMPRESSION = {".gz": "gzip", ".zst": "zstd", ".bz2": "bz2"}
_BINARY = (".parquet", ".arrow")


class WrittenFloat(float):
    """A number of a JSON file, with the text that stands in the file."""

    def __new__(cls, text: str) -> "WrittenFloat":
        number = super().__new__(cls, text)
        number.text = text
        return number

    text: str


def file_kind(path: PurePath) -> str | None:
    """Return the suffix of a supported data file, without that of its compression; None for other files."""
    kind = path.suffix.lower()
    if compressed := kind in _COMPRESSION:
        kind = PurePath(path.stem).suffix.lower()
    return kind if kind in READERS and not (compressed and kind in _BINARY) else None


def is_compressed(path: PurePath) -> bool:
    """Return whether a file is compressed as a whole."""
    return path.suffix.lower() in _COMPRESSION


def is_read_by_line(path: PurePath) -> bool:
    """Return whether the lines of a file are found without parsing it, and parsed one at a time."""
    return file_kind(path) in (".jsonl", ".ndjson") and not is_compressed(path)


def open_file(path: Path, max_rows: int | None = None) -> Rows:
    """Find the rows of a file.

    Args:
        path: a file that `file_kind` supports.
        max_rows: of a file with one row per line, find only the first `max_rows`; None means all.

    Raises:
        DataError: the file cannot be read, or is not what its name says.
    """
    kind = file_kind(path)
    assert kind is not None
    try:
        return read_jsonl(path, max_rows) if READERS[kind] is read_jsonl else READERS[kind](path)
    except OSError as error:
        raise DataError(f"{path}: cannot be read: {error}") from error


def _opener(path: Path) -> Callable[[], BinaryIO]:
    """Return a function that opens a text file as bytes. A compressed file is decompressed once, into memory.

    Raises:
        DataError: the file is UTF-16.
    """
    content: bytes | None = None
    if codec := _COMPRESSION.get(path.suffix.lower()):
        import pyarrow as pa

        with pa.input_stream(str(path), compression=codec) as stream:
            content = stream.read()

    def start() -> BinaryIO:
        return path.open("rb") if content is None else io.BytesIO(content)

    with start() as file:
        if file.read(2) in (b"\xff\xfe", b"\xfe\xff"):
            raise DataError(f"{path}: is UTF-16. Save it as UTF-8")
    return start


def read_jsonl(path: Path, max_rows: int | None = None) -> Rows:
    """Find the lines of a .jsonl file that are not blank; a line is parsed when it is read."""
    start = _opener(path)
    numbers: list[int] = []
    offsets, offset = [], 0
    with start() as file:
        for number, line in enumerate(file, start=1):
            if len(numbers) == max_rows:
                break
            if line.removeprefix(b"\xef\xbb\xbf").strip():
                numbers.append(number)
                offsets.append(offset)
            offset += len(line)

    def read(index: int) -> Any:
        with start() as file:
            file.seek(offsets[index])
            line = file.readline()
        try:
            return parse_json(line.decode("utf-8-sig"))
        except UnicodeDecodeError as error:
            raise RowError("not_text", f"the line is not UTF-8: {error}") from error
        except (ValueError, RecursionError) as error:
            hint = ". If the file is one list, name it .json" if line.strip() == b"[" else ""
            raise RowError("not_json", f"the line is not JSON: {error}{hint}") from error

    return numbers, read


def parse_json(text: str) -> Any:
    """Parse JSON. A number with a decimal point keeps its text.

    Raises:
        ValueError, RecursionError: the text is not JSON.
    """
    return json.loads(text, parse_float=WrittenFloat)


def _json(path: Path) -> Rows:
    with _opener(path)() as file:
        content = file.read()
    try:
        rows = parse_json(content.decode("utf-8-sig"))
    except (ValueError, RecursionError) as error:
        if getattr(error, "msg", "") == "Extra data" and content.lstrip(b"\xef\xbb\xbf \t\r\n")[:1] in (b"{", b"["):
            return read_jsonl(path)  # one object per line, as `datasets` reads such a file, too
        raise DataError(f"{path}: not JSON: {error}. If each line is one object, name the file .jsonl") from error
    if isinstance(rows, dict):
        lists = [rows[key] for key in ("data", "rows") if isinstance(rows.get(key), list)]
        rows = lists[0] if len(lists) == 1 else None
    if not isinstance(rows, list):
        raise DataError(f'{path}: must hold a list of objects, or an object with such a list under "data" or "rows"')
    return range(1, len(rows) + 1), rows.__getitem__


def _csv(path: Path, delimiter: str = ",") -> Rows:
    csv.field_size_limit(sys.maxsize)  # the default refuses long texts
    records: list[list[str]] = []
    numbers = []
    start = 1  # first line of the record; a quoted text may span several lines
    # Bytes that are not UTF-8 become lone surrogates. Columns refuses these, so a row is bad and not the whole file.
    with io.TextIOWrapper(_opener(path)(), encoding="utf-8-sig", errors="surrogateescape", newline="") as file:
        reader = csv.reader(file, strict=True, delimiter=delimiter)
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


def _parquet(path: Path) -> Rows:
    import pyarrow as pa
    import pyarrow.parquet as pq

    try:
        # `datasets` would open the files that an image column names, and keep a copy of the data in its cache.
        file = pq.ParquetFile(path)
        # In batches, because Arrow cannot read a column of messages with more than 2 GB of text at once.
        table = pa.Table.from_batches(file.iter_batches(batch_size=1000), schema=file.schema_arrow)
    except (pa.ArrowException, OSError, ValueError) as error:
        raise DataError(f"{path}: not a readable Parquet file: {error}") from error
    return _table(path, table)


def _arrow(path: Path) -> Rows:
    """Map an Arrow file or Arrow stream, such as `datasets` writes, into memory."""
    import pyarrow as pa

    try:
        source = pa.memory_map(str(path))
        opened = pa.ipc.open_file if source.read(6) == b"ARROW1" else pa.ipc.open_stream
        source.seek(0)
        table = opened(source).read_all()
        table.validate(full=True)  # a damaged offset would end the process
    except (pa.ArrowException, OSError, ValueError) as error:
        raise DataError(f"{path}: not a readable Arrow file: {error}") from error
    return _table(path, table)


def _table(path: Path, table: Any) -> Rows:
    try:
        _check_column_names(path, table.column_names)
    except UnicodeDecodeError as error:
        raise DataError(f"{path}: the name of a column is not UTF-8: {error}") from error
    return range(1, len(table) + 1), lambda index: _values(table.slice(index, 1))


def _values(row: Any) -> dict[str, Any]:
    """Return the only row of an Arrow table.

    Raises:
        RowError: unreadable.
    """
    values = {}
    for name, column in zip(row.column_names, row.columns, strict=True):
        try:
            (values[name],) = column.to_pylist()
        except Exception as error:  # pyarrow, datetime and zoneinfo share no exception class
            raise RowError("unreadable", f"{name!r} cannot be read: {error}") from error
    return values


def _check_column_names(path: Path, columns: Sequence[str]) -> None:
    for index, name in enumerate(columns):
        if name in columns[:index]:
            raise DataError(f"{path}: two columns have the same name, {shortened(repr(name))}")


READERS: dict[str, Callable[[Path], Rows]] = {
    ".jsonl": read_jsonl,
    ".ndjson": read_jsonl,
    ".json": _json,
    ".csv": _csv,
    ".tsv": partial(_csv, delimiter="\t"),
    ".parquet": _parquet,
    ".arrow": _arrow,
}
"""The supported kinds of files. Text files may be compressed (.gz, .zst, .bz2)."""
