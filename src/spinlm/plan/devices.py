"""Memory and time on a device, at speeds that are assumed. The plan prints the assumptions."""

import math
import os
from dataclasses import dataclass

from spinlm.plan.costs import GenerationCost, IterationCost
from spinlm.plan.lengths import Lengths
from spinlm.plan.model_shape import Shape
from spinlm.recipe.schema import Recipe
from spinlm.training.memory import MEMORY_MARGIN, optimizer_bytes
from spinlm.utils.hardware import total_memory

GPU_FLOPS = 990e12  # dense bfloat16, of an H100 or H200
GPU_UTILIZATION = 0.40
GPU_BANDWIDTH = 3.35e12 * 0.60  # bytes/s; each generated token reads all weights and the KV cache once
GPU_MEMORY = 80e9  # bytes
GPU_LAYER_SECONDS = 0.75e-3  # per layer and generated token at least, for kernel launches
CPU_CORE_FLOPS = 100e9  # float32
CPU_UTILIZATION = 0.60
CPU_GENERATION_UTILIZATION = 0.30


@dataclass(frozen=True, slots=True)
class Device:
    """A kind of device and its precision."""

    name: str
    dtype: str
    width: int  # bytes of a number
    logits_bytes: int  # a chunk of logits in float32, and a copy

    @property
    def flops(self) -> float:
        """Operations per second in scoring and training."""
        return GPU_FLOPS * GPU_UTILIZATION if self is GPU else cores() * CPU_CORE_FLOPS * CPU_UTILIZATION

    @property
    def memory(self) -> float:
        """Bytes."""
        return GPU_MEMORY if self is GPU else total_memory()

    @property
    def speed(self) -> str:
        """The assumed speeds, in words."""
        if self is GPU:
            generation = f"{GPU_BANDWIDTH / 1e12:.1f} TB/s and at least {1e3 * GPU_LAYER_SECONDS:g} ms per layer"
            return f"{GPU_UTILIZATION:.0%} of {GPU_FLOPS / 1e12:.0f} TFLOP/s (H100); to generate, {generation}"
        peak = f"{cores()} × {CPU_CORE_FLOPS / 1e9:.0f} GFLOP/s"
        return f"{CPU_UTILIZATION:.0%} of {peak}; to generate, {CPU_GENERATION_UTILIZATION:.0%}"

    def generation_seconds(self, shape: Shape, prompt: int, tokens: int, responses: int, batch: int) -> float:
        """Return the seconds to read the prompts and to generate `tokens` for each, `batch` responses at a time."""
        forward = 2 * shape.multiplied
        reading = responses * prompt * forward / self.flops
        if self is CPU:
            return reading + responses * tokens * forward / (cores() * CPU_CORE_FLOPS * CPU_GENERATION_UTILIZATION)
        batch = min(batch, max(1, responses))
        read_bytes = self.width * shape.multiplied + batch * (prompt + tokens) * shape.kv_bytes(self.width)
        step = max(read_bytes / GPU_BANDWIDTH, shape.layers * GPU_LAYER_SECONDS)
        return reading + math.ceil(responses / batch) * tokens * step


GPU = Device("GPU", "bfloat16", 2, 2 * (4 << 26))
CPU = Device("CPU", "float32", 4, 2 * (4 << 23))
DEVICES = {"auto": (GPU, CPU), "bfloat16": (GPU,), "float32": (CPU,)}
"""The devices to plan for, by `model.dtype`."""


@dataclass(frozen=True, slots=True)
class StageTime:
    """Hours of each stage in the process that takes longest."""

    generate: float
    reference_logprobs: float
    train: float
    evaluate: float

    @property
    def total(self) -> float:
        return self.generate + self.reference_logprobs + self.train + self.evaluate


