"""The recipe: all settings of a run, as frozen, strictly checked data.

A per-iteration field takes one number, or a list with one number for each iteration. The string under a field is its
documentation.
"""

from typing import Annotated, Literal

from pydantic import Field, model_validator

from spinlm.recipe import opponent
from spinlm.recipe.data import Data
from spinlm.recipe.fields import (
    Count,
    Fraction,
    NonNegative,
    PerIteration,
    Positive,
    Section,
    Seed,
    get_path,
)
from spinlm.recipe.model import Lora, Model
from spinlm.recipe.objective import Control, Extrapolation, LogRatioObjective, Objective, Spin, TSpin
from spinlm.recipe.opponent import ADAPTER_APIS, Opponent

ELEMENTWISE_OPTIMIZERS = ("adam", "adamw", "nadam", "radam", "rmsprop", "sgd")
"""Optimizers that update each weight independently, so that they work on FSDP's shards of a weight."""

ADAPTER_LOADERS = {"vllm": "vLLM", "sglang": "SGLang", "llama.cpp": "llama.cpp"}
"""Programs that load adapters, by `opponent.server.api`."""

MERGE_REMEDY = (
    "Set opponent.engine: local, or start a server with {merged} in opponent.server.launch_command or reload_command"
)
"""What to do if an engine cannot load an adapter."""

PER_ITERATION_FIELDS = ("objective.beta", "train.learning_rate")
"""Fields that may have a value for each iteration."""

MUTABLE_FIELDS = (
    *opponent.MUTABLE_FIELDS,
    "train.tokens_per_micro_batch",
    "train.gradient_checkpointing",
    "train.fsdp",
    "train.save_steps",
    "evaluate.regime_prompts",
    "report_to",
)
"""Fields that a resumed run may change: they affect speed, memory and reports, not the method."""


class Select(Section):
    metric: Literal["task_score", "heldout_nll"] | None = None
    """Metric that decides which player is best; absent means task_score if there is a scorer, else heldout_nll."""
    patience: Count = 2
    """Stop after this many iterations without a better player."""
    min_standard_errors: NonNegative = 2.0
    """Minimum lead of a player over the best so far, in standard errors of the paired difference."""


class Guard(Section):
    """How much worse than the starting player a player may become before the run stops."""

    max_nll_increase: Positive = 0.1
    """Maximum increase of the held-out NLL, in nats per token. It is also checked after each epoch of training."""
    max_truncated_increase: Positive = 0.2
    """Maximum increase of the share of truncated responses."""
    max_repetition_increase: Positive = 0.1
    """Maximum increase of the share of repeated 4-grams in responses."""


class SelfPlay(Section):
    iterations: Count = 4
    """Number of iterations (T). In each, the main player is trained and becomes the next opponent."""
    replay: Annotated[int, Field(ge=0)] = 1
    """Number of earlier iterations whose synthetic responses are trained on again."""
    select: Select = Select()
    """Choice of the best player, and early stopping."""
    guard: Guard | None = Guard()
    """Detection of collapse, which stops the run; null disables it."""


