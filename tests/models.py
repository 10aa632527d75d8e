"""Tiny language models of many architectures, and adapters over them, with random weights."""

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from peft import LoraConfig, PeftModel, get_peft_model
from torch import Tensor
from transformers import CONFIG_MAPPING, AutoModelForCausalLM, AutoTokenizer

from spinlm.model.families import auto_class
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
    "codegen": {"n_embd": 32, "n_layer": 2, "n_head": 4, "n_positions": 256, "rotary_dim": 4},
    "gpt_neox_japanese": {
        "hidden_size": 32,
        "intermediate_multiple_size": 2,
        "num_hidden_layers": 2,
        "num_attention_heads": 4,
        "max_position_embeddings": 256,
    },
    "xglm": {
        "d_model": 32,
        "ffn_dim": 64,
        "num_layers": 2,
        "attention_heads": 4,
        "max_position_embeddings": 256,
    },
    "mpt": {"d_model": 32, "n_heads": 4, "n_layers": 2, "max_seq_len": 256},
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
_MAMBA_2 = {"mamba_n_heads": 8, "mamba_d_head": 8, "mamba_d_state": 8, "mamba_chunk_size": 8}
_LINEAR = {
    "linear_num_value_heads": 4,
    "linear_num_key_heads": 2,
    "linear_key_head_dim": 8,
    "linear_value_head_dim": 8,
    "head_dim": 8,
    "layer_types": ["linear_attention", "full_attention"],
}
_EXPERTS = {"num_local_experts": 4, "num_experts_per_tok": 2}
_HYBRID = _LLAMA_LIKE | {"num_hidden_layers": 2}
STATEFUL: dict[str, dict[str, Any]] = {
    "mamba": {"hidden_size": 32, "num_hidden_layers": 2, "state_size": 8},
    "mamba2": {"hidden_size": 32, "num_hidden_layers": 2, "state_size": 8, "num_heads": 8, "head_dim": 8}
    | {"n_groups": 2, "chunk_size": 8},
    "rwkv": {"hidden_size": 32, "attention_hidden_size": 32, "num_hidden_layers": 2, "rescale_every": 1},
    "lfm2": _HYBRID | {"layer_types": ["conv", "full_attention"], "block_auto_adjust_ff_dim": False},
    "jamba": _HYBRID
    | {"attn_layer_period": 2, "attn_layer_offset": 1, "num_experts": 4, "num_experts_per_tok": 2}
    | {"expert_layer_period": 2, "expert_layer_offset": 1, "mamba_d_state": 8},
    "zamba2": _HYBRID
    | {"layers_block_type": ["mamba", "hybrid"], "n_mamba_heads": 8, "mamba_headdim": 8, "mamba_d_state": 8}
    | {"mamba_ngroups": 1, "chunk_size": 8, "num_mem_blocks": 1, "adapter_rank": 4},
    "falcon_h1": _HYBRID | _MAMBA_2 | {"mamba_d_ssm": 64, "lm_head_multiplier": 0.5},
    "bamba": _HYBRID | _MAMBA_2 | {"attn_layer_indices": [1]},
    "granitemoehybrid": _HYBRID | _MAMBA_2 | _EXPERTS | {"layer_types": ["mamba", "attention"]},
    "recurrent_gemma": _HYBRID
    | {"num_key_value_heads": 1, "lru_width": 32, "attention_window_size": 8}
    | {"block_types": ["recurrent", "attention"], "logits_soft_cap": 0.7},
    "qwen3_next": _HYBRID
    | _LINEAR
    | _EXPERTS
    | {"num_experts": 4, "moe_intermediate_size": 16}
    | {"shared_expert_intermediate_size": 16},
    "qwen3_5_text": _HYBRID | _LINEAR,
    "nemotron_h": _HYBRID
    | {"layers_block_type": ["mamba", "attention"], "mamba_num_heads": 8, "mamba_head_dim": 8, "head_dim": 8}
    | {"ssm_state_size": 8, "n_groups": 2, "chunk_size": 8},
    "xlstm": {"hidden_size": 128, "num_hidden_layers": 2, "num_heads": 2, "chunk_size": 16}
    | {"output_logit_soft_cap": 0.7},
    "minimax": _HYBRID
    | _EXPERTS
    | {"layer_types": ["linear_attention", "full_attention"], "block_size": 8, "head_dim": 8},
}
"""Families that keep a state between tokens."""
_DEEPSEEK = {"q_lora_rank": 8, "kv_lora_rank": 8, "qk_rope_head_dim": 4, "v_head_dim": 8, "qk_nope_head_dim": 8} | {
    "num_key_value_heads": 4,
    "n_routed_experts": 4,
    "n_group": 1,
    "topk_group": 1,
    "first_k_dense_replace": 1,
}
EXPERTS: dict[str, dict[str, Any]] = {
    "qwen2_moe": _HYBRID
    | {"num_experts": 4, "num_experts_per_tok": 2, "moe_intermediate_size": 16}
    | {"shared_expert_intermediate_size": 16},
    "deepseek_v3": _HYBRID | _DEEPSEEK | {"num_experts_per_tok": 2, "moe_intermediate_size": 16},
    "gpt_oss": _HYBRID | _EXPERTS | {"head_dim": 8},
    "phimoe": _HYBRID | _EXPERTS,
    "llama4_text": _HYBRID
    | {"num_local_experts": 4, "num_experts_per_tok": 1, "head_dim": 8, "intermediate_size_mlp": 64},
    "jetmoe": _HYBRID | _EXPERTS | {"kv_channels": 8},
}
_LONGROPE = {"rope_type": "longrope", "short_factor": [1.0] * 4, "long_factor": [1.0, 1.5, 2.0, 4.0], "rope_theta": 1e4}
ROW_DEPENDENT: dict[str, dict[str, Any]] = {
    "phi3": _LLAMA_LIKE | {"rope_parameters": _LONGROPE, "original_max_position_embeddings": 40},
    "llama": _LLAMA_LIKE
    | {"max_position_embeddings": 40}
    | {"rope_parameters": {"rope_type": "dynamic", "factor": 4.0, "rope_theta": 1e4}},
}
"""Families whose position encoding changes in rows of more than 40 tokens."""
_CONFIGS |= STATEFUL | EXPERTS | {"phi3": ROW_DEPENDENT["phi3"]}
_VISION = {"hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 1, "num_attention_heads": 2} | {
    "image_size": 28,
    "patch_size": 14,
}
_TEXT = _HYBRID | {"head_dim": 8, "vocab_size": 512, "pad_token_id": None, "initializer_range": 0.2}
MULTIMODAL: dict[str, dict[str, Any]] = {
    "gemma3": {"text_config": _TEXT | {"sliding_window": 8}, "vision_config": _VISION, "mm_tokens_per_image": 4},
    "mistral3": {
        "text_config": _TEXT | {"model_type": "mistral"},
        "vision_config": _VISION | {"model_type": "pixtral"},
    },
    "qwen2_5_vl": {
        "text_config": _HYBRID
        | {"vocab_size": 512, "initializer_range": 0.2}
        | {"rope_parameters": {"rope_type": "default", "rope_theta": 1e4, "mrope_section": [1, 1, 2]}},
        "vision_config": {"depth": 1, "hidden_size": 32, "out_hidden_size": 32, "num_heads": 2}
        | {"intermediate_size": 64},
    },
}
ARCHITECTURES = ("llama", "mistral", "qwen2", "gemma2", "gpt2", "gpt_neox", "gpt_neo")


