"""MT-Bench on a tiny run. A scripted server on this machine is the judge."""

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
from dataclasses import dataclass, field
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any

import pytest
import yaml
from runs import assert_whole, read_rows, write_rows

import spinlm.utils.http
from spinlm.errors import DataError, RunError, SpinError
from spinlm.evals.mt_bench.grading import parse_rating
from spinlm.evals.mt_bench.judge import DEFAULT_PROMPTS, Judge, JudgeError
from spinlm.evals.mt_bench.run import run_mt_bench
from spinlm.evals.scores import comparable, read_scores
from spinlm.model.run import Run
from spinlm.recipe.load import parse_recipe
from spinlm.rundir.layout import RunDir
from spinlm.rundir.provenance import read_recipe
from spinlm.rundir.stage_graph import START

KEY = "sk-very-secret/1+2"
QUESTIONS = [
    {"question_id": 1, "category": "writing", "turns": ["Is it alpha?", "And now?"]},
    {"question_id": 2, "category": "math", "turns": ["Is it beta?", "And now?"]},
    {"question_id": 3, "category": "writing", "turns": ["Is it gamma?"]},
]
RATINGS = {("alpha", 1): 4, ("alpha", 2): 8, ("beta", 1): 6, ("beta", 2): 2, ("gamma", 1): 10}
GREETING = "Are you there?"

Reply = str | tuple[int, dict[str, str], str] | None
"""The model's text; or status, headers and body; or None for a connection that breaks."""


@dataclass
class Endpoint:
    """An endpoint that replies with a script: a function of the last message and of the number of its requests."""

    script: Callable[[str, int], Reply] = lambda request, times: "[[5]]"
    bodies: list[dict[str, Any]] = field(default_factory=list)
    keys: list[str | None] = field(default_factory=list)
    busiest: int = 0  # most requests at once
    url: str = ""
    _busy: int = 0
    _lock: threading.Lock = field(default_factory=threading.Lock)

    @property
    def requests(self) -> list[str]:
        """The last messages of all requests, without the greetings."""
        texts = [body["messages"][-1]["content"] for body in self.bodies]
        return [text for text in texts if text != GREETING]

    def reply(self, body: dict[str, Any], key: str | None) -> Reply:
        text = body["messages"][-1]["content"]
        with self._lock:
            self.bodies.append(body)
            self.keys.append(key)
            times = self.requests.count(text)
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
            reply = scripted.reply(body, self.headers.get("Authorization"))
            if reply is None:
                self.connection.shutdown(socket.SHUT_RDWR)
                return
            if isinstance(reply, str):
                reply = (200, {}, json.dumps({"choices": [{"message": {"role": "assistant", "content": reply}}]}))
            status, headers, text = reply
            if self.path != "/v1/chat/completions":
                status, text = 404, '{"error": {"message": "no such path"}}'
            with contextlib.suppress(ConnectionError):  # the client is gone
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
    return Judge(url=endpoint.url, model="scripted", max_concurrency=1)


@dataclass(frozen=True)
class Bench:
    """A finished run and questions."""

    run: RunDir
    questions: Path

    def __call__(self, judge: Judge, *players: int, questions: Path | None = None, **options: Any) -> list[str]:
        recipe = parse_recipe(read_recipe(self.run), "recipe")
        settings = self.questions.with_name("judge.yaml")
        settings.write_text(yaml.safe_dump(judge.model_dump(mode="json")))
        options = {"max_new_tokens": 8, **options}
        return run_mt_bench(
            Run(recipe, self.run), players or (START,), settings, questions or self.questions, **options
        )

    def overall(self, player: int = START) -> Any:
        return read_scores(self.run, player)["mt-bench"]["overall"]

    def rows(self, pattern: str, player: int = START) -> list[dict[str, Any]]:
        (path,) = self.files(pattern, player)
        return read_rows(path)

    def files(self, pattern: str, player: int = START) -> list[Path]:
        return sorted((self.run.iteration(player) / "mt-bench").glob(pattern))

    def set_responses(self, player: int, text: str, same: Sequence[int] = ()) -> None:
        """Replace a player's responses; those to the questions in `same` are equal for all players."""
        (path,) = self.files("responses-*", player)
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


