"""The opponent behind a server: each new player is handed over, or the server is started with it; then it is asked for
many responses at once."""

import logging
import shlex
import shutil
import socket
import subprocess
import sys
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack, contextmanager, suppress
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np

from spinlm.data.renderer import Renderer
from spinlm.errors import SpinError
from spinlm.generation import supervisor
from spinlm.generation.base import Progress, Response
from spinlm.generation.server_apis import DIALECTS, Reply, Wish
from spinlm.model.loading import prepare_base_model
from spinlm.model.merge import save_for_serving
from spinlm.recipe.schema import Recipe, Server
from spinlm.rundir.layout import RunDir
from spinlm.rundir.records import Sampling
from spinlm.utils.http import (
    Endpoint,
    ErrorContext,
    RefusedError,
    gather_bounded,
    open_client,
    probe,
    redact,
    run_async,
)
from spinlm.utils.signals import check_interrupt

log = logging.getLogger("spinlm")

MODELS, HEALTH = "/v1/models", "/health"  # a server has at least one of them
POLL = 0.5  # seconds between looks at a server that is starting


class ServerError(SpinError, RuntimeError):
    """A server cannot be reached or started, refuses, or answers in another way than its kind does."""


ERRORS = ErrorContext(
    error=ServerError,
    url_setting="opponent.server.urls",
    model_setting="opponent.server.model",
    timeout_setting="opponent.server.timeout",
    key_variables=("SPINLM_SERVER_KEY",),
    resume_hint="Complete shards are kept: run the same command again to continue",
)


_SERVED_SO = {
    "vllm": "Was it started with --enable-lora, a --max-lora-rank of at least lora.r, and "
    "VLLM_ALLOW_RUNTIME_LORA_UPDATING=True, and does it see this folder?",
    "sglang": "Was it started with --enable-lora, a --max-lora-rank of at least lora.r and --lora-target-modules all, "
    "and does it see this folder?",
}


@dataclass(frozen=True)
class ServerOpponent:
    """The server engine, once the server has the opponent."""

    server: Server
    urls: list[str]
    model: str | None
    renderer: Renderer

    def generate(
        self, prompts: Sequence[Sequence[int]], sampling: Sampling, seed: int, progress: Progress
    ) -> list[list[Response]]:
        """See `Engine.generate`. The same answers come back only where the server honours seeds.

        Raises:
            ServerError: no answer, and why.
            StoppedError: the user asked to stop.
        """
        wishes = [
            Wish(
                prompt_ids=prompt,
                text=text,
                limit=min(sampling.max_new_tokens, sampling.max_length - len(prompt)),
                seed=int(np.random.SeedSequence([seed, index, sample]).generate_state(1)[0]) >> 1,  # 31 bits
                temperature=sampling.temperature,
                top_p=sampling.top_p,
                stop_ids=sampling.stop_ids,
            )
            for index, (prompt, text) in enumerate(zip(prompts, self._texts(prompts), strict=True))
            for sample in range(sampling.samples)
        ]
        answers: dict[int, Response] = {}

        def record(number: int, answer: Response) -> None:
            answers[number] = answer
            progress(1, len(answer.token_ids))

        run_async(self._ask_all(wishes, record))
        given = [answers[number] for number in range(len(wishes))]
        return [given[first : first + sampling.samples] for first in range(0, len(given), sampling.samples)]

    async def _ask_all(self, wishes: list[Wish], record: Callable[[int, Response], None]) -> None:
        async with open_client(self.urls, self.server.timeout, self.server.max_concurrency) as client:
            endpoint = Endpoint(self.urls, self.model or "", client, self.server.timeout, ERRORS)
            await gather_bounded(wishes, lambda wish: self._ask(endpoint, wish), record, self.server.max_concurrency)

    async def _ask(self, endpoint: Endpoint, wish: Wish) -> Response:
        dialect = DIALECTS[self.server.api]
        body = with_options(dialect.body(self.model, wish), self.server.extra_body)
        reply = await endpoint.request(dialect.path, body, dialect.read, f"{dialect.what} of a whole response")
        if not dialect.raw_logprobs and wish.temperature > 0 and (wish.temperature, wish.top_p) != (1, 1):
            reply = replace(reply, logprobs=None)
        return read_reply(reply, wish, self.renderer)

    def _texts(self, prompts: Sequence[Sequence[int]]) -> list[str]:
        """The prompts as text. What a server makes of it is not in our hands, but that it can be right is checked."""
        if self.server.api != "openai":
            return ["" for _ in prompts]
        texts, unlike = [], 0
        for prompt in prompts:
            text, same = self.renderer.as_text(prompt)
            texts.append(text)
            unlike += not same
        if unlike:
            log.warning(
                "%d of %d prompts have other tokens when they are sent as text. A server that takes token ids (see "
                "opponent.server.api) has no such trouble",
                unlike,
                len(prompts),
            )
        return texts


