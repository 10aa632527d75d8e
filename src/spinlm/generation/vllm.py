"""The opponent in vLLM, in processes of its own that end with the stage, so that training has the whole GPU.

Each copy of the model runs in a `vllm_worker`, which is spoken with in lines of JSON. Written for vLLM 0.33.
"""

import importlib.util
import json
import os
import queue
import signal
import subprocess
import sys
import threading
from collections.abc import Iterator, Sequence
from contextlib import ExitStack, contextmanager, suppress
from pathlib import Path
from typing import Any

from spinlm.errors import MissingPackageError, RecipeError, SpinError
from spinlm.generation import vllm_worker
from spinlm.generation.base import Progress, Response
from spinlm.model.players import Players
from spinlm.recipe.schema import Recipe, Vllm
from spinlm.rundir.records import Sampling
from spinlm.utils.seeds import derive_seed
from spinlm.utils.signals import check_interrupt

RANKS = (1, 8, 16, 32, 64, 128, 256, 320, 512)
"""The values that vLLM's max_lora_rank takes."""

PATIENCE = 20.0  # seconds in which a process may end by itself
LAUNCHED = ("RANK", "WORLD_SIZE", "LOCAL_", "GROUP_", "ROLE_", "MASTER_", "TORCHELASTIC_")
"""Beginnings of what a launcher tells the processes of a run; vLLM would take it for its own."""

SIGNS = (
    ("driver", "the GPU's driver is too old for this vLLM: update it, or install a vLLM built for an older CUDA"),
    ("out of memory", "out of GPU memory: lower opponent.vllm.gpu_memory_utilization, or divide the model with "
     "opponent.vllm.tensor_parallel"),
    ("memory", "too little free GPU memory: lower opponent.vllm.gpu_memory_utilization, divide the model with "
     "opponent.vllm.tensor_parallel, or see with nvidia-smi who else is on the GPU"),
)  # fmt: skip
"""What the text of an error says of its cause, the surest first."""


class VllmError(SpinError, RuntimeError):
    """vLLM does not start, or has ended."""


def engine_arguments(recipe: Recipe, settings: Vllm, model: str, dtype: str) -> dict[str, Any]:
    """What `vllm.LLM` is made with."""
    lora = recipe.lora
    if lora is not None and lora.r > RANKS[-1]:
        raise RecipeError(
            f"lora.r is {lora.r}; vLLM takes adapters up to rank {RANKS[-1]}. Use another opponent.engine"
        )
    asked = {
        "model": model,
        "revision": recipe.model.revision if lora else None,
        "trust_remote_code": recipe.model.trust_remote_code,
        "dtype": dtype,
        "max_model_len": recipe.train.max_length,
        "tensor_parallel_size": settings.tensor_parallel,
        "gpu_memory_utilization": settings.gpu_memory_utilization,
        "skip_tokenizer_init": True,  # token ids go in and come out
        "generation_config": "vllm",  # no defaults for sampling from the model's folder
        "logprobs_mode": "raw_logprobs",  # before temperature and top-p, like ours
        "enable_lora": lora is not None,
        "max_lora_rank": next(rank for rank in RANKS if rank >= lora.r) if lora else None,
        **settings.engine_args,
    }
    return {name: value for name, value in asked.items() if value is not None}


def request(prompt: Sequence[int], sampling: Sampling, seed: int) -> dict[str, Any]:
    """A prompt, and what `vllm.SamplingParams` is made with for one response to it."""
    return {
        "prompt": list(prompt),
        "sampling": {
            "temperature": sampling.temperature,
            "top_p": sampling.top_p,
            "max_tokens": min(sampling.max_new_tokens, sampling.max_length - len(prompt)),
            "stop_token_ids": list(sampling.stop_ids),
            "ignore_eos": True,  # which may be another than the end tokens of this run
            "seed": seed,
            "logprobs": 0,  # the sampled token's own
            "detokenize": False,
        },
    }


def read_answer(given: dict[str, Any], stop_ids: Sequence[int]) -> Response:
    """What came back for one response.

    Raises:
        VllmError: it did not come to its end.
    """
    ids = given["token_ids"]
    if given["finish_reason"] not in ("stop", "length") or not ids:
        raise VllmError(f"vLLM ended a response with {given['finish_reason']!r} after {len(ids)} tokens")
    return Response(ids, ids[-1] in stop_ids, given["logprob"])


def explain(error: str, log: Path) -> str:
    """What a failure of vLLM means, and what to do."""
    found = next((meaning for sign, meaning in SIGNS if sign in error.lower()), "")
    line = (error.strip().splitlines() or ["no message"])[-1]
    return f"vLLM: {found} ({line}). Its log: {log}" if found else f"vLLM failed: {line}. Its log: {log}"