def tiny_model(architecture: str, vocabulary: int = 512, eos: int = 2, spread: float = 0.2, **changes: Any) -> Any:
    """Make a causal language model with seeded random weights."""
    if architecture in MULTIMODAL:
        torch.manual_seed(0)
        config = CONFIG_MAPPING[architecture](**MULTIMODAL[architecture])
        return auto_class(config).from_config(config).eval()
    config = CONFIG_MAPPING[architecture](
        vocab_size=vocabulary,
        initializer_range=spread,
        bos_token_id=1,
        eos_token_id=eos,
        pad_token_id=None,
        **(_CONFIGS.get(architecture, {}) | changes),
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


def save_adapter(
    base: Path, folder: Path, *, config: Any = None, tokenizer: bool = False, noise: float = 0.1, **lora: Any
) -> Path:
    """Save an adapter with random weights by PEFT alone, as another program would.

    Args:
        base: folder of the base model.
        folder: the folder to write.
        config: configuration of the adapter; None means LoRA with the settings `lora`.
        tokenizer: whether to save the base's tokenizer as well.
        noise: standard deviation of what is added to each trained weight.
        lora: settings of LoRA that differ from r 4, alpha 12 and all linear layers.
    """
    options = {"r": 4, "lora_alpha": 12, "target_modules": "all-linear", "task_type": "CAUSAL_LM"} | lora
    torch.manual_seed(7)
    model = get_peft_model(AutoModelForCausalLM.from_pretrained(base), config or LoraConfig(**options))
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.requires_grad:
                parameter.add_(torch.randn_like(parameter), alpha=noise)
    model.save_pretrained(folder)
    if tokenizer:
        AutoTokenizer.from_pretrained(base).save_pretrained(folder)
    return folder


def naive_logprob(model: Any, prompt: Sequence[int], response: Sequence[int]) -> Tensor:
    """Compute log p(response | prompt) from all logits of one row, without a cache: a differentiable scalar."""
    row = torch.tensor([[*prompt, *response]])
    logits = model(input_ids=row, use_cache=False).logits[0, len(prompt) - 1 : -1].double()
    return torch.log_softmax(logits, dim=-1)[torch.arange(len(response)), torch.tensor(response)].sum().float()
