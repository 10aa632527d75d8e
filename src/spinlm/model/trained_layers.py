"""Which layers are trained: the targets of an adapter, and the frozen towers of a multimodal model.

`all-linear` is resolved here, and nowhere else.
"""

import re
from collections.abc import Iterator, Sequence
from typing import Any

from torch import nn

from spinlm.errors import ModelError
from spinlm.recipe.model import is_target

ROUTERS = {"router", "gate", "shared_expert_gate"}
"""Names of the layers that choose experts. A small change of a router sends tokens to other experts."""


def language_model(model: Any) -> str:
    """Return the name of the submodule that reads text, with a dot at its end; empty if it is the whole model."""
    if model.config.get_text_config() is model.config:
        return ""
    decoder = model.get_decoder()
    return next((f"{name}." for name, module in model.named_modules() if module is decoder and name), "")


def freeze_towers(model: Any) -> None:
    """Freeze the vision and audio towers of a multimodal model. Text gives them no gradient."""
    prefix, head = language_model(model), model.get_output_embeddings()
    for name, module in model.named_modules():
        if prefix and module is not head and not name.startswith(prefix):
            for parameter in module.parameters(recurse=False):
                parameter.requires_grad_(False)


def target_modules(model: Any, targets: str | Sequence[str]) -> str | list[str]:
    """Resolve `lora.target_modules` for a model without an adapter.

    Args:
        model: a causal language model of transformers.
        targets: `all-linear`, a regular expression, or the ends of layer names.

    Returns:
        For `all-linear`, and for a multimodal model, the full names of layers of the language model. Otherwise
        `targets`.

    Raises:
        ModelError: the layers with these names are not in the language model.
    """
    prefix = language_model(model)
    if targets == "all-linear":
        return [name for name in _linear_names(model) if name.startswith(prefix)]
    if not prefix:
        return targets if isinstance(targets, str) else list(targets)
    names = [name for name, _ in model.named_modules() if name.startswith(prefix) and is_target(name, targets)]
    if not names:
        raise ModelError(f"lora.target_modules: no layer of the language model ({prefix[:-1]}) has such a name")
    return names


def _linear_names(model: Any) -> Iterator[str]:
    """Yield the names of the linear layers, except the head, routers, and those that cannot have an adapter."""
    from transformers.pytorch_utils import Conv1D

    head, special = model.get_output_embeddings(), ROUTERS | _expert_names(model)
    for name, module in model.named_modules():
        parent, _, last = name.rpartition(".")
        if module is head or not isinstance(module, nn.Linear | Conv1D) or special & {*name.split(".")}:
            continue
        # The kernels take the other weights of a Mamba layer from their modules, so adapters would have no effect.
        if last == "in_proj" or not _is_mamba(model.get_submodule(parent)):
            yield name


def _expert_names(model: Any) -> set[str]:
    """Return the layer names that PEFT converts, because the model holds the weights of all experts in one tensor."""
    from peft import LoraConfig
    from peft.utils.transformers_weight_conversion import convert_peft_config_for_transformers

    experts = set()
    for name in ("gate_proj", "up_proj", "down_proj"):
        config = LoraConfig(target_modules=[name])
        try:
            convert_peft_config_for_transformers(config, model, None)
            converted = name not in (config.target_modules or ())
        except ValueError:  # two layers make one tensor of experts, and only one of them is named here
            converted = True
        if converted:
            experts.add(name)
    return experts


def _is_mamba(module: nn.Module) -> bool:
    return all(hasattr(module, name) for name in ("A_log", "D", "conv1d", "out_proj"))


def describe_trained(model: Any) -> str:
    """Say which layers of a player's model are trained, and which matrices stay frozen apart from the embeddings."""
    has_adapter = hasattr(model, "get_base_model")
    causal_lm = model.get_base_model() if has_adapter else model
    embeddings = [module for module in causal_lm.modules() if isinstance(module, nn.Embedding)]
    adapted_layers = [module.base_layer for module in causal_lm.modules() if hasattr(module, "lora_A")]
    exempt = (*embeddings, *adapted_layers, causal_lm.get_output_embeddings())
    exempt_ids = {id(weight) for module in exempt for weight in module.parameters()}
    prefix, blocks = language_model(causal_lm), set()
    adapted: dict[str, None] = {}
    frozen: dict[str, None] = {}
    for name, parameter in causal_lm.named_parameters():
        layer, *matrix = re.split(r"\.lora_(?:embedding_)?A\.", name)
        if matrix:
            adapted[_part(layer.removesuffix(".base_layer"), prefix)] = None
            blocks.update(re.findall(r"^.*?\.\d+\.", layer))
        elif not parameter.requires_grad and parameter.dim() > 1 and id(parameter) not in exempt_ids:
            frozen[_part(name, prefix)] = None
    trained = sum(parameter.numel() for parameter in model.parameters() if parameter.requires_grad)
    text = f"adapted: {', '.join(adapted)} in {len(blocks)} blocks" if has_adapter else "trained: all weights"
    others = [part for part in frozen if part not in adapted]
    return f"{text} ({trained:,} parameters)" + (f"; frozen: {', '.join(others)}" if others else "")


def _part(name: str, prefix: str) -> str:
    """Return the name under which a weight is listed: its tower, `experts`, `router`, or its layer."""
    components = name.removesuffix(".weight").split(".")
    if not name.startswith(prefix):
        return components[1 if components[0] == "model" else 0]
    if "experts" in components:
        return "experts"
    return "router" if ROUTERS & {*components} else components[-1]