def with_options(body: dict[str, Any], options: dict[str, Any]) -> dict[str, Any]:
    """A request's fields with others added or put in their place, those of a field of fields too; null leaves out."""
    merged = dict(body)
    for name, value in options.items():
        both = isinstance(value, dict) and isinstance(body.get(name), dict)
        merged[name] = with_options(body[name], value) if both else value
    return {name: value for name, value in merged.items() if value is not None}


def read_reply(reply: Reply, wish: Wish, renderer: Renderer) -> Response:
    """What a server sent back, as an answer like those of every engine: it ends with an end-of-turn token if it ended.

    Text is tokenised as a response in training is. An end that the server did not name has no log-probability.

    Raises:
        ServerError: the response was cut before its limit.
    """
    retokenised = reply.token_ids is None
    ids = renderer.continuation_ids(wish.prompt_ids, reply.text) if reply.token_ids is None else list(reply.token_ids)
    stop = next((place for place, token in enumerate(ids) if token in wish.stop_ids), None)
    if stop is not None:
        ids = ids[: stop + 1]
    elif reply.stopped:
        if ids and ids[-1] in renderer.special_ids:  # an end token of the server's own choice
            ids.pop()
        ids.append(renderer.end_id)
    elif not ids or (reply.token_ids is not None and len(ids) < wish.limit):
        raise ServerError(
            f"the server cut a response after {len(ids)} of {wish.limit} tokens: its context is too short for "
            f"{len(wish.prompt_ids)} tokens of a prompt and these. Start it with a longer one (llama.cpp: -c, which "
            "its -np requests share), or lower opponent.max_new_tokens"
        )
    ids = ids[: wish.limit]
    values = (reply.logprobs or [])[: len(ids)]
    logprob = sum(values) if len(values) == len(ids) else None
    return Response(ids, ids[-1] in wish.stop_ids, logprob, retokenised)


@contextmanager
def serve(recipe: Recipe, run: RunDir, renderer: Renderer, iteration: int) -> Iterator[ServerOpponent]:
    """A server that has the opponent of an iteration, for as long as it is needed.

    Raises:
        ServerError: the server cannot be given the opponent.
    """
    server = recipe.opponent.server
    assert server is not None, "the recipe is checked"
    player = run.player(iteration - 1).absolute()
    with ExitStack() as stack:
        names = {"player": str(player), "iteration": str(iteration)}
        texts = [text for text in (server.launch_command, server.reload_command, server.model) if text]
        if any("{base}" in text for text in texts):
            names["base"] = str(prepare_base_model(recipe.model, run))
        if any("{merged}" in text for text in texts):
            merged = run.iteration(iteration).absolute() / ".merged"
            shutil.rmtree(merged, ignore_errors=True)  # of a process that was killed
            stack.callback(shutil.rmtree, merged, ignore_errors=True)
            names["merged"] = str(merged)
            save_for_serving(recipe, run, iteration - 1, merged)
        if server.launch_command is None:
            urls = [_root(url) for url in server.urls]
        else:
            names["port"] = str(_free_port())
            urls = [_root(url) for url in server.urls] or [f"http://127.0.0.1:{names['port']}"]
            journal = run.iteration(iteration) / "server.log"
            stack.enter_context(_running(_filled(server.launch_command, names), urls, server.start_timeout, journal))
        model = None if server.model is None else _filled(server.model, names, quote=False)
        if server.reload_command is not None:
            _promote(
                _filled(server.reload_command, names),
                server.start_timeout,
                run.iteration(iteration) / "reload_command.log",
            )
            _wait(urls, server.start_timeout, "opponent.server.reload_command")
        elif server.launch_command is None:
            _make_sure_of(urls)
            model = f"spinlm-{run.player_digest(iteration - 1)[:12]}"
            _load_adapter(server, urls, model, player)
            stack.callback(_drop_adapter, server, urls, model)
        if model is None and server.api != "sglang":
            model = _first_model(urls)
        yield ServerOpponent(server, urls, model, renderer)


def _root(url: str) -> str:
    return url.strip().rstrip("/").removesuffix("/completions").removesuffix("/v1")


def _filled(text: str, names: dict[str, str], *, quote: bool = True) -> str:
    for name, value in names.items():
        text = text.replace(f"{{{name}}}", shlex.quote(value) if quote else value)
    return text


def _free_port() -> int:
    with socket.socket() as listener:
        listener.bind(("127.0.0.1", 0))
        return int(listener.getsockname()[1])


