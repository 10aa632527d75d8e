"""Chat: the same prompt to several players, side by side."""

import textwrap
from collections.abc import Callable, Sequence
from functools import partial
from typing import TYPE_CHECKING

from spinlm.data.renderer import RowError
from spinlm.export.player import which_player
from spinlm.generation import local_engine
from spinlm.model.players import seat
from spinlm.recipe.schema import Recipe
from spinlm.report.summary import display_text
from spinlm.rundir.layout import RunDir
from spinlm.rundir.records import Message, Sampling
from spinlm.rundir.stage_graph import START, player_name
from spinlm.utils.console import printable

if TYPE_CHECKING:
    from rich.console import Console
    from rich.table import Table

Show = Callable[[int, str], None]
"""`show(player, text)`: the answer of a player, by its place among those asked, has grown to this text."""

NARROWEST = 30  # characters of a column in which an answer can be read
REFRESH = 10  # times a second
INCOMPLETE = "\N{REPLACEMENT CHARACTER}"  # what the first tokens of a character decode to


def who(run: RunDir, names: str) -> tuple[dict[int, str], str]:
    """The players that are meant (numbers, `start`, `best`, with commas): how each is called, by its iteration. And a
    remark where that is fewer than were named.

    Raises:
        RunError: the run has no such player.
    """
    named = [name.strip() for name in names.split(",")]
    heads = {}
    for name in named:
        iteration = which_player(run, name)
        heads[iteration] = player_name(iteration) + (" (best)" if "best" in named and iteration == run.best() else "")
    if len(heads) == len(named):
        return heads, ""
    start = {"best", "start"} <= set(named) and run.best() == START
    same = "the best player is the start" if start else "two of these names mean the same player"
    return heads, f"{same}; it answers once"


def ask(
    recipe: Recipe,
    run: RunDir,
    iterations: Sequence[int],
    messages: list[Message],
    show: Show,
    *,
    temperature: float,
    seed: int,
) -> list[str]:
    """The answers of several iterations' players to one conversation, in order and as they are shown.

    Args:
        recipe: the run's.
        run: whose players.
        iterations: which players.
        messages: the conversation; it ends with a message of the user.
        show: called for each new token of an answer.
        temperature: 0 is greedy.
        seed: the same seed gives the same answers.

    Raises:
        RowError: the conversation cannot be rendered, or is too long.
    """
    players = seat(recipe, run)
    decode = players.renderer.decode
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
    texts: list[str] = []

    def grown(_: int, tokens: list[int]) -> None:
        show(len(texts), decode(tokens).rstrip(INCOMPLETE))

    for iteration in iterations:
        players.become(iteration)
        opponent = local_engine(recipe, players, run.metadata("sft", START)["prefix_sharing"])
        ((answer,),) = opponent.generate([prompt], sampling, seed, lambda ended, tokens: None, grown)
        text = display_text(decode(answer.token_ids), answer.finished, len(answer.token_ids))
        show(len(texts), text)
        texts.append(text)
    return texts


def put(console: "Console", names: Sequence[str], answer: Callable[[Show], list[str]]) -> None:
    """Show answers while they grow: on a wide terminal beside each other, else one below the other.

    Args:
        console: where.
        names: of the players.
        answer: gives the answers, and calls what it is given as they grow.
    """
    if not console.is_terminal or len(names) == 1 or console.width // len(names) < NARROWEST:
        _below_each_other(console, names, answer)
    else:
        _beside_each_other(console, names, answer)


def _below_each_other(console: "Console", names: Sequence[str], answer: Callable[[Show], list[str]]) -> None:
    shown: list[str] = []

    def show(player: int, text: str) -> None:
        if player == len(shown):
            _write(console, ("\n" if player == 0 else "\n\n") + f"[{names[player]}]\n")
            shown.append("")
        _write(console, printable(text[len(shown[player]) :]))
        shown[player] = text

    answer(show)
    _write(console, "\n")


def _write(console: "Console", text: str) -> None:
    console.out(text, end="", highlight=False)
    console.file.flush()


def _beside_each_other(console: "Console", names: Sequence[str], answer: Callable[[Show], list[str]]) -> None:
    from rich.live import Live

    texts = ["" for _ in names]
    with Live(_columns(names, texts), console=console, transient=True, refresh_per_second=REFRESH) as live:

        def show(player: int, text: str) -> None:
            texts[player] = printable(text)
            # While it grows, what fits on the screen: a live display cannot scroll.
            room = max(1, console.height - 4)
            width = console.width // len(names) - 3
            live.update(_columns(names, [_end(text, room, width) for text in texts]))

        whole = answer(show)
    console.print(_columns(names, [printable(text) for text in whole]))


def _columns(names: Sequence[str], texts: Sequence[str]) -> "Table":
    from rich.box import SIMPLE
    from rich.table import Table
    from rich.text import Text

    grid = Table(*names, box=SIMPLE, expand=True, pad_edge=False)
    for column in grid.columns:
        column.ratio = 1
    grid.add_row(*map(Text, texts))
    return grid


def _end(text: str, lines: int, width: int) -> str:
    """The last lines of a text that is wrapped at a width."""
    wrap = partial(textwrap.wrap, width=max(width, 1), replace_whitespace=False, drop_whitespace=False)
    wrapped = [part for line in text.split("\n") for part in wrap(line) or [""]]
    return "\n".join(wrapped[-lines:])
