"""The players: one model in memory that becomes θ_t by loading the weights that an iteration saved.

With LoRA the base is frozen and shared, and a player is an adapter. In full fine-tuning a player is the whole model.
"""

import gc
import logging
import math
from collections.abc import Iterator, Mapping, Sequence
from functools import cached_property
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from spinlm.data.renderer import Renderer
from spinlm.distributed import processes
from spinlm.errors import ModelError
from spinlm.model.adapters import continue_adapter, load_start_tokenizer, tokenizer_folder
from spinlm.model.attention import register_tree_attention
from spinlm.model.base_files import copy_tokenizer_files, save_whole_model, write_chat_template
from spinlm.model.base_model import prepare_base
from spinlm.model.families import check_row_length, check_vocabulary, row_limit
from spinlm.model.fused import fuse_layers
from spinlm.model.loading import (
    add_adapter,
    compute_dtype,
    disable_dropout,
    load_model,
    load_player,
    load_stop_ids,
    non_finite_weights,
    save_stop_ids,
)
from spinlm.model.logprobs import LogProbs, max_logprob_error
from spinlm.model.prefix_trees import PrefixTree, pack_batch
from spinlm.model.trained_layers import freeze_towers
from spinlm.recipe.adapter import ADAPTER_CONFIG, adapter_files
from spinlm.recipe.schema import Recipe
from spinlm.rundir.layout import RunDir
from spinlm.rundir.provenance import pin_model
from spinlm.rundir.records import SPLITS, Example, read_lines
from spinlm.rundir.stage_graph import START
from spinlm.utils.atomic import atomic_path, read_json, write_json

log = logging.getLogger("spinlm")

MAX_LOGPROB_ERROR = {torch.float32: 1e-3, torch.bfloat16: 0.15}
"""Largest difference between our log-probabilities and those of the model's own forward pass, in nats per token."""

_DESTROYED = (
    "Training has destroyed the weights, or the model's weights were damaged from the start. Lower "
    "train.learning_rate, or compute in model.dtype: float32, and run in another --run-dir"
)