@dataclass(frozen=True)
class DeviceModel:
    """Computes the memory and time of a recipe on one kind of device."""

    recipe: Recipe
    lengths: Lengths
    shape: Shape
    device: Device
    processes: int = 1  # one on each device

    @property
    def is_sharded(self) -> bool:
        """Whether the processes divide the model, so that no process has all of it while training."""
        return self.processes > 1 and self.recipe.train.fsdp != "none"

    @property
    def gradient_checkpointing(self) -> bool:
        """Whether gradient checkpointing is on, if the device's memory is empty otherwise."""
        setting = self.recipe.train.gradient_checkpointing
        if setting != "auto":
            return setting
        free = self.device.memory - sum(self._training_state().values())
        return MEMORY_MARGIN * self._activations(checkpointing=False) > free

    def memory(self) -> dict[str, int]:
        """Return the peak bytes of one process, by part."""
        shape, opponent, lora, width = self.shape, self.recipe.opponent, self.recipe.lora, self.device.width
        training = self._training_state() | {
            "activations": self._activations(self.gradient_checkpointing),
            "logits": self.device.logits_bytes,
        }
        weights = self._weight_bytes() + self._compute_copy()
        cache = opponent.batch_size * (self.lengths.longest_prompt + opponent.max_new_tokens) * shape.kv_bytes(width)
        # A CPU generates with a merged copy of the adapted weights; at most all weights are adapted.
        merged = width * shape.parameters if lora and not self.recipe.model.load_in_4bit and self.device is CPU else 0
        return training | {
            "training": sum(training.values()),
            **({"all weights, to generate": weights} if self.is_sharded else {}),
            "KV cache": cache,
            "merged weights, to generate": merged,
            "generating": weights + cache + merged,
        }

    def stage_time(self, cost: IterationCost) -> StageTime:
        """Return the hours of each stage of an iteration; communication between processes is not included.

        Forward takes 2 operations for each parameter and token. Backward takes 4, or 2 with LoRA because frozen weights
        need no gradient. Gradient checkpointing adds another forward. Attention is left out: a few percent here.
        """
        recipe, heldout = self.recipe, self.recipe.data.heldout
        passes = 1 + (1 if recipe.lora else 2) + self.gradient_checkpointing
        tokens_per_hour = 3600 * self.device.flops / (2 * self.shape.multiplied)
        opponent_share = self._largest_share(*([cost.prompts] if cost.pairs else []), heldout)
        heldout_share = self._largest_share(heldout)

        def generate(work: GenerationCost, share: float) -> float:
            responses, batch = math.ceil(share * work.responses), recipe.opponent.batch_size
            prompt, new = self.lengths.prompt, work.response_tokens
            return self.device.generation_seconds(self.shape, prompt, new, responses, batch) / 3600

        step_share = math.ceil(cost.prompts_per_step / self.processes) / cost.prompts_per_step
        return StageTime(
            generate=generate(cost.opponent, opponent_share),
            reference_logprobs=opponent_share * cost.reference_tokens / tokens_per_hour,
            # Each process reads all of the held-out examples for the guard.
            train=(step_share * passes * cost.training_tokens + cost.guard_tokens) / tokens_per_hour,
            evaluate=generate(cost.heldout, heldout_share) + heldout_share * cost.evaluation_tokens / tokens_per_hour,
        )

    def _weight_bytes(self) -> int:
        """Trained weights in float32, and with LoRA the frozen base."""
        lora = self.recipe.lora
        frozen = self.shape.frozen_bytes(self.device.width, self.recipe.model.load_in_4bit) if lora else 0
        return 4 * self.shape.trained(lora) + frozen

    def _compute_copy(self) -> int:
        """The copy in bfloat16 with which full fine-tuning computes."""
        return 0 if self.recipe.lora or self.device.width == 4 else self.device.width * self.shape.parameters

    def _training_state(self) -> dict[str, int]:
        """Return the bytes that training holds at the end of a step, without activations."""
        recipe, trained, weights = self.recipe, self.shape.trained(self.recipe.lora), self._weight_bytes()
        optimizers = [recipe.train.optimizer, *([recipe.sft.optimizer] if recipe.sft else [])]
        state = {"gradients": 4 * trained, "optimizer state": trained * max(map(optimizer_bytes, optimizers))}
        if not self.is_sharded:
            return {"weights": weights + self._compute_copy(), **state}
        sharded = {part: math.ceil(size / self.processes) for part, size in {"weights": weights, **state}.items()}
        # Unless weights are gathered again for backward, autocast's copies of all gathered weights stay until then.
        gathered = self.shape.gathered if recipe.train.fsdp == "full_shard" else self.shape.parameters
        width = self.device.width if recipe.lora else 4  # weights are gathered as stored
        return sharded | {"gathered weights": width * gathered, "copy to compute with": self._compute_copy()}

    def _activations(self, checkpointing: bool) -> int:
        """Return the bytes that the largest micro-batch keeps until its backward pass."""
        recipe, sharing = self.recipe, self.recipe.train.prefix_sharing != "never"
        token = self.shape.activation_bytes(
            self.device.width,
            recipe.train.max_length,
            recipe.lora,
            checkpointing=checkpointing,
            prefix_sharing=sharing,
        )
        return token * recipe.max_micro_batch_tokens(sharing)

    def _largest_share(self, *splits: int) -> float:
        """Return the largest fraction of the prompts that one process has; a shard is not divided."""
        size = self.recipe.opponent.shard_size
        shards = sum(math.ceil(prompts / size) for prompts in splits)
        return min(1.0, math.ceil(shards / self.processes) * size / max(1, sum(splits)))


def cores() -> int:
    """Return the number of processor cores that this process may use."""
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
