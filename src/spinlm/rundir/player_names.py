"""Parse the names of players on the command line."""

from spinlm.errors import RunError
from spinlm.rundir.layout import RunDir
from spinlm.rundir.stage_graph import START


def parse_player(folder: RunDir, name: str) -> int:
    """Return the iteration of the player `best`, `start`, or a number, and verify the player's files.

    Raises:
        RunError: the run has no such player, or a file of it has changed since it was saved.
    """
    saved = [path.parent.name for path in sorted(folder.root.glob("*/player")) if not path.parent.is_symlink()]
    if not saved and not folder.marker("sft", START).exists():
        raise RunError(
            f"{folder.root}: has no player yet, because its preparation is not complete. `spinlm status` shows why"
        )
    iteration: int | None
    if name == "best":
        iteration = folder.best()
        if iteration is None:
            raise RunError(f"{folder.root}: has no best player before an iteration is evaluated. Use start instead")
    elif name == "start":
        iteration = START
    elif name.isdecimal():
        iteration = int(name)
    else:
        raise RunError(f"{name!r} is not a player: write best, start, or the number of an iteration")
    if not folder.player(iteration).is_dir():
        raise RunError(f"{folder.root}: has no player {name}; it has {', '.join(saved) or 'none'}")
    folder.player_digest(iteration)  # raises where a file has changed
    return iteration
