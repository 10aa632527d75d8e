"""Worker process that runs one copy of the model in vLLM. Imports only the standard library and vLLM.

The first line of standard input holds the engine's arguments and the adapter; every further line is a list of requests.
Each line is answered by one line, either the `result` or the `error`. The worker exits at end of standard input: its
parent has exited or needs no more responses.
"""

import json
import os
import queue
import signal
import sys
import threading
import time
import traceback
from typing import Any

SHUTDOWN_TIMEOUT = 20.0  # seconds until the worker kills itself


def main() -> None:
    """Generate responses until the end of standard input."""
    stdout = os.fdopen(os.dup(1), "w")
    os.dup2(2, 1)  # what vLLM prints goes to the log

    def send(message: dict[str, Any]) -> None:
        print(json.dumps(message), file=stdout, flush=True)

    messages: queue.Queue[Any] = queue.Queue()
    threading.Thread(target=_read_messages, args=(messages,), daemon=True).start()
    try:
        from vllm import LLM, SamplingParams
        from vllm.lora.request import LoRARequest

        first = messages.get()
        engine = LLM(**first["engine"])
        lora = first["adapter"] and LoRARequest(lora_name="opponent", lora_int_id=1, lora_path=first["adapter"])
        send({"result": None})
        while (requests := messages.get()) is not None:
            outputs = engine.generate(
                [{"prompt_token_ids": request["prompt"]} for request in requests],
                [SamplingParams(**request["sampling"]) for request in requests],
                use_tqdm=False,
                lora_request=lora or None,
            )
            send({"result": [read_output(output) for output in outputs]})
    except Exception as error:  # the parent must receive every error, of any type
        traceback.print_exc()
        send({"error": f"{type(error).__name__}: {error}"})


def read_output(output: Any) -> dict[str, Any]:
    """Return the fields that the parent needs of a `vllm.RequestOutput` with one response."""
    (completion,) = output.outputs
    return {
        "token_ids": list(completion.token_ids),
        "logprob": completion.cumulative_logprob,
        "finish_reason": completion.finish_reason,
    }


def _read_messages(messages: "queue.Queue[Any]") -> None:
    """Read messages until the end of standard input, then kill the process group after the timeout."""
    for line in sys.stdin:
        messages.put(json.loads(line))
    messages.put(None)
    time.sleep(SHUTDOWN_TIMEOUT)
    os.killpg(os.getpgid(0), signal.SIGKILL)


if __name__ == "__main__":
    main()
