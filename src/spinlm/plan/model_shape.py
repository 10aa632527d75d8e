"""The shape of a model, as its config.json gives it, and what can be counted from it."""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from spinlm.recipe.schema import Lora


class UnknownShapeError(Exception):
    """No shape can be had; the message says what is missing and how to get it."""


FOUR_BITS = 0.5 + 1 / 64 + 4 / (64 * 256)
"""Bytes of a weight in 4 bits: itself, a byte for the scale of every 64, and for every 256 of those a float32."""

Linear = tuple[str, int, int]  # name, inputs and outputs of a linear layer


@dataclass(frozen=True, slots=True)
class Shape:
    """The sizes of a decoder, from which everything else is counted."""

    family: str  # config.json's model_type
    vocab: int
    hidden: int
    layers: int
    heads: int
    kv_heads: int
    head_dim: int
    inner: int  # of the MLP
    positions: int  # learned ones
    tied: bool  # the output head is the embedding
    linears: tuple[Linear, ...]  # of one block
    vectors: int  # parameters of norms and biases

    @property
    def parameters(self) -> int:
        """Embeddings, blocks and norms, and the output head where it is not the embedding."""
        tables = (self.vocab * (1 if self.tied else 2) + self.positions) * self.hidden
        return tables + self.matrices + self.vectors

    @property
    def matrices(self) -> int:
        """Parameters in the linear layers of the blocks, which are those that are quantised."""
        return self.layers * sum(inputs * outputs for _, inputs, outputs in self.linears)

    def frozen_bytes(self, width: int, load_in_4bit: bool) -> int:
        """The model itself, in a precision and as `model.load_in_4bit` says."""
        in_four_bits = self.matrices if load_in_4bit else 0
        return width * (self.parameters - in_four_bits) + round(FOUR_BITS * in_four_bits)

    @property
    def multiplied(self) -> int:
        """Parameters that a token is multiplied with: all but the tables it is looked up in."""
        return self.parameters - (self.positions + (0 if self.tied else self.vocab)) * self.hidden

    @property
    def gathered(self) -> int:
        """Parameters of a block, the unit in which a divided model is gathered, and of the tables around the blocks."""
        return (self.parameters - self.tables) // self.layers + self.tables

    @property
    def tables(self) -> int:
        """Parameters outside the blocks: embeddings, the output head, and (counted here too) all norms."""
        return self.parameters - self.layers * sum(inputs * outputs for _, inputs, outputs in self.linears)

    @property
    def takes_trees(self) -> bool:
        """Whether its attention can take a mask of our own. GPT-Neo's cannot, and is not fused either."""
        return self.family != "gpt_neo"

    def trained(self, lora: Lora | None) -> int:
        """Parameters that are trained: all, or an adapter's r · (inputs + outputs) for each adapted layer."""
        if lora is None:
            return self.parameters
        names = {target.rpartition(".")[2] for target in lora.target_modules}
        adapted = [sizes for name, *sizes in self.linears if lora.target_modules == "all-linear" or name in names]
        return self.layers * lora.r * sum(map(sum, adapted))

    def kv_bytes(self, width: int) -> int:
        """Keys and values of one token in all layers."""
        return 2 * self.layers * self.kv_heads * self.head_dim * width

    def activation_bytes(self, width: int, row: int, lora: Lora | None, *, checkpointing: bool) -> int:
        """What backward needs of one token in a row of some length, to within a factor of about 1.5.

        A block keeps two residual streams and two normalised ones, queries, keys, values and the attention's output
        twice, and the MLP's inner values: before and after the activation, and of a gated MLP four (gate, up, their
        activation and product), or two where it is adapted and computed as one operation. Norms keep two float32 copies
        each, unless they are one operation too. With checkpointing only the residual stream is kept of each block, and
        one block at a time is computed again. Attention that is not fused also keeps scores and weights in float32 and
        once more as computed.
        """
        gpt = self.family in _GPT_LIKE
        inner = (2 if gpt or (lora and not lora.dropout and _adapts_mlp(lora)) else 4) * self.inner
        elements = 4 * self.hidden + (3 * self.heads + 2 * self.kv_heads) * self.head_dim + inner
        norms = 0 if lora and width == 4 and not gpt and self.family != "gemma2" else 4 * (4 * self.hidden)
        scores = 0 if self.takes_trees else (8 + width) * self.heads * row
        block = width * elements + norms + scores
        return self.layers * width * self.hidden + block if checkpointing else self.layers * block


