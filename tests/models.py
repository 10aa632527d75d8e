"""Tiny language models of many architectures, with random weights."""

from pathlib import Path
from typing import Any

import torch
from peft import PeftModel
from transformers import CONFIG_MAPPING, AutoModelForCausalLM

from spinlm.recipe.load import parse_recipe
from spinlm.recipe.schema import Recipe
from tiny import Kind, tiny_tokenizer

_LLAMA_LIKE = {
    "hidden_size": 32,
    "intermediate_size": 64,
    "num_hidden_layers": 3,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "max_position_embeddings": 256,
}
# The initial weights are large, so that wrong attention changes results by far more than rounding errors.
_CONFIGS: dict[str, dict[str, Any]] = {
    "llama": _LLAMA_LIKE,
    "mistral": _LLAMA_LIKE | {"sliding_window": 8},
    "qwen2": _LLAMA_LIKE,
    "gemma2": _LLAMA_LIKE | {"head_dim": 8, "sliding_window": 8},
    "gpt2": {"n_embd": 32, "n_layer": 3, "n_head": 4, "n_positions": 256},
    "gpt_neox": {
        "hidden_size": 32,
        "intermediate_size": 64,
        "num_hidden_layers": 3,
        "num_attention_heads": 4,
        "max_position_embeddings": 256,
    },
    "gpt_neo": {
        "hidden_size": 32,
        "num_layers": 2,
        "attention_types": [[["global", "local"], 1]],
        "num_heads": 4,
        "window_size": 8,
        "max_position_embeddings": 256,
    },
    # Each of the following differs from those above in one property, which the tests name.
    "cohere": _LLAMA_LIKE | {"logit_scale": 0.5},
    "granite": _LLAMA_LIKE | {"logits_scaling": 4.0},
    "mixtral": _LLAMA_LIKE | {"num_local_experts": 4, "num_experts_per_tok": 2},
    "phi": _LLAMA_LIKE,
    "stablelm": _LLAMA_LIKE,
    "nemotron": _LLAMA_LIKE,
    "gptj": {"n_embd": 32, "n_layer": 2, "n_head": 4, "n_positions": 256, "rotary_dim": 4},
    "gpt_bigcode": {"n_embd": 32, "n_layer": 2, "n_head": 4, "n_positions": 256},
    "opt": {
        "hidden_size": 32,
        "word_embed_proj_dim": 32,
        "ffn_dim": 64,
        "num_hidden_layers": 2,
        "num_attention_heads": 4,
        "max_position_embeddings": 256,
    },
    "bloom": {"hidden_size": 32, "n_layer": 2, "n_head": 4},
    "falcon": {"hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 4},
}
ARCHITECTURES = ("llama", "mistral", "qwen2", "gemma2", "gpt2", "gpt_neox", "gpt_neo")


def tiny_model(architecture: str, vocabulary: int = 512, eos: int = 2, spread: float = 0.2, **changes: Any) -> Any:
    """Make a causal language model with seeded random weights."""
    config = CONFIG_MAPPING[architecture](
        vocab_size=vocabulary,
        initializer_range=spread,
        bos_token_id=1,
        eos_token_id=eos,
        pad_token_id=None,
        **(_CONFIGS[architecture] | changes),
    )
    torch.manual_seed(0)
    return AutoModelForCausalLM.from_config(config).eval()


def save_tiny_model(folder: Path, architecture: str = "llama", kind: Kind = "chatml", **changes: Any) -> Path:
    """Save a tiny model and its tokenizer as a model folder."""
    tokenizer = tiny_tokenizer(kind)
    model = tiny_model(architecture, len(tokenizer), eos=tokenizer.eos_token_id, **changes)
    model.save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    return folder


def tiny_recipe(folder: Path, **sections: Any) -> Recipe:
    """Make a recipe for a saved model. A `model` section is merged with the path."""
    model = {"path": str(folder), **sections.pop("model", {})}
    return parse_recipe({"model": model, "data": {"path": "unused.jsonl"}, **sections})


def load_player(model_folder: Path, player: Path):
    """Load a player with PEFT alone."""
    base = AutoModelForCausalLM.from_pretrained(model_folder)
    return PeftModel.from_pretrained(base, str(player)).eval()