def changed(judge: Judge, **settings: Any) -> Judge:
    return Judge(**(judge.model_dump(exclude_unset=True) | settings))


def turn_of(request: str) -> tuple[str, int]:
    """Return the question's word and the turn that the judge has to decide on."""
    word = next(name for name in ("alpha", "beta", "gamma") if name in request)
    return word, 2 if "<message 2>" in request else 1


def by_rule(request: str, times: int = 1) -> str:
    return f"I see. [[{RATINGS[turn_of(request)]}]]"


# Scores


def test_ratings_by_a_known_rule(bench, judge, endpoint, tmp_path):
    endpoint.script = by_rule
    references = write_rows(
        tmp_path / "references.jsonl", [{"question_id": 2, "choices": [{"turns": ["So true", "No"]}]}]
    )
    bench(judge, references=references)
    scores = read_scores(bench.run, START)["mt-bench"]
    # Sums 12, 8, 10 of 2, 2, 1 ratings: mean 6, and √(3/2 · (0² + 4² + 4²)) / 5.
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
    assert counts.items() >= {"unparsable": 0, "missing_responses": 0}.items()

    assert len(endpoint.requests) == len(set(endpoint.requests)) == 5
    for body in endpoint.bodies:
        assert (body["model"], body["temperature"]) == ("scripted", 0)
    assert {turn_of(text) for text in endpoint.requests if "So true" in text} == {("beta", 1), ("beta", 2)}
    rows = {row["question_id"]: row for row in bench.rows("responses-*")}
    for text in endpoint.requests:
        word, turn = turn_of(text)
        responses = rows[{"alpha": 1, "beta": 2, "gamma": 3}[word]]["choices"][0]["turns"]
        assert all(f"\n{response}\n" in text for response in responses[:turn])


def test_extra_body_is_sent_and_makes_other_requests(bench, judge, endpoint):
    bench(judge)
    before = len(endpoint.requests)
    extra_body = {"grammar": "root ::= digit", "temperature": None, "max_tokens": 7}
    bench(changed(judge, extra_body=extra_body))
    assert len(endpoint.requests) == 2 * before
    assert endpoint.bodies[-1].keys() == {"model", "messages", "max_tokens", "grammar"}
    assert (endpoint.bodies[-1]["max_tokens"], endpoint.bodies[-1]["grammar"]) == (7, "root ::= digit")


def test_the_second_turn_sees_the_first_response(bench, judge, endpoint):
    """The responses are the model's greedy ones to these conversations."""
    from spinlm.generation import local_engine
    from spinlm.generation.base import Sampling
    from spinlm.model.players import Players

    bench(judge)
    (row,) = [row for row in bench.rows("responses-*") if row["category"] == "math"]
    recipe = parse_recipe(read_recipe(bench.run), "recipe")
    players = Players(recipe, bench.run)
    players.load(START)
    sampling = Sampling(0.0, 1.0, 8, 256, 1, players.renderer.stop_ids)
    messages = []
    for question, text in zip(QUESTIONS[1]["turns"], row["choices"][0]["turns"], strict=True):
        messages.append({"role": "user", "content": question})
        prompt = players.renderer.prompt_ids(messages)
        ((response,),) = local_engine(players).generate([prompt], sampling, 0, lambda completed, tokens: None)
        assert players.renderer.decode(response.token_ids) == text
        messages.append({"role": "assistant", "content": text})


