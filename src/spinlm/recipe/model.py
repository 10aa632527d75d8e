"""The recipe's sections `model` and `lora`."""

import re
from collections.abc import Sequence
from typing import Annotated, Literal

from pydantic import AfterValidator, Discriminator, Tag

from spinlm.recipe.fields import Count, Fraction, ModelOrPath, Positive, Section, value_or_list


def _check_pattern(pattern: str) -> str:
    """Check a regular expression for whole names of layers."""
    try:
        re.compile(pattern)
    except re.error as error:
        raise ValueError(f"{pattern!r} is not a regular expression: {error}") from None
    if pattern != "all-linear" and re.fullmatch(r"[\w-]+", pattern):
        raise ValueError(
            f"a text is a regular expression for whole names, such as model.layers.0.self_attn.q_proj, and {pattern!r} "
            f"matches none. Write all-linear, the list [{pattern}], or the expression .*{pattern}"
        )
    return pattern


LayerNames = Annotated[
    Annotated[str, AfterValidator(_check_pattern), Tag("<value>")] | Annotated[list[str], Tag("<list>")],
    Discriminator(value_or_list),
]


def is_target(name: str, targets: str | Sequence[str]) -> bool:
    """Return whether `lora.target_modules` means a layer.

    Args:
        name: full name of the layer.
        targets: a regular expression for whole names, or the ends of names.
    """
    if isinstance(targets, str):
        return re.fullmatch(targets, name) is not None
    return any(name == target or name.endswith(f".{target}") for target in targets)


class Model(Section):
    path: ModelOrPath
    """A folder, a .gguf file, `package://NAME/FILE` (a file inside an installed Python package), or a hub id. The
    folder or the hub id may be those of a PEFT adapter."""
    revision: str | None = None
    """Commit, tag or branch of a hub model. Pin it: repositories change."""
    base: ModelOrPath | None = None
    """Base model of the adapter in `path`; absent means the one that the adapter's files name."""
    base_revision: str | None = None
    """Commit, tag or branch of `base`; absent means the one that the adapter's files name."""
    dtype: Literal["auto", "float32", "bfloat16"] = "auto"
    """Precision of the frozen weights and of all computation; `auto` is float32 on a CPU and bfloat16 on a GPU. Full
    fine-tuning keeps the weights in float32 and computes in this precision."""
    load_in_4bit: bool = False
    """Keep the frozen linear layers in 4 bits (QLoRA), in a quarter of their memory in bfloat16. Needs `lora` and the
    package bitsandbytes."""
    trust_remote_code: bool = False
    """Run Python code from the model's repository. Enable it only for repositories you trust."""

    @property
    def base_model(self) -> "Model":
        """The base of the adapter in `path`; the model itself if `path` is a whole model."""
        if self.base is None:
            return self
        update = {"path": self.base, "revision": self.base_revision, "base": None, "base_revision": None}
        return self.model_copy(update=update)


class Lora(Section):
    r: Count = 16
    """Rank."""
    alpha: Positive = 32
    """Scale: the update is multiplied by alpha / r."""
    dropout: Fraction = 0.0
    """Dropout on the adapter's input during training."""
    target_modules: LayerNames = "all-linear"
    """Layers to adapt: a list of names, or a regular expression for whole names. `all-linear` means every linear layer
    of the language model except the output head and routers; `spinlm check` lists them."""
    use_rslora: bool = False
    """Rank-stabilized LoRA: the update is multiplied by alpha / √r."""
    use_dora: bool = False
    """DoRA: train the length of each row of a weight as well. Slower, and generation with vLLM needs merged players."""
    create_new_adapter: bool = False
    """Merge the adapter in `model.path` into its base, and train a new one. Otherwise that adapter is trained further,
    with its own settings."""
