"""MT-Bench on a tiny run, judged by a scripted server on this machine, which misbehaves in every way."""

import contextlib
import json
import os
import shutil
import signal
import socket
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field, replace
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any

import pytest
from runs import assert_whole, read_rows, write_rows

import spinlm.utils.http
from spinlm.errors import DataError, RunError, SpinError
from spinlm.evals.mt_bench.bench import mt_bench
from spinlm.evals.mt_bench.judge import REMINDER, Judge, JudgeError, read_mark, read_options
from spinlm.evals.scores import comparable, read_scores
from spinlm.recipe.load import parse_recipe
from spinlm.rundir.layout import RunDir
from spinlm.rundir.stage_graph import START
from spinlm.utils.atomic import read_json

KEY = "sk-very-secret/1+2"
QUESTIONS = [
    {"question_id": 1, "category": "writing", "turns": ["Is it alpha?", "And now?"]},
    {"question_id": 2, "category": "math", "turns": ["Is it beta?", "And now?"]},
    {"question_id": 3, "category": "writing", "turns": ["Is it gamma?"]},
]
MARKS = {("alpha", 1): 4, ("alpha", 2): 8, ("beta", 1): 6, ("beta", 2): 2, ("gamma", 1): 10}
GREETING = "Are you there?"

Reply = str | tuple[int, dict[str, str], str] | None
"""What a model says, or status, headers and body, or None for a connection that breaks."""


@dataclass
class Endpoint:
    """An endpoint whose answers come from a script: a function of what is asked and of how often that was asked."""

    script: Callable[[str, int], Reply] = lambda asked, times: "[[5]]"
    bodies: list[dict[str, Any]] = field(default_factory=list)
    keys: list[str | None] = field(default_factory=list)
    busiest: int = 0  # most requests at once
    url: str = ""
    _busy: int = 0
    _lock: threading.Lock = field(default_factory=threading.Lock)

    @property
    def asked(self) -> list[str]:
        """The last message of every request but greetings."""
        texts = [body["messages"][-1]["content"] for body in self.bodies]
        return [text for text in texts if text != GREETING]

    def answer(self, body: dict[str, Any], key: str | None) -> Reply:
        text = body["messages"][-1]["content"]
        with self._lock:
            self.bodies.append(body)
            self.keys.append(key)
            times = self.asked.count(text)
            self._busy += 1
            self.busiest = max(self.busiest, self._busy)
        try:
            return "Yes." if text == GREETING else self.script(text, times)
        finally:
            with self._lock:
                self._busy -= 1


