"""The one place that computes a log-probability of a response.

The output head is applied only where a response token is predicted, in chunks, so memory for logits is one chunk
times the vocabulary. With a frozen head the gradient of log p with respect to the hidden state, W[y] − p·W, is formed
together with log p, and backward only scales it: logits are neither kept nor computed twice. With a trained head
backward computes each chunk again.

Shapes: M predicted tokens, S responses, D hidden size, V vocabulary.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.autograd.function import once_differentiable

from spinlm.errors import ModelError
from spinlm.model.attention import TREE_ATTENTION, BlockMasks, HeadSizes, flex_works
from spinlm.model.kernels import BLOCK, linear
from spinlm.model.prefix_trees import PackedBatch, PrefixTree, pack_batch

CHUNK_ELEMENTS = 1 << 23  # of a chunk of logits: 32 MB in float32, which glibc still reuses without new pages
GPU_CHUNKS = 8  # as large on a GPU, for fewer and larger products


@dataclass(frozen=True, slots=True)
class HeadShape:
    """What a model does to its logits after the linear layer: scale · logits, then softcap · tanh(logits / softcap)."""

    scale: float = 1.0
    softcap: float | None = None

    def logits(self, hidden: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
        """[M, D] → [M, V] in float32."""
        logits = linear(hidden, weight, bias).float()
        if self.scale != 1.0:
            logits *= self.scale
        return logits if self.softcap is None else self.softcap * torch.tanh(logits / self.softcap)

    def backward_(self, grad: Tensor, logits: Tensor) -> Tensor:
        """From the gradient at the final logits to that at the linear layer's output, in place."""
        if self.softcap is not None:
            grad *= 1 - (logits / self.softcap) ** 2
        return grad.mul_(self.scale) if self.scale != 1.0 else grad


