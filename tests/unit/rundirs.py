"""Run folders for tests: stages completed with one small file each."""

from pathlib import Path

from spinlm.rundir.layout import RunDir
from spinlm.rundir.stage_graph import STAGES, START

CHAIN = [("prepare", START), ("sft", START), ("evaluate", START), *((stage, t) for t in (0, 1) for stage in STAGES)]
"""The stages of a run of two iterations."""


def names(folder: Path) -> list[str]:
    return sorted(path.name for path in folder.iterdir())


def finish(folder: RunDir, *stages: tuple[str, int], content: str = "result") -> None:
    """Complete stages, each with one file as its output."""
    for stage, t in stages:
        path = folder.iteration(t) / f"{stage}.txt"
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(f"{content} of {stage} {t}")
        folder.complete(stage, t, [path])


def finish_sft(folder: RunDir) -> dict[str, Path]:
    """Complete the stages up to sft, which writes a folder and two files. Returns the files of sft."""
    finish(folder, ("prepare", START))
    files = {name: folder.iteration(START) / name for name in ("player/deep/weights", "player/config", "a", "b")}
    for number, path in enumerate(files.values()):
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes(bytes([number, 255, 0, 7]))
    folder.complete("sft", START, [folder.player(START), files["a"], files["b"]])
    return files
