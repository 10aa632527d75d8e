"""Engines that let the current opponent answer."""

from spinlm.config import Recipe
from spinlm.model.players import Players
from spinlm.opponents.base import Opponent
from spinlm.opponents.local import LocalOpponent


def open_opponent(recipe: Recipe, players: Players) -> Opponent:
    """The recipe's engine, holding the current player."""
    match recipe.opponent.engine:
        case "transformers":
            return LocalOpponent(players.logprobs, recipe.opponent.batch_size)
