"""Engines, which generate the responses of a player."""

from collections.abc import Iterator
from contextlib import contextmanager

from spinlm.generation.base import Engine
from spinlm.generation.local import LocalEngine
from spinlm.model.players import Players


@contextmanager
def open_engine(players: Players, t: int) -> Iterator[Engine]:
    """Open the recipe's engine with the opponent of iteration `t`.

    Raises:
        SpinError: the engine cannot be started or reached.
    """
    opponent = players.recipe.opponent
    match opponent.engine:
        case "local":
            players.load(t - 1)  # θ_t
            yield local_engine(players)
        case "server":
            from spinlm.generation.server import open_server

            if opponent.server and opponent.server.launch_command:
                players.unload()  # the server may need the memory
            with open_server(players, t) as engine:
                yield engine
        case "vllm":
            from spinlm.generation.vllm import open_vllm

            with open_vllm(players, t) as engine:
                yield engine


def local_engine(players: Players) -> LocalEngine:
    """Return an engine in this process, with the loaded player."""
    return LocalEngine(players.logprobs, players.recipe.opponent.batch_size, players.prefix_sharing)
