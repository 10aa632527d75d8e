"""The only module that computes log-probabilities of responses.

The output head is applied only where a response token is predicted, in chunks, so logits need the memory of one chunk.
If the head is frozen, forward computes the gradient of log p with respect to the hidden state, W[y] − p·W, together
with log p, and backward only scales the gradient: logits are neither kept nor computed twice. If the head is trained,
backward computes each chunk again.

Shapes: N rows, L tokens in a row, M predicted tokens, S responses, D hidden, V vocabulary.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.autograd.function import once_differentiable

from spinlm.errors import ModelError
from spinlm.model.attention import TREE_ATTENTION, AttentionShape, BlockMasks, flex_attention_works
from spinlm.model.attention_layers import LAYOUT_IN_MASK, layout_mask, replace_attention, replaceable_layers
from spinlm.model.families import keeps_state, text_model
from spinlm.model.kernels import ROW_BLOCK, linear
from spinlm.model.prefix_trees import PackedBatch, PrefixTree, pack_batch

CHUNK_ELEMENTS = 1 << 23
"""Logits per chunk on a CPU. In float32 this is 32 MB, the largest allocation that glibc reuses without new pages."""
GPU_CHUNK_FACTOR = 8
"""How much larger a chunk is on a GPU, for fewer and larger products."""


@dataclass(frozen=True, slots=True)
class LogitTransform:
    """What a model applies to the output of its head: scale · x, then softcap · tanh(x / softcap)."""

    scale: float = 1.0
    softcap: float | None = None

    def logits(self, hidden: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
        """Compute the head and the transform: [M, D], [V, D], [V] or None → [M, V] in float32."""
        logits = linear(hidden, weight, bias).float()
        if self.scale != 1.0:
            logits *= self.scale
        return logits if self.softcap is None else self.softcap * torch.tanh(logits / self.softcap)

    def backward_(self, grad: Tensor, logits: Tensor) -> Tensor:
        """Convert the gradient of the logits [M, V] in place to the gradient of the head's output [M, V]."""
        if self.softcap is not None:
            grad *= 1 - (logits / self.softcap) ** 2
        return grad.mul_(self.scale) if self.scale != 1.0 else grad


def _first_set(config: Any, *names: str) -> float | None:
    """Return the first of these attributes of a config that is set and not 0."""
    return next((value for name in names if (value := getattr(config, name, None))), None)