@contextmanager
def _running(command: str, urls: list[str], patience: float, journal: Path) -> Iterator[None]:
    """A server that was started by a command, from when it answers."""
    for url in urls:
        if _answers(url):
            raise ServerError(
                f"{url}: something answers there before opponent.server.launch_command was run, and would be asked "
                "instead of the server that it starts. Stop it, or leave opponent.server.urls out and use {port} in "
                "the command"
            )
    with journal.open("wb") as file:
        process = subprocess.Popen(
            [sys.executable, supervisor.__file__, command],
            stdin=subprocess.PIPE,
            stdout=file,
            stderr=subprocess.STDOUT,
            start_new_session=True,  # what ends our terminal or our group is not to end it before the server
        )

    def ended() -> str | None:
        if (code := process.poll()) is None:
            return None
        return f"ended with exit code {code}. {_last_words(command, journal)}"

    try:
        _wait(urls, patience, "opponent.server.launch_command", ended)
        yield
    except ServerError as error:
        if (words := ended()) and words not in str(error):
            raise ServerError(f"{error}\nThe server that opponent.server.launch_command started has {words}") from None
        raise
    finally:
        assert process.stdin is not None
        process.stdin.close()  # which tells the keeper to end it
        process.wait()


def _wait(urls: list[str], patience: float, setting: str, ended: Callable[[], str | None] = lambda: None) -> None:
    """Until every address answers; `ended` tells whether there is nothing left to wait for, and why."""
    began = time.monotonic()
    for url in urls:
        while not _answers(url):
            check_interrupt()
            if words := ended():
                raise ServerError(f"{setting}: before anything answered at {url} it {words}")
            if time.monotonic() - began > patience:
                raise ServerError(
                    f"{setting}: nothing answered at {url} within {patience:g} seconds; opponent.server.start_timeout "
                    "allows more"
                )
            time.sleep(POLL)
    log.info("the server answers after %.0f s", time.monotonic() - began)


def _answers(url: str) -> bool:
    """Whether a server is ready there. llama.cpp lists its model while it still loads, but is not well then."""
    response = probe(url + HEALTH, ERRORS)
    if response is not None and response.status_code == 404:
        response = probe(url + MODELS, ERRORS)
    return response is not None and response.status_code < 500


def _make_sure_of(urls: list[str]) -> None:
    for url in urls:
        if probe(url + MODELS, ERRORS) is None:
            raise ServerError(f"{url}: cannot be reached. Is the server running, and opponent.server.urls right?")


def _first_model(urls: list[str]) -> str | None:
    """What a server lists first; None where it lists nothing, and may need no name."""
    response = probe(f"{urls[0]}{MODELS}", ERRORS)
    try:
        return None if response is None else str(response.json()["data"][0]["id"])
    except (KeyError, IndexError, TypeError, ValueError):
        return None


def _last_words(command: str, journal: Path) -> str:
    lines = journal.read_text(encoding="utf-8", errors="replace").splitlines()[-8:]
    words = "".join(f"\n  {line}" for line in lines)
    return redact(f"It was: {command}\nIts last words, from {journal}:{words}", ERRORS)


def _promote(command: str, patience: float, journal: Path) -> None:
    """Run the user's command. What it prints goes to a file: a server that it leaves running would hold a pipe open."""
    began = time.monotonic()
    with journal.open("wb") as file:
        process = subprocess.Popen(command, shell=True, stdin=subprocess.DEVNULL, stdout=file, stderr=file)
    try:
        while process.poll() is None and time.monotonic() - began < patience:
            check_interrupt()
            time.sleep(POLL / 10)
        how = "took longer than opponent.server.start_timeout" if process.poll() is None else "ended with exit code "
        if process.returncode != 0:
            code = "" if process.returncode is None else process.returncode
            raise ServerError(
                f"opponent.server.reload_command: {how}{code}, so the server may not have the opponent. "
                + _last_words(command, journal)
            )
    finally:
        if process.poll() is None:
            process.kill()
            process.wait()


def _drop_adapter(server: Server, urls: list[str], name: str) -> None:
    """Let the server forget an adapter, instead of keeping one for each iteration. Where it does not, no matter."""
    path = DIALECTS[server.api].dropped
    assert path is not None, "the recipe is checked"

    async def drop() -> None:
        async with open_client(urls, server.timeout, 1) as client:
            for url in urls:
                with suppress(RefusedError, ServerError):
                    endpoint = Endpoint([url], name, client, server.timeout, ERRORS)
                    await endpoint.post(path, {"lora_name": name})

    run_async(drop())


def _load_adapter(server: Server, urls: list[str], name: str, player: Path) -> None:
    """Hand an adapter to every address."""
    path = DIALECTS[server.api].adapters
    assert path is not None, "the recipe is checked"

    async def load() -> None:
        async with open_client(urls, server.timeout, 1) as client:
            for url in urls:
                endpoint = Endpoint([url], name, client, server.timeout, ERRORS)
                try:
                    await endpoint.post(path, {"lora_name": name, "lora_path": str(player)})
                except RefusedError as refused:
                    if "already" in refused.message:  # by an earlier call of this command
                        continue
                    raise ServerError(
                        f"{url}{path}: cannot be given the adapter {player} ({refused}). {_SERVED_SO[server.api]}"
                    ) from None

    run_async(load())