class Train(Section):
    epochs: Count = 2
    """Passes over the pairs of an iteration."""
    batch_size: Count = 64
    """Pairs, or examples of fine-tuning, per optimizer step, over all processes."""
    learning_rate: PerIteration = 5e-7
    """Peak learning rate."""
    optimizer: str = "rmsprop"
    """Name of an optimizer of torch.optim: rmsprop, adamw, sgd, …"""
    warmup_ratio: Fraction = 0.1
    """Share of the steps during which the learning rate rises to its peak."""
    lr_scheduler: Literal["linear", "cosine", "constant"] = "linear"
    """Course of the learning rate after the warm-up: down to 0 (`linear`, `cosine`), or `constant`."""
    weight_decay: NonNegative = 0.0
    """Weight decay of the optimizer."""
    max_grad_norm: Positive = 1.0
    """Maximum norm of the gradient. A larger gradient is scaled down to it."""
    max_length: Annotated[int, Field(ge=8)] = 2048
    """Maximum tokens of prompt plus response. Longer real responses are truncated, and lose their end-of-turn token."""
    tokens_per_micro_batch: Count = 2048
    """Tokens in one forward and backward pass. Lower it when memory runs out: the result stays the same, except for the
    random masks of `lora.dropout`."""
    prefix_sharing: Literal["auto", "always", "never"] = "auto"
    """Compute a prompt once for all its responses (`always`), or once for each response (`never`). `auto` shares if the
    log-probabilities are then still the model's own."""
    gradient_checkpointing: Literal[True, False, "auto"] = "auto"
    """Recompute activations in the backward pass: less memory, more time. `auto` does so if the activations of the
    largest micro-batch would not fit into free memory."""
    fsdp: Literal["none", "shard_grad_op", "full_shard"] = "none"
    """Divide weights, gradients and optimizer state over the processes with FSDP2. `full_shard` frees a layer's weights
    between forward and backward; `shard_grad_op` keeps them, which takes more memory and less communication. With
    `none` every process holds all of them (DDP)."""
    save_steps: Count = 50
    """Optimizer steps between checkpoints."""


class Sft(Section):
    """Supervised fine-tuning before iteration 0. Settings not listed here (lr_scheduler, weight_decay, …) are those of
    `train`."""

    epochs: Count = 1
    """Passes over the examples."""
    learning_rate: Positive = 2e-5
    """Peak learning rate."""
    batch_size: Count = 16
    """Examples per optimizer step."""
    optimizer: str = "adamw"
    """Name of an optimizer of torch.optim."""
    prompts: Count | None = None
    """Number of examples drawn for this stage only, disjoint from those of self-play; absent means the examples of
    self-play themselves."""


class Evaluate(Section):
    scorer: str | None = None
    """Scorer that compares a response with the real one and returns 0 to 1: exact_match, json_fields, gsm8k, or
    `module:function`."""
    max_new_tokens: Count | None = None
    """Maximum tokens of a held-out response; absent means opponent.max_new_tokens."""
    temperatures: list[Annotated[float, Field(gt=0, le=2)]] = []
    """Further temperatures at which held-out responses are sampled and scored. Needs `scorer`."""
    regime_prompts: Annotated[int, Field(ge=0)] = 32
    """Training prompts whose gradients are compared with those of fine-tuning before each training; 0 measures none."""

    @model_validator(mode="after")
    def _check_temperatures(self) -> "Evaluate":
        if self.temperatures and self.scorer is None:
            raise ValueError("temperatures: need a scorer. Set scorer, or remove temperatures")
        if len({*self.temperatures}) < len(self.temperatures):
            raise ValueError("temperatures: a temperature appears twice. Remove one of them")
        return self

    @property
    def responses_per_prompt(self) -> int:
        """Responses that a player writes to a held-out prompt: greedy, at temperature 1, and at `temperatures`."""
        return 1 + len({1.0, *self.temperatures})


