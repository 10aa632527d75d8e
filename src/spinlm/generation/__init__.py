"""Engines that let the current opponent answer."""

from collections.abc import Iterator
from contextlib import contextmanager

from spinlm.generation.base import Engine
from spinlm.generation.local import LocalEngine
from spinlm.model.players import Players
from spinlm.recipe.schema import Recipe


@contextmanager
def open_engine(recipe: Recipe, players: Players, iteration: int, prefix_sharing: bool) -> Iterator[Engine]:
    """The recipe's engine with the opponent of an iteration; `prefix_sharing` says whether its attention takes prefix trees."""
    match recipe.opponent.engine:
        case "local":
            players.become(iteration - 1)
            yield local_engine(recipe, players, prefix_sharing)
        case "server":
            from spinlm.generation.server import serve

            if recipe.opponent.server and recipe.opponent.server.launch_command:
                players.let_go()  # the server may need the memory
            with serve(recipe, players.run, players.renderer, iteration) as opponent:
                yield opponent
        case "vllm":
            from spinlm.generation import vllm

            with vllm.serve(recipe, players, iteration) as opponent:
                yield opponent


def local_engine(recipe: Recipe, players: Players, prefix_sharing: bool) -> LocalEngine:
    """The engine of this process, with whatever player sits."""
    return LocalEngine(players.logprobs, recipe.opponent.batch_size, prefix_sharing)
