"""What runs in a process of its own: one copy of the model in vLLM. Needs nothing but vLLM.

The first line that comes in has the engine's arguments and the adapter, each further one a list of requests. A line
goes out for each: what is `done`, or the `error`. The end of what comes in says that who asked has gone, or is done.
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

PATIENCE = 20.0  # seconds to end in before it is killed


def main() -> None:
    replies = os.fdopen(os.dup(1), "w")
    os.dup2(2, 1)  # what else is printed goes to the log

    def reply(message: dict[str, Any]) -> None:
        print(json.dumps(message), file=replies, flush=True)

    messages: queue.Queue[Any] = queue.Queue()
    threading.Thread(target=_read, args=(messages,), daemon=True).start()
    try:
        from vllm import LLM, SamplingParams
        from vllm.lora.request import LoRARequest

        first = messages.get()
        engine = LLM(**first["engine"])
        lora = first["adapter"] and LoRARequest(lora_name="opponent", lora_int_id=1, lora_path=first["adapter"])
        reply({"done": None})
        while (requests := messages.get()) is not None:
            outputs = engine.generate(
                [{"prompt_token_ids": one["prompt"]} for one in requests],
                [SamplingParams(**one["sampling"]) for one in requests],
                use_tqdm=False,
                lora_request=lora or None,
            )
            reply({"done": [read_output(output) for output in outputs]})
    except Exception as error:  # whatever ends this process, the one that waits for its answers must hear of it
        traceback.print_exc()
        reply({"error": f"{type(error).__name__}: {error}"})


def read_output(output: Any) -> dict[str, Any]:
    """What is needed of a `vllm.RequestOutput` with one response."""
    (one,) = output.outputs
    return {"token_ids": list(one.token_ids), "logprob": one.cumulative_logprob, "finish_reason": one.finish_reason}


def _read(messages: "queue.Queue[Any]") -> None:
    """Take messages in. After the last one there is not much time, whatever is being done."""
    for line in sys.stdin:
        messages.put(json.loads(line))
    messages.put(None)
    time.sleep(PATIENCE)
    os.killpg(os.getpgid(0), signal.SIGKILL)


if __name__ == "__main__":
    main()