class Recipe(Section):
    model: Model
    """The fine-tuned model that plays against itself."""
    lora: Lora | None = None
    """Train a LoRA adapter through all iterations; absent means full fine-tuning."""
    data: Data
    """The supervised data that the model was fine-tuned on."""
    opponent: Opponent = Opponent()
    """How the synthetic responses are written."""
    selfplay: SelfPlay = SelfPlay()
    """Iterations, choice of the best player, and detection of collapse."""
    objective: Objective = Spin()
    """What training minimizes."""
    train: Train = Train()
    """Optimizer, batches and memory."""
    sft: Sft | None = None
    """Supervised fine-tuning before iteration 0, for a model that was never fine-tuned on the data."""
    evaluate: Evaluate = Evaluate()
    """What is measured on held-out prompts."""
    report_to: list[str] = []
    """Trackers of Accelerate to report to: tensorboard, wandb, …"""
    seed: Seed = 0
    """Seed of sampling, shuffling and the adapter's initial weights."""

    @model_validator(mode="after")
    def _check_lists(self) -> "Recipe":
        iterations = self.selfplay.iterations
        for name in PER_ITERATION_FIELDS:
            value = get_path(self, name)
            if isinstance(value, list) and len(value) != iterations:
                raise ValueError(
                    f"{name}: {len(value)} values for {iterations} iterations. Give one number, or one for each of "
                    "selfplay.iterations"
                )
        return self

    @model_validator(mode="after")
    def _check_4bit(self) -> "Recipe":
        if self.model.load_in_4bit and self.lora is None:
            raise ValueError("model.load_in_4bit: 4-bit weights cannot be trained. Add a section lora, or remove it")
        if self.model.load_in_4bit and self.train.fsdp != "none":
            raise ValueError(
                f"train.fsdp: 4-bit weights cannot be divided over processes, but it is {self.train.fsdp}. Set "
                "train.fsdp: none, or remove model.load_in_4bit"
            )
        return self

    @model_validator(mode="after")
    def _check_extrapolation(self) -> "Recipe":
        if self.extrapolates and self.selfplay.iterations > 1:
            raise ValueError("objective: extrapolate makes one player. Set selfplay.iterations: 1")
        if self.extrapolates and self.lora is not None and self.lora.use_dora:
            raise ValueError(
                "objective: extrapolate does not support lora.use_dora: DoRA scales the rows of a weight to a length, "
                "so that the weights are not linear in the adapter. Use a run with LoRA or with whole models"
            )
        return self

    @model_validator(mode="after")
    def _check_optimizers(self) -> "Recipe":
        optimizers = {"train.optimizer": self.train.optimizer}
        if self.sft is not None:
            optimizers["sft.optimizer"] = self.sft.optimizer
        for name, optimizer in optimizers.items():
            if self.train.fsdp != "none" and optimizer.lower() not in ELEMENTWISE_OPTIMIZERS:
                raise ValueError(
                    f"{name}: {optimizer} needs whole weights, but train.fsdp: {self.train.fsdp} divides them. Set "
                    f"train.fsdp: none, or choose one of {', '.join(ELEMENTWISE_OPTIMIZERS)}"
                )
        return self

    @model_validator(mode="after")
    def _check_server(self) -> "Recipe":
        server = self.opponent.server
        if server is not None and self.lora is None and server.loads_adapters:
            raise ValueError(
                "opponent.server: a running server can load only LoRA adapters, but the players of this recipe are "
                "whole models. Give launch_command, which starts the server with {player}, or reload_command"
            )
        reloads_adapter = server and server.reload_command and "{merged}" not in server.reload_command
        if server and self.lora and reloads_adapter and server.api in ADAPTER_APIS and server.model is None:
            raise ValueError(
                "opponent.server.model: missing. Without it the server would answer with the base, not with the "
                "adapter that reload_command gives it. Name the adapter, or use {merged} in reload_command"
            )
        return self

    @model_validator(mode="after")
    def _check_adapter_engine(self) -> "Recipe":
        if self.lora is None or (engine := self.adapter_engine) is None:
            return self
        if self.lora.use_dora:
            raise ValueError(f"lora.use_dora: {engine} does not support DoRA adapters. {MERGE_REMEDY}")
        if self.lora.use_rslora and engine != "vLLM":
            raise ValueError(f"lora.use_rslora: {engine} would scale the adapter by alpha / r. {MERGE_REMEDY}")
        return self

    @model_validator(mode="after")
    def _check_metric_and_preferences(self) -> "Recipe":
        if self.selfplay.select.metric == "task_score" and self.evaluate.scorer is None:
            raise ValueError("selfplay.select.metric: task_score needs a scorer. Set evaluate.scorer")
        if self.opponent.exclude_correct and self.evaluate.scorer is None:
            raise ValueError(
                "opponent.exclude_correct: needs a scorer that finds the correct responses. Set evaluate.scorer, or "
                "remove opponent.exclude_correct"
            )
        if self.preferences and self.selfplay.iterations * self.opponent.samples_per_prompt > 1:
            raise ValueError(
                "data.columns.rejected: a prompt has one rejected response, the same in every iteration. Set "
                "selfplay.iterations and opponent.samples_per_prompt to 1"
            )
        return self

    @property
    def adapter_engine(self) -> str | None:
        """The program that loads the players' adapters to generate; None if players are merged or loaded here."""
        server = self.opponent.server
        if self.lora is None or self.opponent.engine == "local" or self.preferences:
            return None
        if server is None:
            return "vLLM"
        command = server.launch_command or server.reload_command or ""
        return None if "{merged}" in command else ADAPTER_LOADERS[server.api]

    @property
    def continues_adapter(self) -> bool:
        """Whether the players are later versions of the adapter in `model.path`."""
        return self.model.base is not None and self.lora is not None and not self.lora.create_new_adapter

    @property
    def merges_adapter(self) -> bool:
        """Whether the adapter in `model.path` is merged into its base before anything is trained."""
        return self.model.base is not None and not self.continues_adapter

    @property
    def start(self) -> str:
        """Description of the model that the run starts from."""
        path, lora = self.model.path, self.lora
        if self.model.base is None:
            return path
        if lora is None or lora.create_new_adapter:
            return f"{path}, an adapter that is merged into {self.model.base}"
        kind = "DoRA" if lora.use_dora else "rsLoRA" if lora.use_rslora else "LoRA"
        return f"{path}, a {kind} adapter over {self.model.base} (r {lora.r}, alpha {lora.alpha:g}), trained further"

    @property
    def is_control(self) -> bool:
        """Whether this is a control: fine-tuning on the real responses instead of self-play, or extrapolation."""
        return isinstance(self.objective, Control)

    @property
    def extrapolates(self) -> bool:
        """Whether the player is extrapolated from another run's instead of trained."""
        return isinstance(self.objective, Extrapolation)

    @property
    def preferences(self) -> bool:
        """Whether the synthetic responses are the rejected ones of the data, not an opponent's."""
        return self.data.columns.rejected is not None

    @property
    def longest_synthetic(self) -> int:
        """Maximum tokens of a synthetic response."""
        return self.train.max_length if self.preferences else self.opponent.max_new_tokens

    def synthetic_per_prompt(self, t: int) -> int:
        """Return the number of synthetic responses per prompt in the training of iteration t, with replayed ones."""
        return self.opponent.samples_per_prompt * (min(t, self.selfplay.replay) + 1)

    def other_responses_per_prompt(self, t: int) -> int:
        """Return the number of responses per prompt in the training of iteration t, without the real one.

        T-SPIN adds those of θ_0.
        """
        if self.is_control:
            return 0
        initial = isinstance(self.objective, TSpin) and t > self.selfplay.replay
        return self.synthetic_per_prompt(t) + (self.opponent.samples_per_prompt if initial else 0)

    def mixes_start(self, t: int) -> bool:
        """Return whether the reference of iteration t is a mixture with θ_0. In iteration 0 θ_0 is the opponent."""
        return t > 0 and isinstance(self.objective, LogRatioObjective) and self.objective.reference_mix < 1

    def max_micro_batch_tokens(self, prefix_sharing: bool) -> int:
        """Return the maximum tokens of a micro-batch: the budget, or the tokens of one prompt if they exceed it."""
        others, longest = self.other_responses_per_prompt(self.selfplay.iterations - 1), self.train.max_length
        tree, rows = longest + others * self.longest_synthetic, (1 + others) * longest
        return max(self.train.tokens_per_micro_batch, tree if prefix_sharing else rows)