class LogProbs(nn.Module):
    """Log-probabilities of the responses in a layout, as a module that can be wrapped for parallel training."""

    def __init__(self, model: nn.Module, autocast: torch.dtype | None = None):
        """
        Args:
            model: a causal language model of transformers, with adapters or without.
            autocast: compute in this precision over weights kept in another; None computes in the weights' own.

        Raises:
            ModelError: the model's output head is not a plain linear layer.
        """
        super().__init__()
        self.model = model
        self.autocast = autocast
        causal = _without_adapter(model)
        head = causal.get_output_embeddings()
        if not isinstance(getattr(head, "weight", None), Tensor) or head.weight.dim() != 2 or hasattr(head, "lora_A"):
            raise ModelError(
                f"{type(causal).__name__}: the output head must be a plain linear layer, found {type(head).__name__}. "
                "Leave the head out of lora.target_modules"
            )
        config = causal.config.get_text_config()
        scale = float(getattr(config, "logit_scale", None) or 1.0) / float(
            getattr(config, "logits_scaling", None) or 1.0
        )
        self.shape = HeadShape(scale, getattr(config, "final_logit_softcapping", None))
        self.plain_attention: str = causal.config._attn_implementation

    @property
    def causal(self) -> Any:
        """The causal language model itself, adapters in place."""
        return _without_adapter(self.model)

    def use_attention(self, tree: bool) -> None:
        """Switch between the tree attention and the model's plain one.

        Raises:
            ModelError: the model keeps its own attention.
        """
        wanted = TREE_ATTENTION if tree else self.plain_attention
        if self.causal.config._attn_implementation != wanted:
            self.causal.set_attn_implementation(wanted)
        if tree and self.causal.config._attn_implementation != TREE_ATTENTION:
            raise ModelError(f"{type(self.causal).__name__}: its attention cannot be exchanged, so no prompt trees")

    def forward(self, layout: PackedBatch) -> Tensor:
        """Log-probability of each response, summed over its tokens.

        Returns:
            [S] in float32.
        """
        tokens = self.tokens(layout)
        return torch.zeros(layout.responses, device=tokens.device).index_add(0, layout.response, tokens)

    def tokens(self, layout: PackedBatch) -> Tensor:
        """Log-probability of each predicted token: [M] in float32."""
        return self._tokens(self.hidden(layout), layout)

    def read(self, layout: PackedBatch) -> tuple[Tensor, Tensor]:
        """What the model makes of each response: its log-probability, as `forward`, and one vector of features.

        Returns:
            [S], and [S, D] the mean of the final hidden states that predict the response's tokens, in float32.
        """
        hidden = self.hidden(layout)  # [M, D]
        zeros = hidden.new_zeros(layout.responses, dtype=torch.float32)
        logprobs = zeros.index_add(0, layout.response, self._tokens(hidden, layout))
        counts = zeros.index_add(0, layout.response, torch.ones_like(layout.response, dtype=torch.float32))
        sums = zeros[:, None].expand(-1, hidden.shape[1]).index_add(0, layout.response, hidden.float())
        return logprobs, sums / counts[:, None]

    def _tokens(self, hidden: Tensor, layout: PackedBatch) -> Tensor:
        weight, bias = self._head()
        return _target_logprobs(hidden.to(weight.dtype), weight, bias, layout.targets, self.shape)

    def logits(self, hidden: Tensor) -> Tensor:
        """Logits of a few final hidden states, for sampling: [M, D] → [M, V] in float32."""
        weight, bias = self._head()
        return self.shape.logits(hidden.to(weight.dtype), weight, bias)

    def _head(self) -> tuple[Tensor, Tensor | None]:
        """Weight [V, D] and bias [V] of the output head, in the precision to compute in."""
        head = self.causal.get_output_embeddings()
        dtype, bias = self.autocast or head.weight.dtype, getattr(head, "bias", None)
        return head.weight.to(dtype), None if bias is None else bias.to(dtype)

    def hidden(self, layout: PackedBatch) -> Tensor:
        """Final hidden states at the positions that predict a response token: [M, D]."""
        self.use_attention(layout.spans is not None)
        device = layout.input_ids.device.type
        # A weight is used once: kept casts would only be in the way of what is recomputed or gathered later.
        with torch.autocast(device, dtype=self.autocast, enabled=self.autocast is not None, cache_enabled=False):
            states = self.causal.base_model(
                input_ids=layout.input_ids,
                position_ids=layout.position_ids,
                use_cache=False,
                **self.attention_inputs(layout),
            ).last_hidden_state  # [N, L, D]
        return states.flatten(0, 1)[layout.predict]

    def attention_inputs(self, layout: PackedBatch) -> dict[str, Any]:
        """What `tree_attention` is to be told of a layout, as keywords that the model hands down."""
        if layout.spans is None:
            return {}
        masks = BlockMasks(layout.spans, layout.position_ids) if self.uses_flex(layout.input_ids.device) else None
        return {"spans": layout.spans, "masks": masks}

    def uses_flex(self, device: torch.device) -> bool:
        """Whether prompt trees go through FlexAttention on a device."""
        if device.type != "cuda":
            return False
        dtype = self.autocast or self.causal.get_output_embeddings().weight.dtype
        return flex_works(device, dtype, HeadSizes.of(self.causal.config.get_text_config()))


def _without_adapter(model: Any) -> Any:
    return model.get_base_model() if hasattr(model, "get_base_model") else model


@torch.no_grad()
def parity_gap(logprobs: LogProbs, trees: Sequence[PrefixTree], prefix_sharing: bool) -> float:
    """Largest mean difference per token between a layout's log-probabilities and the model's own, over all responses.

    The model's own come from its plain forward pass over one unpadded row with all logits.
    """
    logprobs.eval()
    device = next(logprobs.parameters()).device
    packed = logprobs(pack_batch(trees, prefix_sharing).to(device)).cpu()
    logprobs.use_attention(tree=False)
    gaps = []
    responses = [(tree.prompt, response) for tree in trees for response in tree.responses]
    for (prompt, response), ours in zip(responses, packed, strict=True):
        ids = torch.tensor([[*prompt, *response]], device=device)
        kind = device.type
        with torch.autocast(kind, dtype=logprobs.autocast, enabled=logprobs.autocast is not None):
            logits = logprobs.causal(input_ids=ids).logits[0, len(prompt) - 1 : -1]  # [R, V]
        target = torch.tensor(response, device=device)
        theirs = torch.log_softmax(logits.float(), dim=-1).gather(1, target[:, None]).sum().cpu()
        gaps.append(abs(ours - theirs).item() / len(response))
    return max(gaps)


