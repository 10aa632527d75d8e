"""The display of responses of several players, while they grow."""

import io

import pytest
from rich.console import Console

from spinlm.chat import ShowResponse, show_responses

STEPS = ["H", "Hi", "Hi [bold]there[/bold]"], ["", "Yes"]


def responses(show: ShowResponse) -> list[str]:
    for player, texts in enumerate(STEPS):
        for text in texts:
            show(player, text)
    return [texts[-1] for texts in STEPS]


def test_a_file_gets_each_piece_in_sequence() -> None:
    file = io.StringIO()
    show_responses(Console(file=file), ["start", "best"], responses)
    assert file.getvalue() == "\n[start]\nHi [bold]there[/bold]\n\n[best]\nYes\n"


def test_a_terminal_gets_columns_with_the_whole_responses() -> None:
    file = io.StringIO()
    show_responses(
        Console(file=file, force_terminal=True, width=80, height=20, color_system=None), ["start", "best"], responses
    )
    *_, names, _rule, row, _end = file.getvalue().split("\n")[-6:-1]
    assert names.split() == ["start", "best"]
    assert row.split("  ")[0].strip() == "Hi [bold]there[/bold]" and row.rstrip().endswith("Yes")


def test_a_long_response_shows_its_end_while_it_grows_and_then_all_of_it() -> None:
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
def test_a_response_cannot_control_the_terminal(terminal: bool) -> None:
    file = io.StringIO()
    clears = "a\x1b[2Jb\x9b2Jc\x07"

    def hostile(show: ShowResponse) -> list[str]:
        show(0, clears)
        show(1, "")
        return [clears, ""]

    show_responses(Console(file=file, force_terminal=terminal, width=80, color_system=None), ["start", "best"], hostile)
    assert r"a\x1b[2Jb\x9b2Jc\x07" in file.getvalue()
    assert not any(command in file.getvalue() for command in ("\x1b[2J", "\x9b", "\x07"))
