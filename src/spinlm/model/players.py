"""The players: one model in memory that becomes θ_t by loading what an iteration saved.

With LoRA the base is frozen and shared, and a player is an adapter; without, a player is the whole model.
"""

import gc
import logging
import math
from collections.abc import Sequence
from functools import cached_property
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import nn

from spinlm.data.renderer import Renderer
from spinlm.distributed import processes
from spinlm.errors import MissingPackageError, ModelError, RecipeError
from spinlm.export.model_card import write_card
from spinlm.model.attention import register_tree_attention
from spinlm.model.fused import fuse_layers
from spinlm.model.loading import (
    add_adapter,
    compute_dtype,
    disable_dropout,
    load_model,
    load_player,
    load_stop_ids,
    load_tokenizer,
    non_finite_weights,
    prepare_base_model,
    save_stop_ids,
)
from spinlm.model.logprobs import LogProbs, max_logprob_error
from spinlm.model.prefix_trees import PrefixTree, pack_batch
from spinlm.recipe.schema import Recipe
from spinlm.rundir.layout import RunDir
from spinlm.training.activation_checkpointing import checkpoint_if_needed
from spinlm.training.parallel import Parallel, Sharded
from spinlm.utils.atomic import atomic_path, read_json, write_json

log = logging.getLogger("spinlm")

PARITY = {torch.float32: 1e-3, torch.bfloat16: 0.15}
"""Largest mean difference per token, in nats, at which packed and plain log-probabilities count as equal."""


_DESTROYED = (
    "Training has destroyed it, or the model came so. Lower train.learning_rate, or compute in model.dtype: float32, "
    "and run in another --run-dir"
)


