"""The recipe: everything a run depends on, as frozen, strictly checked data.

Numbers may be written `5e-7`. A per-iteration value is one number, or a list with one number for each iteration.
The string under a field is its documentation; `spinlm init` and the docs are made from it.
"""

import difflib
import json
import re
from pathlib import Path
from typing import Annotated, Any, Literal

import yaml
from pydantic import BaseModel, ConfigDict, Discriminator, Field, Tag, ValidationError, model_validator

from spinlm.errors import RecipeError

Positive = Annotated[float, Field(gt=0, allow_inf_nan=False)]
NonNegative = Annotated[float, Field(ge=0, allow_inf_nan=False)]
Share = Annotated[float, Field(ge=0, le=1)]
Count = Annotated[int, Field(ge=1)]

_ONE, _LIST = "<one>", "<list>"


def _one_or_list(value: Any) -> str:
    return _LIST if isinstance(value, list) else _ONE


# Choosing the alternative by the kind of value, not by trial, gives one error for a wrong value instead of two.
PerIteration = Annotated[
    Annotated[Positive, Tag(_ONE)] | Annotated[list[Positive], Tag(_LIST)], Discriminator(_one_or_list)
]
LayerNames = Annotated[
    Annotated[Literal["all-linear"], Tag(_ONE)] | Annotated[list[str], Tag(_LIST)], Discriminator(_one_or_list)
]


class Section(BaseModel):
    model_config = ConfigDict(frozen=True, extra="forbid", strict=True, use_attribute_docstrings=True)


class Model(Section):
    path: str
    """A folder, a .gguf file, `package://NAME/FILE` (a file inside an installed Python package), or a hub id."""
    revision: str | None = None
    """Commit, tag or branch of a hub model. Pin it: repositories change."""
    dtype: Literal["auto", "float32", "bfloat16"] = "auto"
    """Precision of the frozen weights and of all computation; `auto` is float32 on CPU and bfloat16 on a GPU. With full
    fine-tuning the weights stay in float32 and bfloat16 is used for computation only."""
    attention: Literal["auto", "sdpa", "eager"] = "auto"
    """Attention for generation and for rows that hold one response; prompt trees bring their own."""
    trust_remote_code: bool = False
    """Run Python code that comes with the model. Only for repositories you trust."""


class Lora(Section):
    r: Count = 16
    """Rank."""
    alpha: Positive = 32
    """Scale: the update is multiplied by alpha / r."""
    dropout: Share = 0.0
    """Dropout on the adapter's input while training."""
    targets: LayerNames = "all-linear"
    """Names of the layers to adapt; `all-linear` is every linear layer but the output head."""


class Columns(Section):
    messages: str | None = None
    """Column with a list of {role, content} messages."""
    prompt: str | None = None
    """Column with the prompt: text, or a list of messages."""
    response: str | None = None
    """Column with the response: text, or a list with one assistant message."""
    system: str | None = None
    """Column with a system prompt for conversations that do not begin with one."""
    id: str | None = None
    """Column with a unique id; a row without one gets a hash of its content."""


class Data(Section):
    path: str
    """A .jsonl, .json, .parquet or .csv file, or a hub dataset id."""
    subset: str | None = None
    """Configuration of a hub dataset that has several, such as `main` of openai/gsm8k."""
    split: str = "train"
    """Split of a hub dataset."""
    revision: str | None = None
    """Commit, tag or branch of a hub dataset."""
    columns: Columns = Columns()
    """Which columns to read; without names, the usual layouts are recognised."""
    turns: Literal["first", "last", "every"] = "first"
    """Which assistant turns of a list of messages become examples."""
    prompts: Count | None = None
    """How many examples to draw at random for self-play; absent means all that are left after the held-out ones."""
    heldout: Count = 512
    """How many examples to set aside for evaluation. Their prompts are never trained on."""
    seed: Annotated[int, Field(ge=0)] = 0
    """Decides which examples are drawn."""
    on_bad_row: Literal["error", "skip"] = "error"
    """Stop at a row that cannot be used, or leave it out and count it."""
    chat_template: str | None = None
    """A Jinja chat template, or a file holding one, in place of the tokenizer's own."""


