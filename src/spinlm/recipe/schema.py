"""The recipe: everything a run depends on, as frozen, strictly checked data.

Numbers may be written `5e-7`. A per-iteration value is one number, or a list with one number for each iteration.
The string under a field is its documentation.
"""

from typing import Annotated, Any, Literal

from pydantic import AfterValidator, BaseModel, ConfigDict, Discriminator, Field, JsonValue, Tag, model_validator

Positive = Annotated[float, Field(gt=0, allow_inf_nan=False)]
NonNegative = Annotated[float, Field(ge=0, allow_inf_nan=False)]
Fraction = Annotated[float, Field(ge=0, le=1)]
Count = Annotated[int, Field(ge=1)]

Seed = Annotated[int, Field(ge=0, lt=1 << 63)]


def _no_address(path: str) -> str:
    """Refuse an address without showing it: a password may be in it."""
    scheme, found, _ = path.partition("://")
    if found and scheme != "package":
        raise ValueError(f"an address ({scheme}://…) is not read: name a file here, or the hub id OWNER/NAME")
    return path


ModelOrPath = Annotated[str, Field(min_length=1), AfterValidator(_no_address)]
Options = dict[str, JsonValue]

ONE, LIST = "<one>", "<list>"  # what pydantic's errors call the two alternatives


def _one_or_list(value: Any) -> str:
    return LIST if isinstance(value, list) else ONE


# Choosing the alternative by the kind of value, not by trial, gives one error for a wrong value instead of two.
PerIteration = Annotated[
    Annotated[Positive, Tag(ONE)] | Annotated[list[Positive], Tag(LIST)], Discriminator(_one_or_list)
]
LayerNames = Annotated[
    Annotated[Literal["all-linear"], Tag(ONE)] | Annotated[list[str], Tag(LIST)], Discriminator(_one_or_list)
]


class Section(BaseModel):
    model_config = ConfigDict(frozen=True, extra="forbid", strict=True, use_attribute_docstrings=True)


class Model(Section):
    path: ModelOrPath
    """A folder, a .gguf file, `package://NAME/FILE` (a file inside an installed Python package), or a hub id."""
    revision: str | None = None
    """Commit, tag or branch of a hub model. Pin it: repositories change."""
    dtype: Literal["auto", "float32", "bfloat16"] = "auto"
    """Precision of the frozen weights and of all computation; `auto` is float32 on CPU and bfloat16 on a GPU. With full
    fine-tuning the weights stay in float32 and bfloat16 is used for computation only."""
    load_in_4bit: bool = False
    """Keep the frozen linear layers in 4 bits (QLoRA; needs a LoRA adapter): a quarter of their memory in bfloat16, an
    eighth in float32. Needs the package bitsandbytes."""
    trust_remote_code: bool = False
    """Run Python code that comes with the model. Only for repositories you trust."""


class Lora(Section):
    r: Count = 16
    """Rank."""
    alpha: Positive = 32
    """Scale: the update is multiplied by alpha / r."""
    dropout: Fraction = 0.0
    """Dropout on the adapter's input while training."""
    target_modules: LayerNames = "all-linear"
    """Names of the layers to adapt; `all-linear` is every linear layer but the output head."""


class Columns(Section):
    messages: str | None = None
    """Column with a list of {role, content} messages."""
    prompt: str | None = None
    """Column with the prompt: text, or a list of messages."""
    response: str | None = None
    """Column with the response: text, or a list with one assistant message."""
    rejected: str | None = None
    """Column of a preference data set with the worse response, in the same form as the better one. It takes the place
    of the opponent's response, so that the objective `spin` is plain DPO."""
    system: str | None = None
    """Column with a system prompt for conversations that do not begin with one."""
    id: str | None = None
    """Column with a unique id; a row without one gets a hash of its content."""


