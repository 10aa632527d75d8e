"""The rows of a data set, read in any order: of one or several files, of a folder, or of a hub data set."""

import bisect
import itertools
import json
import os
import re
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from functools import cached_property
from pathlib import Path, PurePath
from typing import Any

from spinlm.data.readers import READERS, Rows, file_kind, open_file
from spinlm.errors import DataError, RowError, shortened
from spinlm.recipe.data import Data
from spinlm.utils.hub import Repository
from spinlm.utils.model_path import existing_path, is_glob, matching_paths

ROWS_TO_INSPECT = 100
"""Readable rows whose keys together are the columns of a data set."""

_SPLITS = {
    **dict.fromkeys(("train", "training"), "train"),
    **dict.fromkeys(("validation", "valid", "val", "dev"), "validation"),
    **dict.fromkeys(("test", "testing", "eval", "evaluation"), "test"),
}
"""Words in file names that name a split, as `datasets` reads them."""

_SHARD_NAME = re.compile(r"(.+)-\d{5}-of-\d{5}")


@dataclass(frozen=True)
class Shard:
    """One file, or one hub data set."""

    where: str  # the path or hub id
    name: str  # the path below the folder that all shards share, or the hub id: equal on every machine
    numbers: Sequence[int]  # row numbers from 1; line numbers in a text file
    read: Callable[[int], Any]  # index to row; raises RowError


@dataclass(frozen=True)
class Source:
    """Rows that can be read in any order."""

    where: str  # data.path
    shards: Sequence[Shard]

    @cached_property
    def _ends(self) -> list[int]:
        return list(itertools.accumulate(len(shard.numbers) for shard in self.shards))

    def __len__(self) -> int:
        return self._ends[-1]

    def _locate(self, index: int) -> tuple[Shard, int]:
        at = bisect.bisect_right(self._ends, index)
        return self.shards[at], index - (self._ends[at - 1] if at else 0)

    def row(self, index: int) -> dict[str, Any]:
        """Return one row. A row that is a list of objects becomes its messages.

        Raises:
            RowError: the row cannot be read, or is not an object.
        """
        shard, at = self._locate(index)
        row = shard.read(at)
        if isinstance(row, list) and row and all(isinstance(item, dict) for item in row):
            return {"messages": row}
        if not isinstance(row, dict):
            raise RowError("not_an_object", f"the row is {kind_of(row)}, not an object with named values")
        return row

    def columns(self) -> list[str]:
        """Return the keys of the first ROWS_TO_INSPECT readable rows, in order.

        Raises:
            DataError: no row can be read.
        """
        columns: dict[str, None] = {}
        readable, first_error = 0, None
        for index in range(len(self)):
            try:
                columns.update(dict.fromkeys(self.row(index)))
                readable += 1
            except RowError as error:
                place = self.place(index).removeprefix(f"{self.where}, ")
                first_error = first_error or DataError(f"{self.where}: no row can be read; {place}: {error}")
            if readable == ROWS_TO_INSPECT:
                break
        if first_error and not readable:
            raise first_error
        return list(columns)

    def label(self, index: int) -> str:
        """Return the name of a row on every machine: file:row."""
        shard, at = self._locate(index)
        return f"{shard.name}:{shard.numbers[at]}"

    def place(self, index: int) -> str:
        """Return where a row is found on this machine, for messages."""
        shard, at = self._locate(index)
        return f"{shard.where}, row {shard.numbers[at]}"


def open_source(data: Data, max_rows: int | None = None) -> Source:
    """Open the files or the hub data set that `data.path` names.

    Args:
        data: the recipe's data section.
        max_rows: find only about the first `max_rows` rows of files with one row per line; None means all.

    Raises:
        DataError: a file or the data set does not exist, cannot be read or is empty.
    """
    files = data_files(data)
    if files is None:
        shards = [Shard(data.where, data.where, *_hub(data))]
    elif len(files) == 1 and files[0].stat().st_size == 0:
        raise DataError(f"{data.where}: is empty")
    else:
        shards, limit = [], max_rows
        for name, file in shard_names(files).items():
            where = data.where if len(files) == 1 and names_one_file(data) else str(file)
            shards.append(Shard(where, name, *open_file(file, limit)))
            if limit is not None and (limit := limit - len(shards[-1].numbers)) <= 0:
                break
    source = Source(data.where, shards)
    if not len(source):
        raise DataError(f"{data.where}: is empty: it has no rows")
    return source


