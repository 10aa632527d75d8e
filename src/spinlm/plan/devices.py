"""The devices a run is planned for, and the speeds assumed of them. The plan prints what it used."""

import math
import os
from typing import NamedTuple

from spinlm.plan.model_shape import Shape
from spinlm.utils.hardware import total_memory

GPU_FLOPS = 990e12  # dense bfloat16 of an H100 or H200
GPU_UTILISATION = 0.40
GPU_BANDWIDTH = 3.35e12 * 0.60  # bytes/s: weights and KV cache are read once for each generated token
GPU_MEMORY = 80e9
GPU_LAYER_SECONDS = 0.75e-3  # a layer costs at least its kernel launches, however small the model
GPUS_IN_A_MACHINE = 8
GPU_LINK = 450e9 * 0.70  # bytes/s each way between the GPUs of a machine
GPU_NETWORK = 50e9 * 0.70  # and between machines, one port of 400 Gbit/s for each GPU
CPU_CORE_FLOPS = 100e9  # float32
CPU_UTILISATION = 0.60
CPU_GENERATION_UTILISATION = 0.30
TOKENISER_SPEED = 150e3  # tokens/s of a core, rendering included
CPU_NETWORK = 1.25e9 * 0.70  # 10 Gbit/s


class Device(NamedTuple):
    """A kind of device, and what the recipe's precision means on it."""

    name: str
    dtype: str
    width: int  # bytes of a number

    @property
    def flops(self) -> float:
        """Operations a second in scoring and training."""
        return GPU_FLOPS * GPU_UTILISATION if self is GPU else cores() * CPU_CORE_FLOPS * CPU_UTILISATION

    @property
    def memory(self) -> float:
        """Bytes."""
        return GPU_MEMORY if self is GPU else total_memory()

    def bandwidth(self, processes: int) -> tuple[float, str]:
        """Bytes a second that each process can send, and what is assumed for that."""
        if self is CPU:
            return CPU_NETWORK, "assumed: 70% of 10 Gbit/s"
        if processes <= GPUS_IN_A_MACHINE:
            return GPU_LINK, "assumed: 70% of 450 GB/s within a machine"
        return GPU_NETWORK, "assumed: 70% of 400 Gbit/s for each GPU between machines"

    def generation_seconds(self, shape: Shape, prompt: int, tokens: int, replies: int, batch: int) -> float:
        """SampleFeatures the prompts, then one step for each new token of a batch."""
        forward = 2 * shape.multiplied
        reading = replies * prompt * forward / self.flops
        if self is CPU:
            return reading + replies * tokens * forward / (cores() * CPU_CORE_FLOPS * CPU_GENERATION_UTILISATION)
        batch = min(batch, max(1, replies))
        read = self.width * shape.multiplied + batch * (prompt + tokens) * shape.kv_bytes(self.width)
        step = max(read / GPU_BANDWIDTH, shape.layers * GPU_LAYER_SECONDS)
        return reading + math.ceil(replies / batch) * tokens * step

    def speeds(self, batch: int) -> tuple[tuple[str, str, str], ...]:
        """What is assumed: name, value, and on what ground."""
        if self is GPU:
            most = f"{GPU_FLOPS / 1e12:.0f} TFLOP/s"
            training = f"{GPU_UTILISATION:.0%} of {most}", "assumed: one H100 or H200 in bfloat16"
            step = f"{GPU_BANDWIDTH / 1e12:.1f} TB/s, at least {1e3 * GPU_LAYER_SECONDS:g} ms a layer"
            generating = step, f"assumed: one H100, {batch} responses at once"
        else:
            most = f"{cores()} × {CPU_CORE_FLOPS / 1e9:.0f} GFLOP/s"
            training = f"{CPU_UTILISATION:.0%} of {most}", "assumed, on this machine's cores in float32"
            generating = f"{CPU_GENERATION_UTILISATION:.0%} of {most}", "assumed"
        return (f"{self.name}, score and train", *training), (f"{self.name}, generate", *generating)


GPU = Device("GPU", "bfloat16", 2)
CPU = Device("CPU", "float32", 4)
DEVICES = {"auto": (GPU, CPU), "bfloat16": (GPU,), "float32": (CPU,)}
"""Those on which a recipe's model.dtype makes sense."""


def cores() -> int:
    """Processor cores this process may use."""
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