class Data(Section):
    path: ModelOrPath
    """A .jsonl, .json, .parquet or .csv file, or a hub dataset id."""
    subset: str | None = None
    """Configuration of a hub dataset that has several, such as `main` of openai/gsm8k."""
    split: str = "train"
    """Split of a hub dataset."""
    revision: str | None = None
    """Commit, tag or branch of a hub dataset."""
    columns: Columns = Columns()
    """Which columns to read; without names, the usual layouts are recognised."""
    turns: Literal["first", "last", "all"] = "first"
    """Which assistant turns of a list of messages become examples."""
    prompts: Count | None = None
    """How many examples to draw at random for self-play; absent means all that are left after the held-out ones."""
    heldout: Count = 512
    """How many examples to set aside for evaluation. Their prompts are never trained on."""
    seed: Seed = 0
    """Decides which examples are drawn."""
    on_bad_row: Literal["error", "skip"] = "error"
    """Stop at a row that cannot be used, or leave it out and count it."""
    chat_template: str | None = None
    """A Jinja chat template, or a file holding one, in place of the tokenizer's own."""


class Server(Section):
    """A server that generates the synthetic responses. In the texts that are commands or names, {player} stands for the
    folder of the current opponent, {merged} for one with its adapter merged into the base (made when asked for, and
    removed afterwards), {base} for the base model, {iteration} for the iteration, {port} for a free port."""

    api: Literal["vllm", "sglang", "llama.cpp"] = "vllm"
    """The server's API. All three exchange token ids and log-probabilities."""
    urls: list[str] = []
    """Addresses, such as http://127.0.0.1:8000/v1; several take turns. With `launch_command` and no address, a free
    port is used."""
    model: str | None = None
    """Its name for the opponent; absent means the adapter it was handed, else the first model that it lists."""
    reload_command: str | None = None
    """A command that hands the server each new opponent. Without it, and without `launch_command`, vllm and sglang get
    each new adapter through their own endpoint for that."""
    launch_command: str | None = None
    """A command that starts the server with the current opponent; it is stopped when the responses are there."""
    start_timeout: Positive = 600.0
    """Seconds within which the server has to answer once it was started."""
    max_concurrency: Count = 64
    """Maximum number of requests at once."""
    timeout: Positive = 600.0
    """Seconds within which a response has to be there, waiting in the server's queue included."""
    extra_body: Options = {}
    """Further fields of each request; null leaves one out that would be sent."""

    @model_validator(mode="after")
    def _has_an_address(self) -> "Server":
        from spinlm.utils.http import url_fault

        for name in self.extra_body:
            if name.lower() in ("key", "api_key", "apikey", "token", "authorization", "password", "secret"):
                raise ValueError(
                    f"opponent.server.extra_body: {name} would be kept in the run folder. A key goes into the "
                    "environment, as SPINLM_SERVER_KEY"
                )
        for url in self.urls:
            if fault := url_fault(url):
                raise ValueError(f"opponent.server.urls: {fault}")
        if not self.urls and self.launch_command is None:
            raise ValueError(
                "opponent.server: has neither urls nor launch_command. Give the address of a server that runs, such as "
                "urls: ['http://127.0.0.1:8000/v1'], or a launch_command that starts one"
            )
        if self.launch_command is not None and self.reload_command is not None:
            raise ValueError(
                "opponent.server: has launch_command, which starts the server with each opponent, and reload_command, "
                "which hands an opponent to a server that runs. Leave one of them out"
            )
        return self


class Vllm(Section):
    """vLLM in processes of its own, which end with the stage."""

    tensor_parallel: Count = 1
    """GPUs that divide a copy of the model among them."""
    data_parallel: Count = 1
    """Copies of the model, which share the prompts."""
    gpu_memory_utilization: Annotated[float, Field(gt=0, le=1)] = 0.9
    """Share of a GPU's memory that vLLM takes."""
    engine_args: Options = {}
    """Further arguments of vllm.LLM, such as max_num_seqs; null leaves one out that would be given."""

    @model_validator(mode="after")
    def _names_no_other_model(self) -> "Vllm":
        for name in ("model", "tokenizer", "revision", "trust_remote_code", "hf_token"):
            if name in self.engine_args:
                goes = "a key goes into the environment, as HF_TOKEN" if name == "hf_token" else "it goes by model:"
                raise ValueError(f"opponent.vllm.engine_args: {name} is not for here: {goes}")
        return self


