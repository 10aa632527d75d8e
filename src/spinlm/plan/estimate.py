"""The plan: work, memory, time and disk, counted from the recipe, the data's lengths and the model's shape."""

import math
from dataclasses import dataclass
from functools import cached_property

from spinlm.config import EXECUTION_ONLY, MEMORY_MARGIN, Recipe, at_iteration, optimizer_bytes
from spinlm.plan.devices import CPU, DEVICES, GPU, Device
from spinlm.plan.lengths import CHARACTERS_PER_TOKEN, Lengths, Tokens, find_lengths
from spinlm.plan.lookup import find_shape
from spinlm.plan.shapes import Shape, UnknownShapeError
from spinlm.rundir import START, RunDir

UNKNOWN_PROMPTS = 1000
LOGITS_BYTES = {CPU: 2 * (4 << 23), GPU: 2 * (4 << 26)}  # a chunk of logits in float32, and a copy


@dataclass(frozen=True, slots=True)
class Work:
    """What one iteration does. The start (iteration `START`) only evaluates θ_0, after warming it up if asked to."""

    iteration: int
    prompts: int
    steps: int
    replies: tuple[tuple[int, int], ...]  # how many are generated, and tokens in each at most; held-out ones included
    scored: Tokens  # without gradients, held-out ones before and after training included
    trained: Tokens  # with gradients, over all epochs
    responses: int = 0  # synthetic ones to train on
    pairs: int = 0
    learning_rate: float | None = None
    beta: float | None = None

    @property
    def generated(self) -> int:
        """Tokens at most."""
        return sum(replies * tokens for replies, tokens in self.replies)


