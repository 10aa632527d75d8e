"""Journals: JSON lines that are added as they come. An end at any moment loses at most what was being added."""

import json
import os
from pathlib import Path
from typing import Any

from spinlm.errors import RunError


class Journal:
    """A file of JSON objects, one a line. `records` are those it holds; a last line that was cut off is removed.

    Raises:
        RunError: another line is damaged.
    """

    def __init__(self, path: Path):
        self.path = path
        self.records: list[dict[str, Any]] = []
        if not path.exists():
            return
        content = path.read_bytes()
        whole = content[: content.rfind(b"\n") + 1]
        for number, line in enumerate(whole.splitlines(), start=1):
            try:
                record = json.loads(line)
            except ValueError as error:
                raise RunError(
                    f"{path}, line {number}: damaged ({error}). Delete the line, and run again to make it anew"
                ) from error
            if not isinstance(record, dict):
                raise RunError(f"{path}, line {number}: not a record. Delete the line, and run again to make it anew")
            self.records.append(record)
        if whole != content:
            os.truncate(path, len(whole))

    def add(self, *records: dict[str, Any]) -> None:
        """Add records and bring them to disk."""
        self.path.parent.mkdir(parents=True, exist_ok=True)
        with self.path.open("a", encoding="utf-8") as file:
            file.writelines(json.dumps(record) + "\n" for record in records)
            file.flush()
            os.fsync(file.fileno())
        self.records += records