class Opponent(Section):
    engine: Literal["local", "vllm", "server"] = "local"
    """What generates the synthetic responses: this process, vLLM in processes of its own, or a server."""
    vllm: Vllm | None = None
    """How vLLM is set up."""
    server: Server | None = None
    """Which server, and how it is asked."""
    temperature: NonNegative = 1.0
    """1.0 samples from the opponent's own distribution, as the method assumes; 0 is greedy."""
    top_p: Annotated[float, Field(gt=0, le=1)] = 1.0
    """Sample from the smallest set of tokens that holds this share of the probability; 1.0 is all of them."""
    max_new_tokens: Count = 256
    """Longest synthetic response. One that reaches it has no end-of-turn token and is not given one."""
    samples_per_prompt: Count = 1
    """Synthetic responses to every prompt in every iteration."""
    batch_size: Count = 64
    """Responses generated at once."""
    shard_size: Count = 256
    """Prompts in one generation file: the unit that an interrupted run does not repeat."""

    @model_validator(mode="after")
    def _engine_and_server(self) -> "Opponent":
        if self.engine == "server" and self.server is None:
            raise ValueError("opponent.engine is server, but there is no section opponent.server to say which")
        for name in ("server", "vllm"):
            if self.engine != name and getattr(self, name) is not None:
                raise ValueError(
                    f"opponent.{name}: is not used, as opponent.engine is {self.engine}. Set opponent.engine={name}, "
                    "or leave the section out"
                )
        return self


MUTABLE_FIELDS = (
    "opponent.batch_size",
    *(f"opponent.server.{name}" for name in Server.model_fields if name not in ("api", "extra_body")),
    *(f"opponent.vllm.{name}" for name in Vllm.model_fields if name != "engine_args"),
    "train.tokens_per_micro_batch",
    "train.gradient_checkpointing",
    "train.fsdp",
    "train.save_steps",
    "report_to",
)
"""Fields that say how a run is carried out, not what it computes: they may change while it is under way."""


MEMORY_MARGIN = 1.25
"""So many times the memory of activations must be free for keeping them: some more pass by, or leave gaps behind."""

OPTIMIZER_BYTES = {"sgd": 0, "adafactor": 0, "rmsprop": 4, "adagrad": 4, "adam": 8, "adamw": 8, "nadam": 8, "radam": 8}
"""Optimiser state for each trained parameter, in bytes."""

ELEMENTWISE_OPTIMIZERS = ("adam", "adamw", "nadam", "radam", "rmsprop", "sgd")
"""Optimisers that look at each number alone, so that they do not mind how weights are divided."""


def optimizer_bytes(name: str) -> int:
    """State of an optimiser for each trained parameter; one that is not known counts like AdamW's."""
    return OPTIMIZER_BYTES.get(name.lower(), 8)


class Select(Section):
    metric: Literal["task_score", "heldout_nll"] | None = None
    """What decides which player is best; absent means task_score where a scorer is given, else heldout_nll."""
    patience: Count = 2
    """Stop after this many iterations without a better player."""
    min_standard_errors: NonNegative = 2.0
    """How many standard errors of the paired difference a player must be ahead of the best so far to replace it."""


class Guard(Section):
    """Bounds on how far a player may fall behind the starting one before the run is stopped."""

    max_nll_increase: Positive = 0.1
    """Held-out NLL, nats per token. Also looked at after each epoch of training, which then ends there."""
    max_truncated_increase: Positive = 0.2
    """Share of unfinished answers."""
    max_repetition_increase: Positive = 0.1
    """Share of repeated 4-grams in answers."""


