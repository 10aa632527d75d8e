"""Generate responses through a server that has the current opponent."""

import logging
import shlex
import shutil
import socket
import subprocess
import sys
import time
from collections.abc import Iterator, Sequence
from contextlib import ExitStack, contextmanager, suppress
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np

from spinlm.data.renderer import Renderer
from spinlm.errors import SpinError
from spinlm.generation import supervisor
from spinlm.generation.base import OnProgress, Response, Sampling
from spinlm.generation.server_apis import SERVER_APIS, GenerationRequest, GenerationResult
from spinlm.model.merge import save_for_serving
from spinlm.model.players import Players
from spinlm.recipe.opponent import Server
from spinlm.utils.http import Endpoint, ErrorContext, RefusedError, probe, redact, run_async
from spinlm.utils.signals import check_interrupt

log = logging.getLogger("spinlm")

POLL_SECONDS = 0.5


class ServerError(SpinError, RuntimeError):
    """A server cannot be reached or started, rejects a request, or does not return a response."""


ERROR_CONTEXT = ErrorContext(
    error=ServerError,
    url_setting="opponent.server.urls",
    model_setting="opponent.server.model",
    timeout_setting="opponent.server.timeout",
    key_variables=("SPINLM_SERVER_KEY",),
    resume_hint="Complete shards are kept: run the same command again to continue",
)


@dataclass(frozen=True)
class ServerEngine:
    """The server engine. The server has the opponent."""

    server: Server
    urls: list[str]
    model: str | None
    renderer: Renderer

    def generate(
        self, prompts: Sequence[Sequence[int]], sampling: Sampling, seed: int, on_progress: OnProgress
    ) -> list[list[Response]]:
        """See `Engine.generate`. The same seed gives the same responses only if the server honors seeds.

        Raises:
            ServerError: a response cannot be obtained.
            StoppedError: the user asked to stop.
        """
        requests = [
            GenerationRequest(
                prompt_ids=prompt,
                max_tokens=min(sampling.max_new_tokens, sampling.max_length - len(prompt)),
                seed=int(np.random.SeedSequence([seed, index, sample]).generate_state(1)[0]) >> 1,  # 31 bits
                temperature=sampling.temperature,
                top_p=sampling.top_p,
                stop_ids=sampling.stop_ids,
            )
            for index, prompt in enumerate(prompts)
            for sample in range(sampling.samples)
        ]
        responses: dict[int, Response] = {}

        def record(number: int, response: Response) -> None:
            responses[number] = response
            on_progress(1, len(response.token_ids))

        endpoint = Endpoint(
            self.urls, self.model or "", self.server.timeout, self.server.max_concurrency, ERROR_CONTEXT
        )
        run_async(endpoint.run(requests, lambda request: self._generate(endpoint, request), record))
        ordered = [responses[number] for number in range(len(requests))]
        return [ordered[first : first + sampling.samples] for first in range(0, len(ordered), sampling.samples)]

    async def _generate(self, endpoint: Endpoint, request: GenerationRequest) -> Response:
        api = SERVER_APIS[self.server.api]
        body = merge_extra_body(api.body(self.model, request), self.server.extra_body)
        result = await endpoint.request(api.path, body, api.parse, f"{api.result_field} of a complete response")
        if not api.raw_logprobs and request.temperature > 0 and (request.temperature, request.top_p) != (1, 1):
            result = replace(result, logprobs=None)
        return to_response(result, request, self.renderer)


def merge_extra_body(body: dict[str, Any], extra_body: dict[str, Any]) -> dict[str, Any]:
    """Return the body with the extra fields added or replaced, recursively. Remove fields that are None."""
    merged = dict(body)
    for name, value in extra_body.items():
        nested = isinstance(value, dict) and isinstance(body.get(name), dict)
        merged[name] = merge_extra_body(body[name], value) if nested else value
    return {name: value for name, value in merged.items() if value is not None}