class Opponent(Section):
    engine: Literal["transformers"] = "transformers"
    """What generates the synthetic responses."""
    temperature: NonNegative = 1.0
    """1.0 samples from the opponent's own distribution, as the method assumes; 0 is greedy."""
    top_p: Annotated[float, Field(gt=0, le=1)] = 1.0
    """Sample from the smallest set of tokens that holds this share of the probability; 1.0 is all of them."""
    max_new_tokens: Count = 256
    """Longest synthetic response. One that reaches it has no end-of-turn token and is not given one."""
    samples_per_prompt: Count = 1
    """Synthetic responses to every prompt in every iteration."""
    batch_size: Count = 32
    """Responses generated at once."""
    shard_size: Count = 256
    """Prompts in one generation file: the unit that an interrupted run does not repeat."""


EXECUTION_ONLY = (
    "opponent.batch_size",
    "train.tokens_per_micro_batch",
    "train.gradient_checkpointing",
    "train.checkpoint_every",
    "tracking",
)
"""Fields that say how a run is carried out, not what it computes: they may change while it is under way."""


class Select(Section):
    metric: Literal["task_score", "heldout_nll"] | None = None
    """What decides which player is best; absent means task_score where a scorer is given, else heldout_nll."""
    patience: Count = 2
    """Stop after this many iterations without a better player."""
    standard_errors: NonNegative = 2.0
    """How many standard errors of the paired difference a player must be ahead of the best so far to replace it."""


class SelfPlay(Section):
    iterations: Count = 4
    """How many times the main player is trained and becomes the next opponent (T)."""
    replay: Annotated[int, Field(ge=0)] = 1
    """How many earlier iterations' synthetic responses are used again beside the newest."""
    select: Select = Select()
    """Which player is the best, and when to stop."""


class Objective(Section):
    name: Literal["spin"] = "spin"
    """The objective."""
    loss: Literal["logistic", "hinge", "exponential"] = "logistic"
    """The convex decreasing function of the margin."""
    beta: PerIteration = 0.1
    """λ in the paper: how strongly the main player is held to its opponent. Per iteration."""
    nll_weight: NonNegative = 0.0
    """Weight of an added −log p(y|x)/|y|, which keeps the likelihood of the real responses up."""


class Train(Section):
    epochs: Count = 2
    """Passes over the pairs of an iteration."""
    batch_size: Count = 64
    """Pairs per optimiser step, over all processes."""
    learning_rate: PerIteration = 5e-7
    """Peak learning rate. Per iteration."""
    optimizer: str = "rmsprop"
    """Any optimiser of torch.optim by name: rmsprop, adamw, sgd, …"""
    warmup: Share = 0.1
    """Share of the steps over which the learning rate rises to its peak."""
    schedule: Literal["linear", "cosine", "constant"] = "linear"
    """What the learning rate does after the warm-up."""
    weight_decay: NonNegative = 0.0
    """The optimiser's weight decay."""
    max_grad_norm: Positive = 1.0
    """Gradients are scaled down to this norm."""
    max_length: Annotated[int, Field(ge=8)] = 2048
    """Longest prompt plus response, in tokens. Longer real responses are cut (and then have no end-of-turn token)."""
    tokens_per_micro_batch: Count = 2048
    """Tokens in one forward and backward pass. Lower it when memory runs out: the result stays the same."""
    packing: Literal["auto", "tree", "pair"] = "auto"
    """All responses to a prompt in one row (tree), or one response per row (pair); `auto` tries tree and measures."""
    gradient_checkpointing: bool = False
    """Recompute activations in the backward pass: less memory, more time."""
    checkpoint_every: Count = 50
    """Optimiser steps between checkpoints."""


