"""Warm-up: make the starting player θ_0, by supervised fine-tuning where the recipe asks for it."""

import logging

from spinlm.distributed import processes
from spinlm.evals.heldout_nll import Curve
from spinlm.model.players import seat
from spinlm.model.prefix_trees import PrefixTree
from spinlm.recipe.fingerprint import recipe_fingerprint
from spinlm.recipe.schema import Recipe
from spinlm.rundir.layout import RunDir
from spinlm.rundir.records import Example, read_lines
from spinlm.rundir.stage_graph import START
from spinlm.training.batches import SftItems, sft_objective
from spinlm.training.step_log import step_recorder
from spinlm.training.trainer import Fit, fit
from spinlm.utils.seeds import derive_seed

log = logging.getLogger("spinlm")


def warmup(recipe: Recipe, run: RunDir) -> None:
    """Make and save θ_0: the model as it came, with a fresh adapter under LoRA, after `sft` if there is one."""
    if processes.on_rank_zero(run.done, "sft", START):
        processes.on_rank_zero(run.remove_checkpoints, "sft", START)
        return
    processes.on_rank_zero(run.begin, "sft", START, recipe_fingerprint(recipe, START))
    players = seat(recipe, run)
    heldout = list(read_lines(run.examples("heldout"), Example))
    prefix_sharing = players.measure_prefix_sharing(_probe(heldout, recipe.train.max_length))
    sft = recipe.sft
    curve = Curve(recipe, run, players, START, prefix_sharing)
    if sft is not None:
        split = "train" if sft.prompts is None else "sft"

        def measure(epoch: int) -> bool:
            known = str(epoch) in curve.values
            nll = curve.measure(epoch)
            if not known:  # or told by the run that goes on here
                log.info("warm-up: held-out NLL %.4f %s", nll, f"after epoch {epoch}" if epoch else "before it")
            return True

        measure(0)
        how = Fit.of(
            recipe.train,
            epochs=sft.epochs,
            batch_size=sft.batch_size,
            learning_rate=sft.learning_rate,
            optimizer=sft.optimizer,
            seed=derive_seed(recipe.seed, "warmup"),
        )
        fit(
            players,
            SftItems(run.examples(split)),
            sft_objective,
            how,
            prefix_sharing=prefix_sharing,
            checkpoints=run.checkpoints(START),
            what="warm-up SFT",
            on_step=step_recorder(players, run, recipe, "sft", START),
            on_epoch=measure,
        )
    players.save(START)
    facts = {"heldout_nll_by_epoch": curve.values, "prefix_sharing": prefix_sharing}
    processes.on_rank_zero(run.complete, "sft", START, [run.player(START)], **facts)
    processes.on_rank_zero(run.remove_checkpoints, "sft", START)


def _probe(examples: list[Example], max_length: int) -> list[PrefixTree]:
    """Trees to measure prefix sharing on: the longest prompt and two more, each with its own and another's response."""
    longest = sorted(examples, key=lambda example: -len(example.prompt_ids))[:1]
    chosen = longest + [example for example in examples[:2] if example not in longest]
    return [
        PrefixTree(
            example.prompt_ids,
            (example.response_ids, examples[-1 - index].response_ids[: max_length - len(example.prompt_ids)]),
        )
        for index, example in enumerate(chosen)
    ]
