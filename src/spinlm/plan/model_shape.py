"""The shape of a model, read from its config.json or .gguf header, and the sizes that follow from the shape."""

import json
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from spinlm.errors import ModelError
from spinlm.recipe.model import Lora, Model, is_target
from spinlm.utils.gguf_header import read_gguf_header
from spinlm.utils.hub import Repository
from spinlm.utils.model_path import resolve_model

BYTES_IN_4BIT = 0.5 + 1 / 64 + 4 / (64 * 256)
"""Bytes of a 4-bit weight: the weight, 1 byte of scale per 64 weights, and a float32 per 256 scales."""

LLAMA_LIKE = ("llama", "mistral", "qwen2", "qwen3", "gemma2")
GPT_LIKE = ("gpt2", "gpt_neo")

_EXPERT_COUNTS = ("num_local_experts", "num_experts", "n_routed_experts", "moe_num_experts")
"""Where a config.json says that a model has experts."""

Linear = tuple[str, int, int]  # name, inputs and outputs of a linear layer


class UnknownShapeError(Exception):
    """The shape of a model is not available. The message says what is missing and what to do."""


@dataclass(frozen=True, slots=True)
class Shape:
    """The sizes of a decoder."""

    family: str  # model_type in config.json
    vocab: int
    hidden: int
    layers: int
    heads: int
    kv_heads: int
    head_dim: int
    intermediate: int  # width of the MLP
    positions: int  # learned position embeddings
    tied: bool  # the output head is the embedding
    linears: tuple[Linear, ...]  # of one block
    norms_and_biases: int  # parameters

    @property
    def parameters(self) -> int:
        embeddings = (self.vocab * (1 if self.tied else 2) + self.positions) * self.hidden
        return embeddings + self.block_matrices + self.norms_and_biases

    @property
    def block_matrices(self) -> int:
        """Parameters of the linear layers in all blocks; `load_in_4bit` quantizes these."""
        return self.layers * sum(inputs * outputs for _, inputs, outputs in self.linears)

    @property
    def multiplied(self) -> int:
        """Parameters that each token is multiplied with: all except embedding tables."""
        return self.parameters - (self.positions + (0 if self.tied else self.vocab)) * self.hidden

    @property
    def gathered(self) -> int:
        """Parameters that FSDP gathers at once: one block, the embeddings, the output head and all norms."""
        return self.block_matrices // self.layers + self.parameters - self.block_matrices

    def frozen_bytes(self, width: int, in_4bit: bool) -> int:
        """Return the bytes of the frozen base of an adapter, at `width` bytes per number."""
        packed = self.block_matrices if in_4bit else 0
        return width * (self.parameters - packed) + round(BYTES_IN_4BIT * packed)

    def trained(self, lora: Lora | None) -> int:
        """Return the number of trained parameters: all, or r · (inputs + outputs) for each adapted layer.

        DoRA has another parameter for each output.
        """
        if lora is None:
            return self.parameters
        sizes = [
            lora.r * (inputs + outputs) + (outputs if lora.use_dora else 0)
            for block in range(self.layers)
            for index, (_, inputs, outputs) in enumerate(self.linears)
            if adapts(lora, self.layer_name(block, index))
        ]
        embedding = "transformer.wte" if self.family in GPT_LIKE else "model.embed_tokens"
        extra = lora.r * (self.vocab + self.hidden) if adapts(lora, embedding, linear=False) else 0
        return sum(sizes) + extra

    def layer_name(self, block: int, index: int) -> str:
        """Return the full name of a linear layer, which a regular expression in `lora.target_modules` must match."""
        gpt, name = self.family in GPT_LIKE, self.linears[index][0]
        part = "mlp" if index >= len(self.linears) - (2 if gpt else 3) else "attn" if gpt else "self_attn"
        inner = ".attention" if self.family == "gpt_neo" and part == "attn" else ""
        return f"{'transformer.h' if gpt else 'model.layers'}.{block}.{part}{inner}.{name}"

    def kv_bytes(self, width: int) -> int:
        """Return the bytes of the keys and values of one token in all layers."""
        return 2 * self.layers * self.kv_heads * self.head_dim * width

    def activation_bytes(
        self, width: int, row: int, lora: Lora | None, *, checkpointing: bool, prefix_sharing: bool = True
    ) -> int:
        """Return the bytes that backward needs of one token in a row of `row` tokens, within a factor of about 1.5.

        A block keeps two residual streams and two normalized ones; queries, keys, values and twice the attention's
        output; and the MLP's inner values: 2 without a gate, 4 with one, or 2 if the whole MLP is adapted and fused.
        Norms keep two float32 copies each, unless they are fused. GPT-Neo's own attention, used without prefix sharing,
        keeps its weights in float32, and again in 16 bits. With checkpointing each block keeps the residual stream
        only, and one block at a time is recomputed.
        """
        gpt = self.family in GPT_LIKE
        inner = (2 if gpt or (lora and not lora.dropout and _adapts_mlp(lora)) else 4) * self.intermediate
        elements = 4 * self.hidden + (3 * self.heads + 2 * self.kv_heads) * self.head_dim + inner
        norms = 0 if lora and width == 4 and not gpt and self.family != "gemma2" else 4 * (4 * self.hidden)
        weights = (4 if width == 4 else 4 + width) * self.heads * row
        block = width * elements + norms + (weights if self.family == "gpt_neo" and not prefix_sharing else 0)
        return self.layers * width * self.hidden + block if checkpointing else self.layers * block