def test_paired_difference_of_two_players(bench, judge, endpoint):
    bench(judge, START, 0)
    ours, theirs = (read_scores(bench.run, player)["mt-bench"] for player in (START, 0))
    assert all(comparable(score, theirs[task]) for task, score in ours.items())
    bench.set_responses(START, "plain")
    bench.set_responses(0, "better")
    endpoint.script = lambda request, times: f"[[{RATINGS[turn_of(request)] - 1 + ('better' in request)}]]"
    notes = bench(judge, START, 0)
    assert "iteration 0 − start: +1.00 ± 0.00 points, paired over 3 questions" in notes
    assert (bench.overall().value, bench.overall(0).value) == (5.0, 6.0)


# Pairwise


def test_a_judge_that_always_chooses_a_gives_no_winner(bench, judge, endpoint):
    bench(judge, START, 1)
    bench.set_responses(START, "one")
    bench.set_responses(1, "other")
    endpoint.bodies.clear()
    endpoint.script = lambda request, times: "[[A]]"
    notes = bench(judge, START, 1, pairwise=True)
    score = read_scores(bench.run, 1)["mt-bench pairwise"]["against start"]
    assert (score.value, score.standard_error, score.metric) == (0.5, 0.0, "win rate")
    assert score.counts["inconsistent"] == 5
    assert len(endpoint.requests) == len(set(endpoint.requests)) == 10
    assert any("contradicted itself in 5 of 5 comparisons" in line for line in notes)
    assert "mt-bench" in read_scores(bench.run, 1)  # the ratings are still there


def test_win_rate_by_a_known_rule(bench, judge, endpoint):
    """Question 1: win, loss. Question 2: win, one verdict unparsable. Question 3: tie. Mean of 1, 0; 1; ½: 2.5 / 4."""
    bench(judge, START, 1)
    bench.set_responses(START, "base")
    bench.set_responses(1, "challenger")

    def script(request: str, times: int) -> str:
        ours, theirs = "AB" if request.index("challenger") < request.index("base") else "BA"
        if turn_of(request) == ("beta", 2) and ours == "B":
            return "who knows"
        return {"alpha": f"[[{ours if turn_of(request)[1] == 1 else theirs}]]", "beta": f"[[{ours}]]"}.get(
            turn_of(request)[0], "[[C]]"
        )

    endpoint.script = script
    notes = bench(judge, START, 1, pairwise=True)
    score = read_scores(bench.run, 1)["mt-bench pairwise"]["against start"]
    assert score.value == 2.5 / 4
    # Sums 1, 1, ½ of 2, 1, 1 comparisons: deviations −¼, ⅜, −⅛.
    assert score.standard_error == pytest.approx((1.5 * (1 / 16 + 9 / 64 + 1 / 64)) ** 0.5 / 4)
    counted = {name: score.counts[name] for name in ("wins", "ties", "losses", "unparsable", "inconsistent")}
    assert counted == {"wins": 2, "ties": 1, "losses": 1, "unparsable": 1, "inconsistent": 0}
    assert "iteration 1 against start: 1 of 10 verdicts could not be parsed and are not counted" in notes


def test_identical_responses_are_a_tie_without_a_request(bench, judge, endpoint):
    bench(judge, START, 1)
    bench.set_responses(START, "same")
    bench.set_responses(1, "same")
    endpoint.bodies.clear()
    bench(judge, START, 1, pairwise=True)
    score = read_scores(bench.run, 1)["mt-bench pairwise"]["against start"]
    assert (score.value, score.counts["identical"], endpoint.bodies) == (0.5, 5, [])


# Resume


def test_no_request_is_sent_twice_after_an_error(bench, judge, endpoint):
    def script(request: str, times: int) -> Reply:
        return (
            by_rule(request) if len(endpoint.requests) <= 3 else (400, {}, '{"error": {"message": "too long for me"}}')
        )

    endpoint.script = script
    with pytest.raises(JudgeError, match=r"refuses the request \(400: .*too long for me"):
        bench(judge)
    assert read_scores(bench.run, START) == {}
    (responses,), (judgments,) = bench.files("responses-*"), bench.files("single-*")
    before = responses.read_bytes()
    recorded = endpoint.requests[:3]
    with judgments.open("a") as file:
        file.write('{"question_id": 3, "tu')  # as a power failure leaves it
    endpoint.bodies.clear()
    endpoint.script = by_rule
    bench(judge)
    assert len(endpoint.requests) == 2
    assert not set(endpoint.requests) & set(recorded)
    assert responses.read_bytes() == before
    assert_whole(bench.run.root)
    assert bench.overall().value == 6.0
    endpoint.bodies.clear()
    bench(judge)
    assert endpoint.bodies == []
    assert bench.overall().value == 6.0