class Players:
    """One model, and the players it can become. `spinlm.model.run.Run` makes one per process."""

    def __init__(self, recipe: Recipe, folder: RunDir):
        """Raises ModelError if the model does not exist or cannot be converted."""
        from transformers.utils.logging import disable_progress_bar

        disable_progress_bar()
        self.recipe = recipe = pin_model(recipe, folder)
        self.folder = folder
        self.base = prepare_base(recipe, folder)
        self.base_model = self.base.path  # hub id or folder
        self.device = torch.device("cuda", processes.local_rank()) if torch.cuda.is_available() else torch.device("cpu")
        self.dtype = compute_dtype(recipe.model, self.device)
        self._file_template: str | None = None  # the chat template in the tokenizer's files
        self._loaded: Path | None = None  # the player whose weights the model has

    @cached_property
    def tokenizer(self) -> Any:
        tokenizer, self._file_template = load_start_tokenizer(self.base, self._adapter)
        return tokenizer

    @cached_property
    def tokenizer_folder(self) -> Path:
        """The folder with the files of the tokenizer."""
        return tokenizer_folder(self.base, self._adapter)

    @cached_property
    def renderer(self) -> Renderer:
        data = self.recipe.data
        return Renderer(
            self.tokenizer,
            data.chat_template,
            load_stop_ids(self.base, self.base_model),
            variables=data.chat_template_kwargs,
            fold_system=data.system == "fold",
        )

    @cached_property
    def _adapter(self) -> Path | None:
        """The folder of the adapter that is trained further; None if the recipe starts from none."""
        return adapter_files(self.recipe.model) if self.recipe.continues_adapter else None

    @cached_property
    def logprobs(self) -> LogProbs:
        """The model as a module that computes log-probabilities of responses; loaded when it is first used."""
        register_tree_attention()
        lora = self.recipe.lora
        full = lora is None
        stored = torch.float32 if full else self.dtype
        log.info("loading the model")
        model = load_model(self.base, self.base_model, stored, load_in_4bit=self.base.load_in_4bit)
        check_row_length(self.base_model, model.config.to_dict(), self.recipe.train.max_length)
        if lora is not None:
            if self._adapter is not None:
                model = continue_adapter(model, self._adapter, lora, self.base, double=self.recipe.extrapolates)
            else:
                double = self.recipe.extrapolates  # its player has twice the rank of the start
                model = add_adapter(model, lora, self.recipe.seed, self.base.revision, double=double)
            fuse_layers(model)
        else:
            freeze_towers(model)
        check_vocabulary(self.base_model, model, self.tokenizer, self._example_ids())
        disable_dropout(model)
        model.to(self.device)
        return LogProbs(model, autocast=self.dtype if full and self.dtype != stored else None)

    def _example_ids(self) -> Iterator[int]:
        """Yield the tokens of all examples that are already prepared."""
        for path in filter(Path.exists, map(self.folder.examples, SPLITS)):
            for example in read_lines(path, Example):
                yield from (*example.prompt_ids, *example.response_ids, *(example.rejected_ids or ()))

    @property
    def model(self) -> Any:
        return self.logprobs.model

    @property
    def max_positions(self) -> int | None:
        """The longest row that the model can read; None if its config does not say."""
        text = self.model.config.get_text_config()
        limit = row_limit(text.to_dict())
        positions: int | None = getattr(text, "max_position_embeddings", None)
        return limit[1] if limit else positions

    def parameters(self) -> list[tuple[str, nn.Parameter]]:
        """The trained parameters, by name."""
        return [(name, parameter) for name, parameter in self.model.named_parameters() if parameter.requires_grad]

    def unload(self) -> None:
        """Free the memory of the model. The model is loaded again when it is next used."""
        self._loaded = None
        vars(self).pop("logprobs", None)
        gc.collect()
        if self.device.type == "cuda":
            torch.cuda.empty_cache()

    def load(self, t: int) -> None:
        """Load the weights of the player that iteration `t` made.

        Raises:
            ModelError: the folder holds no player of this model.
        """
        player = self.folder.player(t)
        if self._loaded != player:
            load_player(self.model, player, pad=self.recipe.extrapolates)
            self._loaded = player

    def mark_modified(self) -> None:
        """Record that the weights are no longer those of a saved player."""
        self._loaded = None

    def weights(self) -> dict[str, Tensor]:
        """Return the tensors of a player by name: those of the adapter, or all of the model."""
        if self.recipe.lora is not None:
            return dict(self.parameters())
        unique: dict[int, tuple[str, Tensor]] = {}  # a tied weight has two names
        for name, tensor in self.model.state_dict(keep_vars=True).items():
            unique.setdefault(id(tensor), (name, tensor))
        return dict(unique.values())

    def save(self, t: int, full_weights: Mapping[str, Any] | None = None) -> None:
        """Save the weights as the player of iteration `t`, with the tokenizer. Process 0 writes.

        `full_weights` are the complete weights, if the model holds shards.

        Raises:
            ModelError: a weight is NaN or infinite.
        """
        processes.on_rank_zero(self._write, t, full_weights)
        if full_weights is None:
            self._loaded = self.folder.player(t)

    def _write(self, t: int, full_weights: Mapping[str, Any] | None) -> None:
        target = self.folder.player(t)
        if names := non_finite_weights((self.weights() if full_weights is None else full_weights).items()):
            raise ModelError(f"{target}: not saved: {names}. {_DESTROYED}")
        with atomic_path(target) as path:
            if self.recipe.lora is not None:
                self.model.save_pretrained(path, state_dict=full_weights, save_embedding_layers=False)
                _sort_target_modules(path / ADAPTER_CONFIG)
                (path / "README.md").unlink(missing_ok=True)  # PEFT's empty card; `export` writes one
            else:
                save_whole_model(self.base, self.model, self.base_model, path, full_weights)
            self.save_tokenizer(path)

    def save_tokenizer(self, folder: Path) -> None:
        """Save the base's own tokenizer files, the recipe's chat template, and the tokens that end a response."""
        if not copy_tokenizer_files(self.base, self.tokenizer_folder, folder):
            self.tokenizer.save_pretrained(folder)
        if self.renderer.template != self._file_template:
            write_chat_template(folder, self.renderer.template)
        save_stop_ids(folder, self.renderer.stop_ids)

    @torch.no_grad()
    def response_logprobs(self, trees: Sequence[PrefixTree]) -> list[float]:
        """Compute log p(y|x) of each response of each tree under the current weights, in order, in one forward pass.

        Raises:
            ModelError: a log-probability is NaN or infinite.
        """
        self.logprobs.eval()
        return self._finite(self.logprobs(pack_batch(trees, self.prefix_sharing).to(self.device)))

    @torch.no_grad()
    def logprobs_and_features(self, trees: Sequence[PrefixTree]) -> tuple[list[float], np.ndarray]:
        """Compute what `response_logprobs` computes, and a feature vector of each response: [S, D]."""
        self.logprobs.eval()
        batch = pack_batch(trees, self.prefix_sharing).to(self.device)
        logprobs, features = self.logprobs.logprobs_and_features(batch)
        return self._finite(logprobs), features.cpu().numpy()

    def _finite(self, logprobs: Tensor) -> list[float]:
        values: list[float] = logprobs.tolist()
        if not all(map(math.isfinite, values)):
            player = self._loaded or "the player in training"
            raise ModelError(f"{player}: its log-probabilities are not finite. {_DESTROYED}")
        return values

    @cached_property
    def prefix_sharing(self) -> bool:
        """Whether all responses to a prompt share one row. The sft stage decides this by a measurement."""
        return bool(self.folder.metadata("sft", START)["prefix_sharing"])

    def measure_prefix_sharing(self, trees: Sequence[PrefixTree]) -> bool:
        """Decide once per run whether responses to a prompt share a row, by log-probabilities of these trees.

        Raises:
            ModelError: our log-probabilities differ from the model's own, or the recipe requires prefix sharing and the
                model does not support it.
        """
        self.prefix_sharing = processes.on_rank_zero(self._measure_prefix_sharing, trees)
        return self.prefix_sharing

    def _measure_prefix_sharing(self, trees: Sequence[PrefixTree]) -> bool:
        path = self.folder.prefix_sharing
        if path.exists():
            return bool(read_json(path)["prefix_sharing"])
        required = self.recipe.train.prefix_sharing
        # Errors in nats per token, with one response per row and with prefix trees.
        row_error, tree_error = max_logprob_error(self.logprobs, trees, False), math.inf
        chunk = getattr(self.model.config.get_text_config(), "attention_chunk_size", None)
        if chunk is not None and chunk < self.recipe.train.max_length:
            log.info("no prefix sharing: rows longer than %d tokens attend in chunks, as in Llama 4", chunk)
        elif required != "never":
            try:
                tree_error = max_logprob_error(self.logprobs, trees, True)
            except ModelError as error:
                log.info("%s", error)
        if not math.isfinite(row_error):
            raise ModelError(
                f"{self.base_model}: its log-probabilities are not finite. Its weights are damaged, or {self.dtype} is "
                "too imprecise for it; try model.dtype: float32"
            )
        if row_error > MAX_LOGPROB_ERROR[self.dtype]:
            raise ModelError(
                f"{self.base_model}: log-probabilities differ from the model's own by {row_error:.3g} nats per token. "
                "spinlm does not know this kind of output head, or of attention between the tokens of a prompt, so it "
                "cannot train this model"
            )
        # The error with one response per row is the rounding error of this precision. A replaced attention rounds
        # unlike the model's own: its rounding error is that of a row with a single response.
        rounding_error = row_error
        if self.logprobs.replaceable_layers and self.dtype != torch.float32 and math.isfinite(tree_error):
            chains = [PrefixTree(tree.prompt, (response,)) for tree in trees for response in tree.responses]
            rounding_error = max(row_error, *(max_logprob_error(self.logprobs, [chain], True) for chain in chains))
        is_supported = tree_error <= max(MAX_LOGPROB_ERROR[torch.float32], 2 * rounding_error)
        if required == "always" and not is_supported:
            raise ModelError(
                f"{self.base_model}: its attention does not support prefix trees (difference {tree_error:.3g} nats per "
                "token). Set train.prefix_sharing: auto or never"
            )
        log.info(
            "prefix sharing: %s (difference from the model's own log-probabilities, in nats per token: %.2g with "
            "prefix trees, %.2g with one response per row)",
            *("on" if is_supported else "off", tree_error, row_error),
        )
        errors = {"prefix trees": tree_error, "one response per row": row_error}
        write_json(path, {"prefix_sharing": is_supported, "nats_per_token": errors})
        return is_supported


def _sort_target_modules(path: Path) -> None:
    """Sort the lists of modules, which PEFT writes in the order of a set, so that equal players have equal files."""
    config = read_json(path)
    for name in ("target_modules", "exclude_modules"):
        if isinstance(config.get(name), list):
            config[name] = sorted(config[name])
    write_json(path, config)