def adapts(lora: Lora, name: str, *, linear: bool = True) -> bool:
    """Return whether a layer with this full name has an adapter."""
    return linear if lora.target_modules == "all-linear" else is_target(name, lora.target_modules)


def _adapts_mlp(lora: Lora) -> bool:
    """Return whether gated MLPs are fused: all three projections have plain adapters."""
    names = (f"model.layers.0.mlp.{name}" for name in ("gate_proj", "up_proj", "down_proj"))
    return not lora.use_dora and all(adapts(lora, name) for name in names)


def find_shape(model: Model) -> tuple[Shape, str]:
    """Return the shape of a recipe's model, or of an adapter's base, and where it was read.

    Raises:
        UnknownShapeError: no local file and no config.json of the hub or its cache has the shape.
    """
    config, source = find_config(model)
    return shape_from_config(config), source


def find_config(model: Model) -> tuple[dict[str, Any], str]:
    """Return the configuration of a recipe's model with the keys of a config.json, and where it was read.

    Raises:
        UnknownShapeError: neither a local file nor the hub cache has it.
    """
    model = model.base_model
    try:
        path = resolve_model(model.path)
    except ModelError as error:
        raise UnknownShapeError(str(error)) from None
    if path is None:
        return _json_config(_hub_config(model)), "read from config.json on the hub"
    if path.is_file():
        return _gguf_config(path), f"read from the header of {path.name}"
    return _json_config(path / "config.json"), f"read from {path / 'config.json'}"


def describe_trained(config: Mapping[str, Any], shape: Shape | None, lora: Lora | None) -> str:
    """Say which layers are trained and which stay frozen, as far as the configuration tells.

    `spinlm check` says it of the loaded model.
    """
    text = config.get("text_config") or config
    frozen = [f"{name} tower" for name in ("vision", "audio") if config.get(f"{name}_config")]
    if lora is None:
        layers = "trained: all weights"
    elif shape is None:
        targets = "linear layers" if lora.target_modules == "all-linear" else lora.target_modules
        layers = f"adapted: {targets if isinstance(targets, str) else ', '.join(targets)}"
    else:
        numbers = [
            (block, index)
            for block in range(shape.layers)
            for index in range(len(shape.linears))
            if adapts(lora, shape.layer_name(block, index))
        ]
        names = ", ".join(dict.fromkeys(shape.linears[index][0] for _, index in numbers))
        blocks = len({block for block, _ in numbers})
        layers = f"adapted: {names} in {blocks} blocks ({shape.trained(lora):,} parameters)"
    if lora is not None and lora.target_modules == "all-linear" and any(text.get(name) for name in _EXPERT_COUNTS):
        frozen = ["router", "experts", *frozen]
    return layers + (f"; frozen: {', '.join(frozen)}" if frozen else "")