def test_no_request_is_sent_twice_after_ctrl_c(bench, endpoint, cli, tmp_path):
    held = threading.Event()

    def script(request: str, times: int) -> str:
        if len(endpoint.requests) == 3:
            held.wait(20)
        return by_rule(request)

    endpoint.script = script
    command = ("mt-bench", bench.run.root, "--iteration", "start", "--max-new-tokens", "8", "--judge", "judge.yaml")
    (tmp_path / "judge.yaml").write_text(f"url: {endpoint.url}\nmodel: scripted\nmax_concurrency: 1\n")
    process = cli.start(*command, "--questions", bench.questions, folder=tmp_path)
    process.wait_until(lambda: len(endpoint.requests) == 3)
    process.send(signal.SIGINT)
    stopped = process.wait()
    assert (stopped.code, "run the same command again" in stopped.message) == (130, True)
    held.set()
    first = endpoint.requests[:2]
    endpoint.bodies.clear()
    endpoint.script = by_rule
    done = cli(*command, "--questions", bench.questions, folder=tmp_path)
    assert len(endpoint.requests) == 3
    assert not set(endpoint.requests) & set(first)
    assert "overall" in done.out
    assert "6.000 ± 1.386" in done.out
    assert "1 questions (math) have no reference answer" in done.out


def test_more_questions_add_to_what_is_there(bench, judge, endpoint):
    endpoint.script = by_rule
    bench(judge, limit=2)
    assert {row["question_id"] for row in bench.rows("responses-*")} == {1, 2}
    assert bench.overall().examples == 2
    few = bench.rows("responses-*")
    endpoint.bodies.clear()
    bench(judge)
    assert [turn_of(text) for text in endpoint.requests] == [("gamma", 1)]
    assert bench.rows("responses-*")[:2] == few
    shutil.rmtree(bench.run.iteration(START) / "mt-bench")
    bench(judge)
    given = {row["question_id"]: row["choices"] for row in bench.rows("responses-*")}
    assert {row["question_id"]: row["choices"] for row in few}.items() <= given.items()
    bench(judge, limit=1)
    assert read_scores(bench.run, START)["mt-bench"].keys() == {"overall", "turn 1", "turn 2", "writing"}


@pytest.mark.parametrize("change", ["model", "prompts_file", "max_tokens"])
def test_another_judge_gets_all_requests(bench, judge, endpoint, change, tmp_path):
    bench(judge)
    (old,) = bench.files("single-*")
    before = old.read_bytes()
    endpoint.bodies.clear()
    endpoint.script = lambda request, times: "[[9]]"
    strict = [row | {"system_prompt": "Be strict."} for row in read_rows(DEFAULT_PROMPTS)]
    write_rows(tmp_path / "prompts.jsonl", strict)
    bench(
        changed(judge, **{change: {"model": "other/model", "prompts_file": "prompts.jsonl", "max_tokens": 99}[change]})
    )
    assert len(endpoint.requests) == 5
    assert len(bench.files("single-*")) == 2
    assert len(bench.files("responses-*")) == 1
    assert old.read_bytes() == before
    assert bench.overall().value == 9.0


@pytest.mark.parametrize("change", ["max_new_tokens", "questions"])
def test_other_responses_are_other_files(bench, judge, endpoint, change, tmp_path):
    bench(judge)
    endpoint.bodies.clear()
    if change == "questions":
        changed = [QUESTIONS[0] | {"turns": ["Is it alpha, then?"]}, *QUESTIONS[1:]]
        bench(judge, questions=write_rows(tmp_path / "other.jsonl", changed))
    else:
        bench(judge, max_new_tokens=5)
    assert len(bench.files("responses-*")) == len(bench.files("single-*")) == 2
    assert len(endpoint.requests) == (4 if change == "questions" else 5)


