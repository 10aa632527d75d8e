"""Engines that let the current opponent answer."""

from spinlm.config import Recipe
from spinlm.model.players import Players
from spinlm.opponents.base import Opponent
from spinlm.opponents.local import LocalOpponent


def open_opponent(recipe: Recipe, players: Players, packing: str) -> Opponent:
    """The recipe's engine, holding the current player; `packing` is what the model was found to take."""
    match recipe.opponent.engine:
        case "transformers":
            return LocalOpponent(players.logprobs, recipe.opponent.batch_size, packing)
