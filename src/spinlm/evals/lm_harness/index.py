"""Where lm-evaluation-harness has a task, found without reading all of its 14,000 files."""

import functools
import os
import re
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import yaml

from spinlm.errors import RunError

if TYPE_CHECKING:
    from lm_eval.tasks import TaskManager


@functools.cache
def shipped_names() -> dict[str, Path]:
    """Every task, group and tag of the harness, with its file (a few words too many, of comments).

    The harness's own index of its 14,000 files takes ten times as long.
    """
    import lm_eval

    entry = re.compile(
        rb"""^["']?(?:task|group|tag)["']?[ \t]*:[ \t]*((?:\r?\n[ \t]*-[ \t]*[^\r\n]+)+|[^\r\n]*)""", re.MULTILINE
    )
    names: dict[str, Path] = {}
    for parent, _, files in os.walk(Path(lm_eval.__file__).parent / "tasks"):
        for file in files:
            if file.endswith((".py", ".pyc", ".md")):
                continue
            path = Path(parent) / file
            for value in entry.findall(path.read_bytes()):
                for name in re.findall(rb"[\w.:/+()-]*[\w)]", value):
                    if b"\n" in value:  # a list only refers to it
                        names.setdefault(name.decode(), path)
                    else:
                        names[name.decode()] = path
    return names


class _TaskFile(yaml.SafeLoader):
    """Reads a task file without the functions it names."""


_TaskFile.add_multi_constructor("!", lambda loader, suffix, node: None)


def own_names(folder: Path) -> dict[str, Path]:
    """The tasks, groups and tags of the user's own, each with its file."""
    if not folder.is_dir():
        raise RunError(f"--include-path {folder}: no such folder")
    paths = sorted(folder.rglob("*.yaml"))
    if not paths:
        raise RunError(f"--include-path {folder}: has no task files (*.yaml)")
    names: dict[str, Path] = {}
    for path in paths:
        try:
            content = yaml.load(path.read_text(encoding="utf-8"), Loader=_TaskFile)
        except (yaml.YAMLError, UnicodeDecodeError) as error:
            raise RunError(f"{path}: not YAML: {' '.join(str(error).split())}") from error
        if not isinstance(content, dict):
            raise RunError(f"{path}: not a task file: it must hold names with values, such as task: my_task")
        for key in ("task", "group", "tag"):
            values = content.get(key)
            values = values if isinstance(values, list) else [values]
            names |= {
                value: path for value in values if isinstance(value, str) and not (key == "task" and "group" in content)
            }
    return names


def task_manager(
    names: Sequence[str], own: dict[str, Path], shipped: dict[str, Path], folder: Path | None
) -> "TaskManager":
    """The harness's task manager, over no more of its 14,000 files than these tasks need."""
    import lm_eval
    from lm_eval.tasks import TaskManager

    root = Path(lm_eval.__file__).parent / "tasks"
    theirs = {root / shipped[name].relative_to(root).parts[0] for name in names if name not in own}
    mine = [] if folder is None else [folder.absolute()]
    small = TaskManager(include_defaults=False, include_path=[*sorted(theirs), *mine])
    for name in names:
        if name in own and name not in small.task_index:  # it passes over a file that it cannot read
            raise RunError(f"{own[name]}: lm-evaluation-harness cannot read this file. Is what it includes there?")
    return small if _complete(small.task_index, names) else TaskManager(include_path=list(mine))


def _complete(index: dict[str, Any], names: Sequence[Any]) -> bool:
    """Whether an index surely has all that these names stand for."""
    for name in names:
        entry = index.get(name) if isinstance(name, str) else None
        if entry is None or entry.kind.name == "TAG":  # a tag's tasks may lie anywhere
            return False
        if entry.kind.name == "GROUP" and not _complete(index, entry.cfg["task"]):
            return False
    return True