def test_a_changed_response_is_judged_again(bench, judge, endpoint):
    bench(judge)
    bench.set_responses(START, "edited")
    endpoint.bodies.clear()
    bench(judge)
    assert len(endpoint.requests) == 5
    assert all("edited" in text for text in endpoint.requests)


# Endpoint failures


@pytest.mark.parametrize(
    "failure",
    [
        (429, {}, "slow down"),
        (500, {}, "oops"),
        (503, {}, ""),
        None,
        "late",
    ],
)
def test_transient_failures(judge, endpoint, failure):
    def script(request: str, times: int) -> Reply:
        if times > 2:
            return "[[7]]"
        if failure == "late":
            time.sleep(0.5)
        return failure

    endpoint.script = script
    judgments = []
    judge = changed(judge, timeout=0.2)
    judge.ask([[{"role": "user", "content": "?"}]], lambda number, judgment: judgments.append(judgment))
    assert judgments == ["[[7]]"]
    assert len(endpoint.requests) == 3


@pytest.mark.parametrize(
    ("reply", "message", "requests"),
    [
        ((500, {}, "all broken"), "failed 5 times .* 500: all broken.* The verdicts so far", 5),
        (None, "failed 5 times", 5),
        ((401, {}, '{"error": {"message": "who are you"}}'), r"refuses the key .*who are you.*SPINLM_JUDGE_KEY", 1),
        ((403, {}, ""), "refuses the key", 1),
        (
            (404, {}, '{"error": {"message": "no model"}}'),
            "not found .*no model.* scripted .*model in judge.yaml",
            1,
        ),
        ((400, {}, "\x1b[31mbad\n request"), r"refuses the request \(400: \\x1b\[31mbad request\)", 1),
        ((307, {"Location": "http://127.0.0.1:1/"}, ""), r"refuses the request \(307", 1),
        ((200, {}, "<!doctype html><h1>Welcome</h1>"), "Welcome.* ends in /v1", 1),
        ((200, {}, '{"object": "list"}'), r"no choices\[0\].message.content .*list", 1),
        ((200, {}, '{"choices": []}'), "no choices", 1),
        ((200, {}, "[]"), "no choices", 1),
        ((200, {}, '{"choices": [{"text": "[[7]]"}]}'), "no choices", 1),
    ],
)
def test_permanent_failures(judge, endpoint, reply, message, requests):
    endpoint.script = lambda request, times: reply
    with pytest.raises(JudgeError, match=message) as caught:
        judge.ask([[{"role": "user", "content": "?"}]], lambda number, judgment: None)
    assert str(caught.value).startswith(f"{endpoint.url}/chat/completions: ")
    assert len(endpoint.requests) == requests
    assert len(str(caught.value)) < 500


def test_unreachable_endpoint(bench, monkeypatch):
    monkeypatch.setattr("spinlm.utils.http.BACKOFF_SECONDS", 0.01)
    with socket.socket() as unused:
        unused.bind(("127.0.0.1", 0))
        url = f"http://127.0.0.1:{unused.getsockname()[1]}/v1"
        begun = time.monotonic()
        with pytest.raises(JudgeError, match=r"cannot be reached .*url in judge.yaml"):
            bench(Judge(url=url, model="m"))
    assert time.monotonic() - begun < 5
    assert bench.files("*") == []  # the check comes before the responses


def test_a_silent_endpoint(judge, endpoint):
    endpoint.script = lambda request, times: time.sleep(0.3)
    with pytest.raises(JudgeError, match=r"no reply within 0\.05 seconds; timeout in judge.yaml"):
        changed(judge, timeout=0.05).ask([[{"role": "user", "content": "?"}]], lambda number, judgment: None)


