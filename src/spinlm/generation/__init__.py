"""Engines that generate the responses of the current opponent."""

from collections.abc import Iterator
from contextlib import contextmanager

from spinlm.generation.base import Engine
from spinlm.generation.local import LocalEngine
from spinlm.model.players import Players
from spinlm.recipe.schema import Recipe


@contextmanager
def open_engine(recipe: Recipe, players: Players, t: int, prefix_sharing: bool) -> Iterator[Engine]:
    """Open the recipe's engine with the opponent of iteration t. The model of this process may be unloaded."""
    match recipe.opponent.engine:
        case "local":
            players.become(t - 1)
            yield local_engine(recipe, players, prefix_sharing)
        case "server":
            from spinlm.generation.server import open_server

            if recipe.opponent.server and recipe.opponent.server.launch_command:
                players.let_go()  # the server may need the memory
            with open_server(recipe, players.run, players.renderer, t) as engine:
                yield engine
        case "vllm":
            from spinlm.generation.vllm import open_vllm

            with open_vllm(recipe, players, t) as engine:
                yield engine


def local_engine(recipe: Recipe, players: Players, prefix_sharing: bool) -> LocalEngine:
    """Return the engine of this process, with the player that is loaded."""
    return LocalEngine(players.logprobs, recipe.opponent.batch_size, prefix_sharing)