@pytest.fixture
def endpoint(monkeypatch) -> Iterator[Endpoint]:
    for name in ("SPINLM_JUDGE_KEY", "OPENAI_API_KEY"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setenv("NO_PROXY", "127.0.0.1")
    monkeypatch.setattr(spinlm.utils.http, "BACKOFF_SECONDS", 0.01)
    scripted = Endpoint()

    class Handler(BaseHTTPRequestHandler):
        def do_POST(self):
            body = json.loads(self.rfile.read(int(self.headers["Content-Length"])))
            reply = scripted.answer(body, self.headers.get("Authorization"))
            if reply is None:
                self.connection.shutdown(socket.SHUT_RDWR)
                return
            if isinstance(reply, str):
                reply = (200, {}, json.dumps({"choices": [{"message": {"role": "assistant", "content": reply}}]}))
            status, headers, text = reply
            if self.path != "/v1/chat/completions":
                status, text = 404, '{"error": {"message": "no such path"}}'
            with contextlib.suppress(ConnectionError):  # nobody waited for it
                self.send_response(status)
                for name, value in headers.items():
                    self.send_header(name, value)
                self.send_header("Content-Length", str(len(text.encode())))
                self.end_headers()
                self.wfile.write(text.encode())

        def log_message(self, *args):
            pass

    with ThreadingHTTPServer(("127.0.0.1", 0), Handler) as http:
        http.daemon_threads = True
        scripted.url = f"http://127.0.0.1:{http.server_port}/v1"
        thread = threading.Thread(target=http.serve_forever, kwargs={"poll_interval": 0.01})
        thread.start()
        yield scripted
        http.shutdown()
        thread.join()


@pytest.fixture
def judge(endpoint) -> Judge:
    return Judge.of(endpoint.url, "scripted", parallel=1)


@dataclass(frozen=True)
class Bench:
    """A finished run and questions."""

    run: RunDir
    questions: Path

    def __call__(self, judge: Judge, *players: int, questions: Path | None = None, **how: Any) -> list[str]:
        recipe = parse_recipe(read_json(self.run.recipe), "recipe")
        how = {"max_new_tokens": 8, **how}
        return mt_bench(recipe, self.run, players or (START,), judge, questions or self.questions, **how)

    def overall(self, player: int = START) -> Any:
        return read_scores(self.run, player)["mt-bench"]["overall"]

    def rows(self, pattern: str, player: int = START) -> list[dict[str, Any]]:
        (path,) = self.files(pattern, player)
        return read_rows(path)

    def files(self, pattern: str, player: int = START) -> list[Path]:
        return sorted((self.run.iteration(player) / "mt-bench").glob(pattern))

    def set_answers(self, player: int, text: str, same: Sequence[int] = ()) -> None:
        """Put words into a player's mouth; to some questions the same for all."""
        (path,) = self.files("answers-*", player)
        rows = read_rows(path)
        for row in rows:
            turns = row["choices"][0]["turns"]
            row["choices"][0]["turns"] = [
                f"{'same' if row['question_id'] in same else text} {number}" for number in range(len(turns))
            ]
        write_rows(path, rows)


@pytest.fixture
def bench(reference, tmp_path) -> Bench:
    shutil.copytree(reference, tmp_path / "run", symlinks=True)
    return Bench(RunDir(tmp_path / "run"), write_rows(tmp_path / "question.jsonl", QUESTIONS))


def turn_of(asked: str) -> tuple[str, int]:
    """Which question, and which turn of it, a judge is asked about."""
    word = next(name for name in ("alpha", "beta", "gamma") if name in asked)
    return word, 2 if "<message 2>" in asked else 1


def by_rule(asked: str, times: int = 1) -> str:
    return f"I see. [[{MARKS[turn_of(asked)]}]]"


# Scores


def test_scores_of_a_judge_with_a_known_rule(bench, judge, endpoint, tmp_path):
    endpoint.script = by_rule
    references = write_rows(
        tmp_path / "references.jsonl", [{"question_id": 2, "choices": [{"turns": ["So true", "No"]}]}]
    )
    bench(judge, references=references)
    scores = read_scores(bench.run, START)["mt-bench"]
    # Sums 12, 8, 10 of 2, 2, 1 marks: mean 6, and √(3/2 · (0² + 4² + 4²)) / 5.
    assert (scores["overall"].value, scores["overall"].standard_error) == (6.0, pytest.approx(48**0.5 / 5))
    assert (scores["turn 1"].value, scores["turn 1"].standard_error) == pytest.approx((20 / 3, 28**0.5 / 3))
    assert (scores["turn 2"].value, scores["turn 2"].standard_error) == pytest.approx((5.0, 3.0))
    assert (scores["writing"].value, scores["writing"].standard_error) == pytest.approx((22 / 3, 16 / 9))
    assert (scores["math"].value, scores["math"].standard_error) == (4.0, None)
    assert {score.metric for score in scores.values()} == {"points"}
    assert [score.examples for score in scores.values()] == [3, 3, 2, 2, 1]
    settings, counts = scores["overall"].settings, scores["overall"].counts
    asked_for = {"judge": "scripted", "endpoint": judge.host, "limit": None, "max_new_tokens": 8}
    assert settings.items() >= {**asked_for, "without_reference": 0}.items()
    assert counts.items() >= {"unparsable": 0, "unanswered": 0, "asked_again": 0}.items()

    assert len(endpoint.asked) == len(set(endpoint.asked)) == 5
    for body in endpoint.bodies:
        assert (body["model"], body["temperature"]) == ("scripted", 0)
    assert {turn_of(text) for text in endpoint.asked if "So true" in text} == {("beta", 1), ("beta", 2)}
    answers = {row["question_id"]: row for row in bench.rows("answers-*")}
    for text in endpoint.asked:
        word, turn = turn_of(text)
        answer = answers[{"alpha": 1, "beta": 2, "gamma": 3}[word]]["choices"][0]["turns"]
        assert all(f"\n{given}\n" in text for given in answer[:turn])


def test_options_are_sent_and_belong_to_what_was_asked(bench, judge, endpoint):
    bench(judge)
    before = len(endpoint.asked)
    options = read_options('{"grammar": "root ::= digit", "temperature": null, "max_tokens": 7}')
    bench(replace(judge, options=options))
    assert len(endpoint.asked) == 2 * before  # verdicts of before were asked for otherwise
    assert endpoint.bodies[-1].keys() == {"model", "messages", "max_tokens", "grammar"}
    assert (endpoint.bodies[-1]["max_tokens"], endpoint.bodies[-1]["grammar"]) == (7, "root ::= digit")


@pytest.mark.parametrize("text", ["{", "[1]", '{"model": "other"}'])
def test_options_that_cannot_be_sent(text):
    with pytest.raises(JudgeError, match="--judge-options"):
        read_options(text)


def test_the_second_turn_sees_the_first_answer(bench, judge, endpoint):
    """Greedy answers, as the model gives them to these very conversations."""
    from spinlm.generation import local_engine
    from spinlm.model.players import seat
    from spinlm.rundir.records import Sampling

    bench(judge)
    (row,) = [row for row in bench.rows("answers-*") if row["category"] == "math"]
    recipe = parse_recipe(read_json(bench.run.recipe), "recipe")
    players = seat(recipe, bench.run)
    players.become(START)
    sampling = Sampling(0.0, 1.0, 8, 256, 1, players.renderer.stop_ids)
    messages = []
    for said, given in zip(QUESTIONS[1]["turns"], row["choices"][0]["turns"], strict=True):
        messages.append({"role": "user", "content": said})
        prompt = players.renderer.prompt_ids(messages)
        ((answer,),) = local_engine(recipe, players, True).generate([prompt], sampling, 0, lambda ended, tokens: None)
        assert players.renderer.decode(answer.token_ids) == given
        messages.append({"role": "assistant", "content": given})


def test_how_players_compare(bench, judge, endpoint):
    bench(judge, START, 0)
    ours, theirs = (read_scores(bench.run, player)["mt-bench"] for player in (START, 0))
    assert all(comparable(score, theirs[task]) for task, score in ours.items())
    bench.set_answers(START, "plain")
    bench.set_answers(0, "better")
    endpoint.script = lambda asked, times: f"[[{MARKS[turn_of(asked)] - 1 + ('better' in asked)}]]"
    remarks = bench(judge, START, 0)
    assert "iteration 0 − start: +1.00 ± 0.00 points, paired over 3 questions" in remarks
    assert (bench.overall().value, bench.overall(0).value) == (5.0, 6.0)


# Pairs


def test_a_judge_that_always_says_a_finds_no_winner(bench, judge, endpoint):
    bench(judge, START, 1)
    bench.set_answers(START, "one")
    bench.set_answers(1, "other")
    endpoint.bodies.clear()
    endpoint.script = lambda asked, times: "[[A]]"
    remarks = bench(judge, START, 1, pairwise=True)
    score = read_scores(bench.run, 1)["mt-bench pairwise"]["against start"]
    assert (score.value, score.standard_error, score.metric) == (0.5, 0.0, "win rate")
    assert score.counts["orders_differ"] == 5
    assert (score.counts["chose_first"], score.counts["chose_second"]) == (10, 0)
    assert len(endpoint.asked) == len(set(endpoint.asked)) == 10
    assert any("contradicted itself in 5 of 5 games" in line for line in remarks)
    assert "mt-bench" in read_scores(bench.run, 1)  # the marks of before are still there


def test_win_rate_of_a_judge_with_a_known_rule(bench, judge, endpoint):
    """Question 1: won, lost. Question 2: won, one order unreadable. Question 3: tied. Mean of 1, 0; 1; ½: 2.5 / 4."""
    bench(judge, START, 1)
    bench.set_answers(START, "base")
    bench.set_answers(1, "challenger")

    def script(asked: str, times: int) -> str:
        if asked == REMINDER:
            return "who knows"
        ours, theirs = "AB" if asked.index("challenger") < asked.index("base") else "BA"
        if turn_of(asked) == ("beta", 2) and ours == "B":
            return "who knows"
        return {"alpha": f"[[{ours if turn_of(asked)[1] == 1 else theirs}]]", "beta": f"[[{ours}]]"}.get(
            turn_of(asked)[0], "[[C]]"
        )

    endpoint.script = script
    remarks = bench(judge, START, 1, pairwise=True)
    score = read_scores(bench.run, 1)["mt-bench pairwise"]["against start"]
    assert score.value == 2.5 / 4
    # Sums 1, 1, ½ of 2, 1, 1 games: deviations −¼, ⅜, −⅛.
    assert score.standard_error == pytest.approx((1.5 * (1 / 16 + 9 / 64 + 1 / 64)) ** 0.5 / 4)
    counted = {name: score.counts[name] for name in ("wins", "ties", "losses", "unparsable", "orders_differ")}
    assert counted == {"wins": 2, "ties": 1, "losses": 1, "unparsable": 1, "orders_differ": 0}
    assert "iteration 1 against start: 1 of 10 verdicts could not be read and do not count" in remarks


def test_equal_answers_are_a_tie_that_nobody_is_asked_about(bench, judge, endpoint):
    bench(judge, START, 1)
    bench.set_answers(START, "same")
    bench.set_answers(1, "same")
    endpoint.bodies.clear()
    bench(judge, START, 1, pairwise=True)
    score = read_scores(bench.run, 1)["mt-bench pairwise"]["against start"]
    assert (score.value, score.counts["identical"], endpoint.bodies) == (0.5, 5, [])


# Going on


def test_nothing_is_asked_twice_after_an_error(bench, judge, endpoint):
    def script(asked: str, times: int) -> Reply:
        return by_rule(asked) if len(endpoint.asked) <= 3 else (400, {}, '{"error": {"message": "too long for me"}}')

    endpoint.script = script
    with pytest.raises(JudgeError, match=r"refuses the request \(400: too long for me\)"):
        bench(judge)
    assert read_scores(bench.run, START) == {}
    (answers,), (judgements,) = bench.files("answers-*"), bench.files("judgements-*")
    before = answers.read_bytes()
    kept = endpoint.asked[:3]
    with judgements.open("a") as file:
        file.write('{"question_id": 3, "tu')  # as the power going out would leave it
    endpoint.bodies.clear()
    endpoint.script = by_rule
    bench(judge)
    assert len(endpoint.asked) == 2
    assert not set(endpoint.asked) & set(kept)
    assert answers.read_bytes() == before
    assert_whole(bench.run.root)
    assert bench.overall().value == 6.0
    endpoint.bodies.clear()
    bench(judge)
    assert endpoint.bodies == []
    assert bench.overall().value == 6.0


def test_nothing_is_asked_twice_after_ctrl_c(bench, endpoint, cli, tmp_path):
    held = threading.Event()

    def script(asked: str, times: int) -> str:
        if len(endpoint.asked) == 3:
            held.wait(20)
        return by_rule(asked)

    endpoint.script = script
    command = ("mt-bench", bench.run.root, "--iteration", "start", "--max-new-tokens", "8")
    how = ("--judge-url", endpoint.url, "--judge-model", "scripted", "--judge-parallel", "1")
    process = cli.start(*command, *how, "--questions", bench.questions, folder=tmp_path)
    process.wait_until(lambda: len(endpoint.asked) == 3)
    process.send(signal.SIGINT)
    stopped = process.wait()
    assert (stopped.code, stopped.message) == (130, "stopped as asked; run the same command again to continue")
    held.set()
    first = endpoint.asked[:2]
    endpoint.bodies.clear()
    endpoint.script = by_rule
    done = cli(*command, *how, "--questions", bench.questions, folder=tmp_path)
    assert len(endpoint.asked) == 3
    assert not set(endpoint.asked) & set(first)
    assert "overall" in done.out
    assert "6.000 ± 1.386" in done.out
    assert "no reference answer to 1 of the questions (math): there the judge is on its own" in done.out


def test_more_questions_add_to_what_is_there(bench, judge, endpoint):
    endpoint.script = by_rule
    bench(judge, limit=2)
    assert {row["question_id"] for row in bench.rows("answers-*")} == {1, 2}
    assert bench.overall().examples == 2
    few = bench.rows("answers-*")
    endpoint.bodies.clear()
    bench(judge)
    assert [turn_of(text) for text in endpoint.asked] == [("gamma", 1)]
    assert bench.rows("answers-*")[:2] == few
    shutil.rmtree(bench.run.iteration(START) / "mt-bench")
    bench(judge)
    given = {row["question_id"]: row["choices"] for row in bench.rows("answers-*")}
    assert {row["question_id"]: row["choices"] for row in few}.items() <= given.items()
    bench(judge, limit=1)
    assert read_scores(bench.run, START)["mt-bench"].keys() == {"overall", "turn 1", "turn 2", "writing"}


@pytest.mark.parametrize("change", ["judge", "prompts", "judge_tokens"])
def test_another_judge_is_asked_anew(bench, judge, endpoint, change):
    bench(judge)
    (old,) = bench.files("judgements-*")
    before = old.read_bytes()
    endpoint.bodies.clear()
    endpoint.script = lambda asked, times: "[[9]]"
    prompt = replace(judge.prompts["single-v1"], system="Be strict.")
    other = {
        "judge": replace(judge, model="other/model"),
        "prompts": replace(judge, prompts={**judge.prompts, "single-v1": prompt}),
        "judge_tokens": replace(judge, max_tokens=99),
    }[change]
    bench(other)
    assert len(endpoint.asked) == 5
    assert len(bench.files("judgements-*")) == 2
    assert len(bench.files("answers-*")) == 1
    assert old.read_bytes() == before
    assert bench.overall().value == 9.0


@pytest.mark.parametrize("change", ["max_new_tokens", "questions"])
def test_other_answers_are_other_files(bench, judge, endpoint, change, tmp_path):
    bench(judge)
    endpoint.bodies.clear()
    if change == "questions":
        changed = [QUESTIONS[0] | {"turns": ["Is it alpha, then?"]}, *QUESTIONS[1:]]
        bench(judge, questions=write_rows(tmp_path / "other.jsonl", changed))
    else:
        bench(judge, max_new_tokens=5)
    assert len(bench.files("answers-*")) == len(bench.files("judgements-*")) == 2
    assert len(endpoint.asked) == (4 if change == "questions" else 5)


def test_an_answer_that_changed_is_judged_anew(bench, judge, endpoint):
    bench(judge)
    bench.set_answers(START, "edited")
    endpoint.bodies.clear()
    bench(judge)
    assert len(endpoint.asked) == 5
    assert all("edited" in text for text in endpoint.asked)


# An endpoint that misbehaves


@pytest.mark.parametrize(
    "trouble",
    [
        (429, {"Retry-After": "0"}, "slow down"),
        (500, {}, "oops"),
        (503, {"Retry-After": "Mon, 01 Jan 2001 00:00:00 GMT"}, ""),
        None,
        "late",
    ],
)
def test_trouble_that_passes(judge, endpoint, trouble):
    def script(asked: str, times: int) -> Reply:
        if times > 2:
            return "[[7]]"
        if trouble == "late":
            time.sleep(0.5)
        return trouble

    endpoint.script = script
    verdicts = []
    judge = replace(judge, timeout=0.2)
    judge.ask([[{"role": "user", "content": "?"}]], read_mark, lambda number, verdict: verdicts.append(verdict.value))
    assert verdicts == [7.0]
    assert len(endpoint.asked) == 3


def test_retry_after_is_honoured(judge, endpoint):
    endpoint.script = lambda asked, times: "[[7]]" if times > 1 else (429, {"Retry-After": "0.4"}, "")
    begun = time.monotonic()
    judge.ask([[{"role": "user", "content": "?"}]], read_mark, lambda number, verdict: None)
    assert 0.4 <= time.monotonic() - begun < 3


@pytest.mark.parametrize(
    ("reply", "message", "requests"),
    [
        ((500, {}, "all broken"), "failed 5 times .* 500: all broken.* The verdicts so far", 5),
        (None, "failed 5 times", 5),
        ((429, {"Retry-After": "3600"}, '{"error": "quota"}'), r"asks to wait 3600 seconds \(429: quota\)", 1),
        ((401, {}, '{"error": {"message": "who are you"}}'), r"refuses the key .*SPINLM_JUDGE_KEY.*who are you", 1),
        ((403, {}, ""), "refuses the key", 1),
        (
            (404, {}, '{"error": {"message": "no model"}}'),
            "not found .*no model.* scripted .*--judge-model",
            1,
        ),
        ((400, {}, "\x1b[31mbad\n request"), r"refuses the request \(400: \[31mbad request\)", 1),
        ((307, {"Location": "http://127.0.0.1:1/"}, ""), r"redirects \(307", 1),
        ((200, {}, "<!doctype html><h1>Welcome</h1>"), "Welcome.* ends in /v1", 1),
        ((200, {}, '{"object": "list"}'), r"no choices\[0\].message.content .*list", 1),
        ((200, {}, '{"choices": []}'), "no choices", 1),
        ((200, {}, "[]"), "no choices", 1),
        ((200, {}, '{"choices": [{"text": "[[7]]"}]}'), "no choices", 1),
    ],
)
def test_trouble_that_stays(judge, endpoint, reply, message, requests):
    endpoint.script = lambda asked, times: reply
    with pytest.raises(JudgeError, match=message) as caught:
        judge.ask([[{"role": "user", "content": "?"}]], read_mark, lambda number, verdict: None)
    assert str(caught.value).startswith(f"{endpoint.url}/chat/completions: ")
    assert len(endpoint.asked) == requests
    assert len(str(caught.value)) < 500


def test_nobody_there(bench, monkeypatch):
    monkeypatch.setattr("spinlm.utils.http.BACKOFF_SECONDS", 0.01)
    with socket.socket() as unused:
        unused.bind(("127.0.0.1", 0))
        url = f"http://127.0.0.1:{unused.getsockname()[1]}/v1"
        begun = time.monotonic()
        with pytest.raises(JudgeError, match=r"cannot be reached .* Is the server running, and is --judge-url right\?"):
            bench(Judge.of(url, "m"))
    assert time.monotonic() - begun < 5
    assert bench.files("*") == []  # told before anything is answered


def test_a_silent_endpoint(judge, endpoint):
    endpoint.script = lambda asked, times: time.sleep(0.3)
    with pytest.raises(JudgeError, match=r"no reply within 0\.05 seconds; --judge-timeout allows more"):
        replace(judge, timeout=0.05).ask([[{"role": "user", "content": "?"}]], read_mark, lambda number, verdict: None)


def test_requests_at_once(judge, endpoint):
    def script(asked: str, times: int) -> str:
        time.sleep(0.05)
        return f"[[{int(asked) % 9 + 1}]]"

    endpoint.script = script
    found: dict[int, float | None] = {}
    conversations = [[{"role": "user", "content": str(number)}] for number in range(12)]
    replace(judge, parallel=3).ask(conversations, read_mark, lambda n, verdict: found.update({n: verdict.value}))
    assert endpoint.busiest == 3
    assert found == {number: number % 9 + 1 for number in range(12)}


# Verdicts that cannot be read


def test_a_verdict_that_cannot_be_read_is_asked_for_once_more(bench, judge, endpoint):
    def script(asked: str, times: int) -> str:
        if asked == REMINDER:
            earlier = endpoint.bodies[-1]["messages"]
            assert [message["role"] for message in earlier] == ["user", "assistant", "user"]
            return "[[3]]" if "alpha" in earlier[0]["content"] else "no"
        return "[[7]]" if "gamma" in asked else "Hm."

    endpoint.script = script
    remarks = bench(judge)
    assert endpoint.asked.count(REMINDER) == 4
    score = bench.overall()
    assert score.value == (3 + 3 + 7) / 3
    assert (score.counts["unparsable"], score.counts["asked_again"], score.examples) == (2, 4, 2)
    assert "start: 2 of 5 verdicts could not be read and do not count" in remarks
    assert "math" not in read_scores(bench.run, START)["mt-bench"]
    endpoint.bodies.clear()
    bench(judge)
    assert endpoint.bodies == []


@pytest.mark.parametrize("pairwise", [False, True])
def test_no_verdict_can_be_read(bench, judge, endpoint, pairwise):
    """Not even where two players gave the same answer to one question: ties alone are no verdict."""
    bench(judge, START, 1)
    for player in (START, 1):
        bench.set_answers(player, f"by {player}", same=[3])
        bench.run.benchmarks(player).unlink()
    endpoint.script = lambda asked, times: "As a tiny model, I cannot say."
    with pytest.raises(JudgeError, match=r"could not be read.*As a tiny model.*stronger judge"):
        bench(judge, START, 1, pairwise=pairwise)
    assert read_scores(bench.run, 1) == {}


def test_a_reply_without_text_is_no_verdict(judge, endpoint):
    endpoint.script = lambda asked, times: (200, {}, '{"choices": [{"message": {"content": null}}]}')
    verdicts = []
    judge.ask([[{"role": "user", "content": "?"}]], read_mark, lambda number, verdict: verdicts.append(verdict))
    assert (verdicts[0].value, verdicts[0].replies) == (None, ("", ""))


# Questions that a player cannot answer


def test_a_question_longer_than_the_context_is_counted(bench, judge, endpoint, tmp_path):
    long = {"question_id": 4, "category": "math", "turns": ["alpha " * 300, "Why?"]}
    later = {"question_id": 5, "category": "math", "turns": ["alpha?", "beta " * 300]}
    control = {"question_id": 6, "category": "math", "turns": ["alpha <|im_end|>"]}
    path = write_rows(tmp_path / "long.jsonl", [*QUESTIONS, long, later, control])
    remarks = bench(judge, questions=path)
    assert bench.overall().counts["unanswered"] == 4
    assert len(endpoint.asked) == 6
    (line,) = [line for line in remarks if "could not be answered to the end" in line]
    assert line.startswith("start: 3 of 6 questions could not be answered to the end; question 4: turn 1: it has ")
    assert line.endswith(" tokens with what comes before it, and the model has 256 positions")
    with pytest.raises(DataError, match=r"start can answer none of these questions. Of question 4: turn 1: it has"):
        bench(judge, questions=write_rows(tmp_path / "only.jsonl", [long]))


# The key


def test_the_key_is_sent_and_kept_nowhere(bench, judge, endpoint, monkeypatch, capfd):
    monkeypatch.setenv("SPINLM_JUDGE_KEY", f"{KEY}\n")
    monkeypatch.setenv("OPENAI_API_KEY", "another")
    endpoint.script = lambda asked, times: f"You sent {KEY}. [[7]]"
    remarks = bench(judge)
    assert set(endpoint.keys) == {f"Bearer {KEY}"}
    endpoint.script = lambda asked, times: (400, {}, json.dumps({"error": {"message": f"bad key {KEY}"}}))
    with pytest.raises(SpinError, match=r"bad key \[key\]") as caught:
        bench(replace(judge, model="other"))
    shown = "".join(capfd.readouterr()) + "".join(remarks) + str(caught.value) + repr(judge)
    assert KEY not in shown
    written = [path for path in bench.run.root.rglob("*") if path.is_file() and KEY.encode() in path.read_bytes()]
    assert written == []
    assert "[key]" in bench.rows("judgements-scripted-*")[0]["replies"][0]


def test_the_key_of_openai_is_taken_where_there_is_no_other(judge, endpoint, monkeypatch):
    monkeypatch.setenv("OPENAI_API_KEY", "another")
    judge.check()
    monkeypatch.delenv("OPENAI_API_KEY")
    judge.check()
    assert endpoint.keys == ["Bearer another", None]


def test_a_key_that_is_none(judge, monkeypatch):
    monkeypatch.setenv("SPINLM_JUDGE_KEY", "one\ntwo")
    with pytest.raises(JudgeError, match="SPINLM_JUDGE_KEY.*characters that no key has") as caught:
        judge.check()
    assert "two" not in str(caught.value)


# The command


def test_the_command_tells_a_refused_key_before_it_loads_a_model(bench, endpoint):
    """And without the key, whatever the server says."""
    endpoint.script = lambda asked, times: ""
    command = [sys.executable, "-m", "spinlm", "mt-bench", bench.run.root, "--judge-model", "m"]
    command += ["--judge-url", f"{endpoint.url}/wrong", "--questions", bench.questions]
    environment = os.environ | {"SPINLM_JUDGE_KEY": KEY}
    done = subprocess.run(command, env=environment, capture_output=True, text=True)
    assert done.returncode == 2
    assert done.stderr.startswith(f"spinlm: {endpoint.url}/wrong/chat/completions: not found (404: no such path)")
    assert done.stderr.count("\n") == 1
    assert KEY not in done.stdout + done.stderr
    assert bench.files("*") == []


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"--questions": None}, "no questions: name MT-Bench's question.jsonl"),
        ({"--questions": "nothing.jsonl"}, "--questions: nothing.jsonl cannot be read (No such file or directory)"),
        ({"--questions": "bad.jsonl"}, "bad.jsonl, line 2: not a question: turns is missing"),
        ({"--questions": "empty.jsonl"}, "--questions: empty.jsonl is empty: it has no questions"),
        ({"--references": "nothing.jsonl"}, "--references: nothing.jsonl cannot be read"),
        ({"--judge-prompts": "nothing.jsonl"}, "--judge-prompts: nothing.jsonl cannot be read"),
        ({"--judge-prompts": "empty.jsonl"}, "--judge-prompts: the file has no prompt named single-v1"),
        ({"--judge-url": None}, "no judge: name an OpenAI-compatible endpoint with --judge-url"),
        ({"--judge-model": None}, "no judge: name the model that the endpoint is to use with --judge-model"),
        ({"--iteration": "1", "--pairwise": ""}, "--pairwise compares players, and here is only one: iteration 1"),
        ({}, "http://127.0.0.1:1/v1/chat/completions: cannot be reached"),
    ],
)
def test_what_the_command_refuses(bench, cli, tmp_path, changes, message):
    write_rows(tmp_path / "bad.jsonl", [QUESTIONS[0], {"question_id": 2, "category": "math"}])
    (tmp_path / "empty.jsonl").touch()
    options = {
        **{"--questions": "question.jsonl", "--judge-url": "http://127.0.0.1:1/v1", "--judge-model": "m"},
        **{"--iteration": "start,1", "--max-new-tokens": "8"},
        **changes,
    }
    given = [text for name, value in options.items() if value is not None for text in (name, value) if text]
    refused = cli("mt-bench", bench.run.root, *given, folder=tmp_path, code=2)
    assert refused.message.startswith(message)
    assert bench.files("*") == []


def test_pairwise_needs_two_players(bench, judge):
    with pytest.raises(RunError, match=r"only one: start\. Name two of them with --iteration"):
        bench(judge, START, pairwise=True)
