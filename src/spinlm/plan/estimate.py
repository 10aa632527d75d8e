"""The plan: work, memory and time, counted from the recipe, the data's lengths and the model's shape."""

import math
from dataclasses import dataclass
from functools import cached_property
from typing import NamedTuple

from spinlm.plan.devices import CPU, DEVICES, GPU, TOKENISER_SPEED, Device
from spinlm.plan.lengths import Lengths, Tokens, find_lengths
from spinlm.plan.lookup import find_shape
from spinlm.plan.model_shape import Shape, UnknownShapeError
from spinlm.recipe.schema import MEMORY_MARGIN, Recipe, optimizer_bytes, value_at
from spinlm.rundir.layout import RunDir
from spinlm.rundir.resume import recipe_changes
from spinlm.rundir.stage_graph import START, stages

UNKNOWN_PROMPTS = 1000
LOGITS_BYTES = {CPU: 2 * (4 << 23), GPU: 2 * (4 << 26)}  # a chunk of logits in float32, and a copy


class Replies(NamedTuple):
    """Responses to generate."""

    number: int
    tokens: int  # in each, if they are as long as the real ones
    most: int  # and at most


class Hours(NamedTuple):
    """Of each stage, in the process that takes longest."""

    generate: float
    score: float
    train: float
    evaluate: float


@dataclass(frozen=True, slots=True)
class Work:
    """What one iteration does. The start (iteration `START`) only evaluates θ_0, after warming it up if asked to."""

    iteration: int
    prompts: int
    steps: int
    trees: int  # in a step: all pairs of a prompt are one
    drawn: Replies  # by the opponent, held-out ones included
    answered: Replies  # by the player in evaluation: as asked for, and from its own distribution
    scored: Tokens  # by the opponent, held-out ones included
    judged: Tokens  # in evaluation
    watched: Tokens  # held-out ones between the epochs of training
    trained: Tokens  # with gradients, over all epochs
    responses: int = 0  # synthetic ones to train on
    pairs: int = 0
    learning_rate: float | None = None
    beta: float | None = None

    @property
    def generated(self) -> int:
        """Tokens, as far as they are known."""
        return sum(replies.number * replies.tokens for replies in (self.drawn, self.answered))

    @property
    def generated_at_most(self) -> int:
        return sum(replies.number * replies.most for replies in (self.drawn, self.answered))

    @property
    def read(self) -> Tokens:
        """All that is computed without gradients and is not generated."""
        parts = (self.scored, self.judged, self.watched)
        return Tokens(sum(part.tree for part in parts), sum(part.rows for part in parts))


