"""Chat: the same prompt to several players, side by side."""

from collections.abc import Sequence

from spinlm.config import Recipe
from spinlm.data.chat import RowError
from spinlm.model.players import seat
from spinlm.opponents import local_opponent
from spinlm.records import Message, Sampling
from spinlm.rundir import START, RunDir


def ask(
    recipe: Recipe, run: RunDir, iterations: Sequence[int], messages: list[Message], *, temperature: float, seed: int
) -> list[str]:
    """The answers of several iterations' players to one conversation, in order.

    Raises:
        RowError: the conversation cannot be rendered, or is too long.
    """
    players = seat(recipe, run)
    prompt = players.renderer.prompt_ids(messages)
    if len(prompt) >= recipe.train.max_length:
        raise RowError(
            "prompt_too_long", f"it has {len(prompt)} tokens, and train.max_length is {recipe.train.max_length}"
        )
    sampling = Sampling(
        temperature=temperature,
        top_p=recipe.opponent.top_p,
        max_new_tokens=recipe.opponent.max_new_tokens,
        max_length=recipe.train.max_length,
        samples=1,
        stop_ids=players.renderer.stop_ids,
    )
    texts = []
    for iteration in iterations:
        players.become(iteration)
        opponent = local_opponent(recipe, players, run.facts("warmup", START)["packing"])
        ((answer,),) = opponent.answer([prompt], sampling, seed, lambda ended, tokens: None)
        texts.append(players.renderer.decode(answer.token_ids))
    return texts
