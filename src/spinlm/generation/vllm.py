"""Generate responses with vLLM in worker processes that exit with the stage, so that training has the whole GPU.

Each copy of the model runs in a `vllm_worker` process and exchanges lines of JSON with it. Written for vLLM 0.33.
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
from spinlm.generation.base import OnProgress, Response, Sampling
from spinlm.model.players import Players
from spinlm.recipe.opponent import Vllm
from spinlm.recipe.schema import Recipe
from spinlm.utils.seeds import derive_seed
from spinlm.utils.signals import check_interrupt

MAX_LORA_RANKS = (1, 8, 16, 32, 64, 128, 256, 320, 512)
"""The values that vLLM accepts for max_lora_rank."""

SHUTDOWN_TIMEOUT = 20.0  # seconds before a worker process is killed
LAUNCHER_VARIABLES = ("RANK", "WORLD_SIZE", "LOCAL_", "GROUP_", "ROLE_", "MASTER_", "TORCHELASTIC_")
"""Prefixes of torchrun's environment variables. vLLM must not see them: it would join the process group of the run."""

CAUSES = (
    ("driver", "the GPU's driver is too old for this vLLM: update it, or install a vLLM built for an older CUDA"),
    ("out of memory", "out of GPU memory: lower opponent.vllm.gpu_memory_utilization, or divide the model with "
     "opponent.vllm.tensor_parallel"),
    ("memory", "too little free GPU memory: lower opponent.vllm.gpu_memory_utilization, divide the model with "
     "opponent.vllm.tensor_parallel, or look for other processes on the GPU with nvidia-smi"),
)  # fmt: skip
"""Words in error messages and what they mean, the most specific first."""


class VllmError(SpinError, RuntimeError):
    """vLLM does not start, fails, or exits."""


def engine_arguments(recipe: Recipe, settings: Vllm, model: str, dtype: str) -> dict[str, Any]:
    """Return the arguments of `vllm.LLM`."""
    lora = recipe.lora
    if lora is not None and lora.r > MAX_LORA_RANKS[-1]:
        raise RecipeError(
            f"lora.r is {lora.r}; vLLM supports adapters up to rank {MAX_LORA_RANKS[-1]}. Use another opponent.engine"
        )
    arguments = {
        "model": model,
        "revision": recipe.model.base_model.revision if lora and not recipe.merges_adapter else None,
        "trust_remote_code": recipe.model.trust_remote_code,
        "dtype": dtype,
        "max_model_len": recipe.train.max_length,
        "tensor_parallel_size": settings.tensor_parallel,
        "gpu_memory_utilization": settings.gpu_memory_utilization,
        "skip_tokenizer_init": True,  # prompts and responses are token ids
        "generation_config": "vllm",  # ignore the sampling defaults in the model's folder
        "logprobs_mode": "raw_logprobs",  # before temperature and top-p, as in the local engine
        "enable_lora": lora is not None,
        "max_lora_rank": next(rank for rank in MAX_LORA_RANKS if rank >= lora.r) if lora else None,
        **settings.engine_args,
    }
    return {name: value for name, value in arguments.items() if value is not None}


def make_request(prompt: Sequence[int], sampling: Sampling, seed: int) -> dict[str, Any]:
    """Return a prompt and the arguments of `vllm.SamplingParams` for one response."""
    return {
        "prompt": list(prompt),
        "sampling": {
            "temperature": sampling.temperature,
            "top_p": sampling.top_p,
            "max_tokens": min(sampling.max_new_tokens, sampling.max_length - len(prompt)),
            "stop_token_ids": list(sampling.stop_ids),
            "ignore_eos": True,  # this run may have other end tokens than the model
            "seed": seed,
            "logprobs": 0,  # of the sampled token only
            "detokenize": False,
        },
    }


def parse_response(output: dict[str, Any], stop_ids: Sequence[int]) -> Response:
    """Convert a worker's output.

    Raises:
        VllmError: vLLM aborted the response.
    """
    ids = output["token_ids"]
    if output["finish_reason"] not in ("stop", "length") or not ids:
        raise VllmError(f"vLLM ended a response with {output['finish_reason']!r} after {len(ids)} tokens")
    return Response(ids, ids[-1] in stop_ids, output["logprob"])


def explain(error: str, log_file: Path) -> str:
    """Return the likely cause of a vLLM error, the remedy, and the log file."""
    cause = next((meaning for word, meaning in CAUSES if word in error.lower()), "")
    line = (error.strip().splitlines() or ["no message"])[-1]
    return f"vLLM: {cause} ({line}). Log: {log_file}" if cause else f"vLLM failed: {line}. Log: {log_file}"