def test_max_concurrency(judge, endpoint):
    def script(request: str, times: int) -> str:
        time.sleep(0.05)
        return f"[[{int(request) % 9 + 1}]]"

    endpoint.script = script
    judgments: dict[int, str] = {}
    conversations = [[{"role": "user", "content": str(number)}] for number in range(12)]
    changed(judge, max_concurrency=3).ask(conversations, judgments.__setitem__)
    assert endpoint.busiest == 3
    assert judgments == {number: f"[[{number % 9 + 1}]]" for number in range(12)}


# Unparsable judgments


def test_judgments_without_a_verdict_are_counted(bench, judge, endpoint):
    endpoint.script = lambda request, times: "[[7]]" if "alpha" in request else "Hm."
    notes = bench(judge)
    score = bench.overall()
    assert (score.value, score.counts["unparsable"], score.examples) == (7.0, 3, 1)
    assert "start: 3 of 5 verdicts could not be parsed and are not counted" in notes
    assert "math" not in read_scores(bench.run, START)["mt-bench"]
    endpoint.bodies.clear()
    bench(judge)
    assert endpoint.bodies == []


@pytest.mark.parametrize("pairwise", [False, True])
def test_no_score_without_a_verdict(bench, judge, endpoint, pairwise):
    """A tie of identical responses is not a verdict."""
    bench(judge, START, 1)
    for player in (START, 1):
        bench.set_responses(player, f"by {player}", same=[3])
        bench.run.benchmarks(player).unlink()
    endpoint.script = lambda request, times: "As a tiny model, I cannot say."
    with pytest.raises(JudgeError, match=r"could be parsed.*As a tiny model.*stronger judge"):
        bench(judge, START, 1, pairwise=pairwise)
    assert read_scores(bench.run, 1) == {}


def test_an_empty_judgment_is_not_a_verdict(judge, endpoint):
    endpoint.script = lambda request, times: (200, {}, '{"choices": [{"message": {"content": null}}]}')
    judgments = []
    judge.ask([[{"role": "user", "content": "?"}]], lambda number, judgment: judgments.append(judgment))
    assert judgments == [""] and parse_rating("") is None


# Questions that a player cannot respond to


def test_a_question_longer_than_the_context_is_counted(bench, judge, endpoint, tmp_path):
    long = {"question_id": 4, "category": "math", "turns": ["alpha " * 300, "Why?"]}
    later = {"question_id": 5, "category": "math", "turns": ["alpha?", "beta " * 300]}
    control = {"question_id": 6, "category": "math", "turns": ["alpha <|im_end|>"]}
    path = write_rows(tmp_path / "long.jsonl", [*QUESTIONS, long, later, control])
    notes = bench(judge, questions=path)
    assert bench.overall().counts["missing_responses"] == 4
    assert len(endpoint.requests) == 6
    (line,) = [line for line in notes if "no complete response" in line]
    assert line.startswith("start: 3 of 6 questions") and "question 4: turn 1" in line and "256 positions" in line
    with pytest.raises(DataError, match=r"start cannot respond .* Question 4: turn 1"):
        bench(judge, questions=write_rows(tmp_path / "only.jsonl", [long]))


# The key


def test_the_key_is_sent_and_kept_nowhere(bench, judge, endpoint, monkeypatch, capfd):
    monkeypatch.setenv("SPINLM_JUDGE_KEY", f"{KEY}\n")
    monkeypatch.setenv("OPENAI_API_KEY", "another")
    endpoint.script = lambda request, times: f"You sent {KEY}. [[7]]"
    notes = bench(judge)
    assert set(endpoint.keys) == {f"Bearer {KEY}"}
    endpoint.script = lambda request, times: (400, {}, json.dumps({"error": {"message": f"bad key {KEY}"}}))
    with pytest.raises(SpinError, match=r"bad key \[key\]") as caught:
        bench(changed(judge, model="other"))
    shown = "".join(capfd.readouterr()) + "".join(notes) + str(caught.value) + repr(judge)
    assert KEY not in shown
    written = [path for path in bench.run.root.rglob("*") if path.is_file() and KEY.encode() in path.read_bytes()]
    assert written == []
    assert "[key]" in bench.rows("single-scripted-*")[0]["judgment"]