class LogProbs(nn.Module):
    """Log-probabilities of the responses in a packed batch. A module, so that DDP or FSDP can wrap it."""

    def __init__(self, model: nn.Module, autocast: torch.dtype | None = None):
        """
        Args:
            model: a causal language model of transformers, with or without a PEFT adapter.
            autocast: precision to compute in; None means the precision of the weights.

        Raises:
            ModelError: the output head of the model is not a plain linear layer.
        """
        super().__init__()
        self.model = model
        self.autocast = autocast
        head = self.causal_lm.get_output_embeddings()
        if hasattr(head, "lora_A"):
            name = next(name for name, module in self.causal_lm.named_modules() if module is head)
            raise ModelError(
                f"lora.target_modules: matches {name}, the output head. Log-probabilities are computed from the head's "
                "weight, so the head cannot have an adapter. Leave the head out. An adapter with LoRA on the head can "
                "be merged first: lora.create_new_adapter: true"
            )
        if not isinstance(getattr(head, "weight", None), Tensor) or head.weight.dim() != 2:
            raise ModelError(
                f"{type(self.causal_lm).__name__} is not supported: its output head is a {type(head).__name__}, not a "
                "plain linear layer"
            )
        config = self.causal_lm.config.get_text_config()
        scale = _first_set(config, "logit_scale", "lm_head_multiplier") or 1.0
        divisor = getattr(config, "logits_scaling", None) or 1.0
        softcap = _first_set(config, "final_logit_softcapping", "logits_soft_cap", "output_logit_soft_cap")
        self.transform = LogitTransform(float(scale) / float(divisor), softcap)
        if hasattr(config, "rescale_every"):
            config.rescale_every = 0  # RWKV would divide weights when it does not train, but not those of an adapter
        self.default_attention: str = self.causal_lm.config._attn_implementation
        self.replaceable_layers = replaceable_layers(self.causal_lm)  # empty where transformers exchanges the attention

    @property
    def causal_lm(self) -> Any:
        """The causal language model without the PEFT wrapper; adapter layers stay in place."""
        model: Any = self.model
        return model.get_base_model() if hasattr(model, "get_base_model") else model

    def use_tree_attention(self, enabled: bool) -> None:
        """Switch between the tree attention and the attention that the model was loaded with.

        Raises:
            ModelError: the attention of the model cannot be replaced.
        """
        if enabled and keeps_state(self.causal_lm):
            raise ModelError(f"{type(self.causal_lm).__name__}: keeps a state between tokens, so no prefix sharing")
        replace_attention(self.replaceable_layers, enabled)
        if self.replaceable_layers:
            return
        implementation = TREE_ATTENTION if enabled else self.default_attention
        if self.causal_lm.config._attn_implementation != implementation:
            self.causal_lm.set_attn_implementation(implementation)
        if enabled and self.causal_lm.config._attn_implementation != TREE_ATTENTION:
            raise ModelError(f"{type(self.causal_lm).__name__}: attention cannot be replaced, so no prefix sharing")

    def forward(self, batch: PackedBatch) -> Tensor:
        """Compute the log-probability of each response, summed over its tokens: [S] in float32."""
        token_logprobs = self.token_logprobs(batch)
        zeros = torch.zeros(batch.num_responses, device=token_logprobs.device)
        return zeros.index_add(0, batch.response_indices, token_logprobs)

    def token_logprobs(self, batch: PackedBatch) -> Tensor:
        """Compute the log-probability of each predicted token: [M] in float32."""
        return self._target_logprobs(self.hidden_states(batch), batch)

    def logprobs_and_features(self, batch: PackedBatch) -> tuple[Tensor, Tensor]:
        """Compute the log-probability and a feature vector of each response.

        Returns:
            Log-probabilities [S] as in `forward`, and features [S, D] in float32: the mean of the final hidden states
            that predict the response's tokens.
        """
        hidden = self.hidden_states(batch)  # [M, D]
        zeros = hidden.new_zeros(batch.num_responses, dtype=torch.float32)
        indices = batch.response_indices
        logprobs = zeros.index_add(0, indices, self._target_logprobs(hidden, batch))
        lengths = zeros.index_add(0, indices, torch.ones_like(indices, dtype=torch.float32))
        sums = zeros[:, None].expand(-1, hidden.shape[1]).index_add(0, indices, hidden.float())
        return logprobs, sums / lengths[:, None]

    def _target_logprobs(self, hidden: Tensor, batch: PackedBatch) -> Tensor:
        weight, bias = self._head()
        result: Tensor = _TargetLogProbs.apply(hidden.to(weight.dtype), weight, bias, batch.targets, self.transform)
        return result

    def logits(self, hidden: Tensor) -> Tensor:
        """Compute logits of final hidden states for sampling: [M, D] → [M, V] in float32."""
        weight, bias = self._head()
        return self.transform.logits(hidden.to(weight.dtype), weight, bias)

    def _head(self) -> tuple[Tensor, Tensor | None]:
        """Return weight [V, D] and bias [V] of the output head, in the compute precision."""
        head = self.causal_lm.get_output_embeddings()
        dtype, bias = self.autocast or head.weight.dtype, getattr(head, "bias", None)
        return head.weight.to(dtype), None if bias is None else bias.to(dtype)

    def hidden_states(self, batch: PackedBatch) -> Tensor:
        """Compute the final hidden states that predict a response token: [M, D]."""
        self.use_tree_attention(batch.spans is not None)
        device = batch.input_ids.device.type
        # No cache: each weight is cast once, and FSDP may gather a weight again, which makes a cached cast wrong.
        with torch.autocast(device, dtype=self.autocast, enabled=self.autocast is not None, cache_enabled=False):
            states = text_model(self.causal_lm)(
                input_ids=batch.input_ids,
                position_ids=batch.position_ids,
                use_cache=False,
                **self.attention_kwargs(batch),
            ).last_hidden_state  # [N, L, D]
        return states.flatten(0, 1)[batch.logits_indices]

    def attention_kwargs(self, batch: PackedBatch) -> dict[str, Any]:
        """Return the keyword arguments that the model passes on to `tree_attention`."""
        if batch.spans is None:
            return {}
        device = batch.input_ids.device
        masks = BlockMasks(batch.spans, batch.position_ids) if self.uses_flex_attention(device) else None
        return self.layout_kwargs(device, spans=batch.spans, block_masks=masks)

    def layout_kwargs(self, device: torch.device, **layout: Any) -> dict[str, Any]:
        """Return the keyword arguments with which the model passes a layout on to `tree_attention`."""
        in_mask = self.causal_lm.config.model_type in LAYOUT_IN_MASK
        return {"attention_mask": layout_mask(layout, device)} if in_mask else layout

    def uses_flex_attention(self, device: torch.device) -> bool:
        """Return whether tree attention uses FlexAttention on a device."""
        if device.type != "cuda":
            return False
        dtype = self.autocast or self.causal_lm.get_output_embeddings().weight.dtype
        return flex_attention_works(device, dtype, AttentionShape.from_config(self.causal_lm.config.get_text_config()))


@torch.no_grad()
def max_logprob_error(logprobs: LogProbs, trees: Sequence[PrefixTree], prefix_sharing: bool) -> float:
    """Compare log-probabilities of packed trees with those from the model's own logits, one response at a time.

    Returns:
        The largest absolute difference over all responses, in nats per token.

    Raises:
        ModelError: the attention of the model cannot be replaced.
    """
    logprobs.eval()
    device = next(logprobs.parameters()).device
    packed = logprobs(pack_batch(trees, prefix_sharing).to(device)).cpu()
    logprobs.use_tree_attention(False)
    errors = []
    responses = [(tree.prompt, response) for tree in trees for response in tree.responses]
    for (prompt, response), value in zip(responses, packed, strict=True):
        expected = plain_logprob(logprobs.causal_lm, prompt, response, logprobs.autocast)
        errors.append(abs(value.item() - expected) / len(response))
    return max(errors)


