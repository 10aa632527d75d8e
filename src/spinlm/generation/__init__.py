"""Engines that let the current opponent answer."""

from collections.abc import Iterator
from contextlib import contextmanager

from spinlm.generation.base import Engine
from spinlm.generation.local import LocalEngine
from spinlm.model.players import Players
from spinlm.recipe.schema import Recipe


@contextmanager
def open_engine(recipe: Recipe, players: Players, iteration: int, packing: str) -> Iterator[Engine]:
    """The recipe's engine with the opponent of an iteration; `packing` is what the model was found to take."""
    match recipe.opponent.engine:
        case "transformers":
            players.become(iteration - 1)
            yield local_engine(recipe, players, packing)
        case "server":
            from spinlm.generation.server import serve

            if recipe.opponent.server and recipe.opponent.server.command:
                players.let_go()  # the server may need the memory
            with serve(recipe, players.run, players.renderer, iteration) as opponent:
                yield opponent
        case "vllm":
            from spinlm.generation import vllm

            with vllm.serve(recipe, players, iteration) as opponent:
                yield opponent


def local_engine(recipe: Recipe, players: Players, packing: str) -> LocalEngine:
    """The engine of this process, with whatever player sits."""
    return LocalEngine(players.logprobs, recipe.opponent.batch_size, packing)
