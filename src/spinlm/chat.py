"""Chat: send one prompt to several players and compare their responses."""

import textwrap
from collections.abc import Callable, Sequence
from functools import partial
from typing import TYPE_CHECKING

from spinlm.errors import RowError
from spinlm.generation import local_engine
from spinlm.generation.base import Sampling
from spinlm.model.run import Run
from spinlm.report.summary import display_text
from spinlm.rundir.layout import RunDir
from spinlm.rundir.records import Message
from spinlm.rundir.stage_graph import player_name
from spinlm.utils.console import printable

if TYPE_CHECKING:
    from rich.console import Console
    from rich.table import Table

ShowResponse = Callable[[int, str], None]
"""`show(index, text)`: the response of the player at this index has grown to this text."""

MIN_COLUMN_WIDTH = 30  # characters; narrower columns are hard to read
REFRESH_PER_SECOND = 10
INCOMPLETE = "\N{REPLACEMENT CHARACTER}"  # the first tokens of a multi-token character decode to this


def player_titles(folder: RunDir, iterations: Sequence[int]) -> list[str]:
    """Return a title for each player, which says whether the player is the best one."""
    best = folder.best()
    return [player_name(iteration) + (" (best)" if iteration == best else "") for iteration in iterations]


def respond(
    run: Run,
    iterations: Sequence[int],
    messages: list[Message],
    show: ShowResponse,
    *,
    temperature: float,
    seed: int,
) -> list[str]:
    """Generate the response of each player to one conversation.

    Args:
        run: the run.
        iterations: the iterations of the players.
        messages: the conversation. The last message is the user's.
        show: called after each new token of a response.
        temperature: 0 decodes greedily.
        seed: the same seed gives the same responses.

    Returns:
        One response per player, in the order of `iterations`, as the text that is shown.

    Raises:
        RowError: the conversation cannot be rendered, or is too long.
    """
    recipe, players = run.recipe, run.players
    decode = players.renderer.decode
    prompt = players.renderer.prompt_ids(messages)
    if len(prompt) >= recipe.train.max_length:
        raise RowError(
            "prompt_too_long", f"it has {len(prompt)} tokens, and train.max_length is {recipe.train.max_length}"
        )
    sampling = Sampling.from_recipe(recipe, players.renderer.stop_ids, temperature=temperature, samples=1)
    texts: list[str] = []

    def show_tokens(_: int, token_ids: list[int]) -> None:
        show(len(texts), decode(token_ids).rstrip(INCOMPLETE))

    for iteration in iterations:
        players.load(iteration)
        ((response,),) = local_engine(players).generate(
            [prompt], sampling, seed, lambda ended, tokens: None, show_tokens
        )
        text = display_text(decode(response.token_ids), response.finished, len(response.token_ids))
        show(len(texts), text)
        texts.append(text)
    return texts


def show_responses(console: "Console", titles: Sequence[str], respond: Callable[[ShowResponse], list[str]]) -> None:
    """Show responses while they grow: in columns on a wide terminal, otherwise one below the other.

    Args:
        console: where to print.
        titles: one title per player.
        respond: generates the responses, reports their growth to its argument, and returns them.
    """
    if not console.is_terminal or len(titles) == 1 or console.width // len(titles) < MIN_COLUMN_WIDTH:
        _show_in_sequence(console, titles, respond)
    else:
        _show_in_columns(console, titles, respond)


def _show_in_sequence(console: "Console", titles: Sequence[str], respond: Callable[[ShowResponse], list[str]]) -> None:
    shown: list[str] = []

    def show(index: int, text: str) -> None:
        if index == len(shown):
            _write(console, ("\n" if index == 0 else "\n\n") + f"[{titles[index]}]\n")
            shown.append("")
        _write(console, printable(text[len(shown[index]) :]))
        shown[index] = text

    respond(show)
    _write(console, "\n")


def _write(console: "Console", text: str) -> None:
    console.out(text, end="", highlight=False)
    console.file.flush()


def _show_in_columns(console: "Console", titles: Sequence[str], respond: Callable[[ShowResponse], list[str]]) -> None:
    from rich.live import Live

    texts = ["" for _ in titles]
    with Live(_columns(titles, texts), console=console, transient=True, refresh_per_second=REFRESH_PER_SECOND) as live:

        def show(index: int, text: str) -> None:
            texts[index] = printable(text)
            height = max(1, console.height - 4)  # a live display cannot scroll
            width = console.width // len(titles) - 3
            live.update(_columns(titles, [_last_lines(text, height, width) for text in texts]))

        responses = respond(show)
    console.print(_columns(titles, [printable(text) for text in responses]))


def _columns(titles: Sequence[str], texts: Sequence[str]) -> "Table":
    from rich.box import SIMPLE
    from rich.table import Table
    from rich.text import Text

    grid = Table(*titles, box=SIMPLE, expand=True, pad_edge=False)
    for column in grid.columns:
        column.ratio = 1
    grid.add_row(*map(Text, texts))
    return grid


def _last_lines(text: str, lines: int, width: int) -> str:
    """Wrap a text at a width and return its last lines."""
    wrap = partial(textwrap.wrap, width=max(width, 1), replace_whitespace=False, drop_whitespace=False)
    wrapped = [part for line in text.split("\n") for part in wrap(line) or [""]]
    return "\n".join(wrapped[-lines:])
