"""The display of a response while it grows."""

import pytest

from spinlm.chat import print_growth


def test_a_response_is_printed_piece_by_piece_and_cannot_control_the_terminal(
    capsys: pytest.CaptureFixture[str],
) -> None:
    printed = ""
    for text in ("H", "Hi [b]", "Hi [b]\x1b[2J", "Hi [b]\x1b[2J\x9b2Jc\x07"):
        printed = print_growth(printed, text)
    assert capsys.readouterr().out == r"Hi [b]\x1b[2J\x9b2Jc\x07"