class WarmupSft(Section):
    """What is not here (schedule, warm-up share, weight decay, …) is as in `train`."""

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
    temperature: NonNegative = 0.0
    """How held-out answers are sampled; 0 is greedy."""
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
    warmup_sft: WarmupSft | None = None
    """Supervised fine-tuning before iteration 0, for a model that was never fine-tuned on the data."""
    evaluate: Evaluate = Evaluate()
    """What is measured on held-out prompts."""
    tracking: list[str] = []
    """Trackers of Accelerate to report to: tensorboard, wandb, …"""
    seed: int = 0
    """Decides sampling, shuffling and the adapter's initial weights."""

    @model_validator(mode="after")
    def _check(self) -> "Recipe":
        for name, value in (
            ("objective.beta", self.objective.beta),
            ("train.learning_rate", self.train.learning_rate),
        ):
            if isinstance(value, list) and len(value) != self.selfplay.iterations:
                raise ValueError(
                    f"{name} has {len(value)} values for {self.selfplay.iterations} iterations: give one number, or "
                    "one for each of selfplay.iterations"
                )
        if self.selfplay.select.metric == "task_score" and self.evaluate.scorer is None:
            raise ValueError("selfplay.select.metric is task_score, but evaluate.scorer names no scorer")
        return self

    def fingerprint(self) -> dict[str, Any]:
        """The recipe as plain data, without what cannot change a result."""
        values = self.model_dump(mode="json")
        for name in EXECUTION_ONLY:
            section, _, key = name.rpartition(".")
            del (values[section] if section else values)[key]
        return values


def at_iteration(value: PerIteration, iteration: int) -> float:
    """The value of a per-iteration field at one iteration."""
    return value[iteration] if isinstance(value, list) else value


def load_recipe(path: Path, overrides: tuple[str, ...] | list[str] = ()) -> Recipe:
    """Read a YAML recipe, apply `section.key=value` overrides, and check it.

    `model.path`, `data.path` and `data.chat_template` that exist beside the recipe, or else in the current folder,
    become absolute.

    Raises:
        RecipeError: the file is missing or no YAML mapping, or a key or value is wrong.
    """
    try:
        text = path.read_text(encoding="utf-8")
    except FileNotFoundError:
        raise RecipeError(f"{path}: no such recipe. `spinlm init` writes one to start from") from None
    except (OSError, UnicodeDecodeError) as error:
        raise RecipeError(f"{path}: cannot be read as text: {error}") from None
    values = _parse_yaml(text, str(path))
    if not isinstance(values, dict):
        raise RecipeError(f"{path}: a recipe is a mapping of sections (model:, data:, …)")
    for override in overrides:
        _apply_override(values, override)
    _resolve_paths(values, path.resolve().parent)
    return parse_recipe(values, str(path))


def parse_recipe(values: dict[str, Any], where: str = "recipe") -> Recipe:
    """Check plain data against the recipe's schema.

    Raises:
        RecipeError: with one line for each thing that is wrong.
    """
    try:
        return Recipe.model_validate(values)
    except ValidationError as error:
        lines = list(dict.fromkeys(_explain(item) for item in error.errors(include_url=False)))
        raise RecipeError("\n".join(f"{where}: {line}" for line in lines)) from None


class _Loader(yaml.SafeLoader):
    """YAML where `5e-7` is a number, as in YAML 1.2 and everywhere else, and a repeated or empty key is an error."""

    def construct_mapping(self, node: yaml.MappingNode, deep: bool = False) -> dict[Any, Any]:
        seen = set()
        for key_node, value_node in node.value:
            if not isinstance(key_node, yaml.ScalarNode):
                continue
            key, line = key_node.value, key_node.start_mark.line + 1
            if key in seen:
                raise yaml.YAMLError(f"the key {key!r} stands twice (line {line})")
            if isinstance(value_node, yaml.ScalarNode) and value_node.value == "" and value_node.style is None:
                raise yaml.YAMLError(
                    f"the key {key!r} has no value (line {line}): write null for none, or {{}} for a section with its "
                    "defaults"
                )
            seen.add(key)
        return super().construct_mapping(node, deep)


_EXPONENT = re.compile(r"^[-+]?[0-9][0-9_]*(\.[0-9_]*)?[eE][-+]?[0-9]+$")
_Loader.add_implicit_resolver("tag:yaml.org,2002:float", _EXPONENT, list("-+0123456789"))