def test_the_key_of_openai_is_the_fallback(judge, endpoint, monkeypatch):
    monkeypatch.setenv("OPENAI_API_KEY", "another")
    judge.check()
    monkeypatch.delenv("OPENAI_API_KEY")
    judge.check()
    assert endpoint.keys == ["Bearer another", None]


def test_invalid_key(judge, monkeypatch):
    monkeypatch.setenv("SPINLM_JUDGE_KEY", "one\ntwo")
    with pytest.raises(JudgeError, match=r"SPINLM_JUDGE_KEY.*characters that no key has") as caught:
        judge.check()
    assert "two" not in str(caught.value)


# The command


def test_the_command_checks_the_endpoint_first(bench, endpoint, tmp_path):
    """No model is loaded, and no message contains the key."""
    endpoint.script = lambda request, times: ""
    (tmp_path / "judge.yaml").write_text(f"url: {endpoint.url}/wrong\nmodel: m\n")
    command = [sys.executable, "-m", "spinlm", "mt-bench", bench.run.root, "--judge", tmp_path / "judge.yaml"]
    environment = os.environ | {"SPINLM_JUDGE_KEY": KEY}
    done = subprocess.run([*command, "--questions", bench.questions], env=environment, capture_output=True, text=True)
    assert done.returncode == 2
    assert done.stderr.startswith(f"spinlm: {endpoint.url}/wrong/chat/completions: not found (404: ")
    assert done.stderr.count("\n") == 1
    assert KEY not in done.stdout + done.stderr
    assert bench.files("*") == []


@pytest.mark.parametrize(
    ("settings", "options", "message"),
    [
        ({}, {"--questions": "nothing.jsonl"}, "--questions: nothing.jsonl cannot be read (No such file or directory)"),
        ({}, {"--questions": "bad.jsonl"}, "bad.jsonl, line 2: turns: "),
        ({}, {"--questions": "empty.jsonl"}, "--questions: empty.jsonl is empty"),
        ({}, {"--references": "nothing.jsonl"}, "--references: nothing.jsonl cannot be read"),
        ({}, {"--judge": "nothing.yaml"}, "--judge: nothing.yaml cannot be read"),
        ({"prompts_file": "nothing.jsonl"}, {}, "prompts_file in judge.yaml: nothing.jsonl cannot be read"),
        ({"prompts_file": "empty.jsonl"}, {}, "prompts_file in judge.yaml: empty.jsonl has no prompt"),
        ({"url": "localhost"}, {}, "judge.yaml: url: localhost is not a URL"),
        ({}, {"--iteration": "1", "--pairwise": ""}, "--pairwise compares players, and iteration 1 is the only one"),
        ({}, {}, "http://127.0.0.1:1/v1/chat/completions: cannot be reached"),
    ],
)
def test_what_the_command_refuses(bench, cli, tmp_path, settings, options, message):
    write_rows(tmp_path / "bad.jsonl", [QUESTIONS[0], {"question_id": 2, "category": "math"}])
    (tmp_path / "empty.jsonl").touch()
    (tmp_path / "judge.yaml").write_text(yaml.safe_dump({"url": "http://127.0.0.1:1/v1", "model": "m"} | settings))
    files = {"--judge": "judge.yaml", "--questions": "question.jsonl"}
    options = files | {"--iteration": "start,1", "--max-new-tokens": "8"} | options
    arguments = [text for option in options.items() for text in option if text]
    refused = cli("mt-bench", bench.run.root, *arguments, folder=tmp_path, code=2)
    assert refused.message.startswith(message)
    assert bench.files("*") == []


def test_pairwise_needs_two_players(bench, judge):
    with pytest.raises(RunError, match="start is the only one"):
        bench(judge, START, pairwise=True)