class Players:
    """One model, and the players it can be. Load it once per process: see `seat`."""

    def __init__(self, recipe: Recipe, run: RunDir):
        from transformers.utils.logging import disable_progress_bar

        disable_progress_bar()
        self.recipe = recipe
        self.run = run
        self.path = prepare_base_model(recipe.model, run)
        self.device = torch.device("cuda", processes.local_rank()) if torch.cuda.is_available() else torch.device("cpu")
        self.dtype = compute_dtype(recipe.model, self.device)
        self._sits: Path | None = None
        self._parallel: Parallel | None = None

    @cached_property
    def tokenizer(self) -> Any:
        return load_tokenizer(self.recipe.model, self.path)

    @cached_property
    def renderer(self) -> Renderer:
        return Renderer(self.tokenizer, self.recipe.data.chat_template, load_stop_ids(self.recipe.model, self.path))

    @cached_property
    def logprobs(self) -> LogProbs:
        """The model, loaded when first asked for, as the module that gives log-probabilities."""
        register_tree_attention()
        lora = self.recipe.lora
        full = lora is None
        stored = torch.float32 if full else self.dtype
        log.info("loading the model")
        model = load_model(self.recipe.model, self.path, stored, load_in_4bit=self.recipe.model.load_in_4bit)
        if lora is not None:
            model = add_adapter(model, lora, self.recipe.seed, self.recipe.model.revision)
            fuse_layers(model)
        disable_dropout(model)
        model.to(self.device)
        return LogProbs(model, autocast=self.dtype if full and self.dtype != stored else None)

    @property
    def model(self) -> Any:
        return self.logprobs.model

    def parameters(self) -> list[tuple[str, nn.Parameter]]:
        """What is trained, by name."""
        return [(name, parameter) for name, parameter in self.model.named_parameters() if parameter.requires_grad]

    @cached_property
    def accelerator(self) -> Any:
        """Accelerate, for training in several processes and for trackers."""
        from accelerate import Accelerator, DistributedDataParallelKwargs

        check_trackers(self.recipe.report_to)
        # Precision is the module's own affair, the same in scoring as in training, so Accelerate is told to leave it.
        return Accelerator(
            cpu=self.device.type == "cpu",
            mixed_precision="no",
            log_with=list(self.recipe.report_to) or None,
            project_dir=self.run.root,
            kwargs_handlers=[DistributedDataParallelKwargs(gradient_as_bucket_view=True, broadcast_buffers=False)],
        )

    def parallel(self) -> Parallel:
        """The log-probability module as the processes train it together."""
        if self._parallel is None:
            self._parallel = self._in_parallel()
        return self._parallel

    def _in_parallel(self) -> Parallel:
        match self.recipe.train.fsdp if processes.world_size() > 1 else "none":
            case "none":
                return Parallel(self.logprobs, self.accelerator)
            case sharding:
                return Sharded(self.logprobs, again=sharding == "full_shard")

    def make_room(self, prefix_sharing: bool) -> bool:
        """Turn gradient checkpointing on where the recipe wants it, or where memory would not suffice without.

        Called before an optimiser holds anything.

        Returns:
            Whether it is on.
        """
        return checkpoint_if_needed(self.logprobs, self.recipe, prefix_sharing)

    def close(self) -> None:
        """Let trackers write what they still hold."""
        if "accelerator" in vars(self):
            for tracker in self.accelerator.trackers:  # its own end_training would part the processes, too
                tracker.finish()

    def let_go(self) -> None:
        """Free the memory of the model; it is loaded again when it is next asked for."""
        if self._parallel is not None:
            self._parallel.end()
        self._sits = self._parallel = None
        vars(self).pop("logprobs", None)
        if "accelerator" in vars(self):
            self.accelerator.free_memory()
        gc.collect()
        if self.device.type == "cuda":
            torch.cuda.empty_cache()

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
        divided = self._parallel if self._parallel is not None and self._parallel.divided else None
        weights = {name: divided.whole(tensor) for name, tensor in self._saved()} if divided else None
        processes.on_rank_zero(self._write, iteration, weights)
        if divided:
            self.let_go()
        else:
            self._parallel = None  # in all processes: the next is made by all of them together
            if "accelerator" in vars(self):
                self.accelerator.free_memory()
            self._sits = self.run.player(iteration)

    def _saved(self) -> list[tuple[str, Any]]:
        """The weights that make a player, by name."""
        if self.recipe.lora is not None:
            return self.parameters()
        once: dict[int, tuple[str, Any]] = {}  # a tied weight has two names
        for name, tensor in self.model.state_dict(keep_vars=True).items():
            once.setdefault(id(tensor), (name, tensor))
        return list(once.values())

    def _write(self, iteration: int, weights: dict[str, Any] | None) -> None:
        if names := non_finite_weights(weights.items() if weights is not None else self._saved()):
            raise ModelError(f"{self.run.player(iteration)}: not saved: {names}. {_DESTROYED}")
        with atomic_path(self.run.player(iteration)) as folder:
            extra = {"save_embedding_layers": False} if self.recipe.lora is not None else {}
            self.model.save_pretrained(folder, state_dict=weights, **extra)
            if self.recipe.lora is not None:
                _sort_targets(folder / "adapter_config.json")
            write_card(self.recipe, iteration, folder)
            self.tokenizer.chat_template = self.renderer.template  # prompted elsewhere as it was here
            self.tokenizer.save_pretrained(folder)
            save_stop_ids(folder, self.renderer.stop_ids)

    @torch.no_grad()
    def response_logprobs(self, trees: Sequence[PrefixTree], prefix_sharing: bool) -> list[float]:
        """Log-probability of each response of each tree under the current weights, in order, in one forward pass."""
        self.logprobs.eval()
        values: list[float] = self.logprobs(pack_batch(trees, prefix_sharing).to(self.device)).tolist()
        self._check(values)
        return values

    @torch.no_grad()
    def read(self, trees: Sequence[PrefixTree], prefix_sharing: bool) -> tuple[list[float], np.ndarray]:
        """As `response_logprobs`, and beside them features of each response: [S, D]."""
        self.logprobs.eval()
        logprobs, features = self.logprobs.logprobs_and_features(pack_batch(trees, prefix_sharing).to(self.device))
        values = logprobs.tolist()
        self._check(values)
        return values, features.cpu().numpy()

    def _check(self, logprobs: list[float]) -> None:
        """Let no measure, and no pair, be made of what is no number."""
        if not all(map(math.isfinite, logprobs)):
            who = self._sits or "the player in training"
            raise ModelError(f"{who}: its log-probabilities are not finite. {_DESTROYED}")

    def measure_prefix_sharing(self, trees: Sequence[PrefixTree]) -> bool:
        """Decide once per run, on these trees, whether responses to a prompt share a row; the run folder keeps the answer.

        Raises:
            ModelError: our log-probabilities are not the model's, or the recipe asks for prefix trees and the model cannot.
        """
        return processes.on_rank_zero(self._measure_prefix_sharing, trees)

    def _measure_prefix_sharing(self, trees: Sequence[PrefixTree]) -> bool:
        path = self.run.prefix_sharing
        if path.exists():
            return bool(read_json(path)["prefix_sharing"])
        wanted = self.recipe.train.prefix_sharing
        rows, shared = max_logprob_error(self.logprobs, trees, False), math.inf
        if wanted != "never":
            try:
                shared = max_logprob_error(self.logprobs, trees, True)
            except ModelError as error:
                log.info("%s", error)
        if not math.isfinite(rows):
            raise ModelError(
                f"{self.path}: its log-probabilities are not finite. Its weights are damaged, or it cannot be computed "
                f"in {self.dtype}; try model.dtype: float32"
            )
        if rows > PARITY[self.dtype]:
            raise ModelError(
                f"{self.path}: log-probabilities differ from the model's own by {rows:.3g} nats per token. Its "
                "output head is of a kind that spinlm does not know, so this model cannot be used"
            )
        fits = shared <= max(PARITY[torch.float32], 2 * rows)  # without trees, the gap is this precision's noise
        if wanted == "always" and not fits:
            raise ModelError(
                f"{self.path}: its attention cannot take prefix trees (difference {shared:.3g} nats per token). "
                "Set train.prefix_sharing: auto or never"
            )
        log.info(
            "prefix sharing: %s (difference from the model's own log-probabilities: %.2g nats per token with prefix "
            "trees, %.2g with one response per row)",
            *("on" if fits else "off", shared, rows),
        )
        write_json(
            path, {"prefix_sharing": fits, "nats_per_token": {"prefix trees": shared, "one response per row": rows}}
        )
        return fits


