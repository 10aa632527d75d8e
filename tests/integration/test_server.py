"""The opponent behind a server: servers with real models, and one that misbehaves in every way."""

import contextlib
import json
import shutil
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import model_server
import pytest
from commands import Cli
from model_server import ModelServer, Reply, listen
from runs import World, assert_whole, read_jsons, readme_command

import spinlm.utils.http
from spinlm.check import check
from spinlm.errors import RecipeError
from spinlm.generation import supervisor
from spinlm.generation.server import ServerError, ServerOpponent
from spinlm.recipe.load import load_recipe
from spinlm.rundir.layout import RunDir
from spinlm.rundir.records import Sampling

GREEDY = ("opponent.temperature=0", "selfplay.select.patience=2")
KINDS_WITH_ADAPTERS = ("vllm", "sglang")


@pytest.fixture(autouse=True)
def quick(monkeypatch: pytest.MonkeyPatch) -> None:
    """No key of this machine's, no proxy, and no long waits."""
    for name in ("SPINLM_SERVER_KEY", "OPENAI_API_KEY"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setenv("NO_PROXY", "127.0.0.1")
    monkeypatch.setattr(spinlm.utils.http, "BACKOFF_SECONDS", 0.01)


@pytest.fixture(scope="module")
def greedy(session_cli: Cli, world: World, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A run whose opponents answer greedily, by the local engine."""
    run = tmp_path_factory.mktemp("greedy") / "run"
    session_cli("run", world.recipe, *GREEDY, "--run-dir", run, folder=world.folder)
    return run


def generations(run: Path, iteration: int) -> dict[str, Any]:
    rows = read_jsons(run / f"iteration-{iteration}" / "generations", "*.jsonl")
    return {row["id"]: row for row in rows}


def facts(run: Path, iteration: int) -> dict[str, Any]:
    marker = run / ".spinlm" / f"iteration-{iteration}" / "reference_logprobs.done"
    return dict(json.loads(marker.read_text(encoding="utf-8"))["train"])


def using(kind: str, **server: Any) -> tuple[str, ...]:
    return ("opponent.engine=server", f"opponent.server={json.dumps({'api': kind, **server})}")


@pytest.mark.parametrize("kind", KINDS_WITH_ADAPTERS)
def test_each_opponent_is_handed_to_the_server(kind: str, cli: Cli, world: World, greedy: Path, tmp_path: Path) -> None:
    """Greedy answers of every iteration are those of the local engine: the server had the same players."""
    served = ModelServer(kind, str(world.model))
    with listen(served.post, served.get) as url:
        changes = (*GREEDY, *using(kind, urls=[f"{url}/v1"], max_concurrency=4))
        cli("run", world.recipe, *changes, "--run-dir", tmp_path / "run", folder=world.folder)
    for iteration in (0, 1):
        ours, theirs = generations(greedy, iteration), generations(tmp_path / "run", iteration)
        assert {key: row["token_ids"] for key, row in theirs.items()} == {
            key: row["token_ids"] for key, row in ours.items()
        }
        assert facts(tmp_path / "run", iteration)["logprob_mismatch_max"] < 1e-4
    assert [body["lora_path"] for body in served.loaded] == [
        str(tmp_path / "run" / name / "player") for name in ("start", "iteration-0")
    ]
    assert len({body["lora_name"] for body in served.loaded}) == 2
    assert list(served.models) == ["base"], "what is needed no more is forgotten"


def test_the_command_of_the_readme(cli: Cli, world: World, tmp_path: Path) -> None:
    folder = shutil.copytree(world.folder, tmp_path / "here")
    served = ModelServer("vllm", str(world.model))
    with listen(served.post, served.get) as url:
        _, *command = readme_command("external server")
        cli(*(word.replace("http://127.0.0.1:8000", url) for word in command), "selfplay.iterations=1", folder=folder)
    assert served.loaded and len(list((folder / "runs").glob("*/best"))) == 1


@pytest.mark.parametrize("kind", ["openai", "llama.cpp"])
def test_server_is_started_with_each_opponent(kind: str, cli: Cli, world: World, greedy: Path, tmp_path: Path) -> None:
    """The adapter is merged for it, and nothing of it is left behind, neither process nor folder."""
    command = f"{sys.executable} {model_server.__file__} {kind} {{port}} {{merged}}"
    run = tmp_path / "run"
    changes = (*GREEDY, *using(kind, launch_command=command))
    cli("run", world.recipe, *changes, "--run-dir", run, folder=world.folder)
    for iteration in (0, 1):
        ours, theirs = generations(greedy, iteration), generations(run, iteration)
        assert [row["text"] for row in theirs.values()] == [row["text"] for row in ours.values()]
        assert [row["finished"] for row in theirs.values()] == [row["finished"] for row in ours.values()]
        assert all(row["retokenised"] == (kind == "openai") for row in theirs.values())
        assert ("logprob_mismatch_max" in facts(run, iteration)) == (kind != "openai")
        assert "listening" in (run / f"iteration-{iteration}" / "server.log").read_text()
    assert not list(run.glob("*/.merged"))
    assert not running(str(run))
    assert_whole(run)


def running(argument: str) -> list[str]:
    """Command lines of this machine's processes that name something."""
    found = []
    for path in Path("/proc").glob("[0-9]*/cmdline"):
        with contextlib.suppress(OSError):
            line = path.read_text(errors="replace").replace("\0", " ")
            if argument in line and "model_server" in line:
                found.append(line)
    return found


@pytest.mark.skipif(not Path("/proc").exists(), reason="looks at /proc")
def test_server_ends_with_us_however_we_end(cli: Cli, world: World, tmp_path: Path) -> None:
    run = tmp_path / "run"
    command = f"{sys.executable} {model_server.__file__} vllm {{port}} {{merged}}; sleep 1"
    slow = ("selfplay.iterations=1", *using("vllm", launch_command=command, model="nobody", max_concurrency=1))
    process = cli.start("run", world.recipe, *slow, "--run-dir", run, folder=world.folder)
    until(lambda: running(str(run)))
    assert (run / "iteration-0" / ".merged" / "model.safetensors").exists()
    process.send(signal.SIGKILL)
    until(lambda: not running(str(run)))
    quick = using("vllm", command=f"{sys.executable} {model_server.__file__} vllm {{port}} {{merged}}")
    cli("run", world.recipe, "selfplay.iterations=1", *quick, "--run-dir", run, folder=world.folder)
    assert not list(run.glob("*/.merged"))


@pytest.mark.skipif(not Path("/proc").exists(), reason="looks at /proc")
def test_keeper_gives_time_to_end(tmp_path: Path) -> None:
    """A server behind a shell, which ends at once, takes a while to end, and is not killed before."""
    slow = tmp_path / "slow.py"
    slow.write_text(
        "import signal, sys, time\n"
        "def end(*_):\n    time.sleep(1.5)\n    print('ended well', flush=True)\n    sys.exit()\n"
        "signal.signal(signal.SIGTERM, end)\nprint('up', flush=True)\nwhile True: time.sleep(1)\n"
    )
    log = tmp_path / "log"
    with log.open("wb") as file:
        command = [sys.executable, supervisor.__file__, f"echo first && {sys.executable} {slow}"]
        process = subprocess.Popen(command, stdin=subprocess.PIPE, stdout=file)
    until(lambda: "up" in log.read_text())
    assert process.stdin is not None
    process.stdin.close()
    assert process.wait(10) == 0
    assert "ended well" in log.read_text()


def until(condition: Callable[[], object], patience: float = 60) -> None:
    deadline = time.monotonic() + patience
    while not condition():
        assert time.monotonic() < deadline, "it never came"
        time.sleep(0.05)


class Scripted:
    """A server with the API of vllm whose answers come from a script: a function of how many requests came before."""

    def __init__(self, script: Callable[[int], Reply | str | None]):
        self.script = script
        self.bodies: list[dict[str, Any]] = []
        self.busiest = self._busy = 0
        self._lock = threading.Lock()

    def post(self, path: str, body: dict[str, Any]) -> Reply:
        with self._lock:
            number = len(self.bodies)
            self.bodies.append(body)
            self._busy += 1
            self.busiest = max(self.busiest, self._busy)
        try:
            reply = self.script(number)
        finally:
            with self._lock:
                self._busy -= 1
        return answer_with(body) if reply == "good" else reply  # type: ignore[return-value]


def answer_with(body: dict[str, Any]) -> Reply:
    """One token that depends on the prompt and the seed, and the end."""
    token = 5 + (sum(body["prompt"]) + body["seed"]) % 100
    choice = {"token_ids": [token, body["stop_token_ids"][0]], "finish_reason": "stop"}
    choice["logprobs"] = {"token_logprobs": [-1.0, -0.5]}
    return 200, {}, json.dumps({"choices": [choice]})


def refuse(status: int, message: str = "because", **headers: str) -> Reply:
    return status, headers, json.dumps({"error": {"message": message}})


def nothing(path: str) -> Reply:
    return 404, {}, "{}"


@pytest.fixture
def opponent(world: World, tmp_path: Path) -> Callable[..., ServerOpponent]:
    """An opponent behind some addresses."""
    from spinlm.model.players import Players

    recipe = load_recipe(world.recipe, [])
    renderer = Players(recipe, RunDir(tmp_path)).renderer

    def opponent(*urls: str, **settings: Any) -> ServerOpponent:
        changed = load_recipe(world.recipe, list(using("vllm", urls=list(urls), **settings)))
        server = changed.opponent.server
        assert server is not None
        return ServerOpponent(server, list(urls), "player", renderer)

    return opponent


PROMPTS = [[7, 8, number] for number in range(9)]


def ask(opponent: ServerOpponent, **how: Any) -> list[list[Any]]:
    stops = opponent.renderer.stop_ids
    settings: dict[str, Any] = {"temperature": 1.0, "top_p": 1.0, "max_new_tokens": 4, "max_length": 64, "samples": 2}
    counted: list[tuple[int, int]] = []
    given = opponent.generate(
        PROMPTS, Sampling(stop_ids=stops, **(settings | how)), 3, lambda *new: counted.append(new)
    )
    assert sum(ended for ended, _ in counted) == len(PROMPTS) * 2
    return given


def test_answers_stand_in_the_order_of_the_prompts(opponent: Callable[..., ServerOpponent]) -> None:
    """However many run at once, and whichever is ready first; the same seed gives the same ones."""
    scripted = Scripted(lambda number: (time.sleep(0.05 if number % 3 == 0 else 0.0), "good")[1])
    with listen(scripted.post, nothing) as url:
        many, one = (ask(opponent(url, max_concurrency=parallel)) for parallel in (6, 1))
    assert many == one
    assert scripted.busiest <= 6 and scripted.busiest > 1
    assert all(answer.finished and answer.logprob == -1.5 for given in many for answer in given)
    seeds = [body["seed"] for body in scripted.bodies[18:]]
    assert len(set(seeds)) == 18 and all(0 <= seed < 2**31 for seed in seeds)
    assert scripted.bodies[0]["max_tokens"] == 4 and scripted.bodies[0]["temperature"] == 1.0


def test_what_passes_is_tried_again(opponent: Callable[..., ServerOpponent]) -> None:
    troubles: list[Any] = [refuse(429, **{"Retry-After": "0"}), refuse(500), refuse(503), None]
    scripted = Scripted(lambda number: troubles[number] if number < len(troubles) else "good")
    with listen(scripted.post, nothing) as url:
        assert len(ask(opponent(url, max_concurrency=1))) == len(PROMPTS)
    assert len(scripted.bodies) == 18 + len(troubles)


def test_a_reply_that_takes_too_long(opponent: Callable[..., ServerOpponent]) -> None:
    scripted = Scripted(lambda number: (time.sleep(0.6 if number == 0 else 0.0), "good")[1])
    with listen(scripted.post, nothing) as url:
        assert len(ask(opponent(url, max_concurrency=1, timeout=0.3))) == len(PROMPTS)
        slow = Scripted(lambda number: (time.sleep(0.4), "good")[1])
    with listen(slow.post, nothing) as url, pytest.raises(ServerError, match=r"no reply within 0\.1 seconds; opponent"):
        ask(opponent(url, max_concurrency=1, timeout=0.1))


def test_several_addresses_share_the_work_and_one_may_be_gone(opponent: Callable[..., ServerOpponent]) -> None:
    first, second = Scripted(lambda number: "good"), Scripted(lambda number: "good" if number < 3 else None)
    with listen(first.post, nothing) as one, listen(second.post, nothing) as two:
        given = ask(opponent(one, two, "http://127.0.0.1:9", max_concurrency=4))
    assert len(given) == len(PROMPTS)
    assert len(second.bodies) >= 3 and len(first.bodies) >= 12


def test_an_address_that_failed_once_gets_work_again(opponent: Callable[..., ServerOpponent]) -> None:
    first = Scripted(lambda number: refuse(503) if number == 0 else "good")
    second = Scripted(lambda number: (time.sleep(0.02), "good")[1])
    with listen(first.post, nothing) as one, listen(second.post, nothing) as two:
        assert len(ask(opponent(one, two, max_concurrency=2))) == len(PROMPTS)
    assert len(first.bodies) > 3
    assert len(first.bodies) + len(second.bodies) == 18 + 1


@pytest.mark.parametrize(
    ("reply", "said"),
    [
        (refuse(401), "refuses the key in SPINLM_SERVER_KEY (401: because). It was not sent any"),
        (refuse(404), "Either it has no model player, which opponent.server.model names, or opponent.server.urls"),
        (refuse(400, "too long"), "refuses the request (400: too long)"),
        ((200, {}, "<html>hello</html>"), "something other than JSON (<html>hello</html>)"),
        ((200, {}, '{"choices": [{"text": "hm"}]}'), "has no choices[0].token_ids"),
        ((200, {}, "[]"), "has no choices[0].token_ids"),
        (refuse(500, "out of memory"), "failed 5 times in a row, at last with: 500: out of memory. Complete shards"),
        (refuse(429, **{"Retry-After": "4000"}), "asks to wait 4000 seconds"),
    ],
)
def test_what_does_not_pass_is_said_once(reply: Reply, said: str, opponent: Callable[..., ServerOpponent]) -> None:
    with listen(Scripted(lambda number: reply).post, nothing) as url, pytest.raises(ServerError) as caught:
        ask(opponent(url))
    assert said in str(caught.value)


def test_nobody_there(opponent: Callable[..., ServerOpponent]) -> None:
    with pytest.raises(ServerError, match=r"cannot be reached .* Is the server running, and opponent\.server\.urls"):
        ask(opponent("http://127.0.0.1:9", "http://127.0.0.1:11"))


def test_the_key_is_sent_and_nowhere_shown(
    opponent: Callable[..., ServerOpponent], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("SPINLM_SERVER_KEY", "sk-secret/1")
    with listen(Scripted(lambda number: refuse(403, "no sk-secret/1 here")).post, nothing) as url:
        asked = opponent(url)
        with pytest.raises(ServerError) as caught:
            ask(asked)
    assert model_server.keys[-1] == "Bearer sk-secret/1"
    assert "no [key] here" in str(caught.value) and "Set it to one that is valid there" in str(caught.value)
    assert "secret" not in str(caught.value) + repr(asked)


def test_complete_shards_are_kept(cli: Cli, world: World, tmp_path: Path) -> None:
    """The server dies after ten answers; the same command goes on with the third shard."""
    run = tmp_path / "run"
    served = ModelServer("vllm", str(world.model))
    count = [0]

    def post(path: str, body: dict[str, Any]) -> Reply:
        count[0] += path == "/v1/completions"
        return refuse(400, "the end") if count[0] > 10 else served.post(path, body)

    changes = ("selfplay.iterations=1",)
    with listen(post, served.get) as url:
        dead = using("vllm", urls=[url], max_concurrency=1)
        result = cli("run", world.recipe, *changes, *dead, "--run-dir", run, folder=world.folder, code=2)
    assert "the end" in result.message
    assert_whole(run)
    files = sorted((run / "iteration-0" / "generations").glob("*.jsonl"))
    kept = {path: path.read_bytes() for path in files}
    assert len(kept) == 2
    served.bodies.clear()
    with listen(served.post, served.get) as url:  # at another address, which is no other recipe
        alive = using("vllm", urls=[url], max_concurrency=2)
        cli("run", world.recipe, *changes, *alive, "--run-dir", run, folder=world.folder)
    assert {path: path.read_bytes() for path in kept} == kept
    assert len(served.bodies) == 24 + 10 - 8


@pytest.mark.parametrize(
    ("command", "said"),
    [
        ("echo no such model; exit 3", "before anything answered at"),
        ("sleep 60", "nothing answered at"),
    ],
)
def test_server_that_does_not_start(command: str, said: str, cli: Cli, world: World, tmp_path: Path) -> None:
    changes = using("vllm", launch_command=command, start_timeout=1.5)
    result = cli("run", world.recipe, *changes, "--run-dir", tmp_path / "run", folder=world.folder, code=2)
    assert f"opponent.server.launch_command: {said}" in result.message
    if "echo" in command:
        assert "it ended with exit code 3" in result.message and "no such model" in result.message


def test_server_that_dies_while_it_is_asked(cli: Cli, world: World, tmp_path: Path) -> None:
    program = tmp_path / "dies.py"
    program.write_text(
        "import os, sys\n"
        f"sys.path.insert(0, {str(Path(model_server.__file__).parent)!r})\n"
        "from model_server import ModelServer, listen\nimport threading\n"
        "def die(path, body):\n    print('out of memory', flush=True)\n    os._exit(7)\n"
        "with listen(die, lambda path: (200, {}, '{}'), int(sys.argv[1])):\n    threading.Event().wait()\n"
    )
    changes = using("vllm", command=f"{sys.executable} {program} {{port}}", model="it", max_concurrency=1)
    result = cli("run", world.recipe, *changes, "--run-dir", tmp_path / "run", folder=world.folder, code=2)
    assert "command started has ended with exit code 7" in result.message and "out of memory" in result.message


def test_another_server_at_the_address_is_not_taken_for_ours(cli: Cli, world: World, tmp_path: Path) -> None:
    served = ModelServer("vllm", str(world.model))
    with listen(served.post, served.get) as url:
        changes = using("vllm", urls=[url], command="sleep 60")
        result = cli("run", world.recipe, *changes, "--run-dir", tmp_path / "run", folder=world.folder, code=2)
    assert "something answers there before opponent.server.launch_command was run" in result.message


def test_a_server_that_still_loads_is_waited_for(cli: Cli, world: World, tmp_path: Path) -> None:
    """As llama.cpp does it: the model is listed, but nothing else works yet."""
    program = tmp_path / "loads.py"
    program.write_text(
        "import sys, time\n"
        f"sys.path.insert(0, {str(Path(model_server.__file__).parent)!r})\n"
        "from model_server import ModelServer, listen\nimport threading\n"
        "began = time.monotonic()\nserver = ModelServer('llama.cpp', sys.argv[2])\n"
        "def loading(): return time.monotonic() - began < 12\n"
        "def get(path):\n"
        "    if path == '/health': return (503, {}, 'Loading model') if loading() else (200, {}, '{}')\n"
        "    return server.get(path)\n"
        "def post(path, body): return (503, {}, 'Loading model') if loading() else server.post(path, body)\n"
        "with listen(post, get, int(sys.argv[1])):\n    threading.Event().wait()\n"
    )
    changes = using("llama.cpp", command=f"{sys.executable} {program} {{port}} {{merged}}")
    cli("run", world.recipe, "selfplay.iterations=1", *changes, "--run-dir", tmp_path / "run", folder=world.folder)


def test_command_that_leaves_a_server_running(cli: Cli, world: World, tmp_path: Path) -> None:
    served = ModelServer("llama.cpp", str(world.model))
    with listen(served.post, served.get) as url:
        handed = using("llama.cpp", urls=[url], reload_command="sleep 100 & echo begun")
        began = time.monotonic()
        more = ("selfplay.iterations=1", *handed)
        cli("run", world.recipe, *more, "--run-dir", tmp_path / "run", folder=world.folder)
        assert time.monotonic() - began < 60
        assert (tmp_path / "run" / "iteration-0" / "reload_command.log").read_text() == "begun\n"
        stuck = using("llama.cpp", urls=[url], reload_command="sleep 100", start_timeout=1)
        result = cli("run", world.recipe, *stuck, "--run-dir", tmp_path / "other", folder=world.folder, code=2)
    assert "reload_command: took longer than opponent.server.start_timeout" in result.message


def test_command_that_hands_over_the_opponent(cli: Cli, world: World, tmp_path: Path) -> None:
    noted = tmp_path / "noted"
    served = ModelServer("llama.cpp", str(world.model))
    with listen(served.post, served.get) as url:
        handed = using("llama.cpp", urls=[url], reload_command=f"echo {{iteration}} {{player}} {{base}} >> {noted}")
        cli("run", world.recipe, *handed, "--run-dir", tmp_path / "run", folder=world.folder)
        lines = [line.split() for line in noted.read_text().splitlines()]
        assert [line[0] for line in lines] == ["0", "1"]
        assert [Path(line[1]).parent.name for line in lines] == ["start", "iteration-0"]
        assert lines[0][2] == str(world.model)
        broken = using("llama.cpp", urls=[url], reload_command="echo no room; false")
        result = cli("run", world.recipe, *broken, "--run-dir", tmp_path / "other", folder=world.folder, code=2)
    assert "reload_command: ended with exit code 1" in result.message and "no room" in result.message


def test_adapter_that_the_server_refuses(cli: Cli, world: World, tmp_path: Path) -> None:
    def post(path: str, body: dict[str, Any]) -> Reply:
        return refuse(400, "rank too large") if "lora" in path else refuse(500)

    with listen(post, nothing) as url:
        result = cli(
            *("run", world.recipe, *using("vllm", urls=[url]), "--run-dir", tmp_path / "run"),
            folder=world.folder,
            code=2,
        )
    assert "cannot be given the adapter" in result.message and "rank too large" in result.message
    assert "--max-lora-rank" in result.message


def test_check_compares_the_engines(world: World, tmp_path: Path) -> None:
    """A server with the player is told from one with another model, and one that does not sample is noticed."""
    served = ModelServer("llama.cpp", str(world.model))
    with listen(served.post, served.get) as url:
        recipe = load_recipe(world.recipe, list(using("llama.cpp", urls=[url], reload_command="true")))
        said = "\n".join(check(recipe))
        assert "engine: all 8 greedy answers of the server engine are those of the local engine" in said
        assert "does it heed" not in said
        complete = served._complete
        served._complete = lambda name, prompt, limit, how, stops: complete(  # type: ignore[method-assign]
            name, prompt, limit, how | {"temperature": 0}, stops
        )
        assert "does it heed opponent.temperature" in "\n".join(check(recipe))
        served._complete = complete  # type: ignore[method-assign]
        for parameter in served.models["base"].parameters():
            parameter.data.mul_(-1)
        said = "\n".join(check(recipe))
    assert "engine: 0 of 8 greedy answers" in said and "which rounding does not explain" in said


@pytest.mark.parametrize(
    ("changes", "said"),
    [
        (["opponent.engine=server"], "there is no section opponent.server"),
        (['opponent.server={api: vllm, urls: ["http://a"]}'], "is not used, as opponent.engine is local"),
        (using("vllm"), "neither urls nor a command"),
        (using("vllm", urls=["127.0.0.1:8000"]), "is not an address that begins with http://"),
        (using("vllm", urls=["http://me:secret@a"]), "write the address without a password"),
        (using("openai", urls=["http://a"]), "has to be told of each new opponent"),
        ((*using("vllm", urls=["http://a"]), "lora=null"), "only LoRA adapters can be handed"),
        (using("vllm", urls=["http://a"], command="x", reload_command="y"), "Leave one of them out"),
        (using("ollama", urls=["http://a"]), "opponent.server.api"),
    ],
)
def test_recipes_that_cannot_be_played(changes: list[str], said: str, world: World) -> None:
    with pytest.raises(RecipeError) as caught:
        load_recipe(world.recipe, list(changes))
    assert said in str(caught.value)