def _parse_yaml(text: str, where: str) -> Any:
    try:
        return yaml.load(text, Loader=_Loader)
    except (yaml.YAMLError, ValueError) as error:  # ValueError: a date that is none
        raise RecipeError(f"{where}: not valid YAML: {error}") from None


def _apply_override(values: dict[str, Any], override: str) -> None:
    key, equals, text = override.partition("=")
    if not equals or not key.strip() or not text.strip():
        raise RecipeError(f"override {override!r}: write section.key=value, for example train.epochs=1 or lora=null")
    *sections, last = key.strip().lstrip("-").split(".")
    target = values
    for section in sections:
        if target.get(section) is None:
            target[section] = {}
        target = target[section]
        if not isinstance(target, dict):
            raise RecipeError(f"override {override!r}: {section} is not a section")
    target[last] = _parse_yaml(text, f"override {override!r}")


def _resolve_paths(values: dict[str, Any], folder: Path) -> None:
    for section, key in (("model", "path"), ("data", "path"), ("data", "chat_template")):
        block = values.get(section)
        value = block.get(key) if isinstance(block, dict) else None
        if not isinstance(value, str) or "\n" in value or "{" in value:
            continue
        try:
            here = Path(value).expanduser()
        except RuntimeError as error:  # ~name of a user that does not exist
            raise RecipeError(f"{section}.{key}: {value}: {error}") from None
        # Absolute, so that the run can be continued, and asked, from any folder.
        found = next((path for path in (folder / here, here) if path.exists()), None)
        if found is not None or value.startswith("~"):
            block[key] = str((found or here).absolute())  # type: ignore[index]  # a dict, or value would be None


def _explain(item: Any) -> str:
    location = [part for part in item["loc"] if part not in (_ONE, _LIST)]
    dotted = ".".join(str(part) for part in location)
    match item["type"]:
        case "extra_forbidden":
            return f"{dotted}: unknown key{_suggest([str(part) for part in location])}"
        case "missing":
            return f"{dotted}: missing"
        case "value_error":
            return str(item["ctx"]["error"])
        case "model_type" | "model_attributes_type":
            return f"{dotted}: should be a section with keys, got {_show(item['input'])}"
    message = item["msg"][0].lower() + item["msg"][1:] + (" (or a list)" if _ONE in item["loc"] else "")
    hint = ""
    if item["type"] == "string_type" and isinstance(item["input"], int | float):
        hint = "; put it in quotes to make it text"
    if item["type"] == "float_type" and isinstance(item["input"], str) and _is_number(item["input"]):
        hint = "; leave the quotes out"
    return f"{dotted}: {message.replace('input should', 'should')}, got {_show(item['input'])}{hint}"


def _suggest(location: list[str]) -> str:
    """What may have been meant by an unknown key: one with a similar name here, or the same name in another section."""
    *sections, key = location
    known = list(_section(sections).model_fields)
    elsewhere = [name for name in Recipe.model_fields if key in getattr(_section([name]), "model_fields", {})]
    if 0 < len(elsewhere) <= 2:
        return f"; did you mean {' or '.join(f'{name}.{key}' for name in elsewhere)}?"
    if near := difflib.get_close_matches(key, known, n=1, cutoff=0.5):
        return f"; did you mean {near[0]}?"
    return f"; known: {', '.join(known)}"


def _section(names: list[str]) -> Any:
    """The class of a section of the recipe; None for a field that is none."""
    model: Any = Recipe
    for name in names:
        annotation = model.model_fields[name].annotation
        choices = [annotation, *getattr(annotation, "__args__", ())]
        model = next((one for one in choices if isinstance(one, type) and issubclass(one, Section)), None)
    return model


def _show(value: Any) -> str:
    try:
        return json.dumps(value, default=str, ensure_ascii=False)[:80]
    except (TypeError, ValueError):  # keys that JSON has not, or a value that holds itself
        return repr(value)[:80]


def _is_number(text: str) -> bool:
    try:
        float(text)
    except ValueError:
        return False
    return True