_seated: Players | None = None


def seat(recipe: Recipe, run: RunDir) -> Players:
    """The players of a run, loaded once per process."""
    global _seated
    if _seated is None or _seated.run.root != run.root or _seated.recipe != recipe:
        stand_up()  # let go of the old model before loading the next
        _seated = Players(recipe, run)
    return _seated


def _sort_targets(path: Path) -> None:
    """PEFT writes the target modules in the order of a set, so equal players would differ from process to process."""
    config = read_json(path)
    if isinstance(config["target_modules"], list):
        write_json(path, config | {"target_modules": sorted(config["target_modules"])})


def stand_up() -> None:
    """Let go of the model, so that the next `seat` loads it as it came."""
    global _seated
    if _seated is not None:
        _seated.close()
    _seated = None


def check_trackers(names: list[str]) -> None:
    """Make sure that Accelerate knows the trackers and that their packages are there.

    Raises:
        RecipeError: a tracker is unknown.
        MissingPackageError: its package is not installed.
    """
    from accelerate.tracking import LOGGER_TYPE_TO_CLASS, get_available_trackers

    known = {str(name) for name in LOGGER_TYPE_TO_CLASS}
    available = {str(name) for name in get_available_trackers()}
    for name in names:
        if name not in known:
            raise RecipeError(f"report_to: Accelerate knows no tracker {name!r}; known: {', '.join(sorted(known))}")
        if name not in available:
            package = name.replace("_", "-")
            raise MissingPackageError(
                f"report_to: {name} needs a package that is not installed. Run: pip install {package}"
            )