def names_a_file(path: str) -> bool:
    """Return whether a path means local files (which may be missing), not a hub data set."""
    return path.startswith(("/", "./", "../", "~")) or is_glob(path) or file_kind(PurePath(path)) is not None


def names_one_file(data: Data) -> bool:
    """Return whether `data.path` is the path of one existing file."""
    path = existing_path(data.where) if isinstance(data.path, str) else None
    return path is not None and not path.is_dir()


def data_files(data: Data) -> list[Path] | None:
    """Return the local files that `data.path` names, in the order in which they are read; None for a hub data set.

    Raises:
        DataError: a file or folder does not exist, or is not supported.
    """
    if isinstance(data.path, str) and existing_path(data.path) is None and not names_a_file(data.path):
        return None
    return list(dict.fromkeys(file for path in data.paths for file in _files_at(path, data.split)))


def shard_names(files: Sequence[Path]) -> dict[str, Path]:
    """Return each file under its path below the folder that all files share."""
    root = os.path.commonpath([file.absolute().parent for file in files])
    return {file.absolute().relative_to(root).as_posix(): file for file in files}


def _files_at(name: str, split: str) -> list[Path]:
    path = existing_path(name)
    if path is None and is_glob(name):
        files = [file for file in matching_paths(name) if file.is_file() and file_kind(file)]
        if not files:
            raise DataError(f"{name}: no file matches that is {_supported()}")
        return files
    if path is None:
        hint = "" if names_a_file(name) else ". A list holds files only: name a data set of the hub alone"
        raise DataError(f"{name}: no such file{hint}")
    if path.is_dir():
        return _files_in(path, split)
    if file_kind(path) is None:
        raise DataError(f"{name}: unsupported kind of file; supported: {_supported()}")
    if not path.is_file():
        raise DataError(f"{name}: is not a file")
    return [path]


def _files_in(folder: Path, split: str) -> list[Path]:
    """Return the data files of a folder, sorted by name: of the split, where the names say the split.

    Raises:
        DataError: there are none, the split is not among them, or it is unclear which files are meant.
    """
    if (folder / "dataset_dict.json").is_file():  # datasets.DatasetDict.save_to_disk
        splits = sorted(part.name for part in folder.iterdir() if (part / "state.json").is_file())
        if split not in splits:
            raise DataError(f"{folder}: has no split {split!r}. Set data.split to one of {', '.join(splits)}")
        folder = folder / split
    if (folder / "state.json").is_file():  # datasets.Dataset.save_to_disk; other .arrow files there are caches
        try:
            state = json.loads((folder / "state.json").read_text(encoding="utf-8"))
            files = [folder / Path(part["filename"]).name for part in state["_data_files"]]
        except (OSError, ValueError, TypeError, KeyError) as error:
            raise DataError(f"{folder}: state.json cannot be read: {error}") from error
        if missing := [file.name for file in files if not file.is_file()]:
            raise DataError(f"{folder}: {missing[0]} is missing, which state.json names")
        return files
    files = [file for file in sorted(folder.iterdir()) if _is_data(file)]
    files = files or [file for file in sorted(folder.rglob("*")) if _is_data(file)]
    if not files:
        raise DataError(f"{folder}: is a folder without a data file ({_supported()})")
    by_split: dict[str | None, list[Path]] = {}
    for file in files:
        by_split.setdefault(_split_of(file.relative_to(folder)), []).append(file)
    named = [name for name in by_split if name and (len(by_split) > 1 or _split_words(name))]
    if named and None in by_split:
        raise DataError(
            f"{folder}: {by_split[None][0].name} names no split, but {by_split[named[0]][0].name} names {named[0]}. "
            "Name the files in data.path, as a list or with *"
        )
    if named and split not in by_split:
        raise DataError(f"{folder}: has no split {split!r}. Set data.split to one of {', '.join(named)}")
    files = by_split[split] if named else files
    if len(kinds := sorted({str(file_kind(file)) for file in files})) > 1:
        raise DataError(
            f"{folder}: holds {' and '.join(kinds)} files. Name those to read in data.path, such as *.jsonl"
        )
    if len(parts := sorted({str(file.parent.relative_to(folder)) for file in files})) > 1:
        raise DataError(
            f"{folder}: holds data in several folders ({shortened(', '.join(parts))}). Name one in data.path, or all "
            "with **"
        )
    return files


