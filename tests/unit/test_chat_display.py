"""Answers of several players, while they grow."""

import io

import pytest
from rich.console import Console

from spinlm.chat import ShowResponse, show_responses

WAYS = ["H", "Hi", "Hi [bold]there[/bold]"], ["", "Yes"]


def answers(show: ShowResponse) -> list[str]:
    for player, texts in enumerate(WAYS):
        for text in texts:
            show(player, text)
    return [texts[-1] for texts in WAYS]


def test_below_each_other_each_piece_as_it_comes() -> None:
    file = io.StringIO()
    show_responses(Console(file=file), ["start", "best"], answers)
    assert file.getvalue() == "\n[start]\nHi [bold]there[/bold]\n\n[best]\nYes\n"


def test_beside_each_other_what_was_shown_is_replaced_by_the_whole() -> None:
    file = io.StringIO()
    show_responses(
        Console(file=file, force_terminal=True, width=80, height=20, color_system=None), ["start", "best"], answers
    )
    *_, names, _rule, row, _end = file.getvalue().split("\n")[-6:-1]
    assert names.split() == ["start", "best"]
    assert row.split("  ")[0].strip() == "Hi [bold]there[/bold]" and row.rstrip().endswith("Yes")


def test_a_long_answer_shows_its_end_while_it_grows_and_then_all_of_it() -> None:
    file = io.StringIO()
    text = "\n".join(f"line {number}" for number in range(40))

    def long(show: ShowResponse) -> list[str]:
        show(0, text)
        return [text, "short"]

    show_responses(Console(file=file, force_terminal=True, width=80, height=10, color_system=None), ["a", "b"], long)
    grown, whole = file.getvalue().rsplit("line 0", 1)
    assert "line 39" in grown and "line 20" not in grown
    assert all(f"line {number}" in whole for number in range(1, 40))


@pytest.mark.parametrize("terminal", [False, True])
def test_an_answer_cannot_command_the_terminal(terminal: bool) -> None:
    file = io.StringIO()
    clears = "a\x1b[2Jb\x9b2Jc\x07"

    def hostile(show: ShowResponse) -> list[str]:
        show(0, clears)
        show(1, "")
        return [clears, ""]

    show_responses(Console(file=file, force_terminal=terminal, width=80, color_system=None), ["start", "best"], hostile)
    assert r"a\x1b[2Jb\x9b2Jc\x07" in file.getvalue()
    assert not any(command in file.getvalue() for command in ("\x1b[2J", "\x9b", "\x07"))