class Worker:
    """A process in which one copy of the model runs."""

    def __init__(self, arguments: dict[str, Any], adapter: Path | None, gpus: str | None, log: Path):
        own = {"VLLM_NO_USAGE_STATS": "1", **({} if gpus is None else {"CUDA_VISIBLE_DEVICES": gpus})}
        inherited = {name: value for name, value in os.environ.items() if not name.startswith(LAUNCHED)}
        with log.open("wb") as file:
            self.process = subprocess.Popen(
                [sys.executable, "-P", vllm_worker.__file__],
                stdin=subprocess.PIPE,
                stdout=subprocess.PIPE,
                stderr=file,
                env=inherited | own,
                start_new_session=True,  # a Ctrl-C is ours; and all that vLLM starts can be ended together
                text=True,
            )
        self.log = log
        self._replies: queue.Queue[str] = queue.Queue()
        threading.Thread(target=self._listen, daemon=True).start()
        self.send({"engine": arguments, "adapter": None if adapter is None else str(adapter)})

    def _listen(self) -> None:
        assert self.process.stdout is not None
        for line in self.process.stdout:
            self._replies.put(line)
        self._replies.put("")

    def send(self, message: Any) -> None:
        """Hand over a message; one that cannot be is missed when the answer is waited for."""
        assert self.process.stdin is not None
        with suppress(BrokenPipeError):
            self.process.stdin.write(json.dumps(message) + "\n")
            self.process.stdin.flush()

    def receive(self) -> Any:
        """Wait for a reply.

        Raises:
            VllmError: it failed, or is gone.
            StoppedError: the user asked to stop.
        """
        while True:
            check_interrupt()
            try:
                line = self._replies.get(timeout=0.2)
            except queue.Empty:
                if self.process.poll() is None:
                    continue
                line = ""  # gone, though a process of its own may still hold its output open
                with suppress(queue.Empty):
                    line = self._replies.get(timeout=1)  # what it said last was on its way
            if not line:
                code = self.process.wait()
                last = self.log.read_text(encoding="utf-8", errors="replace").strip()[-2000:]
                raise VllmError(f"vLLM's process has ended (exit code {code}). " + explain(last, self.log))
            reply = json.loads(line)
            if "error" in reply:
                raise VllmError(explain(reply["error"], self.log))
            return reply["done"]

    def end(self) -> None:
        """End it, with all it has started."""
        assert self.process.stdin is not None
        with suppress(BrokenPipeError):
            self.process.stdin.close()  # which tells it to end
        with suppress(subprocess.TimeoutExpired):
            self.process.wait(PATIENCE)
        with suppress(ProcessLookupError):
            os.killpg(self.process.pid, signal.SIGKILL)  # and what it left behind
        self.process.wait()


class VllmOpponent:
    """The vLLM engine, once it has the opponent."""

    def __init__(self, workers: Sequence[Worker]):
        self.workers = workers

    def generate(
        self, prompts: Sequence[Sequence[int]], sampling: Sampling, seed: int, progress: Progress
    ) -> list[list[Response]]:
        """See `Engine.generate`.

        Raises:
            VllmError: no answers, and why.
        """
        requests = [
            request(prompt, sampling, derive_seed(seed, index, sample) >> 32)  # 31 bits
            for index, prompt in enumerate(prompts)
            for sample in range(sampling.samples)
        ]
        count = len(self.workers)
        for number, worker in enumerate(self.workers):
            worker.send(requests[number::count])
        answers: list[Any] = [None] * len(requests)
        for number, worker in enumerate(self.workers):
            mine = [read_answer(given, sampling.stop_ids) for given in worker.receive()]
            answers[number::count] = mine
            progress(len(mine), sum(len(answer.token_ids) for answer in mine))
        return [answers[first : first + sampling.samples] for first in range(0, len(answers), sampling.samples)]


@contextmanager
def serve(recipe: Recipe, players: Players, iteration: int) -> Iterator[VllmOpponent]:
    """vLLM with the opponent of an iteration, for as long as it is needed.

    Raises:
        MissingPackageError: vLLM is not installed.
        VllmError: it does not start.
    """
    check_vllm(recipe)
    settings = recipe.opponent.vllm or Vllm()
    player = players.run.player(iteration - 1).absolute()
    model, adapter = (players.path, player) if recipe.lora else (str(player), None)
    arguments = engine_arguments(recipe, settings, model, str(players.dtype).removeprefix("torch."))
    groups = divide_gpus(settings)
    players.let_go()  # vLLM needs the memory
    with ExitStack() as stack:
        workers = []
        for number, gpus in enumerate(groups):
            log = players.run.iteration(iteration) / f"vllm-{number}.log"
            workers.append(Worker(arguments, adapter, gpus, log))
            stack.callback(workers[-1].end)
        for worker in workers:
            worker.receive()
        yield VllmOpponent(workers)


def check_vllm(recipe: Recipe) -> None:
    """Look whether vLLM can be started, as far as that can be said at once.

    Raises:
        MissingPackageError: it is not installed.
        RecipeError: there are fewer GPUs than the recipe wants.
    """
    if importlib.util.find_spec("vllm") is None:
        raise MissingPackageError(
            "opponent.engine: vllm needs a package that is not installed. Run: pip install 'spinlm[vllm]'"
        )
    divide_gpus(recipe.opponent.vllm or Vllm())


def divide_gpus(settings: Vllm) -> list[str | None]:
    """Which GPUs each copy of the model has; None where nothing is to be chosen.

    Raises:
        RecipeError: there are fewer than the recipe wants.
    """
    import torch

    copies, each = settings.data_parallel, settings.tensor_parallel
    visible = os.environ.get("CUDA_VISIBLE_DEVICES")
    gpus = visible.split(",") if visible else [str(number) for number in range(torch.cuda.device_count())]
    if not gpus:  # another kind of device, which vLLM knows itself
        return [None] * copies
    if copies * each > len(gpus):
        raise RecipeError(
            f"opponent.vllm: {copies} × {each} GPUs (data_parallel × tensor_parallel), but there are {len(gpus)}"
        )
    return [",".join(gpus[number * each : (number + 1) * each]) for number in range(copies)]
