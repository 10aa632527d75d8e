"""Chat: send prompts to several players, and show their responses one below the other or as a table."""

from collections.abc import Sequence

from spinlm.errors import RowError, SpinError, shortened
from spinlm.generation import local_engine
from spinlm.generation.base import Sampling
from spinlm.model.run import Run
from spinlm.recipe.load import parse_recipe
from spinlm.report.summary import display_text
from spinlm.rundir.layout import RunDir
from spinlm.rundir.player_names import parse_player
from spinlm.rundir.provenance import read_recipe
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
    prompt = _prompt_ids(run, messages)
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


def respond(
    folder: RunDir,
    prompts: str | Sequence[str],
    *,
    players: str = "start,best",
    system: str | None = None,
    temperature: float = 0.0,
) -> list[dict[str, str]]:
    """Return the responses of players to prompts. Each prompt starts a new conversation.

    Args:
        folder: the run.
        prompts: the user's message, or several.
        players: numbers of iterations, `start` or `best`, separated by commas.
        system: the system message. Use the one of the data.
        temperature: 0 decodes greedily.

    Returns:
        A dict for each prompt: `prompt`, and a response under the name of each player.

    Raises:
        RunError: the run has no such player.
        SpinError: a prompt cannot be rendered, or is too long.
    """
    iterations = dict.fromkeys(parse_player(folder, name.strip()) for name in players.split(","))
    history = [{"role": "system", "content": system}] if system else []
    prompts = [prompts] if isinstance(prompts, str) else prompts
    rows = [{"prompt": prompt} for prompt in prompts]
    with Run(parse_recipe(read_recipe(folder), str(folder.recipe)), folder) as run:
        token_ids, decode = [], run.players.renderer.decode
        for prompt in prompts:
            try:
                token_ids.append(_prompt_ids(run, [*history, {"role": "user", "content": prompt}]))
            except RowError as error:
                raise SpinError(f"the prompt {shortened(prompt)!r} cannot be used: {error}") from error
        sampling = Sampling.from_recipe(run.recipe, run.players.renderer.stop_ids, temperature=temperature, samples=1)
        for iteration in iterations:
            run.players.load(iteration)
            engine = local_engine(run.players)
            responses = engine.generate(token_ids, sampling, run.recipe.seed, lambda ended, tokens: None)
            for row, (response,) in zip(rows, responses, strict=True):
                text = display_text(decode(response.token_ids), response.finished, len(response.token_ids))
                row[player_name(iteration)] = text
    return rows


def _prompt_ids(run: Run, messages: list[Message]) -> list[int]:
    """Return the tokens of a conversation.

    Raises:
        RowError: the conversation cannot be rendered, or is too long.
    """
    prompt, limit = run.players.renderer.prompt_ids(messages), run.recipe.train.max_length
    if len(prompt) >= limit:
        raise RowError("prompt_too_long", f"it has {len(prompt)} tokens, and train.max_length is {limit}")
    return prompt


def print_growth(printed: str, text: str) -> str:
    """Print what a text has more than its part that is already printed; return the text."""
    print(printable(text[len(printed) :]), end="", flush=True)
    return text