def to_response(result: GenerationResult, request: GenerationRequest, renderer: Renderer) -> Response:
    """Convert a server's result: a response that stopped ends with an end-of-turn token.

    A response to which the end token had to be added has no log-probability.

    Raises:
        ServerError: the server cut the response before the token limit.
    """
    ids = list(result.token_ids)
    stop = next((place for place, token in enumerate(ids) if token in request.stop_ids), None)
    if stop is not None:
        ids = ids[: stop + 1]
    elif result.stopped:
        if ids and ids[-1] in renderer.special_ids:  # an end token that only the server knows
            ids.pop()
        ids.append(renderer.end_id)
    elif len(ids) < request.max_tokens:
        raise ServerError(
            f"the server cut a response after {len(ids)} of {request.max_tokens} tokens: the server's context is too "
            f"short for a prompt of {len(request.prompt_ids)} tokens and the response. Start the server with a longer "
            "context (llama.cpp: -c, which its -np requests share), or lower opponent.max_new_tokens"
        )
    ids = ids[: request.max_tokens]
    logprobs = (result.logprobs or [])[: len(ids)]
    return Response(ids, ids[-1] in request.stop_ids, sum(logprobs) if len(logprobs) == len(ids) else None)


@contextmanager
def open_server(players: Players, t: int) -> Iterator[ServerEngine]:
    """Give a server the opponent of iteration t: launch it, run the reload command, or load the adapter.

    On exit a launched server is stopped and a loaded adapter is unloaded.

    Raises:
        ServerError: the server cannot be given the opponent.
    """
    folder, server = players.folder, players.recipe.opponent.server
    assert server is not None, "the recipe is validated"
    player, logs = folder.player(t - 1).absolute(), folder.iteration(t)
    logs.mkdir(parents=True, exist_ok=True)
    with ExitStack() as stack:
        values = {"player": str(player), "iteration": str(t), "base": players.base_model}
        templates = " ".join(text for text in (server.launch_command, server.reload_command, server.model) if text)
        if "{merged}" in templates:
            merged = folder.iteration(t).absolute() / ".merged"
            shutil.rmtree(merged, ignore_errors=True)  # from a process that was killed
            stack.callback(shutil.rmtree, merged, ignore_errors=True)
            values["merged"] = str(merged)
            save_for_serving(players, t - 1, merged)
        urls = [url.strip().rstrip("/").removesuffix("/completions").removesuffix("/v1") for url in server.urls]
        if server.launch_command is not None:
            values["port"] = str(_free_port())
            urls = urls or [f"http://127.0.0.1:{values['port']}"]
            command = _fill(server.launch_command, values)
            stack.enter_context(_launch(command, urls, server.start_timeout, logs / "server.log"))
        model = None if server.model is None else _fill(server.model, values, quote=False)
        if server.reload_command is not None:
            command = _fill(server.reload_command, values)
            _run_reload_command(command, server.start_timeout, logs / "reload_command.log")
            _wait_until_ready(urls, server.start_timeout, "opponent.server.reload_command")
        elif server.launch_command is None:
            model = f"spinlm-{folder.player_digest(t - 1)[:12]}"
            _load_adapter(server, urls, model, player)
            stack.callback(_unload_adapter, server, urls, model)
        if model is None and server.api != "sglang":
            model = _first_model(urls[0])
        yield ServerEngine(server, urls, model, players.renderer)


def _fill(template: str, values: dict[str, str], *, quote: bool = True) -> str:
    for name, value in values.items():
        template = template.replace(f"{{{name}}}", shlex.quote(value) if quote else value)
    return template


def _free_port() -> int:
    with socket.socket() as listener:
        listener.bind(("127.0.0.1", 0))
        return int(listener.getsockname()[1])


@contextmanager
def _launch(command: str, urls: list[str], timeout: float, log_file: Path) -> Iterator[None]:
    """Start a server by a command, wait until it is ready, and stop it on exit."""
    for url in urls:
        if _is_ready(url):
            raise ServerError(
                f"{url}: another server answers there, so opponent.server.launch_command was not run. Stop the other "
                "server, or leave opponent.server.urls out and use {port} in the command"
            )
    with log_file.open("wb") as file:
        process = subprocess.Popen(
            [sys.executable, supervisor.__file__, command],
            stdin=subprocess.PIPE,
            stdout=file,
            stderr=subprocess.STDOUT,
            start_new_session=True,  # a signal to our terminal or process group must not stop the supervisor first
        )
    try:
        _wait_until_ready(urls, timeout, "opponent.server.launch_command", process)
        yield
    except ServerError as error:
        if (code := process.poll()) is None:
            raise
        excerpt = _log_excerpt(command, log_file)
        raise ServerError(f"{error}\nThe server exited with code {code}. {excerpt}") from None
    finally:
        assert process.stdin is not None
        process.stdin.close()  # makes the supervisor stop the server
        process.wait()


