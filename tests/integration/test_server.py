"""The server engine, against servers with real models and against scripted servers that fail."""

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
from spinlm.generation import supervisor
from spinlm.generation.base import Response, Sampling
from spinlm.generation.server import ServerEngine, ServerError
from spinlm.recipe.load import load_recipe
from spinlm.rundir.layout import RunDir

GREEDY = ("opponent.temperature=0", "selfplay.select.patience=2")
ADAPTER_APIS = ("vllm", "sglang")


@pytest.fixture(autouse=True)
def quick(monkeypatch: pytest.MonkeyPatch) -> None:
    """Remove API keys and proxies of this machine, and shorten the pauses between retries."""
    for name in ("SPINLM_SERVER_KEY", "OPENAI_API_KEY"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setenv("NO_PROXY", "127.0.0.1")
    monkeypatch.setattr(spinlm.utils.http, "BACKOFF_SECONDS", 0.01)


@pytest.fixture(scope="module")
def greedy(session_cli: Cli, world: World, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A run whose opponents sample greedily with the local engine."""
    run = tmp_path_factory.mktemp("greedy") / "run"
    session_cli("run", world.recipe, *GREEDY, "--run-dir", run, folder=world.folder)
    return run


def generations(run: Path, iteration: int) -> dict[str, Any]:
    rows = read_jsons(run / f"iteration-{iteration}" / "generations", "*.jsonl")
    return {row["id"]: row for row in rows}


def metadata(run: Path, iteration: int) -> dict[str, Any]:
    marker = run / ".spinlm" / f"iteration-{iteration}" / "reference_logprobs.done"
    return dict(json.loads(marker.read_text(encoding="utf-8"))["train"])


def using(api: str, **server: Any) -> tuple[str, ...]:
    return ("opponent.engine=server", f"opponent.server={json.dumps({'api': api, **server})}")


@pytest.mark.parametrize("api", ADAPTER_APIS)
def test_adapter_of_each_opponent_is_loaded(api: str, cli: Cli, world: World, greedy: Path, tmp_path: Path) -> None:
    """Greedy responses equal those of the local engine in every iteration: the server had the same players."""
    served = ModelServer(api, str(world.model))
    with listen(served.post, served.get) as url:
        changes = (*GREEDY, *using(api, urls=[f"{url}/v1"], max_concurrency=4))
        cli("run", world.recipe, *changes, "--run-dir", tmp_path / "run", folder=world.folder)
    for iteration in (0, 1):
        ours, theirs = generations(greedy, iteration), generations(tmp_path / "run", iteration)
        assert {key: row["token_ids"] for key, row in theirs.items()} == {
            key: row["token_ids"] for key, row in ours.items()
        }
        assert metadata(tmp_path / "run", iteration)["logprob_mismatch_max"] < 1e-4
    assert [body["lora_path"] for body in served.loaded] == [
        str(tmp_path / "run" / name / "player") for name in ("start", "iteration-0")
    ]
    assert len({body["lora_name"] for body in served.loaded}) == 2
    assert list(served.models) == ["base"], "adapters are unloaded"


def test_readme_command(cli: Cli, world: World, tmp_path: Path) -> None:
    folder = shutil.copytree(world.folder, tmp_path / "here")
    served = ModelServer("vllm", str(world.model))
    with listen(served.post, served.get) as url:
        _, *command = readme_command("external server")
        cli(*(word.replace("http://127.0.0.1:8000", url) for word in command), "selfplay.iterations=1", folder=folder)
    assert served.loaded and len(list((folder / "runs").glob("*/best"))) == 1


def test_server_is_launched_with_each_opponent(cli: Cli, world: World, greedy: Path, tmp_path: Path) -> None:
    """The server gets a merged model. Neither its process nor the merged model remains."""
    command = f"{sys.executable} {model_server.__file__} llama.cpp {{port}} {{merged}}"
    run = tmp_path / "run"
    changes = (*GREEDY, *using("llama.cpp", launch_command=command))
    cli("run", world.recipe, *changes, "--run-dir", run, folder=world.folder)
    for iteration in (0, 1):
        ours, theirs = generations(greedy, iteration), generations(run, iteration)
        assert [row["text"] for row in theirs.values()] == [row["text"] for row in ours.values()]
        assert [row["finished"] for row in theirs.values()] == [row["finished"] for row in ours.values()]
        assert "logprob_mismatch_max" in metadata(run, iteration)
        assert "listening" in (run / f"iteration-{iteration}" / "server.log").read_text()
    assert not list(run.glob("*/.merged"))
    assert not running(str(run))
    assert_whole(run)


def running(argument: str) -> list[str]:
    """Return the command lines of model servers that contain the argument."""
    commands = []
    for path in Path("/proc").glob("[0-9]*/cmdline"):
        with contextlib.suppress(OSError):
            line = path.read_text(errors="replace").replace("\0", " ")
            if argument in line and "model_server" in line:
                commands.append(line)
    return commands


@pytest.mark.skipif(not Path("/proc").exists(), reason="looks at /proc")
def test_server_stops_when_spinlm_is_killed(cli: Cli, world: World, tmp_path: Path) -> None:
    run = tmp_path / "run"
    command = f"{sys.executable} {model_server.__file__} vllm {{port}} {{merged}}; sleep 1"
    slow = ("selfplay.iterations=1", *using("vllm", launch_command=command, model="nobody", max_concurrency=1))
    process = cli.start("run", world.recipe, *slow, "--run-dir", run, folder=world.folder)
    until(lambda: running(str(run)))
    assert (run / "iteration-0" / ".merged" / "model.safetensors").exists()
    process.send(signal.SIGKILL)
    until(lambda: not running(str(run)))
    quick = using("vllm", launch_command=f"{sys.executable} {model_server.__file__} vllm {{port}} {{merged}}")
    cli("run", world.recipe, "selfplay.iterations=1", *quick, "--run-dir", run, folder=world.folder)
    assert not list(run.glob("*/.merged"))


@pytest.mark.skipif(not Path("/proc").exists(), reason="looks at /proc")
def test_supervisor_waits_for_the_server_to_stop(tmp_path: Path) -> None:
    """The shell exits at once; the server behind it gets time to stop."""
    slow = tmp_path / "slow.py"
    slow.write_text(
        "import signal, sys, time\n"
        "def end(*_):\n    time.sleep(1.5)\n    print('stopped', flush=True)\n    sys.exit()\n"
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
    assert "stopped" in log.read_text()


def until(condition: Callable[[], object], timeout: float = 60) -> None:
    deadline = time.monotonic() + timeout
    while not condition():
        assert time.monotonic() < deadline, "timeout"
        time.sleep(0.05)


class Scripted:
    """A vLLM server whose replies come from a script, a function of the number of earlier requests."""

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
        return reply_to(body) if reply == "good" else reply  # type: ignore[return-value]


def reply_to(body: dict[str, Any]) -> Reply:
    """Return a token that depends on the prompt and the seed, and the end token."""
    token = 5 + (sum(body["prompt"]) + body["seed"]) % 100
    choice = {"token_ids": [token, body["stop_token_ids"][0]], "finish_reason": "stop"}
    choice["logprobs"] = {"token_logprobs": [-1.0, -0.5]}
    return 200, {}, json.dumps({"choices": [choice]})


def refuse(status: int, message: str = "because") -> Reply:
    return status, {}, json.dumps({"error": {"message": message}})


def nothing(path: str) -> Reply:
    return 404, {}, "{}"


@pytest.fixture
def engine(world: World, tmp_path: Path) -> Callable[..., ServerEngine]:
    """Make an engine for some URLs."""
    from spinlm.model.players import Players

    recipe = load_recipe(world.recipe, [])
    renderer = Players(recipe, RunDir(tmp_path)).renderer

    def make(*urls: str, **settings: Any) -> ServerEngine:
        changed = load_recipe(world.recipe, list(using("vllm", urls=list(urls), **settings)))
        server = changed.opponent.server
        assert server is not None
        return ServerEngine(server, list(urls), "player", renderer)

    return make


PROMPTS = [[7, 8, number] for number in range(9)]


def generate(engine: ServerEngine) -> list[list[Response]]:
    sampling = Sampling(1.0, 1.0, max_new_tokens=4, max_length=64, samples=2, stop_ids=engine.renderer.stop_ids)
    progress: list[tuple[int, int]] = []
    responses = engine.generate(PROMPTS, sampling, 3, lambda *new: progress.append(new))
    assert sum(completed for completed, _ in progress) == len(PROMPTS) * 2
    return responses


def test_responses_are_in_the_order_of_the_prompts(engine: Callable[..., ServerEngine]) -> None:
    """The concurrency and the order of arrival do not matter; the same seed gives the same responses."""
    scripted = Scripted(lambda number: (time.sleep(0.05 if number % 3 == 0 else 0.0), "good")[1])
    with listen(scripted.post, nothing) as url:
        concurrent, serial = (generate(engine(url, max_concurrency=limit)) for limit in (6, 1))
    assert concurrent == serial
    assert scripted.busiest <= 6 and scripted.busiest > 1
    assert all(response.finished and response.logprob == -1.5 for row in concurrent for response in row)
    seeds = [body["seed"] for body in scripted.bodies[18:]]
    assert len(set(seeds)) == 18 and all(0 <= seed < 2**31 for seed in seeds)
    assert scripted.bodies[0]["max_tokens"] == 4 and scripted.bodies[0]["temperature"] == 1.0


def test_transient_errors_are_retried(engine: Callable[..., ServerEngine]) -> None:
    errors: list[Any] = [refuse(429), refuse(500), refuse(503), None]
    scripted = Scripted(lambda number: errors[number] if number < len(errors) else "good")
    with listen(scripted.post, nothing) as url:
        assert len(generate(engine(url, max_concurrency=1))) == len(PROMPTS)
    assert len(scripted.bodies) == 18 + len(errors)


def test_slow_replies(engine: Callable[..., ServerEngine]) -> None:
    scripted = Scripted(lambda number: (time.sleep(0.6 if number == 0 else 0.0), "good")[1])
    with listen(scripted.post, nothing) as url:
        assert len(generate(engine(url, max_concurrency=1, timeout=0.3))) == len(PROMPTS)
        slow = Scripted(lambda number: (time.sleep(0.4), "good")[1])
    with (
        listen(slow.post, nothing) as url,
        pytest.raises(ServerError, match=r"0\.1 seconds; opponent\.server\.timeout"),
    ):
        generate(engine(url, max_concurrency=1, timeout=0.1))


def test_urls_share_the_requests_and_one_may_be_gone(engine: Callable[..., ServerEngine]) -> None:
    first, second = Scripted(lambda number: "good"), Scripted(lambda number: "good" if number < 3 else None)
    with listen(first.post, nothing) as one, listen(second.post, nothing) as two:
        given = generate(engine(one, two, "http://127.0.0.1:9", max_concurrency=4))
    assert len(given) == len(PROMPTS)
    assert len(second.bodies) >= 3 and len(first.bodies) >= 12


def test_url_that_failed_once_gets_requests_again(engine: Callable[..., ServerEngine]) -> None:
    first = Scripted(lambda number: refuse(503) if number == 0 else "good")
    second = Scripted(lambda number: (time.sleep(0.02), "good")[1])
    with listen(first.post, nothing) as one, listen(second.post, nothing) as two:
        assert len(generate(engine(one, two, max_concurrency=2))) == len(PROMPTS)
    assert len(first.bodies) > 3
    assert len(first.bodies) + len(second.bodies) == 18 + 1


@pytest.mark.parametrize(
    ("reply", "message"),
    [
        (refuse(401), "Set a key that is valid there in SPINLM_SERVER_KEY"),
        (refuse(404), "no model player (opponent.server.model), or opponent.server.urls"),
        (refuse(400, "too long"), "too long"),
        ((200, {}, "<html>hello</html>"), "(<html>hello</html>)"),
        ((200, {}, '{"choices": [{"text": "hm"}]}'), "has no choices[0].token_ids"),
        ((200, {}, "[]"), "has no choices[0].token_ids"),
        (refuse(500, "out of memory"), "out of memory"),
    ],
)
def test_permanent_errors(reply: Reply, message: str, engine: Callable[..., ServerEngine]) -> None:
    with listen(Scripted(lambda number: reply).post, nothing) as url, pytest.raises(ServerError) as caught:
        generate(engine(url))
    assert message in str(caught.value)


def test_unreachable_server(engine: Callable[..., ServerEngine]) -> None:
    with pytest.raises(ServerError, match=r"cannot be reached .* opponent\.server\.urls"):
        generate(engine("http://127.0.0.1:9", "http://127.0.0.1:11"))


def test_key_is_sent_and_never_shown(engine: Callable[..., ServerEngine], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("SPINLM_SERVER_KEY", "sk-secret/1")
    with listen(Scripted(lambda number: refuse(403, "no sk-secret/1 here")).post, nothing) as url:
        keyed = engine(url)
        with pytest.raises(ServerError) as caught:
            generate(keyed)
    assert model_server.keys[-1] == "Bearer sk-secret/1"
    assert "no [key] here" in str(caught.value) and "Set a key" in str(caught.value)
    assert "secret" not in str(caught.value) + repr(keyed)


def test_complete_shards_are_kept(cli: Cli, world: World, tmp_path: Path) -> None:
    """The server dies after ten responses; the same command continues with the third shard."""
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
    with listen(served.post, served.get) as url:  # another URL is not another recipe
        alive = using("vllm", urls=[url], max_concurrency=2)
        cli("run", world.recipe, *changes, *alive, "--run-dir", run, folder=world.folder)
    assert {path: path.read_bytes() for path in kept} == kept
    assert len(served.bodies) == 24 + 10 - 8


@pytest.mark.parametrize(
    ("command", "message"),
    [("echo no such model; exit 3", "exited with code 3"), ("sleep 60", "opponent.server.start_timeout")],
)
def test_server_that_does_not_start(command: str, message: str, cli: Cli, world: World, tmp_path: Path) -> None:
    changes = using("vllm", launch_command=command, start_timeout=1.5)
    result = cli("run", world.recipe, *changes, "--run-dir", tmp_path / "run", folder=world.folder, code=2)
    assert "opponent.server.launch_command" in result.message and message in result.message
    assert ("no such model" in result.message) == ("echo" in command)


def test_server_that_dies_during_a_request(cli: Cli, world: World, tmp_path: Path) -> None:
    program = tmp_path / "dies.py"
    program.write_text(
        "import os, sys\n"
        f"sys.path.insert(0, {str(Path(model_server.__file__).parent)!r})\n"
        "from model_server import ModelServer, listen\nimport threading\n"
        "def die(path, body):\n    print('out of memory', flush=True)\n    os._exit(7)\n"
        "with listen(die, lambda path: (200, {}, '{}'), int(sys.argv[1])):\n    threading.Event().wait()\n"
    )
    changes = using("vllm", launch_command=f"{sys.executable} {program} {{port}}", model="it", max_concurrency=1)
    result = cli("run", world.recipe, *changes, "--run-dir", tmp_path / "run", folder=world.folder, code=2)
    assert "exited with code 7" in result.message and "out of memory" in result.message


def test_another_server_at_the_url_is_refused(cli: Cli, world: World, tmp_path: Path) -> None:
    served = ModelServer("vllm", str(world.model))
    with listen(served.post, served.get) as url:
        changes = using("vllm", urls=[url], launch_command="sleep 60")
        result = cli("run", world.recipe, *changes, "--run-dir", tmp_path / "run", folder=world.folder, code=2)
    assert "another server answers there" in result.message


def test_server_that_loads_its_model(cli: Cli, world: World, tmp_path: Path) -> None:
    """llama.cpp lists the model while it loads, and rejects requests."""
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
    changes = using("llama.cpp", launch_command=f"{sys.executable} {program} {{port}} {{merged}}")
    cli("run", world.recipe, "selfplay.iterations=1", *changes, "--run-dir", tmp_path / "run", folder=world.folder)


def test_reload_command_that_leaves_a_server_running(cli: Cli, world: World, tmp_path: Path) -> None:
    served = ModelServer("llama.cpp", str(world.model))
    with listen(served.post, served.get) as url:
        reloaded = using("llama.cpp", urls=[url], reload_command="sleep 100 & echo started")
        started = time.monotonic()
        more = ("selfplay.iterations=1", *reloaded)
        cli("run", world.recipe, *more, "--run-dir", tmp_path / "run", folder=world.folder)
        assert time.monotonic() - started < 60
        assert (tmp_path / "run" / "iteration-0" / "reload_command.log").read_text() == "started\n"
        stuck = using("llama.cpp", urls=[url], reload_command="sleep 100", start_timeout=1)
        result = cli("run", world.recipe, *stuck, "--run-dir", tmp_path / "other", folder=world.folder, code=2)
    assert "reload_command" in result.message and "opponent.server.start_timeout" in result.message


def test_reload_command_gets_the_opponent(cli: Cli, world: World, tmp_path: Path) -> None:
    arguments = tmp_path / "arguments"
    served = ModelServer("llama.cpp", str(world.model))
    with listen(served.post, served.get) as url:
        reloaded = using(
            "llama.cpp", urls=[url], reload_command=f"echo {{iteration}} {{player}} {{base}} >> {arguments}"
        )
        cli("run", world.recipe, *reloaded, "--run-dir", tmp_path / "run", folder=world.folder)
        lines = [line.split() for line in arguments.read_text().splitlines()]
        assert [line[0] for line in lines] == ["0", "1"]
        assert [Path(line[1]).parent.name for line in lines] == ["start", "iteration-0"]
        assert lines[0][2] == str(world.model)
        broken = using("llama.cpp", urls=[url], reload_command="echo no room; false")
        result = cli("run", world.recipe, *broken, "--run-dir", tmp_path / "other", folder=world.folder, code=2)
    assert "reload_command: exited with code 1" in result.message and "no room" in result.message


def test_adapter_that_the_server_rejects(cli: Cli, world: World, tmp_path: Path) -> None:
    def post(path: str, body: dict[str, Any]) -> Reply:
        return refuse(400, "rank too large") if "lora" in path else refuse(500)

    with listen(post, nothing) as url:
        result = cli(
            *("run", world.recipe, *using("vllm", urls=[url]), "--run-dir", tmp_path / "run"),
            folder=world.folder,
            code=2,
        )
    assert "cannot load the adapter" in result.message and "rank too large" in result.message
    assert "--max-lora-rank" in result.message


def test_check_compares_the_engines(world: World, tmp_path: Path) -> None:
    """Check recognizes the player, another model, and a server that does not sample."""
    served = ModelServer("llama.cpp", str(world.model))
    with listen(served.post, served.get) as url:
        recipe = load_recipe(world.recipe, list(using("llama.cpp", urls=[url], reload_command="true")))
        report = "\n".join(check(recipe))
        assert "8/8 greedy" in report
        assert "warning: every response" not in report
        complete = served._complete
        served._complete = lambda name, prompt, limit, how, stops: complete(  # type: ignore[method-assign]
            name, prompt, limit, how | {"temperature": 0}, stops
        )
        assert "warning: every response" in "\n".join(check(recipe))
        served._complete = complete  # type: ignore[method-assign]
        for parameter in served.models["base"].parameters():
            parameter.data.mul_(-1)
        report = "\n".join(check(recipe))
    assert "0/8 greedy" in report and "rounding does not explain" in report
