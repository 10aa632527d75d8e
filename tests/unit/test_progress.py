"""Progress where there is no terminal: a line now and then."""

import logging
import re

import pytest

from spinlm.distributed import progress


def test_lines_say_how_far_how_fast_and_how_long(
    caplog: pytest.LogCaptureFixture, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(progress, "LOG_SECONDS", -1)
    caplog.set_level(logging.INFO)
    with progress.track("train", 8, completed=2) as advance:
        advance(3, 600, "loss 0.5000")
        advance(3, 600)
    first, last = caplog.messages
    assert re.fullmatch(r"train 5/8, [\d,]+ tokens/s, loss 0\.5000, \d+ s left", first)
    assert re.fullmatch(r"train 8/8, [\d,]+ tokens/s, 0 s left", last)


def test_no_remaining_time_from_the_first_responses_of_a_batch(
    caplog: pytest.LogCaptureFixture, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(progress, "LOG_SECONDS", -1)
    caplog.set_level(logging.INFO)
    with progress.track("generate", 20, completed=4, response_unit="responses") as advance:
        advance(3, 600)
        advance(1, 600)
    first, last = caplog.messages
    assert re.fullmatch(r"generate 7/20 responses, [\d,]+ tokens/s", first)
    assert re.fullmatch(r"generate 8/20 responses, [\d,]+ tokens/s, \d+ s left", last)


def test_work_of_an_earlier_attempt_does_not_count_in_the_rate(
    caplog: pytest.LogCaptureFixture, monkeypatch: pytest.MonkeyPatch
) -> None:
    clock = iter([0.0, 10.0])
    monkeypatch.setattr(progress, "LOG_SECONDS", -1)
    monkeypatch.setattr(progress.time, "monotonic", lambda: next(clock))
    caplog.set_level(logging.INFO)
    with progress.track("reference_logprobs", 100, completed=90) as advance:
        advance(5, 50)
    assert caplog.messages == ["reference_logprobs 95/100, 5 tokens/s, 10 s left"]


def test_quiet_prints_nothing(caplog: pytest.LogCaptureFixture, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(progress, "LOG_SECONDS", -1)
    caplog.set_level(logging.WARNING)
    with progress.track("train", 1) as advance:
        advance(1, 10)
    assert caplog.messages == []