def _wait_until_ready(
    urls: list[str], timeout: float, setting: str, process: "subprocess.Popen[bytes] | None" = None
) -> None:
    """Wait until every URL is ready, or raise ServerError at the timeout or as soon as the process has exited."""
    started = time.monotonic()
    for url in urls:
        while not _is_ready(url):
            check_interrupt()
            if process is not None and process.poll() is not None:
                raise ServerError(f"{setting}: the server exited before it was ready at {url}")
            if time.monotonic() - started > timeout:
                raise ServerError(
                    f"{setting}: nothing answered at {url} within {timeout:g} seconds; opponent.server.start_timeout "
                    "allows more"
                )
            time.sleep(POLL_SECONDS)
    log.info("server ready after %.0f s", time.monotonic() - started)


def _is_ready(url: str) -> bool:
    """Return whether a server is ready. While it loads its model, a server answers with an error or not at all."""
    response = probe(f"{url}/health", ERROR_CONTEXT)
    return response is not None and response.status_code < 500


def _first_model(url: str) -> str | None:
    """Return the first model that a server lists; None if it lists none and therefore needs no name."""
    response = probe(f"{url}/v1/models", ERROR_CONTEXT)
    try:
        return None if response is None else str(response.json()["data"][0]["id"])
    except (KeyError, IndexError, TypeError, ValueError):
        return None


def _log_excerpt(command: str, log_file: Path) -> str:
    lines = log_file.read_text(encoding="utf-8", errors="replace").splitlines()[-8:]
    excerpt = "".join(f"\n  {line}" for line in lines)
    return redact(f"The command: {command}\nThe end of its log, {log_file}:{excerpt}", ERROR_CONTEXT)


def _run_reload_command(command: str, timeout: float, log_file: Path) -> None:
    """Run the user's command. Its output goes to a file, because a server that it starts would keep a pipe open."""
    started = time.monotonic()
    with log_file.open("wb") as file:
        process = subprocess.Popen(command, shell=True, stdin=subprocess.DEVNULL, stdout=file, stderr=file)
    try:
        while process.poll() is None and time.monotonic() - started < timeout:
            check_interrupt()
            time.sleep(POLL_SECONDS / 10)
        if process.returncode != 0:
            code = process.returncode
            problem = "took longer than opponent.server.start_timeout" if code is None else f"exited with code {code}"
            raise ServerError(
                f"opponent.server.reload_command: {problem}, so the server may not have the opponent. "
                + _log_excerpt(command, log_file)
            )
    finally:
        if process.poll() is None:
            process.kill()
            process.wait()


def _load_adapter(server: Server, urls: list[str], name: str, player: Path) -> None:
    path = SERVER_APIS[server.api].adapter_path.format("load")
    for url in urls:
        try:
            _post(server, url, path, {"lora_name": name, "lora_path": str(player)})
        except RefusedError as refused:
            if "already" not in str(refused):  # an interrupted run may have loaded the adapter
                raise ServerError(
                    f"{url}{path}: cannot load the adapter {player} ({refused}). The server must be able to read this "
                    "folder, and must run with --enable-lora and a --max-lora-rank of at least lora.r (vLLM also with "
                    "VLLM_ALLOW_RUNTIME_LORA_UPDATING=True, SGLang also with --lora-target-modules all)"
                ) from None


def _unload_adapter(server: Server, urls: list[str], name: str) -> None:
    """Unload an adapter; otherwise the server would keep the adapter of every iteration. Ignore errors."""
    path = SERVER_APIS[server.api].adapter_path.format("unload")
    for url in urls:
        with suppress(RefusedError, ServerError):
            _post(server, url, path, {"lora_name": name})


def _post(server: Server, url: str, path: str, body: dict[str, str]) -> None:
    endpoint = Endpoint([url], "", server.timeout, 1, ERROR_CONTEXT)
    run_async(endpoint.run([body], lambda body: endpoint.post(path, body), lambda *_: None))
