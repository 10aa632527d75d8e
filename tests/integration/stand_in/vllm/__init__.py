"""Stand-in for vLLM 0.33 with the same names and arguments, and a small real model.

`VLLM_STAND_IN` makes it fail: `driver` and `memory` at the start, `die` and `hang` at the first request.
"""

import os
import time
from dataclasses import dataclass
from typing import Any

import torch

print("vLLM prints to stdout")


@dataclass
class SamplingParams:
    """The parameters that spinlm uses."""

    temperature: float = 1.0
    top_p: float = 1.0
    seed: int | None = None
    stop_token_ids: list[int] | None = None
    ignore_eos: bool = False
    max_tokens: int | None = 16
    logprobs: int | None = None
    detokenize: bool = True

    def __post_init__(self) -> None:
        assert self.ignore_eos and not self.detokenize and self.logprobs == 0


@dataclass
class CompletionOutput:
    token_ids: tuple[int, ...]
    cumulative_logprob: float
    finish_reason: str


@dataclass
class RequestOutput:
    outputs: list[CompletionOutput]


class LLM:
    def __init__(
        self,
        model: str,
        *,
        trust_remote_code: bool = False,
        tensor_parallel_size: int = 1,
        dtype: str = "auto",
        gpu_memory_utilization: float = 0.92,
        skip_tokenizer_init: bool = False,
        generation_config: str = "auto",
        logprobs_mode: str = "raw_logprobs",
        max_model_len: int | None = None,
        enable_lora: bool = False,
        max_lora_rank: int = 16,
        max_num_seqs: int = 256,
    ):
        from transformers import AutoModelForCausalLM

        match os.environ.get("VLLM_STAND_IN"):
            case "driver":
                raise RuntimeError("The NVIDIA driver on your system is too old (found version 11040).")
            case "memory":
                raise ValueError("Free memory on device cuda:0 (2.1/79.1 GiB) on startup is less than desired (0.9).")
        for name in ("RANK", "WORLD_SIZE", "MASTER_ADDR"):
            assert name not in os.environ
        assert skip_tokenizer_init and generation_config == "vllm" and max_lora_rank in (1, 8, 16, 32)
        self.model: Any = AutoModelForCausalLM.from_pretrained(model, dtype=getattr(torch, dtype)).eval()
        self.enable_lora, self.max_model_len = enable_lora, max_model_len

    @torch.no_grad()
    def generate(
        self, prompts: list[dict[str, Any]], sampling_params: list[SamplingParams], *, use_tqdm: bool, lora_request: Any
    ) -> list[RequestOutput]:
        from peft import PeftModel

        match os.environ.get("VLLM_STAND_IN"):
            case "die":
                print("Signal 11 received", flush=True)
                os._exit(7)
            case "hang":
                time.sleep(1000)
        assert self.enable_lora == (lora_request is not None)
        if lora_request is not None and not isinstance(self.model, PeftModel):
            self.model = PeftModel.from_pretrained(self.model, lora_request.lora_path).eval()
        pairs = zip(prompts, sampling_params, strict=True)
        return [RequestOutput([self._complete(prompt["prompt_token_ids"], params)]) for prompt, params in pairs]

    def _complete(self, prompt: list[int], params: SamplingParams) -> CompletionOutput:
        generator = torch.Generator().manual_seed(params.seed or 0)
        tokens: list[int] = []
        total = 0.0
        while len(tokens) < (params.max_tokens or 16):
            logits = self.model(torch.tensor([[*prompt, *tokens]])).logits[0, -1].float()
            if params.temperature == 0:
                token = int(logits.argmax())
            else:
                token = int(torch.multinomial((logits / params.temperature).softmax(-1), 1, generator=generator))
            tokens.append(token)
            total += float(logits.log_softmax(-1)[token])
            if token in (params.stop_token_ids or ()):
                return CompletionOutput(tuple(tokens), total, "stop")
        return CompletionOutput(tuple(tokens), total, "length")