class SelfPlay(Section):
    iterations: Count = 4
    """How many times the main player is trained and becomes the next opponent (T)."""
    replay: Annotated[int, Field(ge=0)] = 1
    """How many earlier iterations' synthetic responses are used again beside the newest."""
    select: Select = Select()
    """Which player is the best, and when to stop."""
    guard: Guard | None = Guard()
    """What counts as collapse, and stops the run; null plays on regardless."""


CONTROL = "sft"
"""Name of the objective that is the control."""

READ_BY = {
    "spin": ("link", "beta", "length_normalize", "nll_weight"),
    "dpo-positive": ("beta", "dpop_lambda", "nll_weight"),
    "space": ("mu", "nll_weight"),
    "t-spin": ("link", "beta", "history_weight", "nll_weight"),
    "sft": (),
}
"""The settings that each objective reads."""


class Objective(Section):
    name: Literal["spin", "dpo-positive", "space", "t-spin", "sft"] = "spin"
    """The objective: SPIN's; DPO-Positive, SPACE or T-SPIN, which were made to be stabler; or `sft`, the control:
    supervised fine-tuning on the real responses alone, in as many steps."""
    link: Literal["logistic", "hinge", "exponential"] = "logistic"
    """The convex decreasing function of the margin. For spin and t-spin."""
    beta: PerIteration = 0.1
    """λ in the paper: how strongly the main player is held to its opponent. Per iteration. For spin, dpo-positive, and
    t-spin, whose paper calls it α."""
    length_normalize: bool = False
    """Divide each response's log-probability ratio by its tokens, so that long ones do not weigh more. For spin."""
    dpop_lambda: NonNegative = 50.0
    """How strongly a real response that has become less likely counts against the margin. For dpo-positive."""
    mu: Positive = 1.0
    """How much a synthetic response counts beside a real one. For space, which is best without `selfplay.replay`."""
    history_weight: NonNegative = 1.0
    """Weight of the advantage of the newer synthetic response over θ_0's; the paper's β. For t-spin."""
    nll_weight: NonNegative = 0.0
    """Weight of an added −log p(y|x)/|y|, which keeps the likelihood of the real responses up. For all but sft."""

    @property
    def reads(self) -> tuple[str, ...]:
        """The settings that this objective reads."""
        return READ_BY[self.name]

    @model_validator(mode="after")
    def _no_dead_settings(self) -> "Objective":
        defaults = Objective.model_fields
        for key in (key for key in defaults if key not in ("name", *self.reads)):
            if getattr(self, key) != defaults[key].default:
                readers = ", ".join(name for name, keys in READ_BY.items() if key in keys)
                raise ValueError(
                    f"objective.{key}: {self.name} has no such setting, only {readers}. Leave it out, or replace the "
                    f"whole section on the command line: 'objective={{name: {self.name}}}'"
                )
        return self


class Train(Section):
    epochs: Count = 2
    """Passes over the pairs of an iteration."""
    batch_size: Count = 64
    """Pairs per optimiser step, over all processes."""
    learning_rate: PerIteration = 5e-7
    """Peak learning rate. Per iteration."""
    optimizer: str = "rmsprop"
    """Any optimiser of torch.optim by name: rmsprop, adamw, sgd, …"""
    warmup_ratio: Fraction = 0.1
    """Share of the steps over which the learning rate rises to its peak."""
    lr_scheduler: Literal["linear", "cosine", "constant"] = "linear"
    """What the learning rate does after the warm-up."""
    weight_decay: NonNegative = 0.0
    """The optimiser's weight decay."""
    max_grad_norm: Positive = 1.0
    """Gradients are scaled down to this norm."""
    max_length: Annotated[int, Field(ge=8)] = 2048
    """Longest prompt plus response, in tokens. Longer real responses are cut (and then have no end-of-turn token)."""
    tokens_per_micro_batch: Count = 2048
    """Tokens in one forward and backward pass. Lower it when memory runs out: the result stays the same, but for the
    masks that `lora.dropout` draws."""
    prefix_sharing: Literal["auto", "always", "never"] = "auto"
    """Compute a prompt once for all its responses (always), or once for each response (never); `auto` shares the prompt
    where that gives the model's own log-probabilities."""
    gradient_checkpointing: Literal[True, False, "auto"] = "auto"
    """Compute activations again in the backward pass: less memory, more time. `auto` does it where keeping those of the
    largest micro-batch would take more memory than is free."""
    fsdp: Literal["none", "shard_grad_op", "full_shard"] = "none"
    """Divide weights, gradients and optimiser state over the processes with FSDP2. `full_shard` frees a layer's weights
    between forward and backward; `shard_grad_op` keeps them, which takes more memory and less communication. With
    `none` every process holds all of them (DDP)."""
    save_steps: Count = 50
    """Optimiser steps between checkpoints."""