def _adapts_mlp(lora: Lora) -> bool:
    return lora.target_modules == "all-linear" or {"gate_proj", "up_proj", "down_proj"} <= set(lora.target_modules)


_LLAMA_LIKE = ("llama", "mistral", "qwen2", "qwen3", "gemma2")
_GPT_LIKE = ("gpt2", "gpt_neo", "gpt_neox")


def shape_from_config(config: Mapping[str, Any]) -> Shape:
    """The shape that a config.json describes.

    Raises:
        UnknownShapeError: it lacks a size, or is of a family that cannot be counted here.
    """

    def size(*names: str, default: int | None = None) -> int:
        value = next((config[name] for name in names if config.get(name) is not None), default)
        if not isinstance(value, int) or value < 1:
            raise UnknownShapeError(f"its config has no usable {' or '.join(names)}")
        return value

    family = str(config.get("model_type"))
    if family not in (*_LLAMA_LIKE, *_GPT_LIKE):
        known = ", ".join((*_LLAMA_LIKE, *_GPT_LIKE))
        raise UnknownShapeError(f"its model_type is {family}; those that can be counted are {known}")
    gpt = family in _GPT_LIKE
    hidden, layers = size("hidden_size", "n_embd"), size("num_hidden_layers", "num_layers", "n_layer")
    heads = size("num_attention_heads", "num_heads", "n_head")
    kv_heads = heads if gpt else size("num_key_value_heads", default=heads)
    head_dim = size("head_dim", default=hidden // heads)
    inner = size("intermediate_size", "n_inner", default=4 * hidden if gpt else None)
    queries, keys = heads * head_dim, kv_heads * head_dim
    if gpt:  # norms have a weight and a bias; of the linear layers only GPT-Neo's queries, keys and values have none
        vectors = layers * (4 * hidden + (2 if family == "gpt_neo" else 5) * hidden + inner) + 2 * hidden
    else:
        more = {"qwen2": queries + 2 * keys, "qwen3": 2 * head_dim, "gemma2": 2 * hidden}  # biases; norms
        vectors = layers * (2 * hidden + more.get(family, 0)) + hidden
    return Shape(
        family=family,
        vocab=size("vocab_size"),
        hidden=hidden,
        layers=layers,
        heads=heads,
        kv_heads=kv_heads,
        head_dim=head_dim,
        inner=inner,
        positions=size("n_positions", "max_position_embeddings") if family in ("gpt2", "gpt_neo") else 0,
        tied=bool(config.get("tie_word_embeddings", family in ("gpt2", "gpt_neo", "gemma2"))),
        linears=_linears(family, hidden, queries, keys, inner),
        vectors=vectors,
    )


def _linears(family: str, hidden: int, queries: int, keys: int, inner: int) -> tuple[Linear, ...]:
    if family in _LLAMA_LIKE:
        attention = [("q_proj", hidden, queries), ("k_proj", hidden, keys), ("v_proj", hidden, keys)]
        mlp = [("gate_proj", hidden, inner), ("up_proj", hidden, inner), ("down_proj", inner, hidden)]
        return *attention, ("o_proj", queries, hidden), *mlp
    if family == "gpt_neox":
        attention = [("query_key_value", hidden, 3 * hidden), ("dense", hidden, hidden)]
    elif family == "gpt_neo":
        attention = [(name, hidden, hidden) for name in ("q_proj", "k_proj", "v_proj", "out_proj")]
    else:
        attention = [("c_attn", hidden, 3 * hidden), ("c_proj", hidden, hidden)]
    up, down = ("dense_h_to_4h", "dense_4h_to_h") if family == "gpt_neox" else ("c_fc", "c_proj")
    return *attention, (up, hidden, inner), (down, inner, hidden)