class Worker:
    """A process that runs one copy of the model."""

    def __init__(self, arguments: dict[str, Any], adapter: Path | None, gpus: str | None, log_file: Path):
        inherited = {name: value for name, value in os.environ.items() if not name.startswith(LAUNCHER_VARIABLES)}
        added = {"VLLM_NO_USAGE_STATS": "1"} | ({} if gpus is None else {"CUDA_VISIBLE_DEVICES": gpus})
        with log_file.open("wb") as file:
            self.process = subprocess.Popen(
                [sys.executable, "-P", vllm_worker.__file__],
                stdin=subprocess.PIPE,
                stdout=subprocess.PIPE,
                stderr=file,
                env=inherited | added,
                start_new_session=True,  # Ctrl-C does not reach vLLM, and its whole process group can be killed
                text=True,
            )
        self.log_file = log_file
        self._lines: queue.Queue[str] = queue.Queue()
        threading.Thread(target=self._read_lines, daemon=True).start()
        self.send({"engine": arguments, "adapter": None if adapter is None else str(adapter)})

    def _read_lines(self) -> None:
        assert self.process.stdout is not None
        for line in self.process.stdout:
            self._lines.put(line)
        self._lines.put("")

    def send(self, message: Any) -> None:
        """Send a message. If the process has exited, `receive` raises the error."""
        assert self.process.stdin is not None
        with suppress(BrokenPipeError):
            self.process.stdin.write(json.dumps(message) + "\n")
            self.process.stdin.flush()

    def receive(self) -> Any:
        """Wait for the result of a message.

        Raises:
            VllmError: the worker reports an error, or has exited.
            StoppedError: the user asked to stop.
        """
        while True:
            check_interrupt()
            try:
                line = self._lines.get(timeout=0.2)
            except queue.Empty:
                if self.process.poll() is None:
                    continue
                line = ""  # the process has exited, but one of its children may hold stdout open
                with suppress(queue.Empty):
                    line = self._lines.get(timeout=1)  # its last line
            if not line:
                code = self.process.wait()
                end_of_log = self.log_file.read_text(encoding="utf-8", errors="replace").strip()[-2000:]
                raise VllmError(f"vLLM's process exited with code {code}. " + explain(end_of_log, self.log_file))
            message = json.loads(line)
            if "error" in message:
                raise VllmError(explain(message["error"], self.log_file))
            return message["result"]

    def stop(self) -> None:
        """Stop the process and everything that it started."""
        assert self.process.stdin is not None
        with suppress(BrokenPipeError):
            self.process.stdin.close()  # makes the worker exit
        with suppress(subprocess.TimeoutExpired):
            self.process.wait(SHUTDOWN_TIMEOUT)
        with suppress(ProcessLookupError):
            os.killpg(self.process.pid, signal.SIGKILL)
        self.process.wait()


class VllmEngine:
    """The vLLM engine. Its workers have loaded the opponent."""

    def __init__(self, workers: Sequence[Worker]):
        self.workers = workers

    def generate(
        self, prompts: Sequence[Sequence[int]], sampling: Sampling, seed: int, on_progress: OnProgress
    ) -> list[list[Response]]:
        """See `Engine.generate`.

        Raises:
            VllmError: vLLM fails.
        """
        requests = [
            make_request(prompt, sampling, derive_seed(seed, index, sample) >> 32)  # 31 bits
            for index, prompt in enumerate(prompts)
            for sample in range(sampling.samples)
        ]
        count = len(self.workers)
        for number, worker in enumerate(self.workers):
            worker.send(requests[number::count])
        responses: list[Any] = [None] * len(requests)
        for number, worker in enumerate(self.workers):
            received = [parse_response(output, sampling.stop_ids) for output in worker.receive()]
            responses[number::count] = received
            on_progress(len(received), sum(len(response.token_ids) for response in received))
        return [responses[first : first + sampling.samples] for first in range(0, len(responses), sampling.samples)]


@contextmanager
def open_vllm(players: Players, t: int) -> Iterator[VllmEngine]:
    """Start vLLM with the opponent of iteration t, and stop it on exit.

    Raises:
        MissingPackageError: vLLM is not installed.
        VllmError: vLLM does not start.
    """
    recipe = players.recipe
    check_vllm(recipe)
    settings = recipe.opponent.vllm or Vllm()
    player = players.folder.player(t - 1).absolute()
    model, adapter = (players.base_model, player) if recipe.lora else (str(player), None)
    arguments = engine_arguments(recipe, settings, model, str(players.dtype).removeprefix("torch."))
    gpu_groups = assign_gpus(settings)
    logs = players.folder.iteration(t)
    logs.mkdir(parents=True, exist_ok=True)
    players.unload()  # vLLM needs the memory
    with ExitStack() as stack:
        workers = []
        for number, gpus in enumerate(gpu_groups):
            workers.append(Worker(arguments, adapter, gpus, logs / f"vllm-{number}.log"))
            stack.callback(workers[-1].stop)
        for worker in workers:
            worker.receive()
        yield VllmEngine(workers)


def check_vllm(recipe: Recipe) -> None:
    """Check that vLLM is installed and that there are enough GPUs.

    Raises:
        MissingPackageError: vLLM is not installed.
        RecipeError: there are fewer GPUs than the recipe needs.
    """
    if importlib.util.find_spec("vllm") is None:
        raise MissingPackageError(
            "opponent.engine: vllm needs a package that is not installed. Run: pip install 'spinlm[vllm]'"
        )
    assign_gpus(recipe.opponent.vllm or Vllm())


def assign_gpus(settings: Vllm) -> list[str | None]:
    """Return CUDA_VISIBLE_DEVICES for each copy of the model; None on a machine without CUDA GPUs.

    Raises:
        RecipeError: there are fewer GPUs than the recipe needs.
    """
    import torch

    copies, size = settings.data_parallel, settings.tensor_parallel
    visible = os.environ.get("CUDA_VISIBLE_DEVICES")
    gpus = visible.split(",") if visible else [str(number) for number in range(torch.cuda.device_count())]
    if not gpus:  # vLLM chooses the device
        return [None] * copies
    if copies * size > len(gpus):
        raise RecipeError(
            f"opponent.vllm: needs {copies} × {size} GPUs (data_parallel × tensor_parallel); there are {len(gpus)}"
        )
    return [",".join(gpus[number * size : (number + 1) * size]) for number in range(copies)]