def _is_data(file: Path) -> bool:
    is_description = file.name in ("dataset_info.json", "dataset_infos.json")  # written by `datasets`
    return file_kind(file) is not None and file.is_file() and not is_description and not file.name.startswith(".")


def _split_of(path: PurePath) -> str | None:
    """Return the split that a file's path names: train-00000-of-00002.parquet, test.jsonl, validation/part1.csv."""
    if shard := _SHARD_NAME.match(path.name):
        return shard[1]
    return next(iter(_split_words(path.as_posix())), None)


def _split_words(text: str) -> list[str]:
    return [_SPLITS[word] for word in re.split(r"[^a-z]+", text.lower()) if word in _SPLITS]


def _supported() -> str:
    return f"{', '.join(READERS)}; text also as .gz, .zst or .bz2"


def _hub(data: Data) -> Rows:
    from datasets import load_dataset

    path = data.where
    if "/" not in path:  # load_dataset("csv") and the like would read the files of the current folder
        raise DataError(f"{path}: no such file here. A data set of the hub is named OWNER/NAME")

    def load() -> Any:
        return load_dataset(path, name=data.subset, split=data.split, revision=data.revision)

    try:
        rows = Repository(path, data.revision, "dataset").call(load)
        for name, feature in rows.features.items():
            if hasattr(feature, "decode"):  # an image or a sound: reading the row would open or download it
                rows = rows.cast_column(name, replace(feature, decode=False))
    except DataError:
        raise
    except Exception as error:  # the hub client, its transport and the readers share no exception class
        raise DataError(f"{path}: {_hub_reason(data, error)}") from error
    _check_commit(data, rows)

    def read(index: int) -> Any:
        try:
            return rows[index]
        except Exception as error:  # a feature's decoder may raise anything
            raise RowError("unreadable", f"it cannot be read: {error}") from error

    return range(1, len(rows) + 1), read


def _hub_reason(data: Data, error: Exception) -> str:
    """Return why a hub data set cannot be read, with the field to set."""
    text = " ".join(str(error).split())
    if "Config name is missing" in text or "BuilderConfig" in text:
        names = ", ".join(re.findall(r"'([^']+)'", text[text.rfind("[") :].partition("]")[0])) or text
        problem = f"there is no subset {data.subset!r}" if data.subset else "the data set has several subsets"
        return f"{problem}. Set data.subset to one of: {names}"
    if "Unknown split" in text:
        return f"{text} Set data.split"
    return f"the data set cannot be read from the hub: {text or type(error).__name__}"


def _check_commit(data: Data, rows: Any) -> None:
    """Check that the rows belong to the commit in `data.revision`, if it is a commit.

    Without a network, `datasets` takes the newest rows in its cache, of any commit.

    Raises:
        DataError: the rows belong to another commit.
    """
    commits = {Path(file["filename"]).parent.name for file in rows.cache_files}  # `datasets` names folders by commit
    if data.revision not in commits and all(map(_is_commit, (data.revision or "", *commits))):
        raise DataError(
            f"{data.path}: the hub does not answer, and the cache has commit {', '.join(commits)}, not "
            f"{data.revision}. Wait, and run the same command again"
        )


def _is_commit(text: str) -> bool:
    return re.fullmatch("[0-9a-f]{40}", text) is not None


def kind_of(value: Any) -> str:
    """Return what a JSON value is, in words."""
    names = {type(None): "null", bool: "true or false", str: "text", list: "a list", dict: "an object"}
    return names.get(type(value), "a number" if isinstance(value, int | float) else type(value).__name__)
