"""Engines that let the current opponent answer."""

from collections.abc import Iterator
from contextlib import contextmanager

from spinlm.config import Recipe
from spinlm.model.players import Players
from spinlm.opponents.base import Opponent
from spinlm.opponents.local import LocalOpponent


@contextmanager
def open_opponent(recipe: Recipe, players: Players, iteration: int, packing: str) -> Iterator[Opponent]:
    """The recipe's engine with the opponent of an iteration; `packing` is what the model was found to take."""
    match recipe.opponent.engine:
        case "transformers":
            players.become(iteration - 1)
            yield local_opponent(recipe, players, packing)
        case "server":
            from spinlm.opponents.server import serve

            if recipe.opponent.server and recipe.opponent.server.command:
                players.let_go()  # the server may need the memory
            with serve(recipe, players.run, players.renderer, iteration) as opponent:
                yield opponent
        case "vllm":
            from spinlm.opponents import vllm

            with vllm.serve(recipe, players, iteration) as opponent:
                yield opponent


def local_opponent(recipe: Recipe, players: Players, packing: str) -> LocalOpponent:
    """The engine of this process, with whatever player sits."""
    return LocalOpponent(players.logprobs, recipe.opponent.batch_size, packing)