def shape_from_config(config: Mapping[str, Any]) -> Shape:
    """Return the shape that a config.json describes.

    Raises:
        UnknownShapeError: the config lacks a size, or the model family is not supported.
    """

    def size(*names: str, default: int | None = None) -> int:
        value = next((config[name] for name in names if config.get(name) is not None), default)
        if not isinstance(value, int) or value < 1:
            raise UnknownShapeError(f"the model's config has no usable {' or '.join(names)}")
        return value

    family = str(config.get("model_type"))
    if family not in (*LLAMA_LIKE, *GPT_LIKE):
        supported = ", ".join((*LLAMA_LIKE, *GPT_LIKE))
        raise UnknownShapeError(f"the plan does not support the model_type {family}, only {supported}")
    gpt = family in GPT_LIKE
    hidden, layers = size("hidden_size", "n_embd"), size("num_hidden_layers", "num_layers", "n_layer")
    heads = size("num_attention_heads", "num_heads", "n_head")
    kv_heads = heads if gpt else size("num_key_value_heads", default=heads)
    head_dim = size("head_dim", default=hidden // heads)
    inner = size("intermediate_size", "n_inner", default=4 * hidden if gpt else None)
    queries, keys = heads * head_dim, kv_heads * head_dim
    if gpt:  # a norm has weight and bias; all linear layers have biases, except GPT-Neo's queries, keys and values
        vectors = layers * (4 * hidden + (2 if family == "gpt_neo" else 5) * hidden + inner) + 2 * hidden
    else:
        extra = {"qwen2": queries + 2 * keys, "qwen3": 2 * head_dim, "gemma2": 2 * hidden}  # biases; norms
        vectors = layers * (2 * hidden + extra.get(family, 0)) + hidden
    return Shape(
        family=family,
        vocab=size("vocab_size"),
        hidden=hidden,
        layers=layers,
        heads=heads,
        kv_heads=kv_heads,
        head_dim=head_dim,
        intermediate=inner,
        positions=size("n_positions", "max_position_embeddings") if gpt else 0,
        tied=bool(config.get("tie_word_embeddings", gpt or family == "gemma2")),
        linears=_linears(family, hidden, queries, keys, inner),
        norms_and_biases=vectors,
    )


def _linears(family: str, hidden: int, queries: int, keys: int, inner: int) -> tuple[Linear, ...]:
    if family == "gpt2":
        attention = [("c_attn", hidden, 3 * hidden), ("c_proj", hidden, hidden)]
    else:
        output = "out_proj" if family == "gpt_neo" else "o_proj"
        attention = [("q_proj", hidden, queries), ("k_proj", hidden, keys), ("v_proj", hidden, keys)]
        attention.append((output, queries, hidden))
    if family in GPT_LIKE:
        return *attention, ("c_fc", hidden, inner), ("c_proj", inner, hidden)
    return *attention, ("gate_proj", hidden, inner), ("up_proj", hidden, inner), ("down_proj", inner, hidden)


def _hub_config(model: Model) -> Path:
    """Return config.json of a hub model, from the cache or the hub."""
    try:
        path = Repository(model.path, model.revision).file("config.json")
    except (ModelError, OSError) as error:
        raise UnknownShapeError(str(error)) from None
    if path is None:
        raise UnknownShapeError(
            f"{model.path}: the repository has no config.json. If it is an adapter, run `hf download {model.path}`"
        )
    return path


def _json_config(path: Path) -> dict[str, Any]:
    try:
        config = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise UnknownShapeError(f"{path} cannot be read: {error}") from None
    if not isinstance(config, dict):
        raise UnknownShapeError(f"{path} is not a model configuration")
    return config


_GGUF_SIZES = {
    "num_hidden_layers": "block_count",
    "hidden_size": "embedding_length",
    "intermediate_size": "feed_forward_length",
    "num_attention_heads": "attention.head_count",
    "num_key_value_heads": "attention.head_count_kv",
    "head_dim": "attention.key_length",
    "max_position_embeddings": "context_length",
}


def _gguf_config(path: Path) -> dict[str, Any]:
    """Return the header of a .gguf file with the keys of a config.json."""
    try:
        values, tensors = read_gguf_header(path)
    except ValueError as error:
        raise UnknownShapeError(str(error)) from None
    family = values.get("general.architecture")
    return {
        "model_type": family,
        "vocab_size": values.get("tokenizer.ggml.tokens"),
        "tie_word_embeddings": "output.weight" not in tensors,
        **{name: values.get(f"{family}.{key}") for name, key in _GGUF_SIZES.items()},
    }
