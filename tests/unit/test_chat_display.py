"""Answers of several players, while they grow."""

import io

from rich.console import Console

from spinlm.chat import Show, put

WAYS = ["H", "Hi", "Hi [bold]there[/bold]"], ["", "Yes"]


def answers(show: Show) -> list[str]:
    for player, texts in enumerate(WAYS):
        for text in texts:
            show(player, text)
    return [texts[-1] for texts in WAYS]


def test_below_each_other_each_piece_as_it_comes() -> None:
    file = io.StringIO()
    put(Console(file=file), ["start", "best"], answers)
    assert file.getvalue() == "\n[start]\nHi [bold]there[/bold]\n\n[best]\nYes\n"


def test_beside_each_other_what_was_shown_is_replaced_by_the_whole() -> None:
    file = io.StringIO()
    put(Console(file=file, force_terminal=True, width=80, height=20, color_system=None), ["start", "best"], answers)
    *_, names, _rule, row, _end = file.getvalue().split("\n")[-6:-1]
    assert names.split() == ["start", "best"]
    assert row.split("  ")[0].strip() == "Hi [bold]there[/bold]" and row.rstrip().endswith("Yes")


def test_a_long_answer_shows_its_end_while_it_grows_and_then_all_of_it() -> None:
    file = io.StringIO()
    text = "\n".join(f"line {number}" for number in range(40))

    def long(show: Show) -> list[str]:
        show(0, text)
        return [text, "short"]

    put(Console(file=file, force_terminal=True, width=80, height=10, color_system=None), ["a", "b"], long)
    grown, whole = file.getvalue().rsplit("line 0", 1)
    assert "line 39" in grown and "line 20" not in grown
    assert all(f"line {number}" in whole for number in range(1, 40))