class Sft(Section):
    """What is not here (lr_scheduler, warmup_ratio, weight_decay, …) is as in `train`."""

    epochs: Count = 1
    """Passes over the examples."""
    learning_rate: Positive = 2e-5
    """Peak learning rate."""
    batch_size: Count = 16
    """Examples per optimiser step."""
    optimizer: str = "adamw"
    """Any optimiser of torch.optim by name."""
    prompts: Count | None = None
    """Draw this many examples for the warm-up alone, disjoint from those of self-play; absent means train on the
    examples of self-play themselves."""


class Evaluate(Section):
    scorer: str | None = None
    """Scores an answer against the real response, from 0 to 1: exact_match, json_fields, gsm8k, or
    `module:function`."""
    max_new_tokens: Count | None = None
    """Longest held-out answer; absent means the opponent's limit."""


class Recipe(Section):
    model: Model
    """The fine-tuned model that plays against itself."""
    lora: Lora | None = None
    """Train a LoRA adapter, chained through the iterations; absent means full fine-tuning."""
    data: Data
    """The supervised data the model was fine-tuned on."""
    opponent: Opponent = Opponent()
    """How the opponent answers."""
    selfplay: SelfPlay = SelfPlay()
    """The game."""
    objective: Objective = Objective()
    """What the main player minimises."""
    train: Train = Train()
    """How it is minimised."""
    sft: Sft | None = None
    """Supervised fine-tuning before iteration 0, for a model that was never fine-tuned on the data."""
    evaluate: Evaluate = Evaluate()
    """What is measured on held-out prompts."""
    report_to: list[str] = []
    """Trackers of Accelerate to report to: tensorboard, wandb, …"""
    seed: Seed = 0
    """Decides sampling, shuffling and the adapter's initial weights."""

    @model_validator(mode="after")
    def _check(self) -> "Recipe":
        for name in PER_ITERATION_FIELDS:
            value = get_path(self, name)
            if isinstance(value, list) and len(value) != self.selfplay.iterations:
                raise ValueError(
                    f"{name} has {len(value)} values for {self.selfplay.iterations} iterations: give one number, or "
                    "one for each of selfplay.iterations"
                )
        if self.model.load_in_4bit and self.lora is None:
            raise ValueError(
                "model.load_in_4bit: weights in 4 bits cannot be trained. Add a section lora, or leave it out"
            )
        if self.model.load_in_4bit and self.train.fsdp != "none":
            raise ValueError(
                f"train.fsdp is {self.train.fsdp}, but 4-bit weights cannot be divided over processes. Leave "
                "train.fsdp or model.load_in_4bit out"
            )
        if self.train.fsdp != "none":
            for name, optimizer in (
                ("train.optimizer", self.train.optimizer),
                ("sft.optimizer", self.sft.optimizer if self.sft else "adamw"),
            ):
                if optimizer.lower() not in ELEMENTWISE_OPTIMIZERS:
                    raise ValueError(
                        f"{name} is {optimizer}, but with train.fsdp: {self.train.fsdp} it would see parts of "
                        "weights, not their shapes. Choose train.fsdp: none, or one of "
                        + ", ".join(ELEMENTWISE_OPTIMIZERS)
                    )
        if self.selfplay.select.metric == "task_score" and self.evaluate.scorer is None:
            raise ValueError("selfplay.select.metric is task_score, but evaluate.scorer names no scorer")
        server = self.opponent.server
        if server is not None and not (server.launch_command or server.reload_command):
            if server.api not in ("vllm", "sglang"):
                raise ValueError(
                    f"opponent.server: a {server.api} server has to be told of each new opponent: give reload_command, "
                    "a command that hands it over, or launch_command, which starts the server with it"
                )
            if self.lora is None:
                raise ValueError(
                    "opponent.server: only LoRA adapters can be handed to a server that runs. The players of this "
                    "recipe are whole models: give launch_command, which starts the server with {player}, or "
                    "reload_command"
                )
        if server is not None and self.lora is not None and not server.launch_command:
            if server.api in ("vllm", "sglang") and not server.reload_command and server.model is not None:
                raise ValueError(
                    "opponent.server.model: is not used where the server is handed each new adapter under a name of "
                    "its own. Leave it out"
                )
            names = f"{server.reload_command} {server.model or ''}"
            if (
                server.api in ("vllm", "sglang")
                and server.reload_command
                and not server.model
                and "{merged}" not in names
            ):
                raise ValueError(
                    "opponent.server: reload_command hands over an adapter; without its name in opponent.server.model "
                    "the base would be asked. Name it, or hand over {merged}"
                )
        if self.preferences and self.selfplay.iterations * self.opponent.samples_per_prompt > 1:
            raise ValueError(
                "data.columns.rejected: a prompt has one rejected response, the same in every iteration: set "
                "selfplay.iterations and opponent.samples_per_prompt to 1"
            )
        return self

    @property
    def is_control(self) -> bool:
        """Whether the run is the control: supervised fine-tuning on the real responses, without self-play."""
        return self.objective.name == CONTROL

    @property
    def preferences(self) -> bool:
        """Whether the synthetic responses are the data's rejected ones, and no opponent's."""
        return self.data.columns.rejected is not None

    @property
    def longest_synthetic(self) -> int:
        """The most tokens of a synthetic response."""
        return self.train.max_length if self.preferences else self.opponent.max_new_tokens

    def num_synthetic(self, iteration: int) -> int:
        """Synthetic responses in use for each prompt: the newest, and those of up to `replay` iterations before."""
        return self.opponent.samples_per_prompt * (min(iteration, self.selfplay.replay) + 1)

    def num_branches(self, iteration: int) -> int:
        """Responses computed beside the real one of each prompt in training: those in use, and for T-SPIN θ_0's."""
        match self.objective.name:
            case "sft":
                return 0
            case "t-spin" if iteration > self.selfplay.replay:
                return self.num_synthetic(iteration) + self.opponent.samples_per_prompt
            case _:
                return self.num_synthetic(iteration)

    def max_micro_batch_tokens(self, prefix_sharing: bool) -> int:
        """The most tokens a micro-batch can have: its budget, or those of a single prompt that takes more."""
        used, longest = self.num_branches(self.selfplay.iterations - 1), self.train.max_length
        tree = longest + used * self.longest_synthetic
        return max(self.train.tokens_per_micro_batch, tree if prefix_sharing else (1 + used) * longest)


PER_ITERATION_FIELDS = ("objective.beta", "train.learning_rate")
"""Fields that may have a value for each iteration."""


def get_path(recipe: Any, name: str) -> Any:
    """The value of a field (section.key) of a recipe, or of one as plain data; None where it has none."""
    for key in name.split("."):
        recipe = recipe.get(key) if isinstance(recipe, dict) else getattr(recipe, key, None)
    return recipe


def value_at(value: PerIteration, iteration: int) -> float:
    """The value of a per-iteration field at one iteration."""
    return value[iteration] if isinstance(value, list) else value
