"""Chat: send one prompt to several players, and print their responses one below the other."""

from collections.abc import Sequence

from spinlm.errors import RowError
from spinlm.generation import local_engine
from spinlm.generation.base import Sampling
from spinlm.model.run import Run
from spinlm.report.summary import display_text
from spinlm.rundir.records import Message
from spinlm.rundir.stage_graph import player_name
from spinlm.utils.console import printable

INCOMPLETE = "\N{REPLACEMENT CHARACTER}"  # the first tokens of a multi-token character decode to this


def print_responses(run: Run, iterations: Sequence[int], messages: list[Message], temperature: float) -> None:
    """Print the response of each player to one conversation while it is generated.

    Args:
        run: the run. Its recipe has the seed, so the same conversation gets the same responses.
        iterations: the iterations of the players.
        messages: the conversation. The last message is the user's.
        temperature: 0 decodes greedily.

    Raises:
        RowError: the conversation cannot be rendered, or is too long.
    """
    recipe, players, best = run.recipe, run.players, run.folder.best()
    decode = players.renderer.decode
    prompt = players.renderer.prompt_ids(messages)
    if len(prompt) >= recipe.train.max_length:
        raise RowError(
            "prompt_too_long", f"it has {len(prompt)} tokens, and train.max_length is {recipe.train.max_length}"
        )
    sampling = Sampling.from_recipe(recipe, players.renderer.stop_ids, temperature=temperature, samples=1)
    printed = ""

    def show_tokens(_: int, token_ids: list[int]) -> None:
        nonlocal printed
        printed = print_growth(printed, decode(token_ids).rstrip(INCOMPLETE))

    for iteration in iterations:
        print(f"\n[{player_name(iteration)}{' (best)' if iteration == best else ''}]")
        printed = ""
        players.load(iteration)
        ((response,),) = local_engine(players).generate(
            [prompt], sampling, recipe.seed, lambda ended, tokens: None, show_tokens
        )
        print_growth(printed, display_text(decode(response.token_ids), response.finished, len(response.token_ids)))
        print()


def print_growth(printed: str, text: str) -> str:
    """Print what a text has more than its part that is already printed; return the text."""
    print(printable(text[len(printed) :]), end="", flush=True)
    return text
