"""A small server with the API of vLLM, SGLang or llama.cpp, and real models behind it.

python model_server.py API PORT MODEL
"""

import contextlib
import json
import socket
import sys
import threading
from collections.abc import Callable, Iterator
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Any

import torch
from peft import PeftModel
from transformers import AutoModelForCausalLM

Reply = tuple[int, dict[str, str], str] | None
"""Status, headers and body; None for a connection that breaks."""


class ModelServer:
    """One model, and the adapters that clients load."""

    def __init__(self, api: str, folder: str):
        self.api = api
        self.folder = folder
        self.models: dict[str, Any] = {"base": AutoModelForCausalLM.from_pretrained(folder).eval()}
        self.loaded: list[dict[str, str]] = []
        self.bodies: list[dict[str, Any]] = []
        self._lock = threading.Lock()

    def get(self, path: str) -> Reply:
        names = [{"id": name} for name in self.models]
        return _json({"object": "list", "data": names}) if path == "/v1/models" else _json({"error": path}, 404)

    def post(self, path: str, body: dict[str, Any]) -> Reply:
        with self._lock:
            if path.endswith("/unload_lora_adapter") and self.api in ("vllm", "sglang"):
                del self.models[body["lora_name"]]
                return 200, {}, "Success: removed."
            if path.endswith("/load_lora_adapter") and self.api in ("vllm", "sglang"):
                return self._load(body)
            self.bodies.append(body)
            if path == {"sglang": "/generate", "llama.cpp": "/completion"}.get(self.api, "/v1/completions"):
                return getattr(self, "_" + self.api.replace(".", "_"))(body)
        return _json({"error": {"message": f"no such path {path}"}}, 404)

    def _load(self, body: dict[str, str]) -> Reply:
        name = body["lora_name"]
        if name in self.models:
            return _json({"error": {"message": f"The lora adapter '{name}' has already been loaded."}}, 400)
        base = AutoModelForCausalLM.from_pretrained(self.folder)
        self.models[name] = PeftModel.from_pretrained(base, body["lora_path"]).eval()
        self.loaded.append(body)
        return 200, {"Content-Type": "text/plain"}, f"Success: LoRA adapter '{name}' added successfully."

    def _vllm(self, body: dict[str, Any]) -> Reply:
        if body["model"] not in self.models:
            return _json({"error": {"message": f"The model {body['model']} does not exist."}}, 404)
        tokens, values, stopped = self._complete(
            body["model"], body["prompt"], body["max_tokens"], body, body["stop_token_ids"]
        )
        choice = {
            "text": "…",
            "finish_reason": "stop" if stopped else "length",
            "token_ids": tokens,
            "logprobs": {"token_logprobs": values},
        }
        return _json({"choices": [choice]})

    def _llama_cpp(self, body: dict[str, Any]) -> Reply:
        tokens, values, stopped = self._complete("base", body["prompt"], body["n_predict"], body, [])
        probabilities = [{"id": token, "logprob": value} for token, value in zip(tokens, values, strict=True)]
        reason = "eos" if stopped else "limit"
        return _json({"content": "…", "tokens": tokens, "stop_type": reason, "completion_probabilities": probabilities})

    def _sglang(self, body: dict[str, Any]) -> Reply:
        params = body["sampling_params"]
        tokens, values, stopped = self._complete(
            body["lora_path"], body["input_ids"], params["max_new_tokens"], params, params["stop_token_ids"]
        )
        meta = {
            "finish_reason": {"type": "stop" if stopped else "length"},
            "output_token_logprobs": [[value, token, None] for value, token in zip(values, tokens, strict=True)],
        }
        return _json({"text": "…", "output_ids": tokens, "meta_info": meta})

    @torch.no_grad()
    def _complete(
        self, name: str, prompt: list[int], limit: int, params: dict[str, Any], stops: list[int]
    ) -> tuple[list[int], list[float], bool]:
        """Return tokens with the end token, their log-probabilities, and whether there is an end token."""
        model = self.models[name]
        ends = {*stops, *_as_list(model.generation_config.eos_token_id)}
        generator = torch.Generator().manual_seed(params.get("seed", params.get("sampling_seed")))
        tokens: list[int] = []
        values: list[float] = []
        while len(tokens) < limit:
            logits = model(torch.tensor([[*prompt, *tokens]])).logits[0, -1].float()
            temperature = params["temperature"]
            if temperature == 0:
                token = int(logits.argmax())
            else:
                token = int(torch.multinomial((logits / temperature).softmax(-1), 1, generator=generator))
            tokens.append(token)
            values.append(float(logits.log_softmax(-1)[token]))
            if token in ends:
                return tokens, values, True
        return tokens, values, False


def _as_list(value: Any) -> list[int]:
    return value if isinstance(value, list) else [] if value is None else [value]


def _json(value: Any, status: int = 200) -> Reply:
    return status, {"Content-Type": "application/json"}, json.dumps(value)


keys: list[str | None] = []
"""The Authorization headers of all requests to all servers of this process."""


@contextlib.contextmanager
def listen(post: Callable[[str, dict[str, Any]], Reply], get: Callable[[str], Reply], port: int = 0) -> Iterator[str]:
    """Serve two functions over HTTP in a thread; yields the address."""

    class Handler(BaseHTTPRequestHandler):
        def do_POST(self) -> None:
            keys.append(self.headers["Authorization"])
            self._send(post(self.path, json.loads(self.rfile.read(int(self.headers["Content-Length"])))))

        def do_GET(self) -> None:
            self._send(get(self.path))

        def _send(self, reply: Reply) -> None:
            if reply is None:
                self.connection.shutdown(socket.SHUT_RDWR)
                return
            status, headers, text = reply
            with contextlib.suppress(ConnectionError):  # the client closed the connection
                self.send_response(status)
                for name, value in headers.items():
                    self.send_header(name, value)
                self.send_header("Content-Length", str(len(text.encode())))
                self.end_headers()
                self.wfile.write(text.encode())

        def log_message(self, *args: Any) -> None:
            pass

    with ThreadingHTTPServer(("127.0.0.1", port), Handler) as http:
        http.daemon_threads = True
        thread = threading.Thread(target=http.serve_forever, kwargs={"poll_interval": 0.01})
        thread.start()
        try:
            yield f"http://127.0.0.1:{http.server_port}"
        finally:
            http.shutdown()
            thread.join()


if __name__ == "__main__":
    server = ModelServer(sys.argv[1], sys.argv[3])
    with listen(server.post, server.get, int(sys.argv[2])) as address:
        print("listening at", address, flush=True)
        threading.Event().wait()