@dataclass(frozen=True)
class Plan:
    """What is known of a run before it starts; the rest is counted from that."""

    recipe: Recipe
    lengths: Lengths
    shape: Shape | None
    shape_source: str  # or why there is none
    finished: tuple[str, ...]  # stages of an existing run that will not be done again
    changed: tuple[str, ...]  # why an existing run will be refused
    processes: int = 1  # one on each device

    @property
    def sharded(self) -> bool:
        """Whether processes divide the model among them, instead of each having all of it."""
        return self.processes > 1 and self.recipe.train.fsdp != "none"

    @property
    def set_apart(self) -> int:
        """Examples that self-play does not train on: held-out ones, and those for the warm-up alone."""
        return self.recipe.data.heldout + ((self.recipe.sft and self.recipe.sft.prompts) or 0)

    @property
    def prompts(self) -> int:
        """How many prompts take part in self-play."""
        asked, examples = self.recipe.data.prompts, self.lengths.examples
        if examples is None:
            return asked or UNKNOWN_PROMPTS
        left = max(0, examples - self.set_apart)
        return min(asked or left, left)

    @property
    def trees(self) -> bool:
        """Whether time is counted with all responses to a prompt in one row."""
        sharing = self.recipe.train.prefix_sharing
        return sharing == "always" or (sharing == "auto" and (self.shape is None or self.shape.takes_trees))

    @property
    def prepared(self) -> bool:
        """Whether the lengths are those of an existing run's examples."""
        return "prepare" in self.finished and not self.changed

    @property
    def devices(self) -> tuple[Device, ...]:
        """Those on which the recipe's precision makes sense."""
        return DEVICES[self.recipe.model.dtype]

    @property
    def optimizers(self) -> list[str]:
        warmup = self.recipe.sft
        return [self.recipe.train.optimizer, *([warmup.optimizer] if warmup else [])]

    @cached_property
    def work(self) -> tuple[Work, ...]:
        """The start's, then each iteration's."""
        return self._start(), *(self._iteration(number) for number in range(self.recipe.selfplay.iterations))

    def _start(self) -> Work:
        heldout, warmup = self.recipe.data.heldout, self.recipe.sft
        prompts = (warmup.prompts or self.prompts) if warmup else 0
        return Work(
            iteration=START,
            prompts=prompts,
            steps=warmup.epochs * math.ceil(prompts / warmup.batch_size) if warmup else 0,
            trees=warmup.batch_size if warmup else 1,
            drawn=Replies(0, 0, 0),
            answered=self._answers(),
            scored=Tokens(0, 0),
            judged=self.lengths.tokens((2 * heldout, 1)),  # with one of its own responses, twice
            watched=self.lengths.tokens(((warmup.epochs + 1) * heldout, 0)) if warmup else Tokens(0, 0),
            trained=self.lengths.tokens((warmup.epochs * prompts, 0)) if warmup else Tokens(0, 0),
            learning_rate=warmup.learning_rate if warmup else None,
        )

    def _iteration(self, iteration: int) -> Work:
        train, opponent, heldout = self.recipe.train, self.recipe.opponent, self.recipe.data.heldout
        prompts, samples, used = self.prompts, opponent.samples_per_prompt, self.recipe.num_synthetic(iteration)
        asked = 0 if self.recipe.is_control else prompts  # for responses to learn from
        drawn = 0 if self.recipe.preferences else (asked + heldout) * samples
        trees = max(1, train.batch_size // used)
        return Work(
            iteration=iteration,
            prompts=prompts,
            # All pairs of a prompt are in one step; ⌈pairs / batch_size⌉ where their number divides the batch.
            steps=train.epochs * math.ceil(prompts / trees),
            trees=trees,
            drawn=Replies(drawn, self.lengths.synthetic, opponent.max_new_tokens),
            answered=self._answers(),
            scored=self.lengths.tokens((asked, used), (heldout, samples)),
            # The player reads the opponent's responses and one of its own; then θ_0 reads that one.
            judged=self.lengths.tokens((heldout, samples + 1), (heldout, 1)),
            watched=self.lengths.tokens(((train.epochs - 1) * heldout if self.recipe.selfplay.guard else 0, 0)),
            trained=self.lengths.tokens((train.epochs * prompts, self.recipe.num_branches(iteration))),
            responses=asked * samples,
            pairs=asked * used,
            learning_rate=value_at(train.learning_rate, iteration),
            beta=value_at(self.recipe.objective.beta, iteration) if "beta" in self.recipe.objective.reads else None,
        )

    def _answers(self) -> Replies:
        """Held-out answers, as evaluation asks for and from the player's own distribution."""
        most = self.recipe.evaluate.max_new_tokens or self.recipe.opponent.max_new_tokens
        return Replies(2 * self.recipe.data.heldout, min(most, self.lengths.answer), most)

    def memory(self, shape: Shape, device: Device) -> dict[str, int]:
        """Peak bytes in one process on one device. Only to train can the model be divided."""
        opponent, state = self.recipe.opponent, self._state(shape, device)
        activations = self._activations(shape, device, self.checkpoints(shape, device))
        parts = state | {"activations": activations, "logits": LOGITS_BYTES[device]}
        context = self.lengths.longest_prompt + opponent.max_new_tokens
        cache = opponent.batch_size * context * shape.kv_bytes(device.width)
        lora = self.recipe.lora
        merged = (
            device.width * shape.parameters if lora and not self.recipe.model.load_in_4bit and device is CPU else 0
        )  # at most
        whole = self._stored(shape, device) + self._copy(shape, device)
        return parts | {
            "training": sum(parts.values()),
            **({"whole weights while generating": whole} if self.sharded else {}),
            "KV cache": cache,
            "merged weights while generating": merged,
            "generating": whole + cache + merged,
        }

    def checkpoints(self, shape: Shape, device: Device) -> bool:
        """Whether gradient checkpointing will be on, on an otherwise empty device."""
        wanted = self.recipe.train.gradient_checkpointing
        if wanted != "auto":
            return wanted
        free = device.memory - sum(self._state(shape, device).values())
        return MEMORY_MARGIN * self._activations(shape, device, checkpointing=False) > free

    def _stored(self, shape: Shape, device: Device) -> int:
        """Bytes of the weights: what is trained stays in float32, beside a frozen base."""
        lora = self.recipe.lora
        return 4 * shape.trained(lora) + (
            shape.frozen_bytes(device.width, self.recipe.model.load_in_4bit) if lora else 0
        )

    def _copy(self, shape: Shape, device: Device) -> int:
        """Bytes of the copy in another precision that full fine-tuning computes with."""
        return 0 if self.recipe.lora or device.width == 4 else device.width * shape.parameters

    def _state(self, shape: Shape, device: Device) -> dict[str, int]:
        """Bytes of what is there before a step's end, but for activations."""
        trained, weights = shape.trained(self.recipe.lora), self._stored(shape, device)
        copy = self._copy(shape, device)
        state = {"gradients": 4 * trained, "optimiser state": trained * max(map(optimizer_bytes, self.optimizers))}
        if not self.sharded:
            return {"weights": weights + copy, **state}
        divided = {name: math.ceil(size / self.processes) for name, size in {"weights": weights, **state}.items()}
        # Without gradient checkpointing autocast's copies of what was gathered stay until backward, in every process.
        gathered = shape.gathered if self._gathered_again else shape.parameters
        return divided | {"gathered weights": self._gathered_width(device) * gathered, "copy to compute with": copy}

    @property
    def _gathered_again(self) -> bool:
        """Whether a block's weights are let go of after forward, and gathered again for backward."""
        return self.recipe.train.fsdp == "full_shard"

    def _gathered_width(self, device: Device) -> int:
        """Bytes of a number as it travels: as it is stored, since it is autocast that makes it shorter."""
        return device.width if self.recipe.lora else 4

    def _activations(self, shape: Shape, device: Device, checkpointing: bool) -> int:
        """Bytes that are kept of the largest micro-batch until its backward pass."""
        longest = self.recipe.train.max_length
        token = shape.activation_bytes(device.width, longest, self.recipe.lora, checkpointing=checkpointing)
        return token * self.recipe.max_micro_batch_tokens(self.trees)

    def hours(self, shape: Shape, device: Device, work: Work) -> Hours:
        """Of each stage, in the process that has most to do. What travels between processes is not in it.

        A token costs 2 operations for each parameter forward and 4 backward. A frozen weight needs no gradient of its
        own, so with LoRA backward costs 2; gradient checkpointing runs forward once more. Attention itself, a few per
        cent at these lengths, is left out.
        """
        recipe, heldout = self.recipe, self.recipe.data.heldout
        passes = 1 + (1 if recipe.lora else 2) + self.checkpoints(shape, device)
        hour = 3600 * device.flops / (2 * shape.multiplied)  # tokens
        dealt = self._largest_share(*([work.prompts] if work.pairs else []), heldout)
        held_out = self._largest_share(heldout)

        def read(tokens: Tokens) -> float:
            return (tokens.tree if self.trees else tokens.rows) / hour

        def generate(replies: Replies, share: float) -> float:
            mine = math.ceil(share * replies.number)
            batch = recipe.opponent.batch_size
            return device.generation_seconds(shape, self.lengths.prompt, replies.tokens, mine, batch) / 3600

        step = math.ceil(work.trees / self.processes) / work.trees
        return Hours(
            generate=generate(work.drawn, dealt),
            score=dealt * read(work.scored),
            train=step * passes * read(work.trained) + read(work.watched),  # every process looks for itself
            evaluate=generate(work.answered, held_out) + held_out * read(work.judged),
        )

    def _largest_share(self, *splits: int) -> float:
        """Of all prompts, those of the process with most shards: shards are not divided."""
        size = self.recipe.opponent.shard_size
        shards = sum(math.ceil(prompts / size) for prompts in splits)
        return min(1.0, math.ceil(shards / self.processes) * size / max(1, sum(splits)))

    @property
    def preparing(self) -> float:
        """Hours to render and tokenise the examples, which the first process does alone."""
        tokens = (self.prompts + self.set_apart) * (self.lengths.prompt + self.lengths.real)
        return tokens / TOKENISER_SPEED / 3600

    def traffic(self, shape: Shape, device: Device, work: Work) -> int:
        """Bytes that each process sends in one optimiser step.

        Whole models exchange gradients in a ring, in float32. A divided one is gathered for every forward and every
        backward pass, the tables around its blocks for both at once, and its gradients are summed and divided
        again.
        """
        ring, trained = (self.processes - 1) / self.processes, 4 * shape.trained(self.recipe.lora)
        if not self.sharded or not work.steps:
            return int(2 * ring * trained) if work.steps else 0
        tokens = (work.trained.tree if self.trees else work.trained.rows) / work.steps / self.processes
        passes = math.ceil(tokens / self.recipe.train.tokens_per_micro_batch)
        gathered = shape.parameters
        if self._gathered_again:
            gathered = 2 * shape.parameters - shape.tables
        return int(passes * ring * (self._gathered_width(device) * gathered + trained))


def make_plan(recipe: Recipe, run: RunDir | None = None, processes: int = 1) -> Plan:
    """Work out what a recipe will do and need, and what of it a run folder already holds.

    Args:
        recipe: what is to be done.
        run: the run folder, there or not.
        processes: how many the run is spread over, one on each device.
    """
    shape: Shape | None = None
    try:
        shape, source = find_shape(recipe.model)
    except UnknownShapeError as missing:
        source = str(missing)
    changed = recipe_changes(run, recipe) if run else []
    lengths = find_lengths(recipe, run if not changed else None)
    return Plan(recipe, lengths, shape, source, _finished(recipe, run) if run else (), tuple(changed), processes)


def _finished(recipe: Recipe, run: RunDir) -> tuple[str, ...]:
    done = (stage for stage in stages(recipe.selfplay.iterations) if run.marker(*stage).exists())
    return tuple(name if iteration == START else f"{name} {iteration}" for name, iteration in done)