@torch.no_grad()
def plain_logprob(
    causal_lm: Any, prompt: Sequence[int], response: Sequence[int], autocast: torch.dtype | None = None
) -> float:
    """Compute log p(response | prompt), summed over tokens, from the logits of a model of transformers."""
    device = next(causal_lm.parameters()).device
    ids = torch.tensor([[*prompt, *response]], device=device)
    with torch.autocast(device.type, dtype=autocast, enabled=autocast is not None):
        logits = causal_lm(input_ids=ids).logits[0, len(prompt) - 1 : -1]  # [len(response), V]
    targets = torch.tensor(response, device=device)
    return float(torch.log_softmax(logits.float(), dim=-1).gather(1, targets[:, None]).sum())


class _TargetLogProbs(torch.autograd.Function):
    """log softmax(head(hidden))[target] per row: ([M, D], W [V, D], b [V] or None, [M], transform) → [M] in float32."""

    @staticmethod
    def forward(
        ctx: Any, hidden: Tensor, weight: Tensor, bias: Tensor | None, targets: Tensor, transform: LogitTransform
    ) -> Tensor:
        head_is_trained = ctx.needs_input_grad[1] or ctx.needs_input_grad[2]
        ctx.has_gradient = ctx.needs_input_grad[0] and not head_is_trained
        logprobs = hidden.new_empty(len(hidden), dtype=torch.float32)
        gradient = torch.empty_like(hidden) if ctx.has_gradient else None  # of log p with respect to hidden
        for rows in _chunks(hidden, len(weight)):
            logits = transform.logits(hidden[rows], weight, bias)
            softmax = _TargetSoftmax(logits, targets[rows], transform, need_gradient=ctx.has_gradient)
            logprobs[rows] = softmax.logprobs
            if gradient is not None:
                gradient[rows] = linear(softmax.gradient().to(weight.dtype), weight.t())
        ctx.transform = transform
        ctx.save_for_backward(*((gradient,) if gradient is not None else (hidden, weight, bias, targets)))
        return logprobs

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad_logprobs: Tensor) -> tuple[Tensor | None, ...]:
        if ctx.has_gradient:
            (gradient,) = ctx.saved_tensors
            return gradient * grad_logprobs[:, None].to(gradient.dtype), None, None, None, None
        hidden, weight, bias, targets = ctx.saved_tensors
        grad_hidden, grad_weight, grad_bias = (
            None if not needed else torch.zeros_like(tensor)
            for needed, tensor in zip(ctx.needs_input_grad, (hidden, weight, bias), strict=False)
        )
        for rows in _chunks(hidden, len(weight)):
            logits = ctx.transform.logits(hidden[rows], weight, bias)
            softmax = _TargetSoftmax(logits, targets[rows], ctx.transform, need_gradient=True)
            grad = (softmax.gradient() * grad_logprobs[rows, None]).to(weight.dtype)
            if grad_hidden is not None:
                grad_hidden[rows] = grad @ weight
            if grad_weight is not None:
                grad_weight.addmm_(grad.T, hidden[rows])
            if grad_bias is not None:
                grad_bias += grad.sum(0)
        return grad_hidden, grad_weight, grad_bias, None, None


class _TargetSoftmax:
    """log p(y) per row of logits [M, V], and its gradient with respect to the head's output. Overwrites the logits.

    A second tensor of this size would cost more time in page faults than the arithmetic takes.
    """

    def __init__(self, logits: Tensor, targets: Tensor, transform: LogitTransform, *, need_gradient: bool):
        self._targets = torch.arange(len(logits), device=logits.device), targets
        self._transform = transform
        self._logits = logits.clone() if need_gradient and transform.softcap is not None else logits
        highest = logits.amax(dim=1, keepdim=True)
        target_logits = logits[self._targets] - highest.squeeze(1)
        self._exponentials = logits.sub_(highest).exp_()  # [M, V]
        self._sums = self._exponentials.sum(dim=1)
        self.logprobs = target_logits - self._sums.log()  # [M]

    def gradient(self) -> Tensor:
        """Compute one-hot(y) − p and convert it through the transform: [M, V]. Call at most once."""
        grad = self._exponentials.div_(-self._sums[:, None])
        grad[self._targets] += 1
        return self._transform.backward_(grad, self._logits)


def _chunks(hidden: Tensor, vocabulary: int) -> list[slice]:
    rows = len(hidden)
    size = max(16, CHUNK_ELEMENTS * (GPU_CHUNK_FACTOR if hidden.is_cuda else 1) // vocabulary)
    size -= size % ROW_BLOCK if size > ROW_BLOCK else 0
    return [slice(start, min(start + size, rows)) for start in range(0, rows, size)]