def _target_logprobs(hidden: Tensor, weight: Tensor, bias: Tensor | None, targets: Tensor, shape: HeadShape) -> Tensor:
    result: Tensor = _TargetLogProbs.apply(hidden, weight, bias, targets, shape)
    return result


class _TargetLogProbs(torch.autograd.Function):
    """log softmax(head(h))[y] for each row: ([M, D], [V, D], [V]?, [M]) → [M] in float32."""

    @staticmethod
    def forward(
        ctx: Any, hidden: Tensor, weight: Tensor, bias: Tensor | None, targets: Tensor, shape: HeadShape
    ) -> Tensor:
        trained_head = ctx.needs_input_grad[1] or ctx.needs_input_grad[2]
        form_gradient = ctx.needs_input_grad[0] and not trained_head
        logprobs = hidden.new_empty(len(hidden), dtype=torch.float32)
        unit = torch.empty_like(hidden) if form_gradient else None
        for rows in _chunks(hidden, len(weight)):
            logits = shape.logits(hidden[rows], weight, bias)
            scores = _Softmax(logits, targets[rows], shape, keep=form_gradient)
            logprobs[rows] = scores.logprob
            if unit is not None:
                unit[rows] = linear(scores.gradient().to(weight.dtype), weight.t())
        ctx.shape = shape
        ctx.formed = form_gradient
        ctx.save_for_backward(*((unit,) if unit is not None else (hidden, weight, bias, targets)))
        return logprobs

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, upstream: Tensor) -> tuple[Tensor | None, ...]:
        if ctx.formed:
            (unit,) = ctx.saved_tensors
            return unit * upstream[:, None].to(unit.dtype), None, None, None, None
        hidden, weight, bias, targets = ctx.saved_tensors
        need_hidden, need_weight, need_bias = ctx.needs_input_grad[:3]
        grad_hidden = torch.empty_like(hidden) if need_hidden else None
        grad_weight = torch.zeros_like(weight) if need_weight else None
        grad_bias = torch.zeros_like(bias) if need_bias else None
        for rows in _chunks(hidden, len(weight)):
            logits = ctx.shape.logits(hidden[rows], weight, bias)
            grad = _Softmax(logits, targets[rows], ctx.shape, keep=True).gradient() * upstream[rows, None]
            grad = grad.to(weight.dtype)
            if grad_hidden is not None:
                grad_hidden[rows] = grad @ weight
            if grad_weight is not None:
                grad_weight.addmm_(grad.T, hidden[rows])
            if grad_bias is not None:
                grad_bias += grad.sum(0)
        return grad_hidden, grad_weight, grad_bias, None, None


class _Softmax:
    """log p(y) of each row of logits, and its gradient at the linear layer's output. Overwrites the logits.

    In place, since a second tensor of this size costs more in page faults than the arithmetic.
    """

    def __init__(self, logits: Tensor, targets: Tensor, shape: HeadShape, *, keep: bool):
        self.at, self.shape = (torch.arange(len(logits), device=logits.device), targets), shape
        self.capped = logits.clone() if keep and shape.softcap is not None else logits
        highest = logits.amax(dim=1, keepdim=True)
        of_target = logits[self.at] - highest.squeeze(1)
        self.exponentials = logits.sub_(highest).exp_()  # [M, V]
        self.total = self.exponentials.sum(dim=1)
        self.logprob = of_target - self.total.log()  # [M]

    def gradient(self) -> Tensor:
        """one-hot(y) − p, through the head's shape: [M, V]."""
        grad = self.exponentials.div_(-self.total[:, None])
        grad[self.at] += 1
        return self.shape.backward_(grad, self.capped)


def _chunks(hidden: Tensor, vocabulary: int) -> list[slice]:
    rows = len(hidden)
    size = max(16, CHUNK_ELEMENTS * (GPU_CHUNKS if hidden.is_cuda else 1) // vocabulary)
    size -= size % BLOCK if size > BLOCK else 0
    return [slice(start, min(start + size, rows)) for start in range(0, rows, size)]