@dataclass(frozen=True)
class Plan:
    """What is known of a run before it starts; the rest is counted from that."""

    recipe: Recipe
    lengths: Lengths
    shape: Shape | None
    shape_source: str  # or why there is none
    finished: tuple[str, ...]  # stages of an existing run that will not be done again
    changed: tuple[str, ...]  # why an existing run will be refused

    @property
    def set_apart(self) -> int:
        """Examples that self-play does not train on: held-out ones, and those for the warm-up alone."""
        return self.recipe.data.heldout + ((self.recipe.warmup_sft and self.recipe.warmup_sft.prompts) or 0)

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
        packing = self.recipe.train.packing
        return packing == "tree" or (packing == "auto" and (self.shape is None or self.shape.takes_trees))

    @property
    def devices(self) -> tuple[Device, ...]:
        return DEVICES[self.recipe.model.dtype]

    @property
    def optimizers(self) -> list[str]:
        warmup = self.recipe.warmup_sft
        return [self.recipe.train.optimizer, *([warmup.optimizer] if warmup else [])]

    @cached_property
    def work(self) -> tuple[Work, ...]:
        """The start's, then each iteration's."""
        return self._start(), *(self._iteration(number) for number in range(self.recipe.selfplay.iterations))

    def _start(self) -> Work:
        heldout = self.recipe.data.heldout
        warmup, scored = self.recipe.warmup_sft, self.lengths.tokens((heldout, 0), (heldout, 1))
        if warmup is None:
            return Work(START, 0, 0, (self._answers(),), scored, Tokens(0, 0))
        prompts = warmup.prompts or self.prompts
        return Work(
            iteration=START,
            prompts=prompts,
            steps=warmup.epochs * math.ceil(prompts / warmup.batch_size),
            replies=(self._answers(),),
            scored=scored,
            trained=self.lengths.tokens((warmup.epochs * prompts, 0)),
            learning_rate=warmup.learning_rate,
        )

    def _iteration(self, iteration: int) -> Work:
        train, opponent, heldout = self.recipe.train, self.recipe.opponent, self.recipe.data.heldout
        prompts, samples, used = self.prompts, opponent.samples_per_prompt, self.recipe.used(iteration)
        asked = 0 if self.recipe.objective.name == "sft" else prompts  # for responses to learn from
        drawn = 0 if self.recipe.preferences else (asked + heldout) * samples
        watched = (train.epochs - 1) * heldout if self.recipe.selfplay.guard else 0
        return Work(
            iteration=iteration,
            prompts=prompts,
            # All pairs of a prompt are in one step; ⌈pairs / batch_size⌉ where their number divides the batch.
            steps=train.epochs * math.ceil(prompts / max(1, train.batch_size // used)),
            replies=((drawn, opponent.max_new_tokens), self._answers()),
            scored=self.lengths.tokens((asked, used), (2 * heldout, samples), (2 * heldout, 1), (watched, 0)),
            trained=self.lengths.tokens((train.epochs * prompts, self.recipe.beside(iteration))),
            responses=asked * samples,
            pairs=asked * used,
            learning_rate=at_iteration(train.learning_rate, iteration),
            beta=at_iteration(self.recipe.objective.beta, iteration) if "beta" in self.recipe.objective.reads else None,
        )

    def _answers(self) -> tuple[int, int]:
        """Held-out answers, as evaluation asks for and from the player's own distribution, and tokens in each."""
        return 2 * self.recipe.data.heldout, self.recipe.evaluate.max_new_tokens or self.recipe.opponent.max_new_tokens

    def memory(self, shape: Shape, device: Device) -> dict[str, int]:
        """Peak bytes in one process on one device, with nothing divided over processes."""
        opponent, state = self.recipe.opponent, self._state(shape, device)
        weights = state["weights"]
        activations = self._activations(shape, device, self.checkpoints(shape, device))
        parts = state | {"activations": activations, "logits": LOGITS_BYTES[device]}
        context = self.lengths.longest_prompt + opponent.max_new_tokens
        cache = opponent.batch_size * context * shape.kv_bytes(device.width)
        lora = self.recipe.lora
        merged = device.width * shape.parameters if lora and not lora.quantize and device is CPU else 0  # at most
        return parts | {
            "training": sum(parts.values()),
            "KV cache": cache,
            "merged weights while generating": merged,
            "generating": weights + cache + merged,
        }

    def checkpoints(self, shape: Shape, device: Device) -> bool:
        """Whether gradient checkpointing will be on, on an otherwise empty device."""
        wanted = self.recipe.train.gradient_checkpointing
        if wanted != "auto":
            return wanted
        free = device.memory - sum(self._state(shape, device).values())
        return MEMORY_MARGIN * self._activations(shape, device, checkpointing=False) > free

    def _state(self, shape: Shape, device: Device) -> dict[str, int]:
        """Bytes of what is there before a step begins."""
        trained = shape.trained(self.recipe.lora)
        weights = 4 * trained  # what is trained stays in float32
        if self.recipe.lora or device.width == 2:
            weights += shape.frozen_bytes(device.width, self.recipe.lora)  # or a copy to compute with
        optimizer = trained * max(map(optimizer_bytes, self.optimizers))
        return {"weights": weights, "gradients": 4 * trained, "optimiser state": optimizer}

    def _activations(self, shape: Shape, device: Device, checkpointing: bool) -> int:
        """Bytes that are kept of the largest micro-batch until its backward pass."""
        longest = self.recipe.train.max_length
        token = shape.activation_bytes(device.width, longest, self.recipe.lora, checkpointing=checkpointing)
        return token * self.recipe.most_tokens("tree" if self.trees else "pair")

    def hours(self, shape: Shape, device: Device, work: Work) -> tuple[float, float, float]:
        """To generate, score and train on one device; held-out answers and pairs are in the first two.

        A token costs 2 operations for each parameter forward and 4 backward. A frozen weight needs no gradient of its
        own, so with LoRA backward costs 2; gradient checkpointing runs forward once more. Attention itself, a few per
        cent at these lengths, is left out.
        """
        passes = 1 + (1 if self.recipe.lora else 2) + self.checkpoints(shape, device)
        hour = 3600 * device.flops / (2 * shape.multiplied)  # tokens
        generate = sum(
            device.generation_seconds(shape, self.lengths.prompt, tokens, replies, self.recipe.opponent.batch_size)
            for replies, tokens in work.replies
        )
        scored, trained = (one.tree if self.trees else one.rows for one in (work.scored, work.trained))
        return generate / 3600, scored / hour, passes * trained / hour

    @property
    def disk(self) -> dict[str, int | None]:
        """Bytes in the run folder when the run is over, checkpoints while it runs; None where the shape is needed."""
        recipe, lengths, shape = self.recipe, self.lengths, self.shape
        text = CHARACTERS_PER_TOKEN + 6  # a token as text, and as a decimal number in JSON
        heldout = recipe.data.heldout * recipe.opponent.samples_per_prompt * recipe.selfplay.iterations
        pairs = heldout + sum(one.pairs for one in self.work)
        trained = shape.trained(recipe.lora) if shape else None
        rejected = (self.prompts + self.set_apart) * lengths.synthetic * text if recipe.preferences else 0
        whole: dict[str, int | None] = {"base": 4 * shape.parameters if shape else None}
        return {
            "examples": (self.prompts + self.set_apart) * (lengths.prompt + lengths.real) * text + rejected,
            "generations": sum(one.generated for one in self.work) * text + rejected,
            "pairs": pairs * (lengths.prompt + lengths.real + lengths.synthetic) * 4,
            **(whole if recipe.model.path.endswith(".gguf") else {}),
            "players": trained and 4 * trained * len(self.work),  # θ_0 and each iteration's, in float32
            # The newest one, and the one being written.
            "checkpoints": trained and 2 * (4 + optimizer_bytes(recipe.train.optimizer)) * trained,
        }


def make_plan(recipe: Recipe, run: RunDir | None = None) -> Plan:
    """Work out what a recipe will do and need, and what of it a run folder already holds."""
    shape: Shape | None = None
    try:
        shape, source = find_shape(recipe.model)
    except UnknownShapeError as missing:
        source = str(missing)
    changed = (
        run.changes(recipe.model_dump(mode="json"), EXECUTION_ONLY)
        if run and run.recipe.exists() and run.begun()
        else []
    )
    return Plan(recipe, find_lengths(recipe), shape, source, _finished(recipe, run) if run else (), tuple(changed))


def _finished(recipe: Recipe, run: RunDir) -> tuple[str, ...]:
    stages = {name: (name, START) for name in ("prepare", "warmup", "evaluate")}
    for iteration in range(recipe.selfplay.iterations):
        for name in ("generate", "score", "train", "evaluate", "promote"):
            stages[f"{name} {iteration}"] = (name, iteration)
    return tuple(title for title, stage in stages.items() if run.marker(*stage).exists())
