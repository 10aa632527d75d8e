"""The header of a .gguf file: its metadata and the names of its tensors.

The gguf package's reader is not used: it builds an array of the whole vocabulary, which takes seconds.
"""

import os
import struct
from pathlib import Path
from typing import Any, BinaryIO

_STRING, _ARRAY = 8, 9
_NUMBERS = {0: "<B", 1: "<b", 2: "<H", 3: "<h", 4: "<I", 5: "<i", 6: "<f", 7: "<?", 10: "<Q", 11: "<q", 12: "<d"}


def read_gguf_header(path: Path) -> tuple[dict[str, Any], set[str]]:
    """Return the metadata, in which an array is replaced by its length, and the names of the tensors.

    Raises:
        ValueError: the file cannot be read or is not a .gguf file.
    """
    try:
        with path.open("rb") as file:
            return _read(file)
    except (OSError, ValueError, KeyError, OverflowError, MemoryError, struct.error) as error:
        raise ValueError(f"{path} is not a readable .gguf file: {error}") from None


def _read(file: BinaryIO) -> tuple[dict[str, Any], set[str]]:
    def take(form: str) -> Any:
        return struct.unpack(form, file.read(struct.calcsize(form)))[0]

    def text() -> str:
        return file.read(take("<Q")).decode("utf-8", "replace")

    def value(kind: int) -> Any:
        if kind != _ARRAY:
            return text() if kind == _STRING else take(_NUMBERS[kind])
        element, count = take("<I"), take("<Q")
        if element == _STRING:
            for _ in range(count):
                file.seek(take("<Q"), os.SEEK_CUR)
        else:
            file.seek(count * struct.calcsize(_NUMBERS[element]), os.SEEK_CUR)
        return count

    if take("4s") != b"GGUF":
        raise ValueError("the file does not begin with GGUF")
    _version, tensors, values = take("<I"), take("<Q"), take("<Q")
    metadata = {text(): value(take("<I")) for _ in range(values)}
    names = set()
    for _ in range(tensors):
        names.add(text())
        take(f"{8 * take('<I') + 12}s")  # sizes, type and offset
    return metadata, names
