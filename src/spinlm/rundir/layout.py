"""The run folder: every path in it.

    recipe.yaml      the recipe with all values filled in
    provenance.json  digests of model and data, versions, command line, machine
    train_log.jsonl  one line for each optimizer step
    best             link to the folder that holds the best player
    error.txt        the error that ended the last attempt
    examples/        train.jsonl  heldout.jsonl  sft.jsonl  skipped_rows.json
    base/            the model, if the recipe names a .gguf file or an adapter that is merged
    start/           player/ (θ_0)  heldout_greedy.jsonl  heldout_sampled.jsonl  eval.json
    iteration-t/     generations/  pairs/  regime.json  checkpoints/  player/ (θ_{t+1})  heldout_greedy.jsonl
                     heldout_sampled.jsonl  eval.json  selection.json
    .spinlm/         what only spinlm reads: lock  prefix_sharing.json  digests/  start/*.done  iteration-t/*.done

A file appears under its name only when the file is complete.
"""

import errno
import itertools
import logging
import shutil
from pathlib import Path

from spinlm.rundir.markers import MarkedFolder

log = logging.getLogger("spinlm")

NO_SYMLINK_ERRNOS = (errno.EPERM, errno.ENOTSUP, errno.ENOSYS)
"""Errors of a file system without symbolic links."""


class RunDir(MarkedFolder):
    """One run folder: its paths here, its markers and digests in `markers`, its lock in `lock`."""

    @property
    def provenance(self) -> Path:
        """What the run was made from: model, data, versions, command line, machine."""
        return self.root / "provenance.json"

    @property
    def prefix_sharing(self) -> Path:
        """Whether the responses to a prompt share a row, and the measured errors."""
        return self.state_folder / "prefix_sharing.json"

    @property
    def train_log(self) -> Path:
        """One JSON line for each optimizer step."""
        return self.root / "train_log.jsonl"

    @property
    def base(self) -> Path:
        """The model in safetensors format, if the recipe names a .gguf file or an adapter that is merged."""
        return self.root / "base"

    def examples(self, split: str) -> Path:
        """Examples of a split: train, heldout or sft."""
        return self.root / "examples" / f"{split}.jsonl"

    @property
    def skipped_rows(self) -> Path:
        """Rows of the data set that gave no example, with reasons."""
        return self.root / "examples" / "skipped_rows.json"

    def player(self, t: int) -> Path:
        """The player that iteration t made: θ_{t+1}."""
        return self.iteration(t) / "player"

    def generations(self, t: int, split: str, shard: int) -> Path:
        """The opponent's responses to one shard of a split (train or heldout)."""
        return self.iteration(t) / "generations" / f"{split}-{shard:05d}.jsonl"

    def pairs(self, t: int, split: str, shard: int) -> Path:
        """Pairs that iteration t trains on (train) or is measured on (heldout)."""
        return self.iteration(t) / "pairs" / f"{split}-{shard:05d}.arrow"

    def shards_on_disk(self, stage: str, t: int) -> list[tuple[str, int]]:
        """Return the shards, as (split, number), that the stage generate or reference_logprobs has written."""
        first = (self.generations if stage == "generate" else self.pairs)(t, "train", 0)
        names = [path.stem.rpartition("-") for path in first.parent.glob(f"*-*{first.suffix}")]
        return [(split, int(shard)) for split, _, shard in names if shard.isdecimal()]

    def regime(self, t: int) -> Path:
        """Gradient statistics at the start of an iteration's training."""
        return self.iteration(t) / "regime.json"

    def checkpoints(self, t: int) -> Path:
        """Checkpoints of an unfinished training."""
        return self.iteration(t) / "checkpoints"

    def heldout_nll(self, t: int) -> Path:
        """Held-out NLL after each epoch of an unfinished training, which a resumed run reads."""
        return self.checkpoints(t) / "heldout_nll.json"

    def heldout_greedy(self, t: int) -> Path:
        """The player's greedy responses to the held-out prompts."""
        return self.iteration(t) / "heldout_greedy.jsonl"

    def heldout_sampled(self, t: int) -> Path:
        """The player's responses to the held-out prompts, sampled at temperature 1."""
        return self.iteration(t) / "heldout_sampled.jsonl"

    def heldout_temperatures(self, t: int) -> Path:
        """The player's responses to the held-out prompts, sampled at each of `evaluate.temperatures`."""
        return self.iteration(t) / "heldout_temperatures.jsonl"

    def eval_metrics(self, t: int) -> Path:
        """Metrics of the player."""
        return self.iteration(t) / "eval.json"

    def selection(self, t: int) -> Path:
        """Comparison of the player with the best player before it."""
        return self.iteration(t) / "selection.json"

    def benchmarks(self, t: int) -> Path:
        """Benchmark scores of the player. They are not in eval.json, whose digest is in a marker."""
        return self.iteration(t) / "benchmarks.json"

    @property
    def best_link(self) -> Path:
        """Link to the folder that holds the best player."""
        return self.root / "best"

    def best(self) -> int | None:
        """The iteration with the best player so far (`START` for θ_0); None before the first promotion."""
        promoted = list(itertools.takewhile(lambda t: self.marker("promote", t).exists(), itertools.count()))
        return int(self.metadata("promote", promoted[-1])["best"]) if promoted else None

    def set_best(self, t: int) -> None:
        """Point the link `best` to a player's folder. The link is for people; spinlm reads the markers."""
        temporary, name = self.root / ".best.tmp", self.iteration(t).name
        if self.best_link.is_symlink() and self.best_link.readlink() == Path(name):
            return
        if self.best_link.is_dir() and not self.best_link.is_symlink():
            log.warning("%s: is a folder, not a link to %s; it is left alone", self.best_link, name)
            return
        temporary.unlink(missing_ok=True)
        try:
            temporary.symlink_to(name)
        except OSError as error:
            if error.errno not in NO_SYMLINK_ERRNOS:
                raise
            log.warning("%s: this file system has no links; the best player is in %s", self.best_link, name)
            return
        temporary.replace(self.best_link)

    def remove_checkpoints(self, stage: str, t: int) -> None:
        """Delete the checkpoints of a complete training."""
        if self.checkpoints(t).exists():
            shutil.rmtree(self.checkpoints(t))
        self.begun_file(stage, t).unlink(missing_ok=True)

    def clear(self) -> None:
        """Delete everything but the lock, which the caller holds. An interrupted deletion can be repeated."""
        recipe_digest = self.digest_file(self.recipe)
        for entry in self.state_folder.iterdir():  # markers first, so that no marker outlives the files of its stage
            if entry not in (self.lock, recipe_digest.parent):
                _delete(entry)
        for entry in self.root.iterdir():
            if entry != self.state_folder:
                _delete(entry)
        recipe_digest.unlink(missing_ok=True)  # last: without this file, spinlm would refuse the folder as not its own
        if recipe_digest.parent.exists():
            shutil.rmtree(recipe_digest.parent)


def _delete(path: Path) -> None:
    shutil.rmtree(path) if path.is_dir() and not path.is_symlink() else path.unlink()
