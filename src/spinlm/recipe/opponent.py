"""The recipe's section `opponent`: what writes the synthetic responses."""

from typing import Annotated, Literal

from pydantic import Field, field_validator, model_validator

from spinlm.recipe.fields import Count, NonNegative, Options, Positive, Section, Url

Command = Annotated[str, Field(min_length=1)]

SECRETS = {"key", "api_key", "apikey", "token", "authorization", "password", "secret"}
ADAPTER_APIS = ("vllm", "sglang")
"""APIs with an endpoint that loads a LoRA adapter."""


class Server(Section):
    """An inference server that writes the synthetic responses. In the commands and in `model`, {player} stands for the
    folder of the current opponent, {merged} for a copy of it with the adapter merged into the base (written on demand,
    then removed), {base} for the base model, {iteration} for the iteration, and {port} for a free port."""

    api: Literal["vllm", "sglang", "llama.cpp"] = "vllm"
    """API of the server. Requests and responses hold token ids and log-probabilities."""
    urls: list[Url] = []
    """URLs of the server's replicas, such as http://127.0.0.1:8000/v1. They may be left out with `launch_command`: the
    server then listens on {port}."""
    model: str | None = None
    """The server's name for the opponent. Absent means the adapter that was loaded, or else the first model listed."""
    reload_command: Command | None = None
    """Shell command that gives a running server each new opponent. Without it and without `launch_command`, `vllm` and
    `sglang` load each new adapter through their own endpoint."""
    launch_command: Command | None = None
    """Shell command that starts the server with the current opponent. The server is stopped after generation."""
    start_timeout: Positive = 600.0
    """Maximum seconds from the start of the server to its first reply."""
    max_concurrency: Count = 64
    """Maximum number of concurrent requests."""
    timeout: Positive = 600.0
    """Maximum seconds for one response, including time in the server's queue."""
    extra_body: Options = {}
    """Additional fields of each request. A null removes a field."""

    @property
    def loads_adapters(self) -> bool:
        """Whether spinlm gives the server each new adapter through the server's own endpoint."""
        return self.launch_command is None and self.reload_command is None

    @field_validator("extra_body")
    @classmethod
    def _check_extra_body(cls, options: Options) -> Options:
        for name in options:
            if name.lower() in SECRETS:
                raise ValueError(
                    f"{name} would be stored in the run folder. Put a key into the environment, as SPINLM_SERVER_KEY"
                )
        return options

    @model_validator(mode="after")
    def _check_how_it_gets_players(self) -> "Server":
        if self.launch_command is not None and self.reload_command is not None:
            raise ValueError(
                "launch_command starts the server with each opponent, reload_command gives an opponent to a running "
                "server. Remove one of them"
            )
        if not self.urls and self.launch_command is None:
            raise ValueError(
                "neither urls nor launch_command. Give the URL of a running server, such as "
                "urls: ['http://127.0.0.1:8000/v1'], or a launch_command that starts one"
            )
        if self.loads_adapters and self.api not in ADAPTER_APIS:
            raise ValueError(
                f"a server with api: {self.api} has no endpoint that loads adapters. Give launch_command, which starts "
                "the server with each opponent, or reload_command, which gives it to a running server"
            )
        if self.loads_adapters and self.model is not None:
            raise ValueError("model is not used: each adapter is loaded under its own name. Remove it")
        return self


class Vllm(Section):
    """vLLM in separate processes, which end with the generation stage."""

    tensor_parallel: Count = 1
    """Number of GPUs over which each replica of the model is divided."""
    data_parallel: Count = 1
    """Number of replicas of the model. They share the prompts."""
    gpu_memory_utilization: Annotated[float, Field(gt=0, le=1)] = 0.9
    """Fraction of a GPU's memory that vLLM uses."""
    engine_args: Options = {}
    """Additional arguments of vllm.LLM, such as max_num_seqs. A null removes an argument."""

    @field_validator("engine_args")
    @classmethod
    def _check_engine_args(cls, options: Options) -> Options:
        for name in ("model", "tokenizer", "revision", "trust_remote_code"):
            if name in options:
                raise ValueError(f"{name} follows from the section model. Remove it")
        if "hf_token" in options:
            raise ValueError("hf_token would be stored in the run folder. Put it into the environment, as HF_TOKEN")
        return options


class Opponent(Section):
    engine: Literal["local", "vllm", "server"] = "local"
    """What writes the synthetic responses: `local` (this process), `vllm` (vLLM in separate processes) or `server`."""
    vllm: Vllm | None = None
    """Settings of the engine `vllm`."""
    server: Server | None = None
    """Settings of the engine `server`."""
    temperature: NonNegative = 1.0
    """Sampling temperature. 1.0 samples from the opponent's own distribution, as the method assumes; 0 is greedy."""
    top_p: Annotated[float, Field(gt=0, le=1)] = 1.0
    """Sample from the smallest set of tokens with at least this total probability. 1.0 includes all tokens."""
    max_new_tokens: Count = 256
    """Maximum tokens of a synthetic response. A truncated response has no end-of-turn token."""
    samples_per_prompt: Count = 1
    """Synthetic responses per prompt and iteration."""
    exclude_correct: bool = False
    """Make no pair of a response that `evaluate.scorer` rates 1 (as in IRPO, arXiv 2404.19733)."""
    batch_size: Count = 64
    """Responses generated at once by the local engine."""
    shard_size: Count = 256
    """Prompts per generation file. A complete file is not generated again when a run resumes."""

    @model_validator(mode="after")
    def _check_engine_sections(self) -> "Opponent":
        if self.engine == "server" and self.server is None:
            raise ValueError("engine is server, but the section opponent.server is missing")
        for name in ("server", "vllm"):
            if self.engine != name and getattr(self, name) is not None:
                raise ValueError(
                    f"the section {name} is not used, because opponent.engine is {self.engine}. Set "
                    f"opponent.engine={name}, or remove the section"
                )
        return self

    @model_validator(mode="after")
    def _check_samples(self) -> "Opponent":
        if self.temperature == 0 and self.samples_per_prompt > 1:
            raise ValueError(
                "samples_per_prompt: greedy responses to one prompt are all equal. Set samples_per_prompt to 1, or "
                "raise temperature above 0"
            )
        return self


MUTABLE_FIELDS = (
    "opponent.batch_size",
    *(f"opponent.server.{name}" for name in Server.model_fields if name not in ("api", "extra_body")),
    *(f"opponent.vllm.{name}" for name in Vllm.model_fields if name != "engine_args"),
)
"""Fields of `opponent` that a resumed run may change."""
